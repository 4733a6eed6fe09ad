"""The tables of final scores in docs/checks.md and docs/results.md, from `results/scores*.csv` and
`results/reference.csv`, in Markdown; `python docs/results.py` writes them there."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).parent / "results"
STEPS = 299_008  # of the comparison with Stable-Baselines3: 146 batches of 2,048


def interval(scores) -> tuple[float, float]:
    """Mean and half-width of the 95 % t interval."""
    return np.mean(scores), stats.t.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / len(scores) ** 0.5


def difference(ours, theirs) -> tuple[float, float, float]:
    """Difference of the means and its 95 % interval (Welch)."""
    result = stats.ttest_ind(ours, theirs, equal_var=False)
    return np.mean(ours) - np.mean(theirs), *result.confidence_interval(0.95)


def markdown(header: str, rows: list[list]) -> str:
    lines = [header.split(" | "), ["---"] * len(header.split(" | ")), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def read(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((RESULTS / f"{name}.csv").open()))


def peers() -> dict[tuple[str, str, int], dict[int, dict]]:
    """Rows by method, environment and steps, then by seed: Stable-Baselines3 and the uniform policy."""
    rows = defaultdict(dict)
    for row in read("reference"):
        env = re.sub("(.*)NoFrameskip-v4", r"ALE/\1-v5", row["env_id"])
        rows[row["method"], env, int(row["steps"])][int(row["seed"])] = row
    return rows


def ours() -> dict[tuple[str, str, int], dict[int, dict]]:
    """Rows by script with flags, environment and steps, then by seed."""
    rows = defaultdict(dict)
    for row in read("scores"):
        script, flags = row["command"].split(" ", 1)
        env, seed = (re.search(rf"--{flag} (\S+)", flags).group(1) for flag in ("env-id", "seed"))
        flags = re.sub(r" ?--(env-id|seed|total-timesteps|eval-episodes|torch-threads) \S+", "", flags)
        rows[(script + flags), env, int(row["steps"])][int(seed)] = row
    return rows


def commits(rows) -> str:
    return ", ".join(sorted({row["commit"] for row in rows}))


def games() -> str:
    lines = []
    for (name, env, steps), rows in sorted(ours().items()):
        for seed, row in sorted(rows.items()) if name == "sppo_atari.py" else []:
            cells = []
            for r in (row, peers()["uniform", env, 0][1]):
                half = stats.t.ppf(0.975, int(r["episodes"]) - 1) * float(r["std"]) / (int(r["episodes"]) - 1) ** 0.5
                cells.append(f"{float(r['mean']):.0f} ± {half:.0f} ({r['episodes']} games)")
            lines.append([env, seed, f"{steps:,}", f"{int(row['seconds']) / 60:.0f}", *cells])
    return markdown("game | seed | steps | minutes | trained policy | uniform policy", lines)


def beside_peers() -> str:
    lines = []
    for (name, env, steps), rows in sorted(ours().items(), key=lambda item: item[0][1::-1]):
        scores = {seed: float(rows[seed]["mean"]) for seed in sorted(rows) if seed <= 3}
        peer_rows = peers()["a2c" if "a2c" in name else "ppo", env, steps]
        uniform = [float(row["mean"]) for row in peers()["uniform", env, 0].values()]
        cells = ["–"] * 3
        if uniform and {1, 2, 3} <= peer_rows.keys():
            peer = np.mean([float(peer_rows[seed]["mean"]) for seed in (1, 2, 3)])
            cells = [f"{(peer + uniform[0]) / 2:.0f}", f"{peer:.0f}", f"{uniform[0]:.0f}"]
        listed = ", ".join(f"{score:.0f} (seed {seed})" for seed, score in scores.items())
        mean = f"{np.mean(list(scores.values())):.0f}"
        lines.append([f"`{name}`", env, f"{steps:,}", commits(rows[seed] for seed in scores), listed, mean, *cells])
    header = "script | environment | steps | code | seeds' final scores | mean | halfway | Stable-Baselines3 | uniform"
    return markdown(header, lines)


def baseline() -> str:
    """Our PPO against Stable-Baselines3's, on the seeds that both have."""
    lines = []
    for (name, env, steps), rows in sorted(ours().items()):
        both = sorted(rows.keys() & peers()["ppo", env, steps].keys())
        if name not in ("ppo_baseline.py --policy gaussian", "ppo_baseline.py") or len(both) < 3:
            continue
        a, b = ([float(side[seed]["mean"]) for seed in both] for side in (rows, peers()["ppo", env, steps]))
        gap, low, high = difference(a, b)
        verdict = "not weaker" if low > -0.1 * np.mean(b) else "undecided"
        sides = ("{:.0f} ± {:.0f}".format(*interval(side)) for side in (a, b))
        code = commits(rows[seed] for seed in both)
        lines.append([env, f"{steps:,}", code, len(both), *sides, f"{gap:+.0f} ({low:+.0f} to {high:+.0f})", verdict])
    header = "environment | steps | code | seeds | ours | Stable-Baselines3 | difference (95 % interval) | verdict"
    return markdown(header, lines)


def before_and_after() -> str:
    """Of the shortening of the scripts, on the same commands."""
    lines = []
    before, pairs = {row["command"]: float(row["mean"]) for row in read("scores_before")}, defaultdict(list)
    for row in read("scores"):
        if row["command"] in before:
            kind = re.sub(r" --(seed|total-timesteps|eval-episodes|torch-threads) \S+", "", row["command"])
            pairs[kind].append((before[row["command"]], float(row["mean"])))
    for kind, scores in sorted(pairs.items()):
        old, new = zip(*scores)
        script, env = kind.split(" --env-id ")
        text = "both the same"
        if len(set(old + new)) > 1:
            text = "{:+.0f} ({:+.0f} to {:+.0f})".format(*difference(new, old))
        lines.append([f"`{script}`", env, len(old), f"{np.mean(old):.0f}", f"{np.mean(new):.0f}", text])
    return markdown("script | environment | seeds | before | after | difference (95 % interval)", lines)
