"""What a study says: `report.md` and its figures, from the tables that `study.py collect` wrote.

Every interval is a 95 % interval: Student's, of differences seed by seed, since runs of the same
seed begin alike and their scores go together. P-values are Holm's (1979), over all of a study's.
"""

from collections import Counter
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from scipy import stats
from study_file import KEY, Study, StudyError
from study_results import TAGS, commands, key_of, read_table
from study_run import write_whole

MARGIN = 0.15  # of a tie, in units of the reference's clean score above the uniform policy
CASE = KEY[:3]  # method, environment, condition


def contrast(*terms: tuple[float, pd.Series]) -> tuple[float, float, float, float]:
    """The mean of Σ cᵢ·xᵢ over the seeds that all terms have, Student's 95 % interval and two-sided
    p-value; no interval (NaN) for a single seed, or where all seeds are equally far from 0."""
    x = sum(c * scores for c, scores in terms).dropna()
    if len(x) < 2 or x.std() == 0:
        return x.mean(), np.nan, np.nan, np.nan
    test = stats.ttest_1samp(x, 0)
    return x.mean(), *test.confidence_interval(), test.pvalue


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's p-values: rejecting those below 0.05 errs in 5 % of studies without differences."""
    order, adjusted = np.argsort(p), np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]))
    return adjusted


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def interval(estimate: tuple[float, ...], show=number, plus: str = "") -> str:
    value, low, high, *_ = estimate
    sign = plus if value > 0 and show(value).strip("0.") else ""
    bounds = "no interval" if np.isnan(low) else f"{show(low)} to {show(high)}"
    return "–" if np.isnan(value) else f"{sign}{show(value)} ({bounds})"


def verdict(estimate: tuple, a: str, b: str, word: str, margin: float, same: float = 0) -> str:
    """Which of two methods is higher, say. A tie has its interval within ±margin, and methods
    that differ: on more than half of the seeds they are not the same run (`same`: on which)."""
    _, low, high, *_ = estimate
    if same > 0.5:
        return "same run"
    if np.isnan(low):
        return "no verdict"
    if low > 0 or high < 0:
        return f"{a if low > 0 else b} {word}"
    return "tie" if -margin <= low and high <= margin else "undecided"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Results:
    """The tables of a study. `cases[method, environment, condition]`: its finished runs by seed."""

    def __init__(self, study: Study, folder: Path):
        self.study, self.folder = study, folder
        numbers = dict.fromkeys("seed pilot step steps score mean".split() + [*TAGS], float)
        tables = []
        for name in ("runs", "evaluations", "random"):
            rows = read_table(folder, name)
            if not rows:
                raise StudyError(f"{folder} holds no {name}; `study.py collect` writes them there")
            tables.append(
                pd.DataFrame(rows).astype({k: numbers[k] for k in rows[0] if k in numbers})
            )
        runs, evaluations, random = tables
        commands(study, folder / "none", read_table(folder, "runs"))
        unscored = runs[~np.isfinite(runs.score)]
        if len(unscored):
            raise StudyError(
                f"{len(unscored)} runs have no finite score: {unscored.command.iloc[0]}"
            )
        self.runs = runs[runs.pilot == 0].astype({"seed": int, "steps": int})
        self.evaluations = evaluations.merge(self.runs[KEY])  # of runs that are finished
        self.random = random.set_index("environment")["mean"]
        self.cases = {case: x.set_index("seed").sort_index() for case, x in self.runs.groupby(CASE)}
        there = {key_of(row) for row in read_table(folder, "runs")}
        self.missing = [cell for cell in study.cells if cell.key not in there]
        clean = {x: self.of(study.reference, x, study.clean).mean() for x in study.environments}
        self.reference = pd.Series(clean).dropna()
        # Tasks are those where the reference has learned something: else there is no scale.
        self.tasks = [x for x, score in self.reference.items() if score > self.random[x]]
        self.pairs = [tuple(p) for p in study.comparisons if set(p) <= set(study.methods)]
        self.differences = differences(self)

    def of(self, *case: str) -> pd.Series:
        """Scores of the finished runs by seed."""
        return self.cases[case].score if case in self.cases else pd.Series(dtype=float)

    def same(self, a: str, b: str, *at: str) -> float:
        """The share of seeds on which all evaluations of two methods are equal."""
        curves = []
        for method in (a, b):
            rows = self.evaluations[(self.evaluations[CASE] == (method, *at)).all(axis=1)]
            curves.append(rows.pivot(index="seed", columns="step", values="score"))
        x, y = curves[0].align(curves[1], join="inner", axis=0)
        return (x == y).all(axis=1).mean() if len(x) else 0.0


def differences(results: Results) -> pd.DataFrame:
    """Every comparison by environment and condition: of scores, and of how much less the first
    method loses by noise. Estimates are raw; `unit` is their scale."""
    study, rows = results.study, []
    for (a, b), x, at in product(results.pairs, study.environments, study.conditions):
        unit = results.reference[x] - results.random[x] if x in results.tasks else np.nan
        first, second = (results.of(method, x, at) for method in (a, b))
        case = [a, b, x, at, len(first.index.intersection(second.index)), unit]
        case.append(results.same(a, b, x, at))
        clean = [results.of(method, x, study.clean) for method in (a, b)]
        if len(first) and len(second):
            rows.append([*case, "score", contrast((1, first), (-1, second))])
        if at != study.clean and all(map(len, (first, second, *clean))):
            terms = (1, first), (-1, clean[0]), (1, clean[1]), (-1, second)
            same = min(case.pop(), results.same(a, b, x, study.clean))
            rows.append([*case, same, "loss", contrast(*terms)])
    columns = "a b environment condition seeds unit same of estimate".split()
    found = pd.DataFrame(rows, columns=columns)
    words = {"score": "higher", "loss": "loses less"}
    found["verdict"] = [
        verdict(x.estimate, x.a, x.b, words[x.of], MARGIN * x.unit, x.same)
        for x in found.itertuples()
    ]
    p = found.estimate[found.verdict != "same run"].map(lambda estimate: estimate[3]).dropna()
    found["p"] = pd.Series(holm(p.to_numpy(float)), p.index, dtype=float)
    return found


def verdicts(found: pd.DataFrame, named: bool = True) -> str:
    """What is left of all differences taken together, with the names of those or without."""
    counted = found[found.p.notna()]
    counts, of = Counter(counted.verdict), Counter(counted.of)
    n, ties, undecided = len(counted), counts["tie"], counts["undecided"]
    left = counted[counted.p < 0.05]
    cases = left.groupby(["verdict", "a", "b", "environment"], sort=False)
    names = [f"{v} ({a} − {b}, {x}, {', '.join(rows.condition)})" for (v, a, b, x), rows in cases]
    return (
        f"**{n} intervals of differences** on single tasks, {of['score']} of scores and "
        f"{of['loss']} of what noise costs: {ties} ties, {undecided} undecided; "
        f"{n - ties - undecided} exclude zero, where chance alone makes {0.05 * n:.1f} do so. "
        f"Holm's correction over all of them leaves {len(left)}"
        f"{': ' + '; '.join(names) if named and names else ''}."
    )


def report(study: Study, folder: Path) -> None:
    """Writes `report.md` and its figures into `folder`, beside the tables."""
    results = Results(study, folder)
    parts = [*head(results), *figures(results), *scores(results)]
    parts += difference_table(results, "score", "Differences")
    parts += difference_table(results, "loss", "Lost by noise")
    write_whole(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    print(folder / "report.md")


def head(results: Results) -> list[str]:
    study, missing = results.study, [f"`{cell.name}`" for cell in results.missing]
    which = {"last": "the evaluation after its last update", "mean": "all its evaluations"}
    counts = [len(runs) for runs in results.cases.values()]
    seeds = " to ".join(str(n) for n in dict.fromkeys((min(counts), max(counts))))
    steps = " or ".join(f"{n:,}" for n in sorted(set(results.runs.steps)))
    shown = ", ".join(missing[:12]) + ", …" * (len(missing) > 12)
    left = f"**{len(missing)} of {len(study.cells)} runs are missing** ({shown})."
    return [
        f"# {study.name}",
        study.question,
        f"How β was fixed: {study.beta}",
        *[f"How many seeds: {study.power}"] * bool(study.power),
        f"It stands on {len(results.runs)} runs of {steps} environment steps, {seeds} seeds "
        f"each. A run's score is the mean raw return of {which[study.score]}. A "
        f"difference whose interval contains zero is a tie where the interval lies within "
        f"±{MARGIN:.0%} of what {study.reference} reaches above the uniform policy without noise, "
        f"else undecided. Methods whose evaluations are equal on more than half of the seeds are "
        f"the same run, and no tie.",
        *[verdicts(results.differences)] * bool(len(results.differences)),
        left if missing else "All of its runs are finished.",
    ]


def scores(results: Results) -> list[str]:
    """Mean scores over seeds, and what the runs logged."""
    study, rows = results.study, []
    for x, at, method in product(study.environments, study.conditions, study.methods):
        if (method, x, at) in results.cases:
            runs = results.cases[method, x, at]
            score = interval(contrast((1, runs.score)))
            logged = [f"{runs[name].mean():.3g}" for name in TAGS]
            rows.append([x, at, method, score, str(len(runs)), *logged])
    text = (
        "Mean raw scores over seeds. Then means of what the runs logged: the factor on the plain "
        "policy gradient, which a control has from the method that it is for, and the shares of "
        "samples whose advantage changed its sign by noise and by normalisation."
    )
    random = [f"{x}: {number(results.random[x])}" for x in study.environments]
    header = ["environment", "condition", "method", "score", "seeds", *TAGS]
    uniform = f"The uniform policy's mean over 100 episodes: {', '.join(random)}."
    return ["## Scores", text, table(header, rows), uniform]


def difference_table(results: Results, of: str, title: str) -> list[str]:
    rows = []
    for x in results.differences[results.differences.of == of].itertuples():
        half = 50 * (x.estimate[2] - x.estimate[1]) / x.unit
        seeds = f"{x.seeds}, {x.same * x.seeds:.0f} equal" if x.same else str(x.seeds)
        numbers = [interval(x.estimate, plus="+"), f"{half:.0f} %", f"{x.p:.2g}"]
        shown = ["–" if "nan" in text else text for text in numbers]
        rows.append([f"{x.a} − {x.b}", x.environment, x.condition, seeds, *shown, x.verdict])
    header = "difference environment condition seeds raw ± p verdict".split()
    return [f"## {title}", table(header, rows)] * bool(rows)


def figures(results: Results) -> list[str]:
    """Draws what there is to draw; returns the section that shows it."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    parts = ["## Figures"]

    def show(name: str, grid, text: str) -> None:
        grid.set_titles("{col_name}").savefig(results.folder / f"{name}.png", dpi=120)
        plt.close(grid.figure)
        parts.extend([f"![{text}]({name}.png)", f"*{text}.*"])

    size = {"height": 2.5, "aspect": 1.4}
    errorbar = {"errorbar": lambda x: contrast((1, x))[1:3]}
    curves = results.evaluations
    curves = curves.assign(panel=curves.environment + ", " + curves.condition)
    options = {"x": "step", "y": "score", "hue": "method", "facet_kws": {"sharey": False}}
    grid = sns.relplot(curves, kind="line", col="panel", col_wrap=3, **options, **size, **errorbar)
    show("learning_curves", grid, "Mean raw returns of the evaluations with their intervals")

    gaps = []
    for (a, b), x, at in product(results.pairs, results.tasks, results.study.conditions):
        unit = results.reference[x] - results.random[x]
        seeds = ((results.of(a, x, at) - results.of(b, x, at)) / unit).dropna()
        gaps += [[f"{a} − {b}", x, at, gap] for gap in seeds]
    if gaps:
        gaps = pd.DataFrame(gaps, columns=["pair", "environment", "condition", "difference"])
        options = {"x": "difference", "y": "pair", "hue": "condition", "col": "environment"}
        dodge = 0.5 * (len(results.study.conditions) > 1)
        options |= {"kind": "point", "linestyle": "none", "dodge": dodge or False}
        grid = sns.catplot(gaps, **options, **size, **errorbar).refline(x=0)
        unit = f"what {results.study.reference} reaches above the uniform policy without noise"
        show("differences", grid, f"Differences of scores with their intervals, in units of {unit}")
    return parts
