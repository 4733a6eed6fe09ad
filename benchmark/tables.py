"""The tables of final scores in docs/results.md, from `results/scores*.csv` and `results/reference.csv`, in Markdown.

    python benchmark/tables.py
"""

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


def main() -> None:
    reference, ours, games = defaultdict(dict), defaultdict(dict), []
    for row in csv.DictReader((RESULTS / "reference.csv").open()):
        env = re.sub("(.*)NoFrameskip-v4", r"ALE/\1-v5", row["env_id"])
        reference[row["method"], env, int(row["steps"])][int(row["seed"])] = row
    for row in csv.DictReader((RESULTS / "scores.csv").open()):
        script, flags = row["command"].split(" ", 1)
        env, seed = (re.search(rf"--{flag} (\S+)", flags).group(1) for flag in ("env-id", "seed"))
        flags = re.sub(r" ?--(env-id|seed|total-timesteps|eval-episodes|torch-threads) \S+", "", flags)
        ours[(script + flags), env, int(row["steps"])][int(seed)] = row
        if script == "sppo_atari.py" and "--bf16" not in row["command"]:
            games.append((env, seed, row))

    print("| game | seed | steps | minutes | trained policy | uniform policy |\n| --- | --- | --- | --- | --- | --- |")
    for env, seed, row in sorted(games, key=lambda game: game[:2]):
        uniform = reference["uniform", env, 0][1]
        cells = []
        for r in (row, uniform):
            half = stats.t.ppf(0.975, int(r["episodes"]) - 1) * float(r["std"]) / (int(r["episodes"]) - 1) ** 0.5
            cells.append(f"{float(r['mean']):.0f} ± {half:.0f} ({r['episodes']} games)")
        print(f"| {env} | {seed} | {int(row['steps']):,} | {int(row['seconds']) / 60:.0f} | {cells[0]} | {cells[1]} |")

    print("\n| script | environment | steps | seeds' final scores | mean | halfway | Stable-Baselines3 | uniform |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (name, env, steps), rows in sorted(ours.items(), key=lambda item: item[0][1::-1]):
        scores = {seed: float(rows[seed]["mean"]) for seed in sorted(rows) if seed <= 3}
        peers = reference["a2c" if "a2c" in name else "ppo", env, steps]
        uniform = [float(row["mean"]) for row in reference["uniform", env, 0].values()]
        cells = ["–"] * 3
        if uniform and {1, 2, 3} <= peers.keys():
            peer = np.mean([float(peers[seed]["mean"]) for seed in (1, 2, 3)])
            cells = [f"{(peer + uniform[0]) / 2:.0f}", f"{peer:.0f}", f"{uniform[0]:.0f}"]
        listed = ", ".join(f"{score:.0f} (seed {seed})" for seed, score in scores.items())
        mean = f"{np.mean(list(scores.values())):.0f}"
        print(f"| `{name}` | {env} | {steps:,} | {listed} | {mean} | {' | '.join(cells)} |")

    print("\n| environment | seeds | ours | Stable-Baselines3 | difference (95 % interval) | verdict |")
    print("| --- | --- | --- | --- | --- | --- |")
    for env in ("Hopper-v5", "HalfCheetah-v5"):
        rows, peers = ours["ppo_baseline.py --policy gaussian", env, STEPS], reference["ppo", env, STEPS]
        seeds = sorted(rows.keys() & peers.keys())
        if len(seeds) < 2:
            continue
        a, b = ([float(side[seed]["mean"]) for seed in seeds] for side in (rows, peers))
        gap, low, high = difference(a, b)
        verdict = "not weaker" if low > -0.1 * np.mean(b) else "undecided"
        print(f"| {env} | {len(seeds)} | {interval(a)[0]:.0f} ± {interval(a)[1]:.0f} | {interval(b)[0]:.0f} ± "
              f"{interval(b)[1]:.0f} | {gap:+.0f} ({low:+.0f} to {high:+.0f}) | {verdict} |")


    print("\n| script | environment | seeds | before | after | difference (95 % interval) |")
    print("| --- | --- | --- | --- | --- | --- |")
    pairs = defaultdict(dict)
    before = {row["command"]: float(row["mean"]) for row in csv.DictReader((RESULTS / "scores_before.csv").open())}
    for row in csv.DictReader((RESULTS / "scores.csv").open()):
        if row["command"] in before:
            kind = re.sub(r" --(seed|total-timesteps|eval-episodes|torch-threads) \S+", "", row["command"])
            pairs[kind][row["command"]] = before[row["command"]], float(row["mean"])
    for kind, scores in sorted(pairs.items()):
        old, new = zip(*scores.values())
        script, env = kind.split(" --env-id ")
        text = "both the same"
        if len(set(old + new)) > 1:
            text = "{:+.0f} ({:+.0f} to {:+.0f})".format(*difference(new, old))
        print(f"| `{script}` | {env} | {len(old)} | {np.mean(old):.0f} | {np.mean(new):.0f} | {text} |")


if __name__ == "__main__":
    main()
