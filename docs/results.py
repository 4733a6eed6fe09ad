"""Writes the tables, numbers and figures of results.md, and the README's verdicts.

    python docs/results.py

What it writes stands between <!--NAME--> and <!--/-->. All of it follows from the committed tables,
which `studies/study.py collect` and the commands in benchmark/ wrote. Nothing learns here.
"""

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "studies")]
import bandit  # noqa: E402
import results_figures as figures  # noqa: E402
import study_report as report  # noqa: E402
import tables  # noqa: E402
from study_file import load  # noqa: E402

PAGES = [ROOT / "docs" / "results.md", ROOT / "README.md"]
RESULTS = ROOT / "studies" / "results"
ADDED = range(16, 26)  # seeds of robustness_calm, after the results of the first 15
MARGIN = 0.15  # a larger gain is excluded, or the question is open

NAMES = {
    "CartPole-v1": "CartPole",
    "InvertedDoublePendulum-v5": "the pendulum",
    "LunarLanderContinuous-v3": "LunarLander",
}
SPPO = "SPPO − PPO"
PLAIN = "plain form − its control"
SA2C = "SA2C − its control"
PAIRS = {  # by study
    "cartpole_noise": {SPPO: ("SPPO", "PPO"), PLAIN: ("SPPO plain", "PPO mean weight")},
    "robustness_calm": {SPPO: ("DSPPO", "DPPO"), PLAIN: ("DSPPO plain", "DPPO mean weight")},
    "robustness_continuous": {SPPO: ("DSPPO", "DPPO")},
    "sa2c": {SA2C: ("SA2C", "A2C mean weight")},
}


@dataclass(frozen=True)
class Rules:
    """What was decided after results had been seen. The defaults are the page's."""

    last: int = 3  # evaluations that make the end
    levels: tuple = (0, 1)  # of noise, that are averaged
    without: Iterable[int] = ()  # seeds of robustness_calm
    paired: bool = True
    error: float = 0.05  # of a one-sided bound


def compare(first: pd.Series, second: pd.Series, rules: Rules = Rules()) -> dict:
    """Of the difference of two means over seeds: its value, Student's two-sided 95 % interval and
    p-value, and `upper`, the end of its one-sided interval."""
    both = pd.concat([first, second], axis=1).dropna()
    a, b = both.to_numpy().T
    if rules.paired:
        test = stats.ttest_1samp(a - b, 0)
    else:
        test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    upper = test.confidence_interval(1 - 2 * rules.error).high
    ends = dict(low=low, high=high, upper=upper, p=test.pvalue)
    return dict(value=a.mean() - b.mean(), **ends, seeds=len(both))


def outcomes(points: pd.DataFrame, last: int) -> dict[str, pd.Series]:
    """Scores by method, environment, condition and seed: of all evaluations, and of the last."""
    keys = [*report.CASE, "seed"]
    points = points.sort_values("step")
    ends = points.groupby(keys).tail(last).groupby(keys).score.mean()
    return {"learns faster": points.groupby(keys).score.mean(), "ends higher": ends}


def effects(studies: dict[str, report.Results], rules: Rules = Rules()) -> pd.DataFrame:
    """A row for each comparison, outcome, noise and task, in units of what the study's reference
    reaches above the uniform policy without noise."""
    rows = []
    for name, results in studies.items():
        study, points = results.study, results.evaluations
        if name == "robustness_calm":
            points = points[~points.seed.isin(rules.without)]
        noisy = [x for x in study.conditions if x.startswith("noise") and x != study.clean]
        noises = {
            "without noise": [study.clean],
            "with noise": [x for i, x in enumerate(noisy) if i in rules.levels],
        }
        scores_of = outcomes(points, rules.last)
        cases = product(PAIRS[name].items(), scores_of.items(), noises.items(), results.tasks)
        for (comparison, pair), (outcome, scores), (noise, conditions), env_id in cases:
            unit = scores[study.reference, env_id, study.clean].mean() - results.random[env_id]
            sums = [sum(scores[x, env_id, at] for at in conditions) for x in pair]
            task = NAMES.get(env_id, env_id.partition("-")[0])
            row = dict(comparison=comparison, outcome=outcome, noise=noise, task=task)
            rows.append(row | compare(*(x / len(conditions) / unit for x in sums), rules))
    return pd.DataFrame(rows)


def of(found: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The rows that have all these names."""
    columns = found[["comparison", "outcome", "noise", "task"]]
    return found[columns.isin(names).sum(axis=1) == len(names)]


def percent(row, sign: int = 1) -> str:
    """An estimate with its interval. With sign = -1, how much less."""
    value, *ends = (round(100 * sign * x) for x in (row.value, row.low, row.high))
    plus = "+" if value > 0 and sign > 0 else ""
    return f"{plus}{value} ({min(ends)} to {max(ends)}) %"


def bound(rows: pd.DataFrame) -> int:
    """The largest gain that is not excluded, in percent, rounded up. A claim about the largest of
    several effects needs no correction for their number: whichever it is, its own bound holds."""
    return max(0, math.ceil(100 * rows.upper.max()))


def answer(rows: pd.DataFrame, note: str = "") -> str:
    """The verdict on the claim of a gain, from its estimates on one task or more."""
    apart = report.holm(rows.p.to_numpy(float)) < 0.05
    gains = rows[apart & (rows.value > 0)]
    losses = rows[apart & (rows.value < 0)]
    wide = rows[~apart & (rows.upper > MARGIN)]
    rest = rows.drop([*gains.index, *wide.index])
    parts = []
    if len(gains):
        parts.append(f"gain on {' and '.join(gains.task)}{note}")
    if len(wide):
        half = round(50 * (wide.high - wide.low).max())
        parts.append(f"open (half-width {half} %) on {' and '.join(wide.task)}")
    if not parts or (len(rest) and not len(losses)):
        parts.append("else " * bool(parts) + f"no gain above {bound(rest)} %")
    if len(losses):
        parts.append(f"loss on {' and '.join(losses.task)}")
    return "; ".join(parts)


def language() -> pd.DataFrame:
    """Gold scores of small language models, SPPO − PPO, in units of what PPO gains."""
    points = pd.read_csv(tables.RESULTS / "language.csv").sort_values("step")
    scores = points.groupby(["reward", "method", "seed"]).gold_score
    first, last = scores.first(), scores.last()
    rows = []
    for reward, task in {"proxy": "good rewards", "weak_proxy": "weak rewards"}.items():
        gain = (last - first)[reward, "PPO"].mean()
        row = compare(last[reward, "SPPO"] / gain, last[reward, "PPO"] / gain)
        rows.append(dict(task=task, label=f"language, {task}") | row)
    return pd.DataFrame(rows)


def kung_fu() -> pd.DataFrame:
    """SA2C − A2C on KungFuMaster, in units of A2C's score above the uniform policy: at a mean
    weight near 1, with default weights, and A2C with the mean of these."""
    game = "ALE/KungFuMaster-v5"

    def scores(flags: str) -> pd.Series:
        rows = tables.ours()[f"sa2c_atari.py {flags}".strip(), game, 200_000]
        return pd.Series({seed: float(row["mean"]) for seed, row in rows.items()})

    a2c = scores("--alpha 1 --beta 0")
    unit = a2c.mean() - float(tables.peers()["uniform", game, 0][1]["mean"])
    kinds = {"equal": "--alpha 0.871 --beta 1.742", "default": "", "mean": "--alpha 0.574 --beta 0"}
    rows = [compare(scores(flags) / unit, a2c / unit) for flags in kinds.values()]
    return pd.DataFrame(rows, [*kinds]).assign(task="KungFuMaster", label="SA2C, KungFuMaster")


def up_n_down(games: report.Results) -> pd.DataFrame:
    """SPPO − PPO after 100,000 steps."""
    env_id = games.tasks[0]
    unit = games.reference[env_id] - games.random[env_id]
    scores = (games.of(x, env_id, games.study.clean) / unit for x in ("SPPO beta=1", "PPO"))
    return pd.DataFrame([dict(task="UpNDown", label="UpNDown") | compare(*scores)])


def long_runs() -> pd.DataFrame:
    """Final scores on UpNDown at the paper's length (seeds, methods)."""
    runs = pd.read_csv(RESULTS / "robustness_atari" / "runs.csv")
    return runs.pivot(index="seed", columns="method", values="score").dropna()


def wrong_signs(results: report.Results, env_id: str) -> str:
    """What three wrong signs in ten cost PPO."""
    unit = results.reference[env_id] - results.random[env_id]
    conditions = (results.study.clean, "flips 0.3")
    row = compare(*(results.of("PPO", env_id, at) / unit for at in conditions))
    word = f"loss of {round(100 * row['value'])} %" if row["low"] > 0 else "none"
    return f"{word} on {NAMES[env_id]}"


def over_gaussian(calm: report.Results) -> int:
    """The least that SPPO is behind Gaussian PPO, in percent, over tasks and noises."""
    rows = calm.differences
    rows = rows[(rows.a == "DSPPO") & (rows.b == "PPO") & (rows.of == "score")]
    return round(min(-100 * x.estimate[0] / x.unit for x in rows.itertuples()))


def head(found: pd.DataFrame, folder: str = "") -> str:
    """What is proved, excluded and open: a sentence each."""
    clean, noisy = "without noise", "with noise"
    cases = [("learns faster", clean), ("ends higher", clean), ("ends higher", noisy)]
    speed, end, noisy_end = (bound(of(found, SPPO, *case)) for case in cases)
    proved = (
        "- **Proved:** SPPO, as its authors released it, has exactly PPO's policy gradient, times "
        f"a constant of its settings, α + β|Z| ([derivation]({folder}symmetric_loss.md))."
    )
    excluded = (
        "- **Excluded:** short runs on three control tasks at β = 20, the released code's example "
        f"for Ant, rule out that SPPO gains over PPO more than {speed} % in speed or {end} % at "
        f"the end without noise, or {noisy_end} % at the end with noise, at 95 % confidence each."
    )
    still_open = (
        "- **Open:** nobody knows whether SPPO gains in long games, or in speed on LunarLander "
        "with noise, nor whether weights on samples help, which SA2C has and released SPPO has not."
    )
    return "\n".join([proved, excluded, still_open])


def verdicts(found: pd.DataFrame) -> str:
    """The README's part."""
    figure = '<img src="docs/figures/forest.png" width="700" alt="Differences on three tasks">'
    caption = (
        "*Left SPPO beside PPO, right our plain form, which weighs samples, beside PPO with its "
        "mean weight. Bars are 95 % intervals. [Results](docs/results.md) answer claim by claim.*"
    )
    return "\n\n".join([head(found, "docs/"), figure, caption])


def claims(found: pd.DataFrame, studies: dict, games: pd.DataFrame, rewards: pd.DataFrame) -> str:
    """Claim, answer, and where there is more."""
    gradient = "[proof](symmetric_loss.md#released-sppo-a-constant-factor)"
    knobs = "[proof](symmetric_loss.md#what-α-β-and-z-can-change)"
    control = "[control](#control-and-noise)"
    weights = "[weights](#weights-on-samples)"
    lengths = "[games](#games-and-lengths)"
    rows = [
        ["SPPO is PPO with a scaled policy loss", r"by algebra: times α + β\|Z\|", gradient],
        ["Z = −1 is a good choice", "by algebra: only β·Z matters", knobs],
        ["SPPO depends less on α and β", "by algebra: as PPO depends on its factor", knobs],
    ]
    subjects = {SPPO: ("SPPO", control), PLAIN: ("plain form", weights), SA2C: ("SA2C", weights)}
    for case, estimates in found.groupby(["comparison", "outcome", "noise"], sort=False):
        subject, link = subjects[case[0]]
        note = ", found after looking" * (case[0] == PLAIN)
        rows.append([f"{subject} {case[1]}, {case[2]}", answer(estimates, note), link])
    signs = [
        wrong_signs(studies["z_values"], "InvertedDoublePendulum-v5"),
        wrong_signs(studies["cartpole_noise"], "CartPole-v1"),
    ]
    long = long_runs()
    count = "one seed" if len(long) == 1 else f"{len(long)} seeds"
    long_text = f"{count} each: SPPO {long.SPPO.mean():,.0f}, PPO {long.PPO.mean():,.0f}"
    behind = f"default weights {round(-100 * games.value['default'])} % behind (three seeds)"
    sa2c = f"open at mean weight near 1; {behind}"
    gaussian = f"loss of {over_gaussian(studies['robustness_calm'])} % or more on both tasks"
    rows += [
        ["SPPO beats the usual Gaussian PPO", gaussian, control],
        ["SPPO loses less by noise", "gain on the pendulum: a floor effect", control],
        ["three wrong signs in ten harm PPO", ", ".join(signs), control],
        ["SA2C ends higher in a game, KungFuMaster", sa2c, lengths],
        ["SPPO ends higher in a long game, UpNDown", f"open ({long_text})", lengths],
        ["SPPO helps with wrong reward models", answer(rewards), "[language](language_models.md)"],
    ]
    return report.table(["claim (of the paper; plain form: ours)", "answer", "more"], rows)


def sa2c_text(results: report.Results | None) -> str:
    """SA2C on control tasks, once there are runs of it."""
    if results is None:
        return "SA2C's study on control tasks, [sa2c](../studies/sa2c.toml), has no results yet."
    report_at = "../studies/results/sa2c/report.md"
    return f"""\
<img src="figures/sa2c.png" width="700" alt="SA2C beside A2C with its mean weight: differences">

SA2C, {results.runs.steps.max():,.0f} steps, percent of A2C's score ([report]({report_at}))."""


def choices(studies: dict[str, report.Results], more: dict[str, report.Results]) -> str:
    """What each choice that was made after results had been seen would change."""
    variants = [
        ("this page", studies, Rules()),
        ("last evaluation alone", studies, Rules(last=1)),
        ("weaker noise alone", studies, Rules(levels=(0,))),
        ("stronger noise alone", studies, Rules(levels=(1,))),
        ("unpaired (Welch)", studies, Rules(paired=False)),
        ("corrected for three tasks", studies, Rules(error=0.05 / 3)),
        ("first 15 seeds", studies, Rules(without=ADDED)),
        ("ten added seeds", studies, Rules(without=range(1, 16))),
        ("without outlier seed 12", studies, Rules(without=[12])),
        ("five-seed study, too", studies | more, Rules()),
    ]
    rows = []
    for text, chosen, rules in variants:
        found = of(effects(chosen, rules), SPPO)
        bounds = found.groupby(["outcome", "noise"], sort=False)
        rows.append([text, *(str(bound(x)) for _, x in bounds)])
    header = ["choice", "faster", "faster, noise", "higher", "higher, noise"]
    return report.table(header, rows)


def more_steps(calm: report.Results, env_id: str) -> float:
    """How many more steps SPPO needs to the same score, as a share: what stretches PPO's mean curve
    so that it fits SPPO's best."""
    points = calm.evaluations[calm.evaluations.environment == env_id]
    points = points[points.condition == calm.study.clean]
    curves = points.groupby(["method", "step"]).score.mean()
    slow, fast = curves["DSPPO"], curves["DPPO"]
    shares = np.linspace(0, 0.3, 301)
    fits = [np.interp(slow.index / (1 + share), fast.index, fast) for share in shares]
    return shares[np.argmin([((fit - slow) ** 2).sum() for fit in fits])]


def numbers(found: pd.DataFrame, calm: report.Results, grid: dict, games: pd.DataFrame) -> dict:
    """Those in the page's sentences, by name."""
    pendulum, lander = calm.tasks
    stars = calm.differences[calm.differences.p < 0.05]
    floor = stars[stars.of == "loss"]
    less = [100 * x.estimate[0] / x.unit for x in floor.itertuples()]
    noisy = [calm.of(x, pendulum, "noise 0.2").mean() for x in {*floor.a, *floor.b}]
    gaussian = calm.differences[(calm.differences.b == "PPO") & (calm.differences.of == "score")]
    weights = calm.runs[(calm.runs.environment == lander) & (calm.runs.condition == "noise 0")]
    weights = weights.groupby("method").mean_weight.mean()
    rows = calm.differences[calm.differences.b == "DPPO matched"].query("of == 'loss'")
    rows = rows[(rows.environment == pendulum) & (rows.condition == "noise 0.2")]
    shrunk = [round(100 * x / rows.unit.iloc[0]) for x in rows.estimate.iloc[0][:3]]
    long = long_runs().mean()
    paper = figures.THE_PAPER_S
    listed = pd.concat([pd.read_csv(x) for x in sorted(RESULTS.glob("*/runs.csv"))]).command
    plain = grid["the pendulum"].query("method == 'plain form'").groupby("ratio").score.mean()
    slower = of(found, SPPO, "learns faster", "without noise", "the pendulum").iloc[0]
    gains = {}
    for name, rules in dict(lander=Rules(), last=Rules(last=1), first=Rules(without=ADDED)).items():
        rows = effects({"robustness_calm": calm}, rules)
        gains[name] = percent(of(rows, PLAIN, "ends higher", "with noise", "LunarLander").iloc[0])
    texts = gains | {
        "slower": percent(slower, -1),
        "steps": f"{100 * more_steps(calm, pendulum):.0f} %",
        "gaussian": f"{min(-100 * x.estimate[0] / x.unit for x in gaussian.itertuples()):.0f} %",
        "stars": f"{len(stars)}",
        "floor": f"{len(floor)}",
        "less": f"{min(less):.0f} to {max(less):.0f} %",
        "shrunk": "{} ({} to {}) %".format(*shrunk),
        "noisy": f"{min(noisy):.0f} to {max(noisy):.0f}",
        "clean": f"{calm.of('DPPO', pendulum, 'noise 0').mean():,.0f}",
        "weak": f"{plain[plain.index < 0.3].mean():.0f} %",
        "strong": "{:.0f} to {:.0f} %".format(*plain[plain.index > 20].agg(["min", "max"])),
        "default": percent(games.loc["default"], -1),
        "mean": percent(games.loc["mean"], -1),
        "equal": percent(games.loc["equal"]),
        "ratio": f"{long['SPPO'] / long['PPO']:.1f}",
        "paper_ratio": f"{paper['SPPO'] / paper['PPO']:.1f}",
        "listed": f"{len(listed):,}",
        "distinct": f"{listed.nunique():,}",
        "control_weight": f"{weights['DPPO mean weight']:.2f}",
        "plain_weight": f"{weights['DSPPO plain']:.2f}",
    }
    for beta in bandit.BETAS:
        texts[f"progress_{beta}"] = f"{bandit.efficiency(bandit.EXAMPLE, beta):.2f}"
        texts[f"even_{beta}"] = f"{bandit.break_even(bandit.EXAMPLE, beta):.1f}"
    return texts


def fill(page: str, texts: dict[str, str]) -> str:
    """The page with each text in its place; minus signs are real ones."""

    def put(found: re.Match) -> str:
        return found[1] + re.sub(r"(?<![\w`-])-(?=\d)", "−", texts[found[2]]) + found[3]

    return re.sub(r"(<!-- ?(\w+) ?-->).*?(<!-- ?(?:/|end) ?-->)", put, page, flags=re.DOTALL)


def load_studies() -> dict[str, report.Results]:
    """The committed ones that the page tells of."""
    laptop = ("robustness_continuous", "beta_atari")
    names = [*PAIRS, "z_values", "alpha_beta_grid", "beta_atari"]
    return {
        name: report.Results(load(name, "laptop" if name in laptop else None), RESULTS / name)
        for name in names
        if (RESULTS / name).exists()
    }


def main() -> None:
    studies = load_studies()
    control = {name: studies[name] for name in ("cartpole_noise", "robustness_calm")}
    longer = {"robustness_continuous": studies["robustness_continuous"]}
    found = effects(control)
    sa2c = effects({"sa2c": studies["sa2c"]}) if "sa2c" in studies else pd.DataFrame()
    grid = figures.factor(studies["alpha_beta_grid"], [*control.values()], NAMES)
    games = kung_fu()
    rewards = language()

    blocks = {
        "head": head(found),
        "verdicts": verdicts(found),
        "claims": claims(pd.concat([found, sa2c]), studies, games, rewards),
        "sa2c": sa2c_text(studies.get("sa2c")),
        "choices": choices(control, longer),
        "baseline": tables.beside_peers(),
    }
    texts = {name: f"\n{block}\n" for name, block in blocks.items()}
    texts |= numbers(found, studies["robustness_calm"], grid, games)
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), texts), encoding="utf-8")

    others = of(effects(longer), "ends higher")
    noise = others.noise.map({"without noise": "", "with noise": ", noise"})
    others = others.assign(label=others.task + noise)
    others = [up_n_down(studies["beta_atari"]), games.loc[["equal"]], others, rewards]
    game = pd.read_csv(RESULTS / "robustness_atari" / "evaluations.csv")
    figures.use_style()
    figures.draw_forest(found, {SPPO: ("PPO", "SPPO"), PLAIN: ("control", "plain")}, "forest")
    figures.draw_curves([*control.values()], NAMES)
    figures.draw_factor(grid)
    figures.draw_lengths(game, pd.concat(others))
    bandit.draw()
    if len(sa2c):
        figures.draw_forest(sa2c, {SA2C: ("control", "SA2C")}, "sa2c")


if __name__ == "__main__":
    main()
