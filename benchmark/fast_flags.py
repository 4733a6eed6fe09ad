"""Learning curves with and without the flags that change rounding or precision, from `results/curves.csv`.

    for seed in 1 2 3; do
        python benchmark/score.py sppo_continuous.py --env-id CartPole-v1 --seed $seed … [--compile]
        python benchmark/score.py sppo_continuous.py --env-id Hopper-v5 --seed $seed … [--compile]
        python benchmark/score.py sppo_atari.py --env-id ALE/UpNDown-v5 --seed $seed … [--bf16]
    done
    python benchmark/fast_flags.py  # draws docs/figures/fast_flags.png and prints the final scores

The whole commands are in `results/scores.csv`. Training returns, averaged over fiftieths of a run; a line per seed.
"""

import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from tables import interval

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
PANELS = [  # script, environment, the flag; seeds 1 to 3
    ("sppo_continuous.py", "CartPole-v1", "--compile"),
    ("sppo_continuous.py", "Hopper-v5", "--compile"),
    ("sppo_atari.py", "ALE/UpNDown-v5", "--bf16"),
]


def chosen(rows: list[dict], script: str, env_id: str, flag: str) -> dict[bool, dict[int, list[dict]]]:
    """The rows of a panel by whether the flag is set, and by seed."""
    found = {False: defaultdict(list), True: defaultdict(list)}
    for row in rows:
        seed = int(re.search(r"--seed (\d+)", row["command"])[1])
        if row["command"].startswith(f"{script} --env-id {env_id} ") and seed <= 3:
            found[row["command"].endswith(flag)][seed].append(row)
    return found


def main() -> None:
    curves, scores = (list(csv.DictReader((RESULTS / name).open())) for name in ("curves.csv", "scores.csv"))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 2.8), layout="constrained")
    print("| script | environment | flags | final scores of the seeds | mean |\n| --- | --- | --- | --- | --- |")
    for axis, (script, env_id, flag) in zip(axes, PANELS):
        for on, seeds in chosen(curves, script, env_id, flag).items():
            for seed, points in seeds.items():
                label = (flag if on else "default") if seed == min(seeds) else None
                steps, returns = zip(*((int(point["step"]), float(point["mean_return"])) for point in points))
                axis.plot(steps, returns, color="C1" if on else "C0", alpha=0.8, linewidth=1, label=label)
        axis.set(title=env_id, xlabel="environment steps")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        for on, seeds in chosen(scores, script, env_id, flag).items():
            final = {seed: float(rows[0]["mean"]) for seed, rows in sorted(seeds.items())}
            listed = ", ".join(f"{score:.0f} (seed {seed})" for seed, score in final.items())
            mean = "{:.0f} ± {:.0f}".format(*interval(list(final.values()))) if len(final) > 1 else "–"
            print(f"| `{script}` | {env_id} | {flag if on else 'default'} | {listed or 'not run'} | {mean} |")
    axes[0].set_ylabel("training return")
    figure.savefig(ROOT / "docs" / "figures" / "fast_flags.png", dpi=150)


if __name__ == "__main__":
    main()
