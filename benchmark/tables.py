"""The tables of final scores in docs/checks.md and docs/results.md, in Markdown, from
`results/scores.csv` and `results/reference.csv`; `python docs/results.py` writes them there."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats
from score import read

RESULTS = Path(__file__).parent / "results"
NO_NAME = r" --(env-id|seed|total-timesteps|eval-episodes|torch-threads) \S+"  # flags left out


def interval(scores) -> tuple[float, float]:
    """Mean and half-width of the 95 % t interval."""
    error = np.std(scores, ddof=1) / len(scores) ** 0.5
    return np.mean(scores), stats.t.ppf(0.975, len(scores) - 1) * error


def difference(ours, theirs) -> tuple[float, float, float]:
    """Difference of the means and its 95 % interval (Welch)."""
    result = stats.ttest_ind(ours, theirs, equal_var=False)
    return np.mean(ours) - np.mean(theirs), *result.confidence_interval(0.95)


def markdown(header: str, rows: list[list]) -> str:
    lines = [header.split(" | "), ["---"] * len(header.split(" | ")), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def peers() -> dict[tuple[str, str, int], dict[int, dict]]:
    """Rows of Stable-Baselines3 and the uniform policy: by method, environment and steps, then by
    seed."""
    rows = defaultdict(dict)
    for row in read(RESULTS / "reference.csv"):
        env = re.sub("(.*)NoFrameskip-v4", r"ALE/\1-v5", row["env_id"])
        rows[row["method"], env, int(row["steps"])][int(row["seed"])] = row
    return rows


def ours() -> dict[tuple[str, str, int], dict[int, dict]]:
    """Rows by script with flags, environment and steps, then by seed."""
    rows = defaultdict(dict)
    for row in read(RESULTS / "scores.csv"):
        command = row["command"]
        env = re.search(r"--env-id (\S+)", command)[1]
        seed = int(re.search(r"--seed (\S+)", command)[1])
        name = re.sub(NO_NAME, "", command)
        rows[name, env, int(row["steps"])][seed] = row
    return rows


def commits(rows) -> str:
    return ", ".join(sorted({row["commit"] for row in rows}))


def games() -> str:
    """SPPO beside the uniform policy, a line for each seed."""
    lines = []
    for (name, env, steps), rows in sorted(ours().items()):
        if name != "sppo_atari.py":
            continue
        for seed, row in sorted(rows.items()):
            cells = [env, seed, f"{steps:,}", f"{int(row['seconds']) / 60:.0f}"]
            for one in (row, peers()["uniform", env, 0][1]):
                episodes = int(one["episodes"])
                half = stats.t.ppf(0.975, episodes - 1) * float(one["std"]) / (episodes - 1) ** 0.5
                cells.append(f"{float(one['mean']):.0f} ± {half:.0f} ({episodes} games)")
            lines.append(cells)
    return markdown("game | seed | steps | minutes | trained policy | uniform policy", lines)


def means(rows: dict[int, dict], seeds) -> list[float]:
    return [float(rows[seed]["mean"]) for seed in seeds]


def beside_peers() -> str:
    """All our scores, beside Stable-Baselines3's and the uniform policy's where there are some."""
    lines = []
    for (name, env, steps), rows in sorted(ours().items(), key=lambda item: item[0][1::-1]):
        seeds = sorted(seed for seed in rows if seed <= 3)
        scores = means(rows, seeds)
        listed = ", ".join(f"{x:.0f} (seed {seed})" for seed, x in zip(seeds, scores))
        code = commits(rows[seed] for seed in seeds)
        cells = [f"`{name}`", env, f"{steps:,}", code, listed, f"{np.mean(scores):.0f}"]

        peer_rows = peers()["a2c" if "a2c" in name else "ppo", env, steps]
        uniform_rows = peers()["uniform", env, 0]
        if uniform_rows and {1, 2, 3} <= peer_rows.keys():
            peer = np.mean(means(peer_rows, (1, 2, 3)))
            uniform = means(uniform_rows, uniform_rows)[0]
            cells += [f"{(peer + uniform) / 2:.0f}", f"{peer:.0f}", f"{uniform:.0f}"]
        else:
            cells += ["–"] * 3
        lines.append(cells)
    header = "script | environment | steps | code | seeds' final scores | mean"
    return markdown(f"{header} | halfway | Stable-Baselines3 | uniform", lines)


def baseline() -> str:
    """Our PPO against Stable-Baselines3's, on the seeds that both have."""
    lines = []
    for (name, env, steps), rows in sorted(ours().items()):
        peer_rows = peers()["ppo", env, steps]
        both = sorted(rows.keys() & peer_rows.keys())
        if name not in ("ppo_baseline.py --policy gaussian", "ppo_baseline.py") or len(both) < 3:
            continue
        our_scores = means(rows, both)
        peer_scores = means(peer_rows, both)
        gap, low, high = difference(our_scores, peer_scores)
        cells = [env, f"{steps:,}", commits(rows[seed] for seed in both), len(both)]
        for scores in (our_scores, peer_scores):
            cells.append("{:.0f} ± {:.0f}".format(*interval(scores)))
        cells.append(f"{gap:+.0f} ({low:+.0f} to {high:+.0f})")
        cells.append("not weaker" if low > -0.1 * np.mean(peer_scores) else "undecided")
        lines.append(cells)
    header = "environment | steps | code | seeds | ours | Stable-Baselines3"
    return markdown(f"{header} | difference (95 % interval) | verdict", lines)
