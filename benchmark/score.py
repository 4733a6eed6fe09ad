"""Final scores of our scripts: trains one seed, appends a line to `benchmark/results/scores.csv`.

    python benchmark/score.py sppo_atari.py --env-id ALE/Boxing-v5 --seed 1 --total-timesteps 200000

Whatever stands behind the script's name goes to the script. A line that is already there is not
computed again.
"""

import csv
import fcntl
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "scores.csv"
FIELDS = ["command", "steps", "episodes", "mean", "std", "seconds", "commit"]
FINAL = re.compile(r"score at (\d+) steps: (-?[\d.]+) \+- ([\d.]+)")


def append(path: Path, fields: list[str], rows: list[list]) -> None:
    """Adds rows to a table, under a head if it is new. Several processes may do so at once."""
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, 2)
        head = [fields] if file.tell() == 0 else []
        csv.writer(file, lineterminator="\n").writerows(head + rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def commit_of(script: str) -> str:
    """The last commit that changed the script, with a + where the file differs from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "log", "-1", "--format=%h", "--", script], text=True)
    changes = subprocess.check_output([*git, "diff", "HEAD", "--", script])
    return commit.strip() + "+" * bool(changes)


def main() -> None:
    script, *flags = sys.argv[1:]
    command = " ".join([script, *flags])
    if any(row["command"] == command for row in read(RESULTS)):
        return print("already there:", command)
    start = time.time()
    commit = commit_of(script)
    with tempfile.TemporaryDirectory() as folder:  # the run's own files are not needed
        run = [sys.executable, ROOT / script, *flags]
        done = subprocess.run(run, cwd=folder, stdout=subprocess.PIPE, encoding="utf-8")
        if done.returncode:
            sys.exit(done.returncode)
        (checkpoint,) = Path(folder, "runs").glob("*/checkpoint.pt")
        episodes = torch.load(checkpoint, weights_only=True)["args"]["eval_episodes"]
    steps, mean, std = FINAL.findall(done.stdout)[-1]
    row = [command, steps, episodes, mean, std, round(time.time() - start), commit]
    append(RESULTS, FIELDS, [row])
    print(command, mean, std)


if __name__ == "__main__":
    main()
