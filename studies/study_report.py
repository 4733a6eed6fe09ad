"""What a study says: `report.md` and its figures, from the tables that `study.py collect` wrote.

Every interval is a 95 % interval, and where methods are compared it is one of their difference. Raw scores of a task:
Welch's t interval. Aggregates over tasks: stratified bootstrap over seeds, tasks held fixed (Agarwal et al., 2021), of
normalised scores (score − random) / (reference − random).
"""

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
TAUS = np.linspace(0, 1.5, 61)  # of the performance profiles
CASE = KEY[:3]  # method, environment, condition


def contrast(*terms: tuple[float, np.ndarray]) -> tuple[float, float, float]:
    """Σ cᵢ·mean(xᵢ) of independent samples with its 95 % interval (Welch and Satterthwaite). NaN, which is to say none,
    where there is no variance to go by: a single seed, or seeds that agree while their means do not."""
    value = sum(c * np.mean(x) for c, x in terms)
    parts = [c**2 * np.var(x, ddof=1) / len(x) for c, x in terms if len(x) > 1]
    if len(parts) < len(terms) or sum(parts) == 0:
        return (0.0, 0.0, 0.0) if len(parts) == len(terms) and value == 0 else (value, np.nan, np.nan)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, (_, x) in zip(parts, terms))
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    return value, value - half, value + half


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(x > y), ties a half, mean over tasks, of (…, seeds, tasks): rliable's, without the p-value that takes time."""
    x, y = x[..., :, None, :], y[..., None, :, :]
    return ((x > y) + 0.5 * (x == y)).mean((-3, -2, -1))


def bootstrap(function, *scores: np.ndarray) -> tuple[float, float, float]:
    """`function` of scores (seeds, tasks), one array or more, with its stratified bootstrap percentile interval."""
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever `random_state` says
    value, interval = library.get_interval_estimates({"": list(scores)}, lambda *x: np.array([function(*x)]), reps=REPS)
    return value[""][0], *interval[""][:, 0]


def iqm_contrast(*signs: int):
    """Σ signᵢ·IQM(scoresᵢ), for `bootstrap`."""
    return lambda *scores: sum(sign * metrics.aggregate_iqm(x) for sign, x in zip(signs, scores))


def spread(scores: np.ndarray) -> float:
    """Standard deviation over settings of the mean score, without what the seeds add; scores: (seeds, settings)."""
    between = np.var(scores.mean(0), ddof=1) - np.var(scores, axis=0, ddof=1).mean() / len(scores)
    return float(max(between, 0) ** 0.5)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's ρ with its 95 % interval (Fisher's z with the standard error of Bonett and Wright, 2000)."""
    if len(x) < 5 or len(set(x)) < 2 or len(set(y)) < 2:
        return np.nan, np.nan, np.nan
    rho = stats.spearmanr(x, y).statistic
    half = stats.norm.ppf(0.975) * ((1 + rho**2 / 2) / (len(x) - 3)) ** 0.5
    z = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    return rho, np.tanh(z - half), np.tanh(z + half)


def coverage(seeds: int, tasks: int, trials: int) -> pd.DataFrame:
    """How often the intervals contain the truth on synthetic scores of two methods that do not differ. The bootstrap
    here is the one of `bootstrap`, written for whole arrays, with fewer resamples."""
    names = ["raw difference, one task", "difference of IQMs", "probability of improvement"]
    hits = pd.DataFrame(0, names, ["normal", "some runs fail"])
    for shape in hits:
        rng = np.random.default_rng(0)
        for _ in range(trials):
            x, y = rng.normal(0.8, 0.2, (2, seeds, tasks)) * rng.uniform(0.5, 1.5, tasks)  # tasks of different scales
            if shape == "some runs fail":
                x, y = (np.where(rng.random(z.shape) < 0.3, rng.normal(0.1, 0.05, z.shape), z) for z in (x, y))
            _, *raw = contrast((1, x[:, 0]), (-1, y[:, 0]))
            x, y = (z[rng.integers(seeds, size=(500, seeds, tasks)), np.arange(tasks)] for z in (x, y))
            iqms = [stats.trim_mean(z.reshape(500, -1), 0.25, axis=1) for z in (x, y)]
            bounds = np.percentile([iqms[0] - iqms[1], improvement(x, y) - 0.5], (2.5, 97.5), axis=1).T
            hits[shape] += [low <= 0 <= high for low, high in (raw, *bounds)]
    return hits / trials


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def interval(estimate: tuple[float, float, float], show=number, plus: str = "") -> str:
    value, low, high = estimate
    value_shown = (plus if value > 0 else "") + show(value)
    bounds = "no interval" if np.isnan(low) else f"{show(low)} to {show(high)}"
    return "–" if np.isnan(value) else f"{value_shown} ({bounds})"


def verdict(estimate: tuple[float, float, float], a: str, b: str, word: str, zero: float = 0) -> str:
    """Which of two methods is higher, say, or a tie, where a positive estimate speaks for a."""
    _, low, high = estimate
    return "no verdict" if np.isnan(low) else "tie" if low <= zero <= high else f"{a if low > zero else b} {word}"


def difference(estimate: tuple[float, float, float], *verdict_of, show=number) -> list[str]:
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
        self.runs, self.evaluations = (rows[rows.pilot == 0] for rows in (runs, evaluations))
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
        self.drawn = [method for method in study.methods if method not in chain(*study.families.values())]

    def of(self, *case: str) -> np.ndarray:
        """Final scores (seeds,) of the finished runs."""
        return self.cases[case].score.to_numpy(float) if case in self.cases else np.zeros(0)

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
    sections = (raw_scores, raw_differences, aggregates, measured_coverage, spreads, weights, sign_flips, figures)
    parts = head(results, command) + [part for section in sections for part in section(results)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    print(folder / "report.md")


def head(results: Results, command: str) -> list[str]:
    study, seeds = results.study, sorted({len(runs) for runs in results.cases.values()})
    n_missing, n_runs = len(results.missing), len(results.runs)
    which = dict(last="the evaluation after its last update", mean="all its evaluations")[study.score]
    kinds = dict(method=study.methods, environment=study.environments, condition=study.conditions)
    counts = ", ".join(f"{len(names)} {kind}{'s' * (len(names) > 1)}" for kind, names in kinds.items())
    parts = [
        f"# {study.name}", study.question, f"How β was fixed: {study.beta}",
        f"It stands on {n_runs} runs: {counts} ({', '.join(study.conditions)}), "
        f"{' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds each, "
        f"{' or '.join(f'{n:,}' for n in sorted(set(results.runs.steps)))} environment steps. A run's score is the "
        f"mean raw return of {which}. Intervals are 95 % intervals; those of a difference "
        f"that contain zero are called ties. Of many intervals about one in twenty excludes zero by chance.",
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


def raw_differences(results: Results) -> list[str]:
    """Of scores, and of what noise costs: more robust is what loses less, and not what scores higher with noise."""
    study, rows, counts, noise_rows = results.study, [], [], []
    for a, b in results.pairs:
        verdicts = Counter()
        for env_id, condition in product(study.environments, study.conditions):
            x, y, *clean = (results.of(m, env_id, at) for at in (condition, study.clean) for m in (a, b))
            if len(x) and len(y):
                shown = difference(contrast((1, x), (-1, y)), a, b, "higher")
                verdicts[shown[1]] += 1
                rows.append([f"{a} − {b}", env_id, condition, f"{len(x)}, {len(y)}", *shown])
            if condition != study.clean and all(map(len, (x, y, *clean))):
                losses = [contrast((1, before), (-1, after)) for before, after in zip(clean, (x, y))]
                gap = contrast((1, clean[0]), (-1, x), (-1, clean[1]), (1, y))
                noise_rows.append([f"{a}, {b}", env_id, condition, *map(interval, losses),
                                   *difference(gap, b, a, "loses less")])
        counts.append(f"- {a} − {b}: " + (", ".join(f"{n} × {v}" for v, n in verdicts.items()) or "no runs yet"))
    header = ["difference", "environment", "condition", "seeds", "raw score (Welch t interval)", "verdict"]
    parts = ["## Differences, task by task", "\n".join(counts), table(header, rows)] if counts else []
    if noise_rows:
        header = ["methods", *header[1:3], "loss of the first", "loss of the second", "difference", "verdict"]
        parts += ["## Lost by noise",
                  f"Score without noise ({study.clean}) minus score with it, for both methods, and the difference of "
                  f"these losses. The second method is the more robust one where it is positive, whatever the scores "
                  f"(Welch t intervals).", table(header, noise_rows)]
    return parts


def aggregates(results: Results) -> list[str]:
    study, two = results.study, "{:.2f}".format
    if not results.tasks:
        return ["## Aggregates", f"None: they need finished runs of {study.reference} without noise."]
    text = (f"Normalised scores on {', '.join(results.tasks)}, of the seeds that are finished on all of them: "
            f"interquartile mean (IQM), its difference, and the probability that a run of the first method beats one "
            f"of the second (1/2 is a tie). Stratified bootstrap over seeds ({REPS:,} resamples), percentile "
            f"intervals; tasks, uniform policy and reference are held fixed. Where all runs of one beat all runs of "
            f"the other the interval of the probability has no width: resampling cannot know better.")
    rows, pair_rows, noise_rows = [], [], []
    for condition, method in product(study.conditions, study.methods):
        if (x := results.normalized(method, condition)) is not None:
            rows.append([condition, method, str(len(x)), interval(bootstrap(iqm_contrast(1), x), two)])
    for (a, b), condition in product(results.pairs, study.conditions):
        x, y, *clean = (results.normalized(method, at) for at in (condition, study.clean) for method in (a, b))
        if x is not None and y is not None:
            gap, wins = bootstrap(iqm_contrast(1, -1), x, y), bootstrap(improvement, x, y)
            judged = *difference(gap, a, b, "higher", show=two), interval(wins, two), verdict(wins, a, b, "higher", 0.5)
            pair_rows.append([f"{a} − {b}", condition, f"{len(x)}, {len(y)}", *judged])
        if condition != study.clean and all(scores is not None for scores in (x, y, *clean)):
            loss = bootstrap(iqm_contrast(1, -1, -1, 1), clean[0], x, clean[1], y)
            noise_rows.append([f"{a}, {b}", condition, *difference(loss, b, a, "loses less", show=two)])
    parts = ["## Aggregates", text, table(["condition", "method", "seeds", "IQM"], rows)]
    if pair_rows:
        header = ["difference", "condition", "seeds", "of IQMs", "verdict", "probability of improvement", "verdict"]
        parts.append(table(header, pair_rows))
    if noise_rows:
        parts += ["What noise costs the first method minus what it costs the second, in IQM:",
                  table(["methods", "condition", "difference of the losses", "verdict"], noise_rows)]
    return parts


def measured_coverage(results: Results) -> list[str]:
    scores = (results.normalized(*case) for case in product(results.study.methods, results.study.conditions))
    if not (sizes := [x.shape for x in scores if x is not None]):
        return []
    seeds, tasks = min(sizes)
    trials = 1000 if seeds * tasks <= 100 else 300
    shares = coverage(seeds, tasks, trials)
    half = 1.96 * (shares * (1 - shares) / trials) ** 0.5
    rows = [[name, *map("{:.3f} ± {:.3f}".format, shares.loc[name], half.loc[name])] for name in shares.index]
    text = (f"How often these intervals contain zero (a half) when two methods do not differ, on {trials:,} synthetic "
            f"studies with this one's {seeds} seeds and {tasks} task{'s' * (tasks > 1)}. 0.95 is what they claim; what "
            f"is missing to it are false verdicts. In the second column three runs in ten end near the uniform policy.")
    return ["## Measured coverage", text, table(["interval", *shares], rows)]


def spreads(results: Results) -> list[str]:
    """How much the setting matters, for methods that a grid was expanded from."""
    study, rows, gaps, matrices = results.study, [], [], {}
    for family, *case in product(study.families, study.environments, study.conditions):
        samples = [x for member in study.families[family] if len(x := results.of(member, *case)) > 1]
        if len(samples) > 1:
            n = min(map(len, samples))
            matrix = matrices[family, *case] = np.array([x[:n] for x in samples]).T
            means = matrix.mean(0)
            rows.append([family, *case, f"{len(means)} × {n}",
                         *map(number, (means.mean(), means.min(), means.max(), spread(matrix)))])
    for (a, b), *case in product(study.comparisons, study.environments, study.conditions):
        if (a, *case) in matrices and (b, *case) in matrices:
            gap = bootstrap(lambda x, y: spread(x) - spread(y), matrices[a, *case], matrices[b, *case])
            gaps.append([f"{a} − {b}", *case, *difference(gap, a, b, "higher")])
    text = ("Over the settings of a grid, of mean scores over seeds. Spread: their standard deviation, without what "
            "the seeds' own variance adds to it. Its difference is bootstrapped over seeds, an approximation at few "
            "seeds.")
    header = ["method", "environment", "condition", "settings × seeds", "mean", "lowest", "highest", "spread"]
    parts = ["## Spread over settings", text, table(header, rows)] if rows else []
    return parts + [table(["difference", "environment", "condition", "of spreads", "verdict"], gaps)] * bool(gaps)


def weights(results: Results) -> list[str]:
    """Whether the controls do what they are for."""
    study, shown = results.study, {case: f"{rows.mean_weight.mean():.3g}" for case, rows in results.cases.items()}
    rows = [[method, *(", ".join(shown.get((method, env_id, condition), "–") for condition in study.conditions)
                       for env_id in study.environments)] for method in results.drawn]
    text = (f"The mean factor on the plain policy gradient that the runs logged, by condition "
            f"({', '.join(study.conditions)}). A control has the one of the method that it is for, if pilot runs on "
            f"other seeds were enough to know it.")
    return ["## Mean weights", text, table(["method", *study.environments], rows)] if rows else []


def sign_flips(results: Results) -> list[str]:
    study, rows, correlations = results.study, [], []
    shares = dict(flips_noise="by noise", flips_normalization="by normalisation")
    for env_id, condition in product(study.environments, [*study.conditions, "all"]):
        runs = results.runs[results.runs.environment == env_id]
        runs = runs if condition == "all" else runs[runs.condition == condition]
        shown = [env_id, condition, str(len(runs))]
        if condition != "all" and len(runs):
            rows.append([*shown, *(f"{runs[name].mean():.3f}" for name in shares)])
        estimates = (rank_correlation(runs[name], runs.score) for name in shares)
        correlations.append([*shown, *(interval(estimate, "{:.2f}".format, "+") for estimate in estimates)])
    text = ("Share of samples whose advantage changes sign by reward noise and by minibatch normalisation, mean over "
            "all updates and runs; then Spearman's ρ between a run's share and its final score, methods and seeds "
            "together, with its interval (Fisher's z). Across conditions it says little about causes: the noise moves "
            "both.")
    header, names = ["environment", "condition", "runs"], shares.values()
    return ["## Sign flips", text, table([*header, *names], rows),
            table([*header, *(f"ρ, {name}" for name in names)], correlations)]


def figures(results: Results) -> list[str]:
    """Draws what there is to draw; returns the section that shows it."""
    sns.set_theme(context="paper", style="ticks")
    study, parts, size = results.study, ["## Figures"], dict(height=2.2, aspect=1.3, facet_kws=dict(sharey=False))
    points, share = [], "share of runs above τ"
    for method, condition in product(results.drawn, study.conditions):
        if (scores := results.normalized(method, condition)) is not None:
            np.random.seed(0)
            value, band = library.create_performance_profile({"": scores}, TAUS, reps=500)
            points += [(method, condition, *point) for line in (value[""], *band[""]) for point in zip(TAUS, line)]
    points = pd.DataFrame(points, columns=["method", "condition", "τ", share])

    def show(name: str, text: str, data: pd.DataFrame, **options) -> None:
        figure = sns.relplot(data, **options, **size).set_titles(None, "{row_name}", "{col_name}", size=8)
        figure.savefig(results.folder / f"{name}.png", dpi=150)
        plt.close(figure.figure)
        parts.extend([f"![{text}]({name}.png)", f"*{text}.*"])

    curves, finals = (rows[rows.method.isin(results.drawn)] for rows in (results.evaluations, results.runs))
    if len(curves):
        show("learning_curves", "Mean raw return of the evaluations over seeds, with its t interval at every point "
             "where there are two seeds or more", curves, kind="line", x="step", y="score", hue="method",
             row="environment", col="condition", errorbar=lambda x: contrast((1, x))[1:])
    if len(points):
        show("profiles", "Performance profiles: share of runs whose normalised score is above τ, with stratified "
             "bootstrap intervals at every τ", points, kind="line", x="τ", y=share, hue="method", col="condition",
             estimator="median", errorbar=("pi", 100))  # all of them: value, lower and upper bound
    if len(finals) and len(study.conditions) > 2:
        show("dose_response", "Mean final score with its t interval, by condition", finals, kind="line", x="condition",
             y="score", hue="method", col="environment", errorbar=lambda x: contrast((1, x))[1:], err_style="bars")
    if len(study.conditions) > 1:
        show("sign_flips", "A run's share of sign flips by noise against its final score", results.runs,
             x="flips_noise", y="score", hue="condition", col="environment")
    return parts
