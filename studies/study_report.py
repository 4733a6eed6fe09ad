"""What a study says: `report.md` and its figures, from the tables that `study.py collect` wrote.

Every interval is a 95 % interval, and where methods are compared it is one of their difference. Raw scores of a task:
Welch's t interval. Aggregates over tasks: stratified bootstrap over seeds, tasks held fixed (Agarwal et al., 2021), of
normalised scores (score − random) / (reference − random).
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rliable import library, metrics
from scipy import stats
from study_file import Study, StudyError

REPS = 2000  # bootstrap resamples
TAUS = np.linspace(0, 1.5, 61)  # of the performance profiles

# ----------------------------------------------------------------------------------------------------------- statistics


def contrast(terms: list[tuple[float, np.ndarray]]) -> tuple[float, float, float]:
    """Σ cᵢ·mean(xᵢ) of independent samples with its 95 % interval (Welch and Satterthwaite). Infinite, which is to say
    none, where there is no variance to go by: a single seed, or seeds that agree while their means do not."""
    value = sum(c * np.mean(x) for c, x in terms)
    if min(len(x) for _, x in terms) < 2:
        return value, -np.inf, np.inf
    parts = [c**2 * np.var(x, ddof=1) / len(x) for c, x in terms]
    if sum(parts) == 0:
        return (value, -np.inf, np.inf) if value else (0.0, 0.0, 0.0)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, (_, x) in zip(parts, terms))
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    return value, value - half, value + half


def improvement(x: np.ndarray, y: np.ndarray) -> float:
    """P(x > y), ties counting a half, averaged over tasks: rliable's, without the p-value that takes its time."""
    return float(np.mean((x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])))


def iqm_contrast(*signs: int):
    """Σ signᵢ·IQM(scoresᵢ), for `bootstrap`."""
    return lambda *scores: np.array([sum(s * metrics.aggregate_iqm(x) for s, x in zip(signs, scores))])


def bootstrap(function, *scores: np.ndarray) -> tuple[float, float, float]:
    """`function` of scores (seeds, tasks), one array or more, with its stratified bootstrap percentile interval."""
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever `random_state` says
    value, interval = library.get_interval_estimates({"": list(scores)}, function, reps=REPS)
    return float(value[""][0]), float(interval[""][0, 0]), float(interval[""][1, 0])


def spread(scores: np.ndarray) -> float:
    """Standard deviation over settings of the mean score, without what the seeds add; scores: (seeds, settings)."""
    between = np.var(scores.mean(0), ddof=1) - np.var(scores, axis=0, ddof=1).mean() / len(scores)
    return float(max(between, 0) ** 0.5)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's ρ with its 95 % interval (Fisher's z with the standard error of Bonett and Wright, 2000)."""
    if len(x) < 5 or len(set(x)) < 2 or len(set(y)) < 2:
        return np.nan, -np.inf, np.inf
    rho = stats.spearmanr(x, y).statistic
    half = stats.norm.ppf(0.975) * ((1 + rho**2 / 2) / (len(x) - 3)) ** 0.5
    z = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    return rho, np.tanh(z - half), np.tanh(z + half)


def coverage(seeds: int, tasks: int, shape: str, trials: int) -> dict[str, float]:
    """How often the intervals contain the truth on synthetic scores of two methods that do not differ.

    The bootstrap here is the one of `bootstrap`, written for whole arrays, with fewer resamples.
    """
    rng = np.random.default_rng(0)
    hits = dict.fromkeys(("raw difference, one task", "difference of IQMs", "probability of improvement"), 0)
    for _ in range(trials):
        x, y = rng.normal(0.8, 0.2, (2, seeds, tasks)) * rng.uniform(0.5, 1.5, tasks)  # tasks of different scales
        if shape == "some runs fail":
            x, y = (np.where(rng.random(z.shape) < 0.3, rng.normal(0.1, 0.05, z.shape), z) for z in (x, y))
        _, low, high = contrast([(1, x[:, 0]), (-1, y[:, 0])])
        hits["raw difference, one task"] += low <= 0 <= high
        x_new, y_new = (z[rng.integers(seeds, size=(500, seeds, tasks)), np.arange(tasks)] for z in (x, y))
        low, high = np.percentile(iqms(x_new) - iqms(y_new), (2.5, 97.5))
        hits["difference of IQMs"] += low <= 0 <= high
        wins = (x_new[:, :, None] > y_new[:, None]) + 0.5 * (x_new[:, :, None] == y_new[:, None])
        low, high = np.percentile(wins.mean((1, 2, 3)), (2.5, 97.5))
        hits["probability of improvement"] += low <= 0.5 <= high
    return {name: count / trials for name, count in hits.items()}


def iqms(scores: np.ndarray) -> np.ndarray:
    """Interquartile means of many (seeds, tasks) arrays at once."""
    ordered = np.sort(scores.reshape(len(scores), -1))
    cut = int(0.25 * ordered.shape[1])
    return ordered[:, cut : ordered.shape[1] - cut].mean(1)


# ------------------------------------------------------------------------------------------------------------- Markdown


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def interval(estimate: tuple[float, float, float], show=number, sign: str = "") -> str:
    value, low, high = estimate
    plus = "+" if sign and value > 0 else ""
    if np.isinf(low):
        return "–" if np.isnan(value) else f"{plus}{show(value)} (no interval)"
    return f"{plus}{show(value)} ({show(low)} to {show(high)})"


def verdict(estimate: tuple[float, float, float], words: tuple[str, str], zero: float = 0) -> str:
    """One of two words, for a difference that is positive and one that is negative, or a tie."""
    _, low, high = estimate
    if np.isinf(low):
        return "no verdict"
    return "tie" if low <= zero <= high else words[0] if low > zero else words[1]


def higher(a: str, b: str) -> tuple[str, str]:
    return f"{a} higher", f"{b} higher"


def less_lost(a: str, b: str) -> tuple[str, str]:
    """For what a loses minus what b loses."""
    return f"{b} loses less", f"{a} loses less"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --------------------------------------------------------------------------------------------------------------- report


class Results:
    """The tables of a study. `scores[method, environment, condition]` are the final scores by seed."""

    def __init__(self, study: Study, folder: Path):
        self.study, self.folder = study, folder
        try:
            with (folder / "runs.csv").open() as runs, (folder / "random.csv").open() as random:
                self.random = {row["environment"]: float(row["mean"]) for row in csv.DictReader(random)}
                self.runs = [row for row in csv.DictReader(runs) if row["pilot"] == "0"]
            with (folder / "evaluations.csv").open() as file:
                self.evaluations = [row for row in csv.DictReader(file) if row["pilot"] == "0"]
        except FileNotFoundError as error:
            raise StudyError(f"there is no {error.filename}; `study.py collect` makes it") from None
        cells = {(c.method, c.env_id, c.condition, c.seed): c for c in study.cells if not c.pilot}
        self.scores, self.weights = {}, {}
        for row in self.runs:
            key = row["method"], row["environment"], row["condition"]
            cell = cells.pop((*key, int(row["seed"])), None)
            if cell is None or f" --total-timesteps {cell.steps} " not in row["command"] + " ":
                raise StudyError(f"{folder / 'runs.csv'} holds a run that is not of this study: {row['command']}")
            self.scores.setdefault(key, {})[int(row["seed"])] = float(row["score"])
            self.weights.setdefault(key, []).append(float(row["mean_weight"]))
        self.missing = list(cells.values())
        self.reference = {}  # by environment, where a method has learned more than nothing: else there is no scale
        self.tasks = []
        for env_id in study.environments:
            clean = self.of(study.reference, env_id, study.clean)
            if len(clean):
                self.reference[env_id] = float(np.mean(clean))
                if self.reference[env_id] > self.random[env_id]:
                    self.tasks.append(env_id)

    def of(self, method: str, env_id: str, condition: str) -> np.ndarray:
        """Final scores (seeds,) of the finished runs."""
        found = self.scores.get((method, env_id, condition), {})
        return np.array([found[seed] for seed in sorted(found)])

    def normalized(self, method: str, condition: str) -> np.ndarray | None:
        """(seeds, tasks) of the seeds that are finished on every task; None if these are fewer than two."""
        runs = [self.scores.get((method, env_id, condition), {}) for env_id in self.tasks]
        seeds = sorted(set.intersection(*map(set, runs))) if runs else []
        if len(seeds) < 2:
            return None
        scores = np.array([[run[seed] for run in runs] for seed in seeds])
        random, reference = (np.array([of[env] for env in self.tasks]) for of in (self.random, self.reference))
        return (scores - random) / (reference - random)


def report(study: Study, folder: Path, command: str) -> None:
    """Writes `report.md` and its figures into `folder`, beside the tables."""
    results = Results(study, folder)
    if not results.runs:
        raise StudyError(f"no run of {study.name} is finished")
    sections = [head(results, command), raw_scores(results), raw_differences(results)]
    if study.clean and len(study.conditions) > 1:
        sections.append(losses_by_noise(results))
    sections += [aggregates(results), measured_coverage(results), spreads(results), weights(results)]
    sections += [sign_flips(results), figures(results)]
    (folder / "report.md").write_text("\n\n".join(filter(None, sections)) + "\n")
    print(folder / "report.md")


def head(results: Results, command: str) -> str:
    study = results.study
    seeds = [len(results.of(*key)) for key in results.scores]
    per_cell = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else f"{max(seeds)}"
    steps = sorted({int(row["steps"]) for row in results.runs})
    lines = [
        f"# {study.name}", study.question, f"How β was fixed: {study.beta}",
        f"It stands on {len(results.runs)} runs: {plural(len(study.methods), 'method')}, "
        f"{plural(len(study.environments), 'environment')}, {plural(len(study.conditions), 'condition')} "
        f"({', '.join(study.conditions)}), {per_cell} seeds each, "
        f"{' or '.join(f'{n:,}' for n in steps)} environment steps. A run's score is the mean raw return of the "
        f"evaluation after its last update. Intervals are 95 % intervals; those of a difference that contain zero are "
        f"called ties. Of many intervals about one in twenty excludes zero by chance.",
    ]
    if results.missing:
        names = [cell.name for cell in results.missing]
        shown = ", ".join(f"`{name}`" for name in names[:12]) + (", …" if len(names) > 12 else "")
        lines.append(f"**{len(names)} of {len(names) + len(results.runs)} runs are missing** ({shown}). "
                     f"`{command}` completes them.")
    else:
        lines.append(f"All of its runs are finished. `{command}` repeats them.")
    return "\n\n".join(lines)


def raw_scores(results: Results) -> str:
    study, parts = results.study, ["## Scores", "Mean raw score over seeds with its t interval."]
    for condition in study.conditions:
        rows = []
        if condition == study.clean:
            rows.append(["uniform policy, 100 episodes",
                         *(number(results.random[e]) if e in results.random else "–" for e in study.environments)])
        for method in study.methods:
            cells = []
            for env_id in study.environments:
                scores = results.of(method, env_id, condition)
                cells.append(f"{interval(contrast([(1, scores)]))}, n = {len(scores)}" if len(scores) else "–")
            rows.append([method, *cells])
        parts.append(f"**{condition}**\n\n" + table(["method", *study.environments], rows))
    if study.clean:
        parts.append(f"Normalised scores count the uniform policy as 0 and the mean of {study.reference}, "
                     f"{study.clean}, as 1.")
    if lost := [env_id for env_id in results.reference if env_id not in results.tasks]:
        parts.append(f"**Not in the aggregates**: {', '.join(lost)}, where {study.reference} does not beat the uniform "
                     f"policy.")
    return "\n\n".join(parts)


def method_pairs(study: Study) -> list[tuple[str, str]]:
    return [(a, b) for a, b in study.comparisons if a in study.methods and b in study.methods]


def drawn_methods(study: Study) -> list[str]:
    """Those that are not one of many settings in a grid."""
    return [method for method in study.methods if all(method not in members for members in study.families.values())]


def raw_differences(results: Results) -> str:
    study, rows, counts = results.study, [], []
    for a, b in method_pairs(study):
        verdicts = []
        for env_id in study.environments:
            for condition in study.conditions:
                x, y = (results.of(method, env_id, condition) for method in (a, b))
                if len(x) and len(y):
                    difference = contrast([(1, x), (-1, y)])
                    verdicts.append(verdict(difference, higher(a, b)))
                    n = f"{len(x)}, {len(y)}"
                    rows.append([f"{a} − {b}", env_id, condition, n, interval(difference, sign="+"), verdicts[-1]])
        counts.append(f"- {a} − {b}: " + (", ".join(f"{verdicts.count(v)} × {v}" for v in dict.fromkeys(verdicts))
                                           or "no runs yet"))
    if not counts:
        return ""
    header = ["difference", "environment", "condition", "seeds", "raw score (Welch t interval)", "verdict"]
    return "\n\n".join(["## Differences, task by task", "\n".join(counts), table(header, rows)])


def losses_by_noise(results: Results) -> str:
    """More robust is what loses less: a difference of differences, and not the higher score with noise."""
    study, rows = results.study, []
    for a, b in method_pairs(study):
        for env_id in study.environments:
            for condition in study.conditions:
                if condition == study.clean:
                    continue
                groups = [results.of(method, env_id, at) for method in (a, b) for at in (study.clean, condition)]
                if all(map(len, groups)):
                    losses = [contrast([(1, groups[i]), (-1, groups[i + 1])]) for i in (0, 2)]
                    gap = contrast(list(zip((1, -1, -1, 1), groups)))
                    rows.append([f"{a}, {b}", env_id, condition, *map(interval, losses), interval(gap, sign="+"),
                                 verdict(gap, less_lost(a, b))])
    text = (f"Score without noise ({study.clean}) minus score with it, for both methods, and the difference of these "
            f"losses. The second method is the more robust one where it is positive, whatever the scores (Welch t "
            f"intervals).")
    header = ["methods", "environment", "condition", "loss of the first", "loss of the second", "difference", "verdict"]
    return "\n\n".join(["## Lost by noise", text, table(header, rows)])


def aggregates(results: Results) -> str:
    study, two = results.study, "{:.2f}".format
    if not results.tasks:
        return f"## Aggregates\n\nNone: they need finished runs of {study.reference}, {study.clean or 'without noise'}."
    text = (f"Normalised scores on {', '.join(results.tasks)}, of the seeds that are finished on all of them: "
            f"interquartile mean (IQM), its difference, and the probability that a run of the first method beats one "
            f"of the second (1/2 is a tie). Stratified bootstrap over seeds ({REPS:,} resamples), percentile "
            f"intervals; tasks, uniform policy and reference are held fixed. Where all runs of one beat all runs of "
            f"the other the interval of the probability has no width: resampling cannot know better.")
    rows = []
    for condition in study.conditions:
        for method in study.methods:
            scores = results.normalized(method, condition)
            if scores is not None:
                estimate = bootstrap(iqm_contrast(1), scores)
                rows.append([condition, method, str(len(scores)), interval(estimate, two)])
    parts = ["## Aggregates", text, table(["condition", "method", "seeds", "IQM"], rows)]
    rows, noise_rows = [], []
    for a, b in method_pairs(study):
        for condition in study.conditions:
            x, y = (results.normalized(method, condition) for method in (a, b))
            if x is None or y is None:
                continue
            gap = bootstrap(iqm_contrast(1, -1), x, y)
            wins = bootstrap(lambda x, y: np.array([improvement(x, y)]), x, y)
            rows.append([f"{a} − {b}", condition, f"{len(x)}, {len(y)}",
                         interval(gap, two, "+"), verdict(gap, higher(a, b)),
                         interval(wins, two), verdict(wins, higher(a, b), 0.5)])
            before = [results.normalized(method, study.clean) for method in (a, b)]
            if condition != study.clean and before[0] is not None and before[1] is not None:
                loss = bootstrap(iqm_contrast(1, -1, -1, 1), before[0], x, before[1], y)
                noise_rows.append([f"{a}, {b}", condition, interval(loss, two, "+"),
                                   verdict(loss, less_lost(a, b))])
    header = ["difference", "condition", "seeds", "of IQMs", "verdict", "probability of improvement", "verdict"]
    parts.append(table(header, rows) if rows else "No comparison has two seeds of both methods on all tasks yet.")
    if noise_rows:
        parts += ["What noise costs the first method minus what it costs the second, in IQM:",
                  table(["methods", "condition", "difference of the losses", "verdict"], noise_rows)]
    return "\n\n".join(parts)


def measured_coverage(results: Results) -> str:
    sizes = [s.shape for m in results.study.methods for c in results.study.conditions
             if (s := results.normalized(m, c)) is not None]
    if not sizes:
        return ""
    seeds, tasks = min(sizes)
    trials = 1000 if seeds * tasks <= 100 else 300
    shapes = ("normal", "some runs fail")
    measured = [coverage(seeds, tasks, shape, trials) for shape in shapes]
    rows = [[name, *(f"{cover[name]:.3f} ± {1.96 * (cover[name] * (1 - cover[name]) / trials) ** 0.5:.3f}"
                     for cover in measured)] for name in measured[0]]
    text = (f"How often these intervals contain zero (a half) when two methods do not differ, on {trials:,} synthetic "
            f"studies with this one's {seeds} seeds and {plural(tasks, 'task')}. 0.95 is what they claim; what is "
            f"missing to it are false verdicts. In the second column three runs in ten end near the uniform policy.")
    return "\n\n".join(["## Measured coverage", text, table(["interval", *shapes], rows)])


def spreads(results: Results) -> str:
    """How much the setting matters, for methods that a grid was expanded from."""
    study, rows = results.study, []
    matrices = {}
    for family, members in study.families.items():
        for env_id in study.environments:
            for condition in study.conditions:
                scores = [results.scores.get((member, env_id, condition), {}) for member in members]
                scores = [s for s in scores if len(s) >= 2]
                n = min(map(len, scores), default=0)
                if len(scores) < 2:
                    continue
                matrix = np.array([[s[seed] for seed in sorted(s)[:n]] for s in scores]).T
                matrices[family, env_id, condition] = matrix
                means = matrix.mean(0)
                numbers = map(number, (means.mean(), means.min(), means.max(), spread(matrix)))
                rows.append([family, env_id, condition, f"{len(means)} × {n}", *numbers])
    if not rows:
        return ""
    header = ["method", "environment", "condition", "settings × seeds", "mean", "lowest", "highest", "spread"]
    text = ("Over the settings of a grid, of mean scores over seeds. Spread: their standard deviation, without what "
            "the seeds' own variance adds to it. Its difference is bootstrapped over seeds, an approximation at few "
            "seeds.")
    parts, rows = ["## Spread over settings", text, table(header, rows)], []
    for a, b in study.comparisons:
        for env_id in study.environments:
            for condition in study.conditions:
                x, y = (matrices.get((family, env_id, condition)) for family in (a, b))
                if x is not None and y is not None:
                    gap = bootstrap(lambda x, y: np.array([spread(x) - spread(y)]), x, y)
                    rows.append([f"{a} − {b}", env_id, condition, interval(gap, sign="+"), verdict(gap, higher(a, b))])
    if rows:
        parts.append(table(["difference", "environment", "condition", "of spreads", "verdict"], rows))
    return "\n\n".join(parts)


def weights(results: Results) -> str:
    """Whether the controls do what they are for."""
    study, rows = results.study, []
    for method in drawn_methods(study):
        cells = []
        for env_id in study.environments:
            found = [results.weights.get((method, env_id, condition)) for condition in study.conditions]
            cells.append(", ".join(f"{np.mean(values):.3g}" if values else "–" for values in found))
        rows.append([method, *cells])
    if not rows:
        return ""
    text = (f"The mean factor on the plain policy gradient that the runs logged, by condition "
            f"({', '.join(study.conditions)}). A control has the one of the method that it is for, if pilot runs on "
            f"other seeds were enough to know it.")
    return "\n\n".join(["## Mean weights", text, table(["method", *study.environments], rows)])


FLIPS = dict(flips_noise="by noise", flips_normalization="by normalisation")


def sign_flips(results: Results) -> str:
    study, rows, correlations = results.study, [], []
    for env_id in study.environments:
        for condition in [*study.conditions, None]:
            runs = [r for r in results.runs if r["environment"] == env_id and condition in (r["condition"], None)]
            scores = np.array([float(row["score"]) for row in runs])
            flips = [np.array([float(row[name]) for row in runs]) for name in FLIPS]
            if condition is not None and len(runs):
                rows.append([env_id, condition, str(len(runs)), *(f"{x.mean():.3f}" for x in flips)])
            if condition is not None or len(study.conditions) > 1:
                estimates = [rank_correlation(x, scores) for x in flips]
                correlations.append([env_id, condition or "all", str(len(runs)),
                                     *(interval(e, "{:.2f}".format, "+") for e in estimates)])
    text = ("Share of samples whose advantage changes sign by reward noise and by minibatch normalisation, mean over "
            "all updates and runs; then Spearman's ρ between a run's share and its final score, methods and seeds "
            "together, with its interval (Fisher's z). Across conditions it says little about causes: the noise moves "
            "both.")
    names = list(FLIPS.values())
    return "\n\n".join(["## Sign flips", text, table(["environment", "condition", "runs", *names], rows),
                        table(["environment", "condition", "runs", *(f"ρ, {name}" for name in names)], correlations)])


# -------------------------------------------------------------------------------------------------------------- figures


def figures(results: Results) -> str:
    """Draws what there is to draw; returns the section that shows it."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    study, shown, drawn = results.study, [], drawn_methods(results.study)
    if drawn:
        learning_curves(results, drawn)
        shown.append(("learning_curves", "Mean raw return of the evaluations over seeds, with its t interval at every "
                                         "point where there are two seeds or more"))
        if any(results.normalized(method, c) is not None for method in drawn for c in study.conditions):
            profiles(results, drawn)
            shown.append(("profiles", "Performance profiles: share of runs whose normalised score is above τ, with "
                                      "stratified bootstrap intervals at every τ"))
    if drawn and len(study.conditions) > 2:
        dose_response(results, drawn)
        shown.append(("dose_response", "Mean final score with its t interval, by condition"))
    if study.families:
        over_settings(results)
        shown.append(("settings", "Mean final score of each setting against its mean weight, the factor on PPO's "
                                  "gradient"))
    if len(study.conditions) > 1:
        flips_and_scores(results)
        shown.append(("sign_flips", "A run's share of sign flips by noise against its final score"))
    return "\n\n".join(["## Figures", *(f"![{text}]({name}.png)\n\n*{text}.*" for name, text in shown)])


def panels(rows: int, columns: int):
    return plt.subplots(rows, columns, figsize=(2.6 * columns + 1.2, 2.1 * rows + 0.4), squeeze=False,
                        constrained_layout=True)


def style(index: int) -> dict:
    return dict(color=f"C{index % 10}", linestyle=("-", "--", ":")[index // 10 % 3])


def save(figure, results: Results, name: str, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside right upper")
    figure.savefig(results.folder / f"{name}.png", dpi=150)
    plt.close(figure)


def learning_curves(results: Results, methods: list[str]) -> None:
    study = results.study
    points: dict = {}
    for row in results.evaluations:
        key = row["method"], row["environment"], row["condition"]
        points.setdefault(key, {}).setdefault(int(row["step"]), []).append(float(row["score"]))
    figure, grid = panels(len(study.environments), len(study.conditions))
    for env_id, line in zip(study.environments, grid):
        for condition, axes in zip(study.conditions, line):
            for i, method in enumerate(methods):
                curve = sorted(points.get((method, env_id, condition), {}).items())
                steps = [step for step, _ in curve]
                bands = np.array([contrast([(1, np.array(scores))]) for _, scores in curve]).reshape(-1, 3)
                bands[np.isinf(bands)] = np.nan
                axes.plot(steps, bands[:, 0], **style(i), lw=1, label=method)
                axes.fill_between(steps, bands[:, 1], bands[:, 2], color=style(i)["color"], alpha=0.12, lw=0)
            axes.set_title(f"{env_id}, {condition}", fontsize=8)
            axes.set_xlabel("environment steps")
    save(figure, results, "learning_curves", grid[0, 0])


def profiles(results: Results, methods: list[str]) -> None:
    conditions = list(results.study.conditions)
    figure, grid = panels(1, len(conditions))
    for condition, axes in zip(conditions, grid[0]):
        for i, method in enumerate(methods):
            scores = results.normalized(method, condition)
            if scores is None:
                continue
            np.random.seed(0)
            value, band = library.create_performance_profile({"": scores}, TAUS, reps=500)
            axes.plot(TAUS, value[""], **style(i), lw=1, label=method)
            axes.fill_between(TAUS, *band[""], color=style(i)["color"], alpha=0.12, lw=0)
        axes.set(title=condition, xlabel="normalised score τ", ylabel="share of runs above τ", ylim=(0, 1.02))
    save(figure, results, "profiles", grid[0, 0])


def dose_response(results: Results, methods: list[str]) -> None:
    study, labels = results.study, list(results.study.conditions)
    figure, grid = panels(1, len(study.environments))
    for env_id, axes in zip(study.environments, grid[0]):
        for i, method in enumerate(methods):
            found = [(x, contrast([(1, scores)])) for x, condition in enumerate(labels)
                     if len(scores := results.of(method, env_id, condition))]
            x = [at + 0.04 * (i - len(methods) / 2) for at, _ in found]
            error = [[value - low if np.isfinite(low) else 0 for _, (value, low, _) in found]] * 2
            axes.errorbar(x, [value for _, (value, _, _) in found], error, **style(i), lw=1, capsize=2, label=method)
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        axes.set_title(env_id, fontsize=8)
    save(figure, results, "dose_response", grid[0, 0])


def over_settings(results: Results) -> None:
    study = results.study
    figure, grid = panels(len(study.environments), len(study.conditions))
    for env_id, line in zip(study.environments, grid):
        for condition, axes in zip(study.conditions, line):
            for i, (family, members) in enumerate(study.families.items()):
                keys = [key for member in members if (key := (member, env_id, condition)) in results.scores]
                x, y = [np.mean(results.weights[key]) for key in keys], [results.of(*key).mean() for key in keys]
                axes.plot(x, y, "os^Dv"[i % 5], color=f"C{i}", ms=3, mfc="none", label=family)
            axes.set(title=f"{env_id}, {condition}", xscale="log", xlabel="mean weight", ylabel="score")
    save(figure, results, "settings", grid[0, 0])


def flips_and_scores(results: Results) -> None:
    study = results.study
    figure, grid = panels(1, len(study.environments))
    for env_id, axes in zip(study.environments, grid[0]):
        for i, condition in enumerate(study.conditions):
            rows = [r for r in results.runs if (r["environment"], r["condition"]) == (env_id, condition)]
            x, y = ([float(row[name]) for row in rows] for name in ("flips_noise", "score"))
            axes.plot(x, y, "o", color=f"C{i % 10}", ms=3, mfc="none", label=condition)
        axes.set(title=env_id, xlabel="sign flips by noise", ylabel="final score")
    save(figure, results, "sign_flips", grid[0, 0])
