"""The table of final scores beside Stable-Baselines3's, in Markdown, from `results/scores.csv` and
`results/reference.csv`; `python docs/results.py` writes it into docs/results.md."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats
from score import read

RESULTS = Path(__file__).parent / "results"
NO_NAME = r" --(env-id|seed|total-timesteps|eval-episodes|torch-threads) \S+"  # flags left out
PEERS = {  # ours, and what it is called there
    "ppo_baseline.py --policy gaussian": "ppo",
    "ppo_baseline.py": "ppo",
    "sa2c_atari.py --alpha 1 --beta 0": "a2c",
}


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


def beside_peers() -> str:
    """Our PPO and A2C against Stable-Baselines3's, on the seeds that both have."""
    lines = []
    for (name, env, steps), rows in sorted(ours().items()):
        method = PEERS.get(name)
        peer_rows = peers()[method, env, steps]
        both = sorted(rows.keys() & peer_rows.keys())
        if len(both) < 3:
            continue
        our_scores, peer_scores = (
            [float(scores[seed]["mean"]) for seed in both] for scores in (rows, peer_rows)
        )
        gap, low, high = difference(our_scores, peer_scores)
        task = re.sub(r"ALE/|Continuous|-v\d", "", env)
        cells = [f"{method.upper()}, {task}", len(both)]
        for scores in (our_scores, peer_scores):
            cells.append("{:.0f} ± {:.0f}".format(*interval(scores)))
        cells.append(f"{gap:+.0f} ({low:+.0f} to {high:+.0f})")
        cells.append("not weaker" if low > -0.1 * np.mean(peer_scores) else "open")
        lines.append(cells)
    header = "method, task | seeds | ours | Stable-Baselines3 | difference | answer"
    return markdown(header, lines)
