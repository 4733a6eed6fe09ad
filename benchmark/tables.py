"""The README's tables of final scores, from `results/scores.csv` and `results/reference.csv`, in Markdown.

    python benchmark/tables.py
"""

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).parent / "results"


def interval(scores) -> tuple[float, float]:
    """Mean and half-width of the 95 % t interval."""
    return np.mean(scores), stats.t.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / len(scores) ** 0.5


def difference(ours, theirs) -> tuple[float, float, float]:
    """Difference of the means and its 95 % interval (Welch)."""
    result = stats.ttest_ind(ours, theirs, equal_var=False)
    return np.mean(ours) - np.mean(theirs), *result.confidence_interval(0.95)


def main() -> None:
    reference, ours, games = defaultdict(dict), defaultdict(dict), []
    for row in csv.DictReader((RESULTS / "reference.csv").open()):
        env = re.sub("(.*)NoFrameskip-v4", r"ALE/\1-v5", row["env_id"])
        reference[row["method"], env][int(row["seed"])] = row
    for row in csv.DictReader((RESULTS / "scores.csv").open()):
        script, flags = row["command"].split(" ", 1)
        flags = dict(re.findall(r"--(\S+) (\S+)", flags))
        name = script + (f" --policy {flags['policy']}" if "policy" in flags else "")
        ours[name, flags["env-id"]][int(flags["seed"])] = row
        if script == "sppo_atari.py":
            games.append((flags["env-id"], flags["seed"], row))

    print("| game | seed | steps | minutes | trained policy | uniform policy |\n| --- | --- | --- | --- | --- | --- |")
    for env, seed, row in games:
        uniform = reference["uniform", env][1]
        cells = []
        for r in (row, uniform):
            half = stats.t.ppf(0.975, int(r["episodes"]) - 1) * float(r["std"]) / (int(r["episodes"]) - 1) ** 0.5
            cells.append(f"{float(r['mean']):.0f} ± {half:.0f} ({r['episodes']} games)")
        print(f"| {env} | {seed} | {int(row['steps']):,} | {int(row['seconds']) / 60:.0f} | {cells[0]} | {cells[1]} |")

    print("\n| script | environment | steps | seeds' final scores | mean | halfway | Stable-Baselines3 | uniform |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (name, env), rows in sorted(ours.items(), key=lambda item: item[0][::-1]):
        scores = [float(rows[seed]["mean"]) for seed in (1, 2, 3) if seed in rows]
        peers = reference.get(("a2c" if "a2c" in name else "ppo", env), {})
        peer = np.mean([float(peers[seed]["mean"]) for seed in (1, 2, 3)]) if {1, 2, 3} <= peers.keys() else np.nan
        uniform = float(reference["uniform", env][1]["mean"]) if ("uniform", env) in reference else np.nan
        print(f"| `{name}` | {env} | {int(rows[1]['steps']):,} | {', '.join(f'{s:.0f}' for s in scores)} | "
              f"{np.mean(scores):.0f} | {(peer + uniform) / 2:.0f} | {peer:.0f} | {uniform:.0f} |")

    print("\n| environment | seeds | ours | Stable-Baselines3 | difference (95 % interval) | verdict |")
    print("| --- | --- | --- | --- | --- | --- |")
    for env in ("Hopper-v5", "HalfCheetah-v5"):
        rows, peers = ours["ppo_baseline.py --policy gaussian", env], reference["ppo", env]
        seeds = sorted(rows.keys() & peers.keys())
        if len(seeds) < 2:
            continue
        a, b = ([float(side[seed]["mean"]) for seed in seeds] for side in (rows, peers))
        gap, low, high = difference(a, b)
        verdict = "not weaker" if low > -0.1 * np.mean(b) else "undecided"
        print(f"| {env} | {len(seeds)} | {interval(a)[0]:.0f} ± {interval(a)[1]:.0f} | {interval(b)[0]:.0f} ± "
              f"{interval(b)[1]:.0f} | {gap:+.0f} ({low:+.0f} to {high:+.0f}) | {verdict} |")


if __name__ == "__main__":
    main()
