"""Speed of several runs at the same time, with an older checkout's script and with this one; appends to a table.

    python benchmark/side_by_side.py OLD_CHECKOUT --copies 1 2 4 --repeats 3

Humanoid-v5 with 64 environments, whose actions NumPy computes: with threads of its own, runs get into each other's way.
Prints the median of each run's steps per second (measured as in before_after.py) and its share of one run's alone."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from before_after import ROOT, commit_of, steps_per_second
from score import append

FIELDS = ["which", "copies", "repeat", "copy", "steps_per_second", "commit"]
COMMAND = ("sppo_continuous.py --env-id Humanoid-v5 --num-envs 64 --num-steps 256 --update-epochs 1 --eval-episodes 1 "
           "--torch-threads 1 --total-timesteps 81920")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old_checkout", type=Path)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2, 4], help="runs at the same time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results" / "side_by_side.csv")
    args = parser.parse_args()
    roots, speeds = {"old": args.old_checkout.resolve(), "new": ROOT}, {}
    script, *flags = COMMAND.split()
    for repeat in range(args.repeats):
        for copies in args.copies:
            for which, root in roots.items():
                runs = [(root, script, *flags, f"--seed={seed + 1}") for seed in range(copies)]
                with ThreadPoolExecutor(copies) as pool:
                    each = list(pool.map(lambda run: steps_per_second(*run), runs))
                speeds.setdefault((which, copies), []).extend(each)
                commit = commit_of(root, script)
                for copy, speed in enumerate(each):
                    append(args.output, FIELDS, [[which, copies, repeat + 1, copy + 1, f"{speed:.1f}", commit]])
    for (which, copies), each in speeds.items():
        alone = median(speeds[which, args.copies[0]])
        print(f"{which}, {copies} at a time: {median(each):.0f} steps/s each, {median(each) / alone:.2f} of one alone")


if __name__ == "__main__":
    main()
