"""Trains language models against two reward models and records every evaluation: who gets better by whose measure?

    python benchmark/tiny_language.py
    python benchmark/language.py --jobs 2
    python benchmark/language.py --report

The reward is a proxy, a classifier trained on few labels (or the weak one, on very few); `gold`, trained on all labels,
judges. Each run's evaluations become lines of benchmark/results/language.csv; a run that is there is not done again, so
that the command goes on where it was stopped. --report draws the figures and prints the tables from that file."""

import csv
import itertools
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from before_after import commit_of
from score import append
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "language.csv"
MEASURES = "score gold_score kl kl_k3 reference_perplexity distinct_2 entropy response_length ended".split()
FIELDS = ["reward", "method", "seed", "step", *MEASURES, "command", "commit"]
METHODS = {
    "PPO": "--alpha 1 --beta 0",
    "SPPO": "--alpha 0.5 --beta 0.4",
    "matched control": "--alpha 0.9 --beta 0",
    "plain SPPO": "--alpha 0.5 --beta 0.4 --no-importance-weighted-reverse",
    "mean-weight control": "--alpha 0.6 --beta 0",
    "PPO without KL": "--alpha 1 --beta 0 --kl-coef 0",
}


@dataclass
class Args:
    """Runs of sppo_rlhf.py with two reward models."""

    models: Path = Path("models")  # folder made by tiny_language.py
    rewards: tuple[str, ...] = ("proxy", "weak_proxy")  # reward models in it
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    flags: str = "--total-episodes 3840 --eval-interval 384 --torch-threads 1"  # of every run
    jobs: int = 2  # runs at the same time
    report: bool = False  # only tables and figures


def train(args: Args, reward: str, method: str, seed: int) -> None:
    flags = f"--reward-label 1 {args.flags} {METHODS[method]} --seed {seed}"
    command = f"sppo_rlhf.py --reward-model models/{reward} {flags}"
    if RESULTS.exists() and any((row["command"]) == command for row in csv.DictReader(RESULTS.open())):
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models").symlink_to(args.models.resolve())
        line = [sys.executable, ROOT / "sppo_rlhf.py", *command.split()[1:], "--gold-model", "models/gold"]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            return print(command, done.stderr[-2000:], flush=True)
        (run,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        points = zip(*(events.Scalars(f"eval/{measure}") for measure in MEASURES))
        commit = commit_of(ROOT, "sppo_rlhf.py")
        rows = [[reward, method, seed, p[0].step - 1, *(f"{x.value:.5g}" for x in p), command, commit] for p in points]
    append(RESULTS, FIELDS, rows)
    print(done.stdout.splitlines()[-1], command, flush=True)


def main(args: Args) -> None:
    runs = itertools.product(args.seeds, args.rewards, args.methods)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(args, run[1], run[2], run[0]), runs))


if __name__ == "__main__":
    main(tyro.cli(Args))
