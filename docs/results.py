"""Writes the numbers of docs/results.md: what lies between <!-- NAME --> and <!-- end -->, from the committed tables.

    python docs/results.py

It runs nothing that learns: `studies/study.py collect`, `benchmark/score.py` and their like wrote the tables.
"""

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

PAGE = ROOT / "docs" / "results.md"
SCALES = dict(cartpole_noise=None, z_values=None, alpha_beta_grid=None, sign_flips=None, robustness_continuous="laptop")
Estimate = tuple[float, float, float]  # with the interval's ends
Measured = list[tuple[Estimate, str]]  # estimates that are positive if a claim holds, and how to say them


def percent(estimate: Estimate) -> str:
    return report.interval(estimate, lambda x: f"{round(100 * x)}", "+") + " %"


def unit(results: report.Results, env_id: str) -> float:
    return results.reference[env_id] - results.random[env_id]


def seeds_of(results: report.Results) -> str:
    n = sorted({len(runs) for runs in results.cases.values()})
    return " to ".join(map(str, dict.fromkeys((n[0], n[-1])))) + " seeds"


def verdict(measured: Measured) -> str:
    """In a word: positive, negative, both, or neither, which is a tie where an interval is narrow enough to say so."""
    up, down = any(low > 0 for (_, low, _), _ in measured), any(high < 0 for (*_, high), _ in measured)
    if up or down:
        return "mixed" if up and down else "holds" if up else "contradicted"
    narrow = any(high - low <= 2 * report.MARGIN for (_, low, high), _ in measured)
    return "not tested" if not measured else "tie" if narrow else "undecided"


def compare(results: report.Results | None, pairs: list[tuple[str, str]], conditions: list[str], what: str,
            lost: bool = False) -> Measured:
    """Mean over conditions of the score a − b, or of how much less than b a loses by noise, with its Welch interval, in
    units of the reference's clean score above the uniform policy."""
    measured = []
    for (a, b), env_id in ((pair, env_id) for pair in pairs for env_id in (results.tasks if results else [])):
        terms = [(sign / len(conditions), results.of(method, env_id, condition))
                 for condition in conditions for sign, method in ((1, a), (-1, b))]
        clean = [(sign, results.of(method, env_id, results.study.clean)) for sign, method in ((-1, a), (1, b))]
        estimate = tuple(np.array(report.contrast(*terms, *clean * lost)[:3]) / unit(results, env_id))
        measured.append((estimate, f"{a} − {b}, {env_id}{what}, {seeds_of(results)}: {percent(estimate)}"))
    return measured


def compare_all(results: report.Results, a: str, b: str, conditions: list[str], what: str) -> Measured:
    """Over all tasks, difference of interquartile means: of scores, or with two conditions of what the first costs."""
    scores = [results.normalized(method, condition) for condition in conditions for method in (a, b)]
    estimate = report.bootstrap(report.iqm_contrast(*(1, -1, -1, 1)[: len(scores)]), *scores)
    return [(estimate, f"{a} − {b}, {len(results.tasks)} tasks{what}, {seeds_of(results)}: {percent(estimate)}")]


def cost(results: report.Results | None, method: str, condition: str) -> Measured:
    """What a condition costs a method, in the same units."""
    measured, clean = [], results.study.clean if results else ""
    for env_id in results.tasks if results else []:
        terms = (1, results.of(method, env_id, clean)), (-1, results.of(method, env_id, condition))
        estimate = tuple(np.array(report.contrast(*terms)[:3]) / unit(results, env_id))
        measured.append((estimate, f"{condition} costs {method}, {env_id}, {seeds_of(results)}: {percent(estimate)}"))
    return measured


def correlations(results: report.Results | None) -> str:
    """Spearman's ρ between a run's share of sign flips by noise and its score within a noise level, pooled over levels
    by Fisher's z. It decides nothing: the score can move the share as well."""
    texts = []
    for env_id in results.tasks if results else []:
        runs = results.runs[(results.runs.environment == env_id) & (results.runs.flips_noise > 0)]
        levels = [rows for _, rows in runs.groupby("condition")]
        rho = [report.rank_correlation(rows.flips_noise, rows.score)[0] for rows in levels]
        z, n = np.average(np.arctanh(rho), weights=[len(x) - 3 for x in levels]), sum(len(x) - 3 for x in levels)
        half = 1.96 * ((1 + np.tanh(z) ** 2 / 2) / n) ** 0.5
        shown = report.interval(np.tanh([z, z - half, z + half]), "{:.2f}".format, "+")
        texts.append(f"rank correlation with flips by noise, within noise levels, {env_id}, {len(runs)} runs: {shown}")
    return "; ".join(texts)


def sensitivity(results: report.Results | None) -> Measured:
    """Spread over settings beside PPO's over the same range of its policy coefficient. The claim is that it is less."""
    measured = []
    for a, b, env_id, condition, gap in report.spread_gaps(results) if results else []:
        value, low, high = np.array(gap) / unit(results, env_id)
        text = f"spread over settings, {a} − {b}, {env_id}, {condition}: {percent((value, low, high))}"
        measured.append(((-value, -high, -low), text))
    return measured


def learned_rewards() -> Measured:
    """Gold scores of small language models, in units of what PPO gains."""
    runs = pd.read_csv(tables.RESULTS / "language.csv").sort_values("step").groupby(["reward", "method", "seed"])
    before, after, measured = runs.gold_score.first(), runs.gold_score.last(), []
    for reward in after.index.levels[0]:
        gain, ppo = (after - before)[reward, "PPO"].mean(), after[reward, "PPO"].to_numpy()
        estimate = report.contrast((1 / gain, after[reward, "SPPO"].to_numpy()), (-1 / gain, ppo))[:3]
        text = f"SPPO − PPO, small models, `{reward}`, {len(ppo)} seeds: {percent(estimate)} of PPO's gain"
        measured.append((estimate, text))
    return measured


def claims(studies: dict[str, report.Results]) -> str:
    pole, z, grid, flips, four = map(studies.get, SCALES)
    ids = [(name, row) for (name, env_id, steps), rows in tables.ours().items() for row in rows.values()
           if (env_id, steps) == ("ALE/KungFuMaster-v5", 200_000)]
    sa2c, balanced, a2c = (np.mean([float(row["mean"]) for name, row in ids if name == "sa2c_atari.py" + flags])
                           for flags in ("", " --alpha 0.871 --beta 1.742", " --alpha 1 --beta 0"))
    controls = [("SPPO", "PPO matched"), ("SPPO plain", "PPO mean weight")]
    settings = [("Z-1", "Z-0.5"), ("Z-1", "Z-2"), ("plain Z-1", "plain Z-0.5"), ("plain Z-1", "plain Z-2")]
    rows = [
        ("SPPO beats PPO on control tasks", "SPPO above PPO; 30 seeds, β tuned per task",
         compare(pole, [("SPPO", "PPO"), ("SPPO plain", "PPO")], ["noise 0"], ", no noise")
         + compare_all(four, "DSPPO", "DPPO", ["noise 0"], ", no noise"), ""),
        ("it is more robust against noisy rewards", "the same with reward noise 0.05",
         compare(pole, [("SPPO", "PPO"), controls[1]], ["noise 0.2", "noise 1"], ", less lost by noise", lost=True)
         + compare_all(four, "DSPPO", "DPPO", ["noise 0.05", "noise 0"], ", less lost by noise"), ""),
        ("it repairs advantages of the wrong sign", "an argument; signs were not turned on purpose",
         compare(pole, controls, ["flips 0.1", "flips 0.3"], ", signs turned"),
         "as released it has PPO's gradient times α + β\\|Z\\| ([derivation](symmetric_loss.md))"),
        ("wrong signs are what does harm", "shares of sign flips", cost(pole, "PPO", "flips 0.3")
         + cost(z, "PPO", "flips 0.3"), correlations(flips or pole)),
        ("it is less sensitive to its hyperparameters", "sweeps of its own α and β", sensitivity(grid), ""),
        ("Z = −1 is a good choice", "−1 throughout", compare(z, settings, ["flips 0", "flips 0.3"], ""),
         "only β·Z matters, bit for bit (a test)"),
        ("it helps against errors of a learned reward model", "better on IMDB and TL;DR", learned_rewards(), ""),
        ("SPPO beats PPO on Atari", "UpNDown, 5,000,000 steps: 126,830 against 58,289", [],
         "UpNDown, 100,000 steps only"),
        ("SA2C beats A2C on Atari", "SA2C above A2C", [], f"KungFuMaster, 200,000 steps, three seeds: {sa2c:,.0f}; "
         f"with a mean weight near 1 {balanced:,.0f}; A2C {a2c:,.0f}"),
    ]
    shown = [[claim, reported, "; ".join([*(text for _, text in measured), *[note] * bool(note)]), verdict(measured)]
             for claim, reported, measured, note in rows]
    return report.table(["the claim", "the paper reports", "measured here", "verdict"], shown)


def section(results: report.Results) -> str:
    """A study's question, figure, and differences in percent: a line for each comparison and task."""
    study, found, rows = results.study, results.differences[results.differences.of == "score"], []
    for (a, b), env_id in ((pair, env_id) for pair in results.pairs for env_id in results.tasks):
        cells = {x.condition: percent(tuple(np.array(x.estimate[:3]) / x.unit)) for x in found.itertuples()
                 if (x.a, x.b, x.environment) == (a, b, env_id)}
        rows.append([f"{a} − {b}", env_id, *(cells.get(condition, "–") for condition in study.conditions)])
    path, steps = f"../studies/results/{results.folder.name}", sorted(set(results.runs.steps))
    figure = "heat_maps" if study.families else "differences"
    which = dict(last="the last evaluation", mean="the mean of all evaluations")[study.score]
    return "\n\n".join([
        f"*{study.question}* {seeds_of(results)} of {' or '.join(f'{n:,}' for n in steps)} steps; a run's score is "
        f"{which}.",
        f'<img src="{path}/{figure}.png" width="600" alt="{study.question}">',
        *(report.spreads(results)[2:] if study.families else
          [report.table(["difference", "task", *study.conditions], rows), report.verdicts(results.differences)]),
        f"[The whole report]({path}/report.md)",
    ])  # fmt: skip


def main() -> None:
    folders = {name: ROOT / "studies" / "results" / name for name in SCALES}
    studies = {name: report.Results(load(name, SCALES[name]), x) for name, x in folders.items() if x.exists()}
    blocks = {name: section(results) for name, results in studies.items()} | dict(
        claims=claims(studies), games=tables.games(), beside_peers=tables.beside_peers(), baseline=tables.baseline(),
        before_and_after=tables.before_and_after())  # fmt: skip
    text = PAGE.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = text.index(f"<!-- {name} -->\n"), text.index("<!-- end -->", text.index(f"<!-- {name} -->"))
        block = re.sub(r"(?<![\w`-])-(?=\d)", "−", block)
        text = text[:begin] + f"<!-- {name} -->\n\n{block}\n\n" + text[end:]
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
