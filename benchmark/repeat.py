"""Repeats runs of the committed studies from their recorded commands and compares every evaluation with the table's.

    python benchmark/repeat.py --runs 10 --seed 1    # drawn from studies/results/*/runs.csv

Scores are equal, as printed, on the same kind of machine with the pinned versions; with --compile they need not be.
Exits with 1 where one is not that should be.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
KEY = ["study", "method", "environment", "condition", "seed", "pilot"]
SCORE = re.compile(r"^score at (\d+) steps: (\S+) ", re.MULTILINE)


def read(name: str) -> pd.DataFrame:
    """A table of all studies together."""
    paths = sorted((ROOT / "studies" / "results").glob(f"*/{name}.csv"))
    return pd.concat([pd.read_csv(path).assign(study=path.parent.name) for path in paths], ignore_index=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--studies", nargs="*", help="draw from these alone")
    args = parser.parse_args()
    runs, evaluations = read("runs"), read("evaluations").set_index(KEY).sort_index()
    runs = runs[runs.study.isin(args.studies)] if args.studies else runs
    unequal = 0
    for i in np.random.default_rng(args.seed).choice(len(runs), args.runs, replace=False):
        run = runs.iloc[i]
        with tempfile.TemporaryDirectory() as folder:
            script, *flags = shlex.split(run.command)
            command = [sys.executable, ROOT / script, *flags, "--torch-threads", "1"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        again = {int(step): float(score) for step, score in SCORE.findall(done.stdout)}
        table = evaluations.loc[[tuple(run[KEY])]].set_index("step").score
        equal = again.keys() == {*table.index} and all(abs(again[step] - table[step]) < 0.006 for step in again)
        unequal += not equal and "--compile" not in run.command
        print(f"{'equal' if equal else 'NOT EQUAL'}: {run.study}, last score {table.iloc[-1]:.2f}, again "
              f"{again[max(again)]:.2f}: {run.command}", flush=True)
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
