"""Trains language models against wrong reward models and records every evaluation: who gets better
by whose measure?

    python small_models/train.py --large
    python benchmark/language.py --jobs 2                                             # 23 seeds
    python benchmark/language.py --report
    python benchmark/language.py --report --results benchmark/results/language.csv    # 5 seeds

The reward is a proxy, a classifier trained on few labels (or the weak one, on very few); `gold`,
trained on all labels, judges. Each run's evaluations become lines of a table; a run that is there
is not done again: the command goes on where it was stopped. --report writes the table of
docs/language_models.md and draws its figures."""

import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from score import ROOT, append, commit_of, read
from tables import difference, interval, markdown
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
PAIRS = [  # that the page compares
    ("SPPO", "PPO"),
    ("SPPO", "matched control"),
    ("plain SPPO", "mean-weight control"),
    ("plain SPPO", "PPO"),
    ("PPO without KL", "PPO"),
]
PAGE = ROOT / "docs" / "language_models.md"


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
    report: bool = False  # only the page's table and figures


def train(args: Args, reward: str, method: str, seed: int) -> None:
    flags = f"--reward-label 1 {args.flags} {METHODS[method]} --seed {seed}"
    command = f"sppo_rlhf.py --reward-model models/{reward} {flags}"
    if any(row["command"] == command for row in read(args.results)):
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models").symlink_to(args.models.resolve())
        line = [sys.executable, ROOT / "sppo_rlhf.py", *command.split()[1:]]
        line += ["--gold-model", "models/gold"]
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


def load(results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluations before and after training, by reward, method and seed."""
    table = pd.read_csv(results).sort_values("step")
    runs = table.groupby(["reward", "method", "seed"], sort=False)[MEASURES]
    return runs.first(), runs.last()


def differences(before: pd.DataFrame, after: pd.DataFrame, reward: str) -> dict:
    """Mean and 95 % interval of gold scores' differences, by name."""
    before, after = before.gold_score[reward], after.gold_score[reward]
    mean, half = interval(after["PPO"] - before["PPO"])
    found = {"PPO: trained − untrained": (mean, mean - half, mean + half)}
    for one, other in PAIRS:
        if {one, other} <= set(after.index.get_level_values("method")):
            found[f"{one} − {other}"] = difference(after[one], after[other])
    return found


def report(results: Path) -> str:
    """The table of docs/language_models.md."""
    before, after = load(results)
    rewards = after.index.unique("reward")
    found = [differences(before, after, reward) for reward in rewards]
    rows = []
    for name in found[0]:
        intervals = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*each[name]) for each in found]
        rows.append([name, *intervals])
    return markdown("difference of gold scores | " + " | ".join(rewards), rows)


def draw(results: Path) -> None:
    """The figures of docs/language_models.md."""
    import matplotlib.pyplot as plt

    before, after = load(results)
    table = pd.read_csv(results).groupby(["reward", "method", "step"])[MEASURES].mean()
    rewards = after.index.unique("reward")
    size = {"ncols": len(rewards), "sharey": True, "squeeze": False}
    intervals, (axes,) = plt.subplots(**size, figsize=(10, 3), sharex=True)
    for axis, reward in zip(axes, rewards):
        found = differences(before, after, reward)
        drawn = {name: x for name, x in found.items() if "without" not in name}
        for y, (mean, low, high) in enumerate(drawn.values()):
            error = [[mean - low], [high - mean]]
            axis.errorbar(mean, -y, xerr=error, fmt="o", color="C0", capsize=3)
        axis.set_yticks([-y for y in range(len(drawn))], drawn)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=f"reward: {reward}", xlabel="difference of the gold score, 95 % interval")

    curves, (axes,) = plt.subplots(**size, figsize=(10, 4))
    for axis, reward in zip(axes, rewards):
        for color, method in enumerate(("PPO", "SPPO", "PPO without KL")):
            means = table.loc[reward, method]
            style = {"color": f"C{color}", "markersize": 3}
            axis.plot(means.kl, means.gold_score, "o-", label=f"{method}: gold", **style)
            axis.plot(means.kl, means.score, "--", label=f"{method}: the reward", **style)
        axis.set(title=f"reward: {reward}", xlabel="KL to the reference (nats a response)")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("mean score of held-out prompts")

    for name, figure in (("differences", intervals), ("gold_kl", curves)):
        figure.tight_layout()
        figure.savefig(PAGE.parent / "figures" / f"language_{name}.png", dpi=120)


def main(args: Args) -> None:
    if args.report:
        draw(args.results)
        page = PAGE.read_text(encoding="utf-8")
        start, _, end = re.split("(?<=<!--rewards-->)|(?=<!--/-->)", page)
        return PAGE.write_text(f"{start}\n\n{report(args.results)}\n\n{end}", encoding="utf-8")
    runs = itertools.product(args.seeds, args.rewards, args.methods)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(args, run[1], run[2], run[0]), runs))


if __name__ == "__main__":
    main(tyro.cli(Args))
