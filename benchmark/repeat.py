"""Repeats runs of the committed studies from their recorded commands, and compares every evaluation
with the table's.

    python benchmark/repeat.py --runs 10 --seed 1    # drawn from studies/results/*/runs.csv

Scores are equal, as printed, with the scripts that made the table, on the same kind of machine and
with the pinned versions; with --compile they need not be. Exits with 1 where one is not that should
be.
"""

import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

ROOT = Path(__file__).resolve().parent.parent
KEY = ["study", "method", "environment", "condition", "seed", "pilot"]
SCORE = re.compile(r"^score at (\d+) steps: (\S+) ", re.MULTILINE)


@dataclass
class Args:
    """Repeats runs of the studies."""

    runs: int = 10  # how many
    seed: int = 1  # of the draw
    studies: tuple[str, ...] = ()  # draw from these alone


def read(name: str) -> pd.DataFrame:
    """A table of all studies together."""
    tables = []
    for path in sorted((ROOT / "studies" / "results").glob(f"*/{name}.csv")):
        tables.append(pd.read_csv(path).assign(study=path.parent.name))
    return pd.concat(tables, ignore_index=True)


def repeat(command: str) -> dict[int, float]:
    """Scores by step."""
    script, *flags = shlex.split(command)
    again = [sys.executable, ROOT / script, *flags, "--torch-threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(again, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return {int(step): float(score) for step, score in SCORE.findall(done.stdout)}


def main(args: Args) -> int:
    runs = read("runs")
    evaluations = read("evaluations").set_index(KEY).sort_index()
    if args.studies:
        runs = runs[runs.study.isin(args.studies)]
    unequal = 0
    for i in np.random.default_rng(args.seed).choice(len(runs), args.runs, replace=False):
        run = runs.iloc[i]
        again = repeat(run.command)
        table = evaluations.loc[[tuple(run[KEY])]].set_index("step").score
        same_steps = again.keys() == {*table.index}
        equal = same_steps and all(abs(again[step] - table[step]) < 0.006 for step in again)
        unequal += not equal and "--compile" not in run.command
        scores = f"last score {table.iloc[-1]:.2f}, again {again[max(again)]:.2f}"
        verdict = "equal" if equal else "NOT EQUAL"
        print(f"{verdict}: {run.study}, {scores}: {run.command}", flush=True)
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
