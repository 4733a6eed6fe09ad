"""Speed of the scripts beside those of an older checkout, in turn; appends to a table and prints the ratios new/old.

    python benchmark/before_after.py OLD_CHECKOUT --pairs 5 --output benchmark/results/before_after.csv

Steps per second are those between the first and the last point of `losses/value_loss` in TensorBoard, by its clock, in
the last four fifths of a run: without loading, compiling and the final evaluation. Run it on an idle machine."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from score import append
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["case", "pair", "which", "steps_per_second", "commit"]
ATARI = "sppo_atari.py --env-id ALE/Breakout-v5 --total-timesteps 8192 --eval-episodes 1"
CHEETAH = "sppo_continuous.py --env-id HalfCheetah-v5 --eval-episodes 1 --total-timesteps"
CASES = {
    "Atari": ATARI,
    "Atari --bf16": f"{ATARI} --bf16",
    "HalfCheetah": f"{CHEETAH} 40960",
    "HalfCheetah --compile": f"{CHEETAH} 81920 --compile",
    "SA2C": "sa2c_atari.py --env-id ALE/Breakout-v5 --total-timesteps 16000 --eval-episodes 1",
}


def steps_per_second(root: Path, script: str, *flags: str) -> float:
    """Of one run, in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, root / script, *flags], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        (run,) = Path(folder, "runs").iterdir()
        points = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars("losses/value_loss")
    first, last = points[len(points) // 5], points[-1]
    return (last.step - first.step) / (last.wall_time - first.wall_time)


def commit_of(root: Path, script: str) -> str:
    """The last commit that changed the script, with a + where the file differs from it."""
    git = ("log -1 --format=%h", "diff HEAD")
    commit, changes = (subprocess.check_output(["git", "-C", root, *x.split(), "--", script]) for x in git)
    return commit.decode().strip() + "+" * bool(changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old_checkout", type=Path)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each, in the other order every second time")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results" / "before_after.csv")
    args = parser.parse_args()
    roots = {"old": args.old_checkout.resolve(), "new": ROOT}
    for case in args.cases:
        command, speeds = CASES[case].split(), {"old": [], "new": []}
        for pair in range(args.pairs):
            for which in ("old", "new") if pair % 2 == 0 else ("new", "old"):
                speeds[which].append(speed := steps_per_second(roots[which], *command))
                commit = commit_of(roots[which], command[0])
                append(args.output, FIELDS, [[case, pair + 1, which, f"{speed:.1f}", commit]])
        ratios = [new / old for old, new in zip(speeds["old"], speeds["new"])]
        print(f"{case}: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)


if __name__ == "__main__":
    main()
