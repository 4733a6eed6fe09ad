"""What a study says: `report.md` and its figures, from the tables that `study.py collect` wrote.

Every interval is a 95 % interval, and where methods are compared it is one of their difference. On a task: Student's
of differences seed by seed, since runs of the same seed begin alike and their scores go together; p-values after Holm
(1979) over all of a study's. Over tasks: stratified bootstrap over seeds, tasks held fixed (Agarwal et al., 2021), of
normalised scores (score − random) / (reference − random).
"""

import re
from collections import Counter
from itertools import chain, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from rliable import library, metrics
from scipy import stats
from study_file import KEY, Study, StudyError

REPS = 2000  # bootstrap resamples
MARGIN = 0.15  # a tie's interval lies within ± this, in units of the reference's clean score above random
CASE = KEY[:3]  # method, environment, condition


def contrast(*terms: tuple[float, pd.Series]) -> tuple[float, float, float, float]:
    """Σ cᵢ·xᵢ seed by seed: its mean over the seeds that all terms have, Student's 95 % interval and two-sided p-value.
    NaN, which is to say none, where there is no variance to go by: a single seed, or all seeds equally far from 0."""
    x = sum(c * scores for c, scores in terms).dropna()
    value, error = x.mean(), x.std() / max(len(x), 1) ** 0.5
    if not error > 0:
        return (0.0, 0.0, 0.0, 1.0) if len(x) > 1 and value == 0 else (value, np.nan, np.nan, np.nan)
    half = stats.t.ppf(0.975, len(x) - 1) * error
    return value, value - half, value + half, 2 * stats.t.sf(abs(value) / error, len(x) - 1)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values: rejecting those below 0.05 errs once or more in 5 % of studies without differences."""
    order, adjusted = np.argsort(p), np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]))
    return adjusted


def bootstrap(function, *scores: np.ndarray) -> tuple[float, float, float]:
    """`function` of scores (seeds, tasks), one array or more, with its stratified bootstrap percentile interval."""
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever `random_state` says
    value, interval = library.get_interval_estimates({"": list(scores)}, lambda *x: np.array([function(*x)]), reps=REPS)
    return value[""][0], *interval[""][:, 0]


def iqm_contrast(*signs: int):
    """Σ signᵢ·IQM(scoresᵢ), for `bootstrap`."""
    return lambda *scores: sum(sign * metrics.aggregate_iqm(x) for sign, x in zip(signs, scores))


def spread(scores: pd.DataFrame) -> pd.Series:
    """Standard deviation over settings (columns), by seed. What runs differ by at random is in it, for all methods."""
    return scores.std(axis=1)


def rank_correlation(runs: pd.DataFrame, share: str) -> tuple[float, float, float]:
    """Spearman's ρ between a share and the score, with its interval: percentile bootstrap over seeds, whose runs by
    different methods are not independent. Ranks are those among all runs."""
    if runs.seed.nunique() < 5 or min(runs[share].nunique(), runs.score.nunique()) < 2:
        return np.nan, np.nan, np.nan
    ranks, seeds = runs[[share, "score"]].rank().to_numpy(), pd.factorize(runs.seed)[0]
    n = seeds.max() + 1
    drawn = np.vstack([np.ones(n), np.random.default_rng(0).multinomial(n, np.ones(n) / n, REPS)])[:, seeds]
    x, y = (z - (drawn @ z / drawn.sum(1))[:, None] for z in ranks.T)  # first all runs as they are, then the resamples
    rho = (drawn * x * y).sum(1) / ((drawn * x**2).sum(1) * (drawn * y**2).sum(1)) ** 0.5
    return rho[0], *np.nanpercentile(rho[1:], (2.5, 97.5))


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def interval(estimate: tuple[float, ...], show=number, plus: str = "") -> str:
    value, low, high, *_ = estimate
    value_shown = (plus if value > 0 and show(value).strip("0.") else "") + show(value)
    bounds = "no interval" if np.isnan(low) else f"{show(low)} to {show(high)}"
    return "–" if np.isnan(value) else f"{value_shown} ({bounds})"


def verdict(estimate: tuple[float, ...], a: str, b: str, word: str, margin: float = np.inf) -> str:
    """Which of two methods is higher, say, where a positive estimate speaks for a; else a tie if the interval shows the
    difference to be within ±margin, and undecided if it does not."""
    _, low, high, *_ = estimate
    if low > 0 or high < 0:
        return f"{a if low > 0 else b} {word}"
    return "no verdict" if np.isnan(low) else "tie" if -margin <= low and high <= margin else "undecided"


def difference(estimate: tuple[float, ...], *verdict_of, show=number) -> list[str]:
    return [interval(estimate, show, "+"), verdict(estimate, *verdict_of)]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Results:
    """The tables of a study. `cases[method, environment, condition]` are its finished runs, by seed."""

    def __init__(self, study: Study, folder: Path):
        self.study, self.folder = study, folder
        kinds = dict(dtype=dict.fromkeys(CASE, str), keep_default_na=False, na_values="nan")
        try:
            runs, evaluations, random = (pd.read_csv(folder / f"{name}.csv", float_precision="round_trip", **kinds)
                                         for name in ("runs", "evaluations", "random"))
        except FileNotFoundError as error:
            raise StudyError(f"there is no {error.filename}; `study.py collect` makes it") from None
        self.runs = runs[runs.pilot == 0]
        self.evaluations = evaluations.merge(self.runs[KEY])  # of runs that are finished
        if self.runs.empty:
            raise StudyError(f"no run of {study.name} is finished")
        self.random = random.set_index("environment")["mean"]
        cells = {cell.key: cell for cell in study.cells if not cell.pilot}
        for *key, command in self.runs[[*KEY, "command"]].astype(str).to_numpy():
            cell = cells.pop(tuple(key), None)
            if cell is None or f" --total-timesteps {cell.steps} " not in command + " ":
                raise StudyError(f"{folder / 'runs.csv'} holds a run that is not of this study: {command}")
        self.missing = list(cells.values())
        self.cases = {case: rows.set_index("seed").sort_index() for case, rows in self.runs.groupby(CASE)}
        self.reference = pd.Series({env_id: scores.mean() for env_id in study.environments
                                    if len(scores := self.of(study.reference, env_id, study.clean))})
        # Tasks are those where the reference has learned more than nothing: else there is no scale.
        self.tasks = [env_id for env_id, score in self.reference.items() if score > self.random[env_id]]
        self.pairs = [(a, b) for a, b in study.comparisons if a in study.methods and b in study.methods]
        self.differences = differences(self)

    def of(self, *case: str) -> pd.Series:
        """Scores of the finished runs by seed."""
        return self.cases[case].score if case in self.cases else pd.Series(dtype=float)

    def normalized(self, method: str, condition: str) -> np.ndarray | None:
        """(seeds, tasks) of the seeds that are finished on every task; None if these are fewer than two."""
        cases = [(method, env_id, condition) for env_id in self.tasks]
        if not cases or any(case not in self.cases for case in cases):
            return None
        scores = pd.concat([self.cases[case].score for case in cases], axis=1, join="inner").to_numpy(float)
        random, reference = (of[self.tasks].to_numpy() for of in (self.random, self.reference))
        return (scores - random) / (reference - random) if len(scores) > 1 else None


def report(study: Study, folder: Path, command: str) -> None:
    """Writes `report.md` and its figures into `folder`, beside the tables."""
    results = Results(study, folder)
    sections = (figures, raw_scores, raw_differences, aggregates, spreads, weights, sign_flips)
    parts = head(results, command) + [part for section in sections for part in section(results)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    print(folder / "report.md")


def head(results: Results, command: str) -> list[str]:
    study, seeds = results.study, sorted({len(runs) for runs in results.cases.values()})
    n_missing, n_runs = len(results.missing), len(results.runs)
    which = dict(last="the evaluation after its last update", mean="all its evaluations")[study.score]
    kinds = dict(method=study.methods, environment=study.environments, condition=study.conditions)
    counts = ", ".join(f"{len(names)} {kind}{'s' * (len(names) > 1)}" for kind, names in kinds.items())
    power = [f"How many seeds: {study.power}"] * bool(study.power)
    parts = [
        f"# {study.name}", study.question, f"How β was fixed: {study.beta}", *power,
        f"It stands on {n_runs} runs: {counts} ({', '.join(study.conditions)}), "
        f"{' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seed{'s' * (seeds != [1])} each, "
        f"{' or '.join(f'{n:,}' for n in sorted(set(results.runs.steps)))} environment steps. A run's score is the "
        f"mean raw return of {which}. Intervals are 95 % intervals. A difference whose interval contains zero is a tie "
        f"where the interval lies within ±{MARGIN:.0%} of what {study.reference} reaches above the uniform policy "
        f"without noise, else undecided.", *[verdicts(results.differences)] * bool(len(results.differences)),
    ]
    if n_missing == 0:
        return [*parts, f"All of its runs are finished. `{command}` repeats them."]
    shown = ", ".join(f"`{cell.name}`" for cell in results.missing[:12]) + ", …" * (n_missing > 12)
    return [*parts, f"**{n_missing} of {n_missing + n_runs} runs are missing** ({shown}). `{command}` completes them."]


def raw_scores(results: Results) -> list[str]:
    study, parts = results.study, ["## Scores", "Mean raw score over seeds with its t interval."]
    shown = {case: f"{interval(contrast((1, rows.score)))}, n = {len(rows)}" for case, rows in results.cases.items()}
    for condition in study.conditions:
        random = ["uniform policy, 100 episodes", *map(number, results.random[study.environments])]
        rows = [random] * (condition == study.clean)
        rows += [[method, *(shown.get((method, env_id, condition), "–") for env_id in study.environments)]
                 for method in study.methods]
        parts.append(f"**{condition}**\n\n" + table(["method", *study.environments], rows))
    parts.append(f"Normalised scores count the uniform policy as 0 and the mean of {study.reference}, {study.clean}, "
                 f"as 1.")
    if lost := [env_id for env_id in results.reference.index if env_id not in results.tasks]:
        parts.append(f"**Not in the aggregates**: {', '.join(lost)}, where {study.reference} does not beat the uniform "
                     f"policy.")
    return parts


def differences(results: Results) -> pd.DataFrame:
    """Every comparison by environment and condition: of scores, and of how much less the first method loses by noise.
    More robust is what loses less, and not what scores higher with noise. Estimates are raw; `unit` is their scale."""
    study, rows = results.study, []
    for (a, b), env_id, condition in product(results.pairs, study.environments, study.conditions):
        x, y, *clean = (results.of(m, env_id, at) for at in (condition, study.clean) for m in (a, b))
        unit = results.reference[env_id] - results.random[env_id] if env_id in results.tasks else np.nan
        row = [a, b, env_id, condition, len(x.index.intersection(y.index)), unit]
        if len(x) and len(y):
            rows.append([*row, "score", contrast((1, x), (-1, y))])
        if condition != study.clean and all(map(len, (x, y, *clean))):
            rows.append([*row, "loss", contrast((1, x), (-1, clean[0]), (1, clean[1]), (-1, y))])
    found = pd.DataFrame(rows, columns="a b environment condition seeds unit of estimate".split())
    p = found.estimate.map(lambda estimate: estimate[3]).astype(float)
    found["p"] = pd.Series(holm(p.dropna().to_numpy()), p.dropna().index)
    words = dict(score="higher", loss="loses less")
    found["verdict"] = [verdict(x.estimate, x.a, x.b, words[x.of], MARGIN * x.unit) for x in found.itertuples()]
    return found


def verdicts(found: pd.DataFrame, named: bool = True) -> str:
    """What is left of a study's differences when all of them are taken together, with the names of those or without."""
    counts, of = Counter(found.verdict[found.p.notna()]), Counter(found.of[found.p.notna()])
    n, ties, undecided = counts.total(), counts["tie"], counts["undecided"]
    left = found[found.p < 0.05]
    names = [f"{word} ({a} − {b}, {env_id}, {', '.join(rows.condition)})" for (word, a, b, env_id), rows in
             left.groupby(["verdict", "a", "b", "environment"], sort=False)]  # fmt: skip
    return (f"**{n} intervals of differences** on single tasks, {of['score']} of scores and {of['loss']} of what noise "
            f"costs: {ties} ties, {undecided} undecided; {n - ties - undecided} exclude zero, where chance alone "
            f"makes {0.05 * n:.1f} do so. Holm's correction over all of them leaves {len(left)}"
            f"{': ' + '; '.join(names) if named and names else ''}.")


def raw_differences(results: Results) -> list[str]:
    parts, header = [], ["difference", "environment", "condition", "seeds", "raw", "±", "p", "verdict"]
    for of, title, text in (
        ("score", "## Differences", f"Raw scores, seed by seed; half the interval's width in percent of what "
         f"{results.study.reference} reaches above the uniform policy without noise; the p-value after Holm."),
        ("loss", "## Lost by noise", "How much less the first method loses than the second; positive is more robust, "
         "whatever the scores."),
    ):
        rows = [[f"{x.a} − {x.b}", x.environment, x.condition, str(x.seeds), interval(x.estimate, plus="+"),
                 f"{50 * (x.estimate[2] - x.estimate[1]) / x.unit:.0f} %", f"{x.p:.2g}", x.verdict]
                for x in results.differences[results.differences.of == of].itertuples()]
        parts += [title, text, table(header, rows).replace("| nan % |", "| – |")] if rows else []
    return parts


def aggregates(results: Results) -> list[str]:
    """Over the tasks, if there are several."""
    study, two, rows, pairs = results.study, "{:.2f}".format, [], []
    if len(results.tasks) < 2:
        return []
    text = (f"Normalised scores on {', '.join(results.tasks)}, of the seeds that are finished on all of them: "
            f"interquartile mean (IQM) and its difference. Stratified bootstrap over seeds ({REPS:,} resamples), "
            f"percentile intervals; tasks, uniform policy and reference are held fixed.")
    for condition, method in product(study.conditions, study.methods):
        if (x := results.normalized(method, condition)) is not None:
            rows.append([condition, method, str(len(x)), interval(bootstrap(iqm_contrast(1), x), two)])
    for (a, b), condition in product(results.pairs, study.conditions):
        x, y, *clean = (results.normalized(method, at) for at in (condition, study.clean) for method in (a, b))
        if x is not None and y is not None:
            gap = difference(bootstrap(iqm_contrast(1, -1), x, y), a, b, "higher", MARGIN, show=two)
            pairs.append([f"{a} − {b}", condition, f"{len(x)}, {len(y)}", "score", *gap])
        if condition != study.clean and all(scores is not None for scores in (x, y, *clean)):
            gap = bootstrap(iqm_contrast(1, -1, 1, -1), x, clean[0], clean[1], y)
            pairs.append([*pairs[-1][:3], "less lost by noise", *difference(gap, a, b, "loses less", MARGIN, show=two)])
    header = ["difference", "condition", "seeds", "of", "IQM", "verdict"]
    parts = ["## Aggregates", text, table(["condition", "method", "seeds", "IQM"], rows)]
    return parts + [table(header, pairs)] * bool(pairs)


def settings(results: Results) -> dict[tuple[str, str, str], pd.DataFrame]:
    """Scores (seeds, settings) of the methods that a grid was expanded from, by method, environment and condition."""
    study, found = results.study, {}
    for family, *case in product(study.families, study.environments, study.conditions):
        table = pd.DataFrame({member: results.of(member, *case) for member in study.families[family]}).dropna()
        if len(table):
            found[family, *case] = table
    return found


def spread_gaps(results: Results) -> list[tuple]:
    """(a, b, environment, condition, spread of a − spread of b)."""
    study, of = results.study, settings(results)
    cases = product(study.comparisons, study.environments, study.conditions)
    return [(a, b, *case, contrast((1, spread(of[a, *case])), (-1, spread(of[b, *case]))))
            for (a, b), *case in cases if (a, *case) in of and (b, *case) in of]


def spreads(results: Results) -> list[str]:
    """How much the setting matters."""
    rows = []
    for case, x in settings(results).items():
        p = stats.friedmanchisquare(*x.to_numpy().T).pvalue if x.shape[1] > 2 and len(x) > 1 else np.nan
        shown = map(number, (x.to_numpy().mean(), x.mean().min(), x.mean().max(), spread(x).mean()))
        rows.append([*case, f"{x.shape[1]} × {len(x)}", *shown, f"{p:.2g}".replace("nan", "–")])
    gaps = []
    for a, b, env_id, condition, gap in spread_gaps(results):
        margin = MARGIN * spread(settings(results)[b, env_id, condition]).mean()
        gaps.append([f"{a} − {b}", env_id, condition, *difference(gap, a, b, "higher", margin)])
    text = ("Over the settings of a grid. Mean, lowest and highest are of means over seeds; spread is the standard "
            "deviation of a seed's scores over the settings, which has in it what runs differ by at random; p is "
            "Friedman's, of no setting being better than another (not corrected). "
            "Differences of spreads are in raw score; a tie is within 15 % of the second one's.")
    header = ["method", "environment", "condition", "settings × seeds", "mean", "lowest", "highest", "spread", "p"]
    parts = ["## Spread over settings", text, table(header, rows)] if rows else []
    return parts + [table(["difference", "environment", "condition", "of spreads", "verdict"], gaps)] * bool(gaps)


def weights(results: Results) -> list[str]:
    """Whether the controls do what they are for."""
    study, shown = results.study, {case: f"{rows.mean_weight.mean():.3g}" for case, rows in results.cases.items()}
    grids = [*chain(*study.families.values())]
    rows = [[method, *(", ".join(shown.get((method, env_id, condition), "–") for condition in study.conditions)
                       for env_id in study.environments)] for method in study.methods if method not in grids]
    text = (f"The mean factor on the plain policy gradient that the runs logged, by condition "
            f"({', '.join(study.conditions)}). A control has the one of the method that it is for, if pilot runs on "
            f"other seeds were enough to know it.")
    return ["## Mean weights", text, table(["method", *study.environments], rows)] if rows else []


def sign_flips(results: Results) -> list[str]:
    study, rows, correlations = results.study, [], []
    shares = dict(flips_noise="by noise", flips_normalization="by normalisation")
    for env_id, condition in product(study.environments, [*study.conditions, "all with flips by noise"]):
        runs = results.runs[results.runs.environment == env_id]
        runs = runs[runs.condition == condition] if condition in study.conditions else runs[runs.flips_noise > 0]
        shown = [env_id, condition, str(len(runs))]
        if condition in study.conditions and len(runs):
            rows.append([*shown, *(f"{runs[name].mean():.3f}" for name in shares)])
        estimates = (rank_correlation(runs, name) for name in shares)
        correlations.append([*shown, *(interval(estimate, "{:.2f}".format, "+") for estimate in estimates)])
    text = ("Share of samples whose advantage changes sign by reward noise and by minibatch normalisation, mean over "
            "all updates and runs; then Spearman's ρ between a run's share and its score, methods and seeds together "
            "(bootstrap over seeds). It says little about causes: the score moves the shares as well, and across "
            "conditions the noise moves both.")
    header, names = ["environment", "condition", "runs"], shares.values()
    return ["## Sign flips", text, table([*header, *names], rows),
            table([*header, *(f"ρ, {name}" for name in names)], correlations)]


def figures(results: Results) -> list[str]:
    """Draws what there is to draw; returns the section that shows it."""
    sns.set_theme(context="paper", style="ticks")
    study, parts, one = results.study, ["## Figures"], len(results.study.environments) == 1  # task: scores are alike
    size = dict(height=2, aspect=1.2, facet_kws=dict(sharey="row" if one else False))

    def show(name: str, figure, text: str) -> None:
        figure.savefig(results.folder / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)
        parts.extend([f"![{text}]({name}.png)", f"*{text}.*"])

    def grid(rows: pd.DataFrame, **options):
        titles = "{row_name}\n{col_name}" if "row" in options else None, None, "{col_name}"
        return sns.relplot(rows, **options, **size).set_titles(*titles, size=7).figure

    if results.differences.p.notna().any():
        show("differences", forest(results), f"Differences with their intervals, in units of what {study.reference} "
             f"reaches above the uniform policy without noise; grey: ±{MARGIN:.0%}; filled: p < 0.05 after Holm")
    if study.families and results.tasks:
        show("heat_maps", heat_maps(results), "Mean scores over seeds, in the same units, a field for each setting")
    points = results.evaluations
    curves = [points[points.method == method].assign(pair=f"{a} (blue),\n{b} (orange)", hue=method == b)
              for a, b in results.pairs for method in (a, b)]
    if curves and len(curves := pd.concat(curves)):
        curves["panel"] = curves.environment + ", " + curves.condition
        show("learning_curves", grid(curves, kind="line", x="step", y="score", hue="hue", row="pair", col="panel",
             legend=False, errorbar=lambda x: contrast((1, x))[1:3]), "Mean raw return of the evaluations of both "
             "methods with its t interval at every point")
    if len(study.conditions) > 1:
        show("sign_flips", grid(results.runs, x="flips_noise", y="score", hue="condition", col="environment"),
             "A run's share of sign flips by noise against its score")
    return parts


def forest(results: Results):
    """Differences of scores, and of what noise costs: a row of panels for each environment."""
    lines = [(*pair, at) for pair in results.pairs for at in results.study.conditions]
    rows, found = list(results.tasks), results.differences
    kinds = dict(score="score", loss="less lost by noise or flips")
    panels = [of for of in kinds if of in set(found.of)]
    figure, axes = plt.subplots(len(rows), len(panels), sharey=True, squeeze=False, layout="constrained",
                                figsize=(1 + 3 * len(panels), len(rows) * (0.7 + 0.15 * len(lines))))
    for (row, env_id), (column, of) in product(enumerate(rows), enumerate(panels)):
        ax = axes[row, column]
        ax.axvspan(-MARGIN, MARGIN, color="0.92")
        ax.axvline(0, color="0.5", linewidth=0.8)
        ax.set_title(f"{env_id}\n{kinds[of]}", size=8)
        for x in found[(found.of == of) & (found.environment == env_id)].itertuples():
            (value, low, high), y = np.array(x.estimate[:3]) / x.unit, lines.index((x.a, x.b, x.condition))
            color = f"C{results.pairs.index((x.a, x.b))}"
            ax.plot([low, high], [y, y], color=color)
            ax.plot(value, y, "o", color=color, markersize=4, markerfacecolor=color if x.p < 0.05 else "white")
        ax.set_yticks(range(len(lines)), [f"{a} − {b}, {at}" for a, b, at in lines], size=6)
        ax.set_ylim(len(lines) - 0.5, -0.5)
    unit = f"in units of what {results.study.reference} reaches above the uniform policy without noise"
    figure.supxlabel(unit, size=8)
    return figure


def heat_maps(results: Results):
    """Mean scores over the settings of a grid's methods, as their names say them: a row of maps for each of these."""
    families, cases = results.study.families, [*product(results.tasks, results.study.conditions)]
    figure, axes = plt.subplots(len(families), len(cases), squeeze=False, layout="constrained",
                                figsize=(3.5 * len(cases), 1.6 * len(families)))
    for (row, family), (column, (env_id, condition)) in product(enumerate(families), enumerate(cases)):
        rows, random = [], results.random[env_id]
        for member in families[family]:
            scores = results.of(member, env_id, condition)
            share = (scores.mean() - random) / (results.reference[env_id] - random) if len(scores) else np.nan
            rows.append({name: float(x) for name, x in re.findall(r" (\w+)=(\S+)", member)} | {" ": "", "share": share})
        down, across = [" ", *[*rows[0]][:-2]][-2:]  # of a single axis: one line of fields
        ax = sns.heatmap(pd.DataFrame(rows).pivot(index=down, columns=across, values="share"), ax=axes[row, column],
                         vmin=0, vmax=1.1, annot=True, fmt=".2f", annot_kws=dict(size=6), cbar=False)
        ax.set_title(f"{family}\n{env_id}, {condition}", size=8)
    return figure
