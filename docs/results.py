"""Writes the tables of results.md, checks.md and the README.

    python docs/results.py

A table lies between <!-- NAME --> and <!-- end -->. The figures are from the committed tables,
which `studies/study.py collect`, `benchmark/score.py` and their like wrote. Nothing learns here.
"""

import copy
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "studies")]
import study_report as report  # noqa: E402
import tables  # noqa: E402
from study_file import load  # noqa: E402

PAGES = [ROOT / "docs" / "results.md", ROOT / "docs" / "checks.md", ROOT / "README.md"]
RESULTS = ROOT / "studies" / "results"
SCALES = dict(
    cartpole_noise=None,
    robustness_calm=None,
    z_values=None,
    alpha_beta_grid=None,
    sign_flips=None,
    beta_atari="laptop",
    robustness_continuous="laptop",
)
VERDICTS = ["holds", "tie", "mixed", "undecided", "contradicted", "not tested"]

# An estimate has its interval's ends and a p-value. What is measured is a list of estimates that
# are positive if a claim holds, each with how to say it.
Estimate = tuple[float, float, float, float]
Measured = list[tuple[Estimate, str]]


@dataclass
class Claim:
    claim: str
    reported: str  # by the paper
    measured: Measured  # decides
    note: str = ""  # decides nothing

    @property
    def text(self) -> str:
        texts = [text for _, text in self.measured]
        return "<br>".join(texts + [self.note] if self.note else texts)


def percent(estimate: Estimate) -> str:
    return report.interval(estimate, lambda x: f"{round(100 * x)}", "+") + " %"


def unit(results: report.Results, env_id: str) -> float:
    return results.reference[env_id] - results.random[env_id]


def seeds_of(results: report.Results) -> str:
    numbers = sorted({len(runs) for runs in results.cases.values()})
    ends = dict.fromkeys((numbers[0], numbers[-1]))
    return " to ".join(map(str, ends)) + " seeds"


def verdict(measured: Measured) -> tuple[str, str]:
    """A word, and how many of the estimates it rests on.

    *holds*, *contradicted*, *mixed*: some differ from zero, with Holm's correction over the row,
    and by intervals that do not lie within ± MARGIN. *tie*: all intervals do.
    """
    if not measured:
        return "not tested", ""
    values, lows, highs, p = np.array([estimate for estimate, _ in measured]).T
    within = (lows >= -report.MARGIN) & (highs <= report.MARGIN)
    apart = (report.holm(p) < 0.05) & ~within
    share = f"{sum(apart)} of {len(apart)}"
    if not any(apart):
        return "tie" if all(within) else "undecided", ""
    if all(values[apart] > 0):
        return "holds", share
    if all(values[apart] < 0):
        return "contradicted", share
    return "mixed", share


def at_the_end(results: report.Results) -> report.Results:
    """The same runs; a run's score is its last evaluation."""
    last = results.evaluations.sort_values("step").groupby([*report.CASE, "seed"]).score.last()
    study = results.study
    ended = copy.copy(results)
    ended.cases = {case: rows.assign(score=last[case]) for case, rows in results.cases.items()}
    ended.reference = results.reference.copy()
    for env_id in results.tasks:
        ended.reference[env_id] = ended.of(study.reference, env_id, study.clean).mean()
    return ended


def measure(results: report.Results, env_id: str, terms: list) -> tuple[Estimate, str]:
    """A contrast Σ c · scores over `terms` (c, scores by seed), in units of the reference's clean
    score above the uniform policy, and where it is from."""
    estimate = report.contrast(*((c / unit(results, env_id), scores) for c, scores in terms))
    seeds = len(pd.concat([scores for _, scores in terms], axis=1).dropna())
    return estimate, f"{seeds} seeds: {percent(estimate)}"


def compare(results: report.Results | None, pairs: list, conditions: list, what="") -> Measured:
    """Mean over conditions of the score a − b, for each pair (a, b) and on every task; nothing of a
    study without runs."""
    measured = []
    for (a, b), env_id in itertools.product(pairs, results.tasks if results else []):
        terms = []
        for condition in conditions:
            terms.append((1 / len(conditions), results.of(a, env_id, condition)))
            terms.append((-1 / len(conditions), results.of(b, env_id, condition)))
        estimate, text = measure(results, env_id, terms)
        measured.append((estimate, f"{a} − {b}, {env_id}{what}, {text}"))
    return measured


def cost(results: report.Results, env_id: str, method: str, condition: str) -> tuple[Estimate, str]:
    """What a condition costs a method."""
    clean = results.of(method, env_id, results.study.clean)
    under_it = results.of(method, env_id, condition)
    estimate, text = measure(results, env_id, [(1, clean), (-1, under_it)])
    return estimate, f"{condition} cost {method}, {env_id}, {text}"


def settings(results: report.Results, family: str, env_id: str, condition: str) -> pd.DataFrame:
    """Scores (seeds, settings) of a method that the study's grid expands."""
    members = results.study.families[family]
    return pd.DataFrame({x: results.of(x, env_id, condition) for x in members}).dropna()


def spread(scores: pd.DataFrame) -> pd.Series:
    """Standard deviation over settings, by seed. What runs differ by at random is in it, for all
    methods."""
    return scores.std(axis=1)


def spread_gaps(results: report.Results) -> list[tuple]:
    """(a, b, environment, condition, spread of a − spread of b, mean spread of b)."""
    study = results.study
    gaps = []
    for (a, b), *case in itertools.product(study.comparisons, study.environments, study.conditions):
        if {a, b} <= study.families.keys():
            first, second = (spread(settings(results, x, *case)) for x in (a, b))
            if len(first) and len(second):
                gap = report.contrast((1, first), (-1, second))
                gaps.append((a, b, *case, gap, second.mean()))
    return gaps


def spread_tables(results: report.Results) -> list[str]:
    """How much the setting matters; nothing of a study without a grid."""
    study = results.study
    rows = []
    for case in itertools.product(study.families, study.environments, study.conditions):
        scores = settings(results, *case)
        if not len(scores):
            continue
        p = stats.friedmanchisquare(*scores.to_numpy().T).pvalue
        means = scores.mean()
        ends = (scores.to_numpy().mean(), means.min(), means.max(), spread(scores).mean())
        size = f"{scores.shape[1]} × {len(scores)}"
        rows.append([*case, size, *map(report.number, ends), f"{p:.2g}"])
    gaps = []
    for a, b, env_id, condition, gap, whole in spread_gaps(results):
        text = report.interval(gap, plus="+")
        word = report.verdict(gap, a, b, "higher", report.MARGIN * whole)
        gaps.append([f"{a} − {b}", env_id, condition, text, word])
    header = ["method", "environment", "condition", "settings × seeds"]
    header += ["mean", "lowest", "highest", "spread", "p"]
    tables = [report.table(header, rows)] if rows else []
    header = ["difference", "environment", "condition", "of spreads", "verdict"]
    return tables + [report.table(header, gaps)] if gaps else tables


def sensitivity(results: report.Results, method: str) -> Measured:
    """Spread over settings beside PPO's over the same factors on its policy loss, in units of the
    latter. The claim is that it is less."""
    measured = []
    for a, b, env_id, condition, gap, whole in spread_gaps(results):
        if a != method:
            continue
        value, low, high = np.array(gap[:3]) / whole
        text = f"spread over settings, {a} − {b}, {env_id}, {condition}, {seeds_of(results)}: "
        text += f"{percent((value, low, high))} of PPO's"
        measured.append(((-value, -high, -low, gap[3]), text))
    return measured


def learned_rewards(a: str, b: str) -> Measured:
    """Gold scores of small language models, a − b, in units of what PPO gains."""
    points = pd.read_csv(tables.RESULTS / "language.csv").sort_values("step")
    scores = points.groupby(["reward", "method", "seed"]).gold_score
    first = scores.first()
    last = scores.last()
    measured = []
    for reward in last.index.levels[0]:
        gain = (last - first)[reward, "PPO"].mean()
        estimate = report.contrast((1 / gain, last[reward, a]), (-1 / gain, last[reward, b]))
        seeds = len(last[reward, a])
        text = f"{a} − {b}, reward `{reward}`, {seeds} seeds: {percent(estimate)} of PPO's gain"
        measured.append((estimate, text))
    return measured


def sa2c() -> tuple[Measured, str]:
    """On the one game of which there are three seeds, in units of A2C's score above the uniform
    policy. What default weights do is said, but decides nothing: most of it is the size of the
    policy loss."""
    game = "ALE/KungFuMaster-v5"

    def scores(flags: str) -> pd.Series:
        rows = tables.ours()[f"sa2c_atari.py{flags}", game, 200_000]
        return pd.Series({seed: float(row["mean"]) for seed, row in rows.items()})

    a2c = scores(" --alpha 1 --beta 0")
    above = a2c.mean() - float(tables.peers()["uniform", game, 0][1]["mean"])
    equal = report.contrast((1 / above, scores(" --alpha 0.871 --beta 1.742")), (-1 / above, a2c))
    default = report.contrast((1 / above, scores("")), (-1 / above, a2c))
    text = f"SA2C (mean weight near 1) − A2C, {game}, 200,000 steps, {len(a2c)} seeds: "
    note = "with default weights, whose policy loss is smaller, not counted: "
    return [(equal, text + percent(equal))], note + percent(default)


def at_full_length(name: str) -> str:
    """Last evaluations of the finished runs of a study on one task: a seed or two, which decide
    nothing."""
    runs = pd.read_csv(RESULTS / name / "runs.csv").sort_values(["seed", "method"])
    scores = (f"{x.method} {report.number(x.score)} (seed {x.seed})" for x in runs.itertuples())
    return f"at the end of {runs.steps.max():,} steps, not counted: {', '.join(scores)}"


def shown(measured: Measured) -> str:
    """The estimates alone."""
    return "; ".join(text.rpartition(": ")[2] for _, text in measured)


def ours(measured: Measured, beside: str = "") -> str:
    """Of the plain form, which the paper does not have: it is said, but decides nothing about the
    paper's claims."""
    return f"the plain form, ours{beside}, in the same order, not counted: {shown(measured)}"


def control_claims(pole: report.Results, calm: report.Results) -> list[Claim]:
    """Of CartPole, and of the two calm tasks, where all actions are discretised (D)."""
    clean = (["noise 0"], ["noise 0"])
    noisy = (["noise 0.2", "noise 1"], ["noise 0.05", "noise 0.2"])

    def both(a: str, b: str, conditions: tuple, end: bool = False) -> Measured:
        what = "" if conditions == clean else ", mean over noise"
        first, second = (at_the_end(x) if end else x for x in (pole, calm))
        return compare(first, [(a, b)], conditions[0], what) + compare(
            second, [(f"D{a}", f"D{b}")], conditions[1], what
        )

    plain_without_noise = shown(both("SPPO plain", "PPO mean weight", clean))
    return [
        Claim(
            claim="SPPO learns faster than PPO on control tasks",
            reported="SPPO above PPO; 30 seeds, β tuned per task",
            measured=both("SPPO", "PPO", clean),
            note="D: discretised actions",
        ),
        Claim(
            claim="SPPO ends above PPO on control tasks",
            reported="SPPO above PPO",
            measured=both("SPPO", "PPO", clean, end=True),
        ),
        Claim(
            claim="SPPO learns faster where rewards are noisy",
            reported="SPPO above PPO with noise 0.05",
            measured=both("SPPO", "PPO", noisy),
        ),
        Claim(
            claim="SPPO ends above PPO where rewards are noisy",
            reported="SPPO above PPO with noise 0.05",
            measured=both("SPPO", "PPO", noisy, end=True),
        ),
        Claim(
            claim="reweighting samples (our plain form) helps where rewards are noisy",
            reported="the idea; the released form has none",
            measured=both("SPPO plain", "PPO mean weight", noisy),
            note=f"without noise, in the same order, not counted: {plain_without_noise}",
        ),
    ]


def claims(studies: dict[str, report.Results]) -> list[Claim]:
    pole = studies.get("cartpole_noise")
    calm = studies.get("robustness_calm")
    z = studies.get("z_values")
    grid = studies.get("alpha_beta_grid")
    games = studies.get("beta_atari")

    near = [("Z-1", "Z-0.5"), ("Z-1", "Z-2")]
    near_plain = [(f"plain {a}", f"plain {b}") for a, b in near]
    plain_z = ours(compare(z, near_plain, ["flips 0"]))
    plain_language = learned_rewards("plain SPPO", "mean-weight control")
    sa2c_measured, sa2c_note = sa2c()
    return [
        *control_claims(pole, calm),
        Claim(
            claim="wrong signs do harm",
            reported="shares of sign flips",
            measured=[
                cost(pole, "CartPole-v1", "PPO", "flips 0.3"),
                cost(z, "InvertedDoublePendulum-v5", "PPO", "flips 0.3"),
            ],
        ),
        Claim(
            claim="SPPO depends less on its hyperparameters than PPO",
            reported="good scores over a range of α and β",
            measured=sensitivity(grid, "SPPO"),
            note="SPPO and PPO weighted are one method but for rounding<br>"
            + ours(sensitivity(grid, "SPPO plain")),
        ),
        Claim(
            claim="Z = −1 is a good choice",
            reported="−1 throughout",
            measured=compare(z, near, ["flips 0"]),
            note=f"only β·Z matters, bit for bit (a test)<br>{plain_z}",
        ),
        Claim(
            claim="SPPO helps against errors of a learned reward model",
            reported="better on IMDB and TL;DR",
            measured=learned_rewards("SPPO", "PPO"),
            note="small models ([which](language_models.md))<br>"
            + ours(plain_language, ", beside its control"),
        ),
        Claim(
            claim="SPPO beats PPO on Atari",
            reported="UpNDown, 5,000,000 steps: 126,830 against 58,289",
            measured=compare(games, [("SPPO beta=1", "PPO")], ["noise 0"], ", 100,000 steps"),
            note=at_full_length("robustness_atari"),
        ),
        Claim(
            claim="SA2C beats A2C on Atari",
            reported="SA2C above A2C, 5,000,000 steps, β tuned per game",
            measured=sa2c_measured,
            note=sa2c_note,
        ),
    ]


def claims_table(rows: list[Claim]) -> str:
    """Claim, what the paper reports, what was measured, and the verdict."""
    cells = []
    for row in rows:
        words = ", ".join(filter(None, verdict(row.measured)))
        cells.append([row.claim, row.reported, row.text, words])
    return report.table(["the claim", "the paper reports", "measured here", "verdict"], cells)


def verdicts_table(rows: list[Claim]) -> str:
    """Verdict, and the claims that have it."""
    by_verdict = {word: [] for word in VERDICTS}
    for row in rows:
        word, share = verdict(row.measured)
        by_verdict[word].append(f"{row.claim} ({share})" if share else row.claim)
    cells = [[word, "; ".join(found)] for word, found in by_verdict.items() if found]
    return report.table(["verdict", "claims"], cells)


def difference_cells(results: report.Results, a: str, b: str, env_id: str) -> dict[str, str]:
    """Differences of scores, a − b, in percent, by condition. Those whose interval excludes zero
    are bold, those that Holm's correction leaves have a star."""
    cells = {}
    for x in results.differences.itertuples():
        if (x.of, x.a, x.b, x.environment) == ("score", a, b, env_id):
            text = percent(tuple(np.array(x.estimate[:3]) / x.unit))
            if x.p < 0.05:
                text += r" \*"
            if x.verdict in (f"{a} higher", f"{b} higher"):
                text = f"**{text}**"
            cells[x.condition] = text
    return cells


def section(results: report.Results) -> str:
    """A study's question, figure, and differences: a line for each comparison and task."""
    study = results.study
    path = f"../studies/results/{results.folder.name}"
    steps = " or ".join(f"{n:,}" for n in sorted(set(results.runs.steps)))
    score = dict(last="the last evaluation", mean="the mean of all evaluations")[study.score]
    figure = "heat_maps" if study.families else "differences"
    blocks = [
        f"*{study.question}* {seeds_of(results)} of {steps} steps; a run's score is {score}.",
        f'<img src="{path}/{figure}.png" width="600" alt="{study.question}">',
        *spread_tables(results),
    ]
    rows = []
    for (a, b), env_id in itertools.product(results.pairs, results.tasks):
        cells = difference_cells(results, a, b, env_id)
        rows.append([f"{a} − {b}", env_id, *(cells.get(x, "–") for x in study.conditions)])
    if rows:
        blocks.append(report.table(["difference", "task", *study.conditions], rows))
        blocks.append(report.verdicts(results.differences, named=False))
    blocks.append(f"[The whole report]({path}/report.md)")
    return "\n\n".join(blocks)


def so_far(name: str) -> str:
    """Every evaluation of a study on one task; its runs may be under way."""
    points = pd.read_csv(RESULTS / name / "evaluations.csv")
    scores = points.pivot(index="step", columns=["method", "seed"], values="score")
    rows = [[f"{step:,}", *map(report.number, row)] for step, *row in scores.itertuples()]
    header = ["steps", *(f"{method}, seed {seed}" for method, seed in scores)]
    return report.table(header, rows).replace("| nan", "| –")


def fill(page: str, blocks: dict[str, str]) -> str:
    """The page with each block in its place; a minus sign before a number is a real one."""
    for name in re.findall(r"<!-- (?!end)(\w+) -->", page):
        begin = page.index(f"<!-- {name} -->")
        end = page.index("<!-- end -->", begin)
        block = re.sub(r"\bZ-", "Z=-", blocks[name])
        block = re.sub(r"(?<![\w`-])-(?=\d)", "−", block)
        page = f"{page[:begin]}<!-- {name} -->\n{block}\n{page[end:]}"
    return page


def main() -> None:
    studies = {}
    for name, scale in SCALES.items():
        if (RESULTS / name).exists():
            studies[name] = report.Results(load(name, scale), RESULTS / name)
    rows = claims(studies)
    blocks = {name: section(results) for name, results in studies.items()}
    blocks |= {
        "claims": claims_table(rows),
        "verdicts": verdicts_table(rows),
        "games": tables.games(),
        "beside_peers": tables.beside_peers(),
        "baseline": tables.baseline(),
        "updown": so_far("robustness_atari"),
    }
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
