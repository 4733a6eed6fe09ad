"""The figures of results.md; `python docs/results.py` draws them from the committed tables."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

FIGURES = Path(__file__).parent / "figures"
WIDTH = 7  # inches, shown at 700 pixels: what has 8 points here has 11 pixels there
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}
# Okabe and Ito's colours, which the colour-blind can tell apart; the same in all figures here.
TASKS = {"CartPole": "#0072B2", "the pendulum": "#D55E00", "LunarLander": "#009E73"}
METHODS = {
    "PPO": "black",
    "SPPO": "#CC79A7",
    "plain form": "#E69F00",
    "its control": "#56B4E9",
    "Gaussian PPO": "0.6",
}
STUDIED = {  # what they are called in cartpole_noise, and in robustness_calm
    "PPO": ("PPO", "DPPO"),
    "SPPO": ("SPPO", "DSPPO"),
    "plain form": ("SPPO plain", "DSPPO plain"),
    "its control": ("PPO mean weight", "DPPO mean weight"),
    "Gaussian PPO": (None, "PPO"),
}
THE_PAPER_S = {"SPPO": 126_830, "PPO": 58_289}  # on UpNDown


def use_style() -> None:
    plt.switch_backend("agg")
    plt.rcdefaults()
    plt.rcParams.update(STYLE)


def save(name: str) -> None:
    plt.savefig(FIGURES / f"{name}.png")
    plt.close()


def bar(ax, row, place: float, colour: str) -> None:
    """An estimate with its 95 % interval, in percent."""
    ax.plot([100 * row.low, 100 * row.high], [place, place], color=colour, lw=2.5)
    ax.plot(100 * row.value, place, "o", color=colour, ms=6)


def percent_axis(ax, worse: str, better: str, limit: float) -> None:
    """Says which side is better."""
    ax.axvspan(-15, 15, color="0.92", lw=0)
    ax.axvline(0, color="0.4", lw=1)
    ax.set_xlim(-limit, limit)
    ax.set_xticks([-50, 0, 50], ["−50 %", "0", "+50 %"])
    ax.set_xlabel(f"← {worse} better      {better} better →")


def draw_forest(found: pd.DataFrame, better: dict[str, tuple[str, str]], name: str) -> None:
    """A panel for each comparison, a row for each outcome with and without noise, a bar for each
    task."""
    rows = [*found[["outcome", "noise"]].drop_duplicates().itertuples(index=False)]
    size = (WIDTH, 0.9 + 0.7 * len(rows))
    figure, axes = plt.subplots(1, len(better), figsize=size, sharey=True, squeeze=False)
    for ax, (panel, sides) in zip(axes[0], better.items()):
        percent_axis(ax, *sides, 80)
        ax.set_title(panel)
        here = found[found.comparison == panel]
        for y, case in enumerate(rows):
            estimates = here[(here.outcome == case[0]) & (here.noise == case[1])]
            for i, row in enumerate(estimates.itertuples()):
                bar(ax, row, y + 0.24 * (i - (len(estimates) - 1) / 2), TASKS[row.task])
        ax.set_yticks(range(len(rows)), [",\n".join(row) for row in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
    seeds = found.groupby("task", sort=False).seeds.min()
    marks = [plt.Line2D([], [], color=TASKS[task], marker="o", lw=2.5) for task in seeds.index]
    labels = [f"{task} ({n} seeds)" for task, n in seeds.items()]
    figure.legend(marks, labels, loc="outside upper center", ncols=3, frameon=False)
    save(name)


def label_lines(ax, ends: dict[str, float]) -> None:
    """Names at the right ends of lines, moved where they would overlap."""
    low, high = ax.get_ylim()
    order = sorted(ends, key=ends.get)
    places = [(ends[method] - low) / (high - low) for method in order]
    for i in range(1, len(places)):  # up
        places[i] = max(places[i], places[i - 1] + 0.11)
    places[-1] = min(places[-1], 1)
    for i in range(len(places) - 2, -1, -1):  # and down again, from the top
        places[i] = min(places[i], places[i + 1] - 0.11)
    for method, place in zip(order, places):
        text = dict(color=METHODS[method], fontsize=8, weight="bold", va="center")
        ax.text(1.03, place, method, transform=ax.transAxes, **text)


def draw_curves(studies: list, names: dict[str, str]) -> None:
    """A row of panels for each task, a column for each noise; a thin line for each seed, a thick
    one for their median. `studies` are those of study_report.Results."""
    cases = [(i, env_id) for i, results in enumerate(studies) for env_id in results.tasks]
    size = (WIDTH, 2.2 * len(cases))
    figure, axes = plt.subplots(len(cases), 3, figsize=size, sharex="row", sharey="row")
    for line, (i, env_id) in zip(axes, cases):
        points = studies[i].evaluations
        points = points[points.environment == env_id]
        line[0].set_ylim(*points.score.quantile([0.01, 0.995]))  # one seed does not set the axis
        conditions = [x for x in studies[i].study.conditions if x.startswith("noise")]
        for ax, condition in zip(line, conditions):
            here = points[points.condition == condition]
            scores = here.pivot(index=["method", "seed"], columns="step", values="score")
            ends = {}
            for method, known_as in STUDIED.items():
                if known_as[i]:
                    seeds = scores.loc[known_as[i]]
                    steps = seeds.columns / 1000
                    ax.plot(steps, seeds.T, color=METHODS[method], lw=0.4, alpha=0.2)
                    ax.plot(steps, seeds.median(), color=METHODS[method], lw=2, zorder=3)
                    ends[method] = seeds.median().iloc[-1]
            label_lines(ax, ends)
            ax.set_title(condition)
        line[0].set_ylabel(f"{names[env_id]}: score")
        line[1].set_xlabel("thousand steps")
    save("curves")


def factor(grid, studies: list, names: dict[str, str]) -> dict[str, pd.DataFrame]:
    """The grid's scores without noise by task, with k = α + β|Z| and β|Z|/α, in percent of what PPO
    reaches in the studies of this task."""
    unit = {x: study.reference[x] - study.random[x] for study in studies for x in study.tasks}
    scores = {}
    for env_id in grid.tasks:
        rows = []
        for method in grid.study.methods:
            knobs = {name: float(x) for name, x in re.findall(r"(\w+)=(\S+)", method)}
            alpha, beta = knobs.get("alpha", knobs.get("k", 1)), knobs.get("beta", 0)
            family = "plain form" if "plain" in method else method.split()[0]
            for seed, score in grid.of(method, env_id, grid.study.clean).items():
                above = 100 * (score - grid.random[env_id]) / unit[env_id]
                rows.append([family, seed, alpha + beta, beta / alpha, above])
        rows = pd.DataFrame(rows, columns=["method", "seed", "k", "ratio", "score"])
        scores[names[env_id]] = rows.drop_duplicates()  # PPO is PPO with k = 1
    return scores


def draw_factor(scores: dict[str, pd.DataFrame]) -> None:
    """PPO and SPPO against k, the plain form against β|Z|/α."""
    size = (WIDTH, 2 * len(scores))
    _, axes = plt.subplots(len(scores), 2, figsize=size, sharey=True, sharex="col")
    for (task, rows), line in zip(scores.items(), axes):
        for ax, knob, methods in zip(line, ("k", "ratio"), (["PPO", "SPPO"], ["plain form"])):
            ax.axhline(100, color="0.8", lw=1)
            for method in methods:
                points = rows[rows.method == method]
                means = points.groupby(knob).score.mean()
                ax.plot(points[knob], points.score, "o", color=METHODS[method], ms=3.5, alpha=0.5)
                ax.plot(means.index, means, color=METHODS[method], lw=2, label=method)
            ax.set(xscale="log", ylim=(0, 145), title=task)
            ax.yaxis.set_major_formatter("{x:.0f} %")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.legend(frameon=False, loc="lower left", ncols=2)
    axes[-1][0].set_xlabel("k = α + β|Z|, the factor on PPO's loss")
    axes[-1][1].set_xlabel("β|Z| / α, how unequal weights are")
    save("factor")


def draw_lengths(game: pd.DataFrame, others: pd.DataFrame) -> None:
    """`game`: evaluations of long runs on UpNDown. `others`: estimates, each with a label."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), width_ratios=[1, 1.2])
    for (method, seed), curve in game.groupby(["method", "seed"]):
        x, y = curve.step / 1e6, curve.score / 1000
        left.plot(x, y, color=METHODS[method], lw=2 if seed == 1 else 1)
        if seed == 1:
            left.text(x.iloc[-1] + 0.1, y.iloc[-1], method, color=METHODS[method], va="center")
    for method, score in THE_PAPER_S.items():
        left.plot(5, score / 1000, "D", color=METHODS[method], ms=7)
        left.text(4.6, score / 1000, f"the paper's {method}", ha="right", va="center")
    left.set(title="UpNDown, one seed each", xlabel="million steps", ylabel="score, thousands")
    left.set_xlim(0, 6.2)
    percent_axis(right, "usual", "symmetric", 90)
    for place, row in enumerate(others.itertuples()):
        bar(right, row, -place, TASKS.get(row.task, "0.3"))
    right.set_yticks(range(0, -len(others), -1), others.label)
    save("lengths")
