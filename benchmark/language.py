"""Trains language models against wrong reward models and records every evaluation: who gets better
by whose measure?

    python small_models/train.py --large
    python benchmark/language.py --jobs 2                                             # 23 seeds
    python benchmark/language.py --report
    python benchmark/language.py --report --results benchmark/results/language.csv    # 5 seeds

The reward is a proxy, a classifier trained on few labels (or the weak one, on very few); `gold`,
trained on all labels, judges. Each run's evaluations become lines of a table; a run that is there
is not done again: the command goes on where it was stopped. --report draws the figures and
prints Markdown from that file."""

import itertools
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from score import ROOT, append, commit_of, read
from tables import difference
from tables import interval as mean_and_half
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MEASURES = "score gold_score kl reference_perplexity distinct_2 entropy response_length ended"
MEASURES = MEASURES.split()
FIELDS = ["reward", "method", "seed", "step", *MEASURES, "command", "commit"]
METHODS = {
    "PPO": "--alpha 1 --beta 0",
    "SPPO": "--alpha 0.5 --beta 0.4",
    "matched control": "--alpha 0.9 --beta 0",
    "plain SPPO": "--alpha 0.5 --beta 0.4 --no-importance-weighted-reverse",
    "mean-weight control": "--alpha 0.537 --beta 0",
    "PPO without KL": "--alpha 1 --beta 0 --kl-coef 0",
}


@dataclass
class Args:
    """Runs of sppo_rlhf.py with wrong reward models."""

    models: Path = Path("models")  # folder made by small_models/train.py --large
    results: Path = ROOT / "benchmark" / "results" / "weak_proxy.csv"  # the table
    rewards: tuple[str, ...] = ("weak_proxy",)  # reward models in the folder; proxy is another
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = tuple(range(1, 24))  # 10 % of PPO's gain can be seen with 23
    flags: str = "--eval-interval 384 --bf16 --torch-threads 1"  # of every run
    jobs: int = 2  # runs at the same time
    report: bool = False  # only tables and figures


def train(args: Args, reward: str, method: str, seed: int) -> None:
    flags = f"--reward-label 1 {args.flags} {METHODS[method]} --seed {seed}"
    command = f"sppo_rlhf.py --reward-model models/{reward} {flags}"
    if any(row["command"] == command for row in read(args.results)):
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models").symlink_to(args.models.resolve())
        line = [
            sys.executable,
            ROOT / "sppo_rlhf.py",
            *command.split()[1:],
            "--gold-model",
            "models/gold",
        ]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            return print(command, done.stderr[-2000:], flush=True)
        (run,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        points = zip(*(events.Scalars(f"eval/{measure}") for measure in MEASURES))
        commit = commit_of("sppo_rlhf.py")
        rows = [
            [reward, method, seed, p[0].step - 1, *(f"{x.value:.5g}" for x in p), command, commit]
            for p in points
        ]
    append(args.results, FIELDS, rows)
    print(done.stdout.splitlines()[-1], command, flush=True)


def interval(one, other=None) -> tuple[float, float, float]:
    """Mean and 95 % interval of a sample, or of the difference of two."""
    if other is not None:
        return difference(one, other)
    mean, half = mean_and_half(one)
    return mean, mean - half, mean + half


def report(results: Path) -> None:
    """Prints the tables of docs/language_models.md and draws its figures."""
    import matplotlib.pyplot as plt
    import pandas as pd

    table = pd.read_csv(results)
    measures = ["gold_score", "score", "kl", "distinct_2", "reference_perplexity"]
    runs = ["reward", "method", "seed"]
    table = table.sort_values([*runs, "step"])
    keys = table.groupby(runs, as_index=False).first()[runs]
    before, after = table.groupby(runs)[measures].first(), table.groupby(runs)[measures].last()
    before, after = before.reset_index(drop=True), after.reset_index(drop=True)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharex=True, sharey=True)
    for axis, reward in zip(axes, keys["reward"].unique()):
        print(
            f"\n### {reward}\n\n| method | seeds | " + " | ".join(measures) + " |\n|" + "---|" * 7
        )
        rows = {
            method: ((keys["reward"] == reward) & (keys["method"] == method)).to_numpy()
            for method in METHODS
        }
        rows = {method: row for method, row in rows.items() if row.any()}
        start = before[(keys["reward"] == reward).to_numpy()]
        print("| before | all | " + " | ".join(f"{start[x].mean():.3g}" for x in measures) + " |")
        for method, row in rows.items():
            cells = ("{:.3g} ({:.3g} to {:.3g})".format(*interval(after[row][x])) for x in measures)
            print(f"| {method} | {row.sum()} | " + " | ".join(cells) + " |")
        print("\n| difference | " + " | ".join(measures) + " |\n|" + "---|" * 6)
        pairs = [
            ("SPPO", "PPO"),
            ("SPPO", "matched control"),
            ("plain SPPO", "mean-weight control"),
            ("plain SPPO", "PPO"),
            ("PPO without KL", "PPO"),
        ]
        gains = (after - before)[rows["PPO"]]
        found = {"PPO: after − before": [interval(gains[x]) for x in measures]}
        for one, other in (pair for pair in pairs if set(pair) <= set(rows)):
            found[f"{one} − {other}"] = [
                interval(after[rows[one]][x], after[rows[other]][x]) for x in measures
            ]
        for name, intervals in found.items():
            print(
                f"| {name} | "
                + " | ".join("{:+.3g} ({:+.3g} to {:+.3g})".format(*x) for x in intervals)
                + " |"
            )
        drawn = [(name, intervals[0]) for name, intervals in found.items() if "without" not in name]
        for y, (_, (mean, low, high)) in enumerate(drawn):
            axis.errorbar(
                mean, -y, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3
            )
        axis.set_yticks([-y for y in range(len(drawn))], [name for name, _ in drawn])
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=f"reward: {reward}", xlabel="difference of the gold score, 95 % interval")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "language_differences.png", dpi=120)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, reward in zip(axes, keys["reward"].unique()):
        for color, method in enumerate(("PPO", "SPPO", "PPO without KL")):
            means = (
                table[(table["reward"] == reward) & (table["method"] == method)]
                .groupby("step")[measures]
                .mean()
            )
            axis.plot(
                means["kl"],
                means["gold_score"],
                "o-",
                color=f"C{color}",
                markersize=3,
                label=f"{method}: gold",
            )
            axis.plot(
                means["kl"], means["score"], "--", color=f"C{color}", label=f"{method}: the reward"
            )
        axis.set(title=f"reward: {reward}", xlabel="KL to the reference (nats a response)")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("mean score of held-out prompts")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "language_gold_kl.png", dpi=120)


def main(args: Args) -> None:
    if args.report:
        return report(args.results)
    runs = itertools.product(args.seeds, args.rewards, args.methods)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(args, run[1], run[2], run[0]), runs))


if __name__ == "__main__":
    main(tyro.cli(Args))
