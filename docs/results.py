"""Writes the tables of results.md, checks.md and the README: what lies between <!-- NAME --> and <!-- end -->.

    python docs/results.py

From the committed tables, which `studies/study.py collect`, `benchmark/score.py` and their like wrote. Nothing learns.
"""

import copy
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "studies")]
import study_report as report  # noqa: E402
import tables  # noqa: E402
from study_file import load  # noqa: E402

PAGES = [ROOT / "docs" / "results.md", ROOT / "docs" / "checks.md", ROOT / "README.md"]
SCALES = dict(cartpole_noise=None, robustness_calm=None, z_values=None, alpha_beta_grid=None, sign_flips=None,
              beta_atari="laptop", robustness_continuous="laptop")  # fmt: skip
Estimate = tuple[float, float, float, float]  # with the interval's ends and a p-value
Measured = list[tuple[Estimate, str]]  # estimates that are positive if a claim holds, and how to say them


def percent(estimate: Estimate) -> str:
    return report.interval(estimate, lambda x: f"{round(100 * x)}", "+") + " %"


def unit(results: report.Results, env_id: str) -> float:
    return results.reference[env_id] - results.random[env_id]


def seeds_of(results: report.Results) -> str:
    n = sorted({len(runs) for runs in results.cases.values()})
    return " to ".join(map(str, dict.fromkeys((n[0], n[-1])))) + " seeds"


def verdict(measured: Measured) -> tuple[str, str]:
    """A word, and how many of the estimates it rests on. *holds*, *contradicted*, *mixed*: some differ from zero, with
    Holm's correction over the row, and by intervals that do not lie within ± MARGIN. *tie*: all intervals do."""
    if not measured:
        return "not tested", ""
    values, lows, highs, p = np.array([estimate for estimate, _ in measured]).T
    within = (lows >= -report.MARGIN) & (highs <= report.MARGIN)
    apart = (report.holm(p) < 0.05) & ~within
    if any(apart):
        word = "holds" if all(values[apart] > 0) else "contradicted" if all(values[apart] < 0) else "mixed"
        return word, f"{sum(apart)} of {len(apart)}"
    return "tie" if all(within) else "undecided", ""


def at_the_end(results: report.Results) -> report.Results:
    """The same runs; a run's score is its last evaluation."""
    last = results.evaluations.sort_values("step").groupby([*report.CASE, "seed"]).score.last()
    ended = copy.copy(results)
    ended.cases = {case: rows.assign(score=last[case]) for case, rows in results.cases.items()}
    ended.reference = results.reference.copy()
    for env_id in results.tasks:
        ended.reference[env_id] = ended.of(results.study.reference, env_id, results.study.clean).mean()
    return ended


def measure(results: report.Results, env_id: str, terms: list[tuple[float, pd.Series]]) -> tuple[Estimate, str]:
    """A contrast in units of the reference's clean score above the uniform policy, and where it is from."""
    estimate = report.contrast(*((c / unit(results, env_id), scores) for c, scores in terms))
    seeds = len(pd.concat([scores for _, scores in terms], axis=1).dropna())
    return estimate, f"{seeds} seeds: {percent(estimate)}"


def compare(results: report.Results | None, pairs: list[tuple[str, str]], conditions: list[str],
            what: str = "") -> Measured:
    """Mean over conditions of the score a − b, on every task; nothing of a study without runs."""
    measured = []
    for (a, b), env_id in ((pair, env_id) for pair in pairs for env_id in (results.tasks if results else [])):
        terms = [(sign / len(conditions), results.of(method, env_id, condition))
                 for condition in conditions for sign, method in ((1, a), (-1, b))]
        estimate, text = measure(results, env_id, terms)
        measured.append((estimate, f"{a} − {b}, {env_id}{what}, {text}"))
    return measured


def cost(results: report.Results, env_id: str, method: str, condition: str) -> tuple[Estimate, str]:
    """What a condition costs a method."""
    terms = [(1, results.of(method, env_id, results.study.clean)), (-1, results.of(method, env_id, condition))]
    estimate, text = measure(results, env_id, terms)
    return estimate, f"{condition} cost {method}, {env_id}, {text}"


def sensitivity(results: report.Results, method: str) -> Measured:
    """Spread over settings beside PPO's over the same factors on its policy loss, in units of the latter. The claim is
    that it is less."""
    measured = []
    for a, b, env_id, condition, gap in (x for x in report.spread_gaps(results) if x[0] == method):
        whole = report.spread(report.settings(results)[b, env_id, condition]).mean()
        value, low, high = np.array(gap[:3]) / whole
        text = f"spread over settings, {a} − {b}, {env_id}, {condition}, {seeds_of(results)}: "
        text += f"{percent((value, low, high))} of PPO's"
        measured.append(((-value, -high, -low, gap[3]), text))
    return measured


def learned_rewards(pairs: list[tuple[str, str]]) -> Measured:
    """Gold scores of small language models, in units of what PPO gains."""
    runs = pd.read_csv(tables.RESULTS / "language.csv").sort_values("step").groupby(["reward", "method", "seed"])
    before, after, measured = runs.gold_score.first(), runs.gold_score.last(), []
    for reward, (a, b) in ((reward, pair) for pair in pairs for reward in after.index.levels[0]):
        gain = (after - before)[reward, "PPO"].mean()
        estimate = report.contrast((1 / gain, after[reward, a]), (-1 / gain, after[reward, b]))
        text = f"{a} − {b}, reward `{reward}`, {len(after[reward, a])} seeds: {percent(estimate)} of PPO's gain"
        measured.append((estimate, text))
    return measured


def sa2c() -> tuple[Measured, str]:
    """On the one game of which there are three seeds, in units of A2C's score above the uniform policy. What default
    weights do is said, but decides nothing: most of it is the size of the policy loss."""
    name, of = "ALE/KungFuMaster-v5", {}
    for flags in ("", " --alpha 0.871 --beta 1.742", " --alpha 1 --beta 0"):
        rows = tables.ours()["sa2c_atari.py" + flags, name, 200_000]
        of[flags] = pd.Series({seed: float(row["mean"]) for seed, row in rows.items()})
    a2c = of[" --alpha 1 --beta 0"]
    above = a2c.mean() - float(tables.peers()["uniform", name, 0][1]["mean"])
    default, equal = (report.contrast((1 / above, of[flags]), (-1 / above, a2c))
                      for flags in ("", " --alpha 0.871 --beta 1.742"))
    text = f"SA2C (mean weight near 1) − A2C, {name}, 200,000 steps, {len(a2c)} seeds: {percent(equal)}"
    return [(equal, text)], f"with default weights, whose policy loss is smaller, not counted: {percent(default)}"


def at_full_length(name: str) -> str:
    """Last evaluations of the finished runs of a study on one task: a seed or two, which decide nothing."""
    runs = pd.read_csv(ROOT / "studies" / "results" / name / "runs.csv").sort_values(["seed", "method"])
    scores = (f"{x.method} {report.number(x.score)} (seed {x.seed})" for x in runs.itertuples())
    return f"at the end of {runs.steps.max():,} steps, not counted: {', '.join(scores)}"


def shown(measured: Measured) -> str:
    """The estimates alone."""
    return "; ".join(text.rpartition(": ")[2] for _, text in measured)


def ours(measured: Measured, beside: str = "") -> str:
    """Of the plain form, which the paper does not have: it is said, but decides nothing about the paper's claims."""
    return f"the plain form, ours{beside}, in the same order, not counted: {shown(measured)}"


def claims(studies: dict[str, report.Results]) -> list[list[str]]:
    """Claim, what the paper reports, what was measured, verdict, and how many estimates it rests on."""
    pole, calm, z, grid, _, games, _ = map(studies.get, SCALES)
    near = [[(f"{form}Z-1", f"{form}Z-0.5"), (f"{form}Z-1", f"{form}Z-2")] for form in ("", "plain ")]
    plain = "SPPO plain", "PPO mean weight"
    clean, noisy, mean = [["noise 0"]] * 2, [["noise 0.2", "noise 1"], ["noise 0.05", "noise 0.2"]], ", mean over noise"

    def both(a: str, b: str, conditions: list[list[str]], what: str = "", end: bool = False) -> Measured:
        one, two = map(at_the_end, (pole, calm)) if end else (pole, calm)
        return compare(one, [(a, b)], conditions[0], what) + compare(two, [(f"D{a}", f"D{b}")], conditions[1], what)

    rows = [
        ("SPPO learns faster than PPO on control tasks", "SPPO above PPO; 30 seeds, β tuned per task",
         both("SPPO", "PPO", clean), "D: discretised actions"),
        ("SPPO ends above PPO on control tasks", "SPPO above PPO", both("SPPO", "PPO", clean, end=True), ""),
        ("SPPO learns faster where rewards are noisy", "SPPO above PPO with noise 0.05",
         both("SPPO", "PPO", noisy, mean), ""),
        ("SPPO ends above PPO where rewards are noisy", "SPPO above PPO with noise 0.05",
         both("SPPO", "PPO", noisy, mean, end=True), ""),
        ("reweighting samples (our plain form) helps where rewards are noisy", "the idea; the released form has none",
         both(*plain, noisy, mean),
         "without noise, in the same order, not counted: " + shown(both(*plain, clean))),
        ("wrong signs do harm", "shares of sign flips",
         [cost(pole, "CartPole-v1", "PPO", "flips 0.3"), cost(z, "InvertedDoublePendulum-v5", "PPO", "flips 0.3")], ""),
        ("SPPO depends less on its hyperparameters than PPO", "good scores over a range of α and β",
         sensitivity(grid, "SPPO"),
         "SPPO and PPO weighted are one method but for rounding<br>" + ours(sensitivity(grid, "SPPO plain"))),
        ("Z = −1 is a good choice", "−1 throughout", compare(z, near[0], ["flips 0"]),
         "only β·Z matters, bit for bit (a test)<br>" + ours(compare(z, near[1], ["flips 0"]))),
        ("SPPO helps against errors of a learned reward model", "better on IMDB and TL;DR",
         learned_rewards([("SPPO", "PPO")]),
         "small models ([which](language_models.md))<br>"
         + ours(learned_rewards([("plain SPPO", "mean-weight control")]), ", beside its control")),
        ("SPPO beats PPO on Atari", "UpNDown, 5,000,000 steps: 126,830 against 58,289",
         compare(games, [("SPPO beta=1", "PPO")], ["noise 0"], ", 100,000 steps"), at_full_length("robustness_atari")),
        ("SA2C beats A2C on Atari", "SA2C above A2C, 5,000,000 steps, β tuned per game", *sa2c()),
    ]
    return [[claim, reported, "<br>".join([*(text for _, text in measured), *[note] * bool(note)]), *verdict(measured)]
            for claim, reported, measured, note in rows]


def section(results: report.Results) -> str:
    """A study's question, figure, and differences in percent: a line for each comparison and task; those whose interval
    excludes zero are bold, those that Holm's correction leaves have a star."""
    study, found, rows = results.study, results.differences, []
    for (a, b), env_id in ((pair, env_id) for pair in results.pairs for env_id in results.tasks):
        cells = {}
        for x in found[found.of == "score"].itertuples():
            if (x.a, x.b, x.environment) == (a, b, env_id):
                mark = "**" * (x.verdict in (f"{a} higher", f"{b} higher"))
                star = r" \*" * (x.p < 0.05)
                cells[x.condition] = mark + percent(tuple(np.array(x.estimate[:3]) / x.unit)) + star + mark
        rows.append([f"{a} − {b}", env_id, *(cells.get(condition, "–") for condition in study.conditions)])
    path, steps = f"../studies/results/{results.folder.name}", sorted(set(results.runs.steps))
    figure = "heat_maps" if study.families else "differences"
    which = dict(last="the last evaluation", mean="the mean of all evaluations")[study.score]
    return "\n\n".join([
        f"*{study.question}* {seeds_of(results)} of {' or '.join(f'{n:,}' for n in steps)} steps; a run's score is "
        f"{which}.",
        f'<img src="{path}/{figure}.png" width="600" alt="{study.question}">',
        *report.spreads(results)[2:],
        *[report.table(["difference", "task", *study.conditions], rows)] * bool(rows),
        *[report.verdicts(found, named=False)] * bool(rows),
        f"[The whole report]({path}/report.md)",
    ])  # fmt: skip


def so_far(name: str) -> str:
    """Every evaluation of a study on one task; its runs may be under way."""
    points = pd.read_csv(ROOT / "studies" / "results" / name / "evaluations.csv")
    scores = points.pivot(index="step", columns=["method", "seed"], values="score")
    rows = [[f"{step:,}", *map(report.number, row)] for step, *row in scores.itertuples()]
    header = ["steps", *(f"{method}, seed {seed}" for method, seed in scores)]
    return report.table(header, rows).replace("| nan", "| –")


def main() -> None:
    folders = {name: ROOT / "studies" / "results" / name for name in SCALES}
    studies = {name: report.Results(load(name, SCALES[name]), x) for name, x in folders.items() if x.exists()}
    rows = claims(studies)
    words = [word for word in ("holds", "tie", "mixed", "undecided", "contradicted", "not tested")
             if word in {row[3] for row in rows}]  # fmt: skip
    by_verdict = [[word, "; ".join(row[0] + f" ({row[4]})" * bool(row[4]) for row in rows if row[3] == word)]
                  for word in words]  # fmt: skip
    whole = [[*row[:3], ", ".join(filter(None, row[3:]))] for row in rows]
    blocks = {name: section(results) for name, results in studies.items()} | dict(
        claims=report.table(["the claim", "the paper reports", "measured here", "verdict"], whole),
        verdicts=report.table(["verdict", "claims"], by_verdict), games=tables.games(),
        beside_peers=tables.beside_peers(), baseline=tables.baseline(), before_and_after=tables.before_and_after(),
        updown=so_far("robustness_atari"),
    )  # fmt: skip
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- (?!end)(\w+) -->", text):
            begin = text.index(f"<!-- {name} -->")
            end = text.index("<!-- end -->", begin)
            block = re.sub(r"(?<![\w`-])-(?=\d)", "−", re.sub(r"\bZ-", "Z=-", blocks[name]))
            text = text[:begin] + f"<!-- {name} -->\n{block}\n" + text[end:]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
