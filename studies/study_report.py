"""What a study says: `report.md`, from the tables that `study.py collect` wrote.

Every interval is a 95 % interval: Student's, of differences seed by seed, since runs of the same
seed begin alike and their scores go together. P-values are Holm's (1979), over all of a study's.
"""

from itertools import chain, product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from study_file import KEY, Study, StudyError
from study_results import TAGS, commands, read_table
from study_run import write_whole

CASE = KEY[:3]  # method, environment, condition


def student(x: pd.Series) -> tuple[float, float, float, float]:
    """Mean, Student's 95 % interval and two-sided p-value, which equal values do not have."""
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


def interval(estimate: tuple[float, ...]) -> str:
    value, low, high, _ = estimate
    bounds = "no interval" if np.isnan(low) else f"{number(low)} to {number(high)}"
    return f"{number(value)} ({bounds})"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Results:
    """The tables of a study. StudyError: they hold runs of another one, or without a score."""

    def __init__(self, study: Study, folder: Path):
        self.study = study
        commands(study, folder / "none", read_table(folder, "runs"))  # all are of this study
        runs, evaluations, random = (read(folder, x) for x in ("runs", "evaluations", "random"))
        unscored = runs[~np.isfinite(runs.score)].command
        if len(unscored):
            raise StudyError(f"{len(unscored)} runs have no finite score: {unscored.iloc[0]}")
        self.runs = runs[runs.pilot == 0]
        self.evaluations = evaluations.merge(self.runs[KEY])
        self.random = random.set_index("environment")["mean"]
        by_case = self.runs.set_index("seed").groupby(CASE)
        self.cases = {case: cell.score for case, cell in by_case}
        clean = {x: self.of(study.reference, x, study.clean).mean() for x in study.environments}
        self.reference = pd.Series(clean).dropna()
        # Tasks are those where the reference has learned something: else there is no scale.
        self.tasks = [x for x, score in self.reference.items() if score > self.random[x]]
        self.differences = differences(self)

    def of(self, *case: str) -> pd.Series:
        """Scores of a method in an environment under a condition, by seed."""
        return self.cases.get(case, pd.Series(dtype=float))


def read(folder: Path, name: str) -> pd.DataFrame:
    rows = list(chain(*read_table(folder, name).values()))
    if not rows:
        raise StudyError(f"{folder} holds no {name}; `study.py collect` writes them there")
    numbers = {column: float for column in rows[0] if column not in [*CASE, "command"]}
    return pd.DataFrame(rows).astype(numbers)


def differences(results: Results) -> pd.DataFrame:
    """Every comparison by environment and condition: of scores, and of how much less the first
    method loses by noise. Estimates are raw; `unit` is their scale."""
    study, rows = results.study, []
    lists = (study.comparisons, study.environments, study.conditions)
    for (a, b), env_id, condition in product(*lists):
        gaps = results.of(a, env_id, condition) - results.of(b, env_id, condition)  # by seed
        clean = results.of(a, env_id, study.clean) - results.of(b, env_id, study.clean)
        learned = env_id in results.tasks
        unit = results.reference[env_id] - results.random[env_id] if learned else np.nan
        case = [a, b, env_id, condition, unit]
        rows.append([*case, "score", gaps.dropna()])
        if condition != study.clean:
            rows.append([*case, "loss", (gaps - clean).dropna()])
    columns = ["a", "b", "environment", "condition", "unit", "of", "gaps"]
    found = pd.DataFrame([row for row in rows if len(row[-1])], columns=columns)
    found["estimate"] = found.gaps.map(student)
    differ = [(gaps != 0).mean() >= 0.5 for gaps in found.gaps]  # else the same run, or a ceiling
    p = found.estimate[differ].map(lambda estimate: estimate[3]).dropna()
    found["p"] = pd.Series(holm(p.to_numpy(float)), p.index, dtype=float)
    return found


def report(study: Study, folder: Path) -> None:
    """Writes `report.md` into `folder`, beside the tables."""
    results = Results(study, folder)
    steps = " or ".join(f"{n:,.0f}" for n in sorted(set(results.runs.steps)))
    asked = sum(not cell.pilot for cell in study.cells)
    parts = [
        f"# {study.name}",
        study.question,
        f"How β was fixed: {study.beta}",
        f"How many seeds: {study.power or 'not said'}",
        f"{len(results.runs)} of {asked} runs are finished, of {steps} environment steps each.",
        "What the words mean: [studies](../../../docs/studies.md#what-a-report-says).",
    ]
    parts += [*score_table(results), *difference_table(results)]
    write_whole(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    print(folder / "report.md")


def score_table(results: Results) -> list[str]:
    """Means over seeds of scores and of what the runs logged."""
    rows = []
    for case, runs in results.runs.groupby(CASE, sort=False):
        logged = [f"{runs[name].mean():.3g}" for name in TAGS]
        rows.append([*case, interval(student(runs.score)), str(len(runs)), *logged])
    random = ", ".join(f"{x}: {number(mean)}" for x, mean in results.random.items())
    text = (
        f"A run's score is the mean raw return of its evaluations (*{results.study.score}*). The "
        f"uniform policy's, over 100 episodes: {random}."
    )
    return ["## Scores", text, table([*CASE, "score", "seeds", *TAGS], rows)]


def difference_table(results: Results) -> list[str]:
    """Every difference, and how many are left of all of them taken together."""
    rows = []
    for x in results.differences.itertuples():
        case = [f"{x.a} − {x.b}", x.environment, x.condition, x.of]
        seeds = f"{len(x.gaps)}, {sum(x.gaps == 0)} equal"
        percent = interval([100 * value / x.unit for value in x.estimate])
        p = "–" if np.isnan(x.p) else f"{x.p:.2g}"
        rows.append([*case, seeds, interval(x.estimate), percent, p])
    p = results.differences.p.dropna()
    apart = sum(low > 0 or high < 0 for _, low, high, _ in results.differences.estimate[p.index])
    text = (
        f"Of **{len(p)} intervals** {apart} exclude zero, where chance alone makes "
        f"{0.05 * len(p):.1f} do so. Holm's correction leaves {sum(p < 0.05)}."
    )
    header = ["difference", "environment", "condition", "of", "seeds", "raw", "percent", "p"]
    return ["## Differences", text, table(header, rows).replace("nan (no interval)", "–")]
