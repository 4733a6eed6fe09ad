"""Final scores of our scripts: trains one seed and appends a line to `benchmark/results/scores.csv`.

    python benchmark/score.py sppo_atari.py --env-id ALE/Boxing-v5 --seed 1 --total-timesteps 200000

Whatever stands behind the script's name goes to the script. A line that is already there is not computed again. The
returns of the training episodes, as means over fiftieths of the run, go to `benchmark/results/curves.csv`.
"""

import csv
import fcntl
import math
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "scores.csv"
CURVES = ROOT / "benchmark" / "results" / "curves.csv"
FIELDS = ["command", "steps", "episodes", "mean", "std", "seconds", "commit"]
FINAL = re.compile(r"score at (\d+) steps: (-?[\d.]+) ± ([\d.]+) \((\d+) ")


def append(path: Path, fields: list[str], rows: list[list]) -> None:
    """Adds rows to a table, under a head if it is new. Several processes may do so at once."""
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, 2)
        csv.writer(file, lineterminator="\n").writerows(([fields] if file.tell() == 0 else []) + rows)


def curve(folder: str, steps: int) -> list[tuple[int, str]]:
    """(last step, mean return of the training episodes that ended) of each fiftieth of the run."""
    (run,) = Path(folder, "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    episodes = defaultdict(list)
    for event in events.Scalars("charts/episodic_return"):
        episodes[math.ceil(event.step / steps * 50)].append(event.value)
    return [(part * steps // 50, f"{sum(returns) / len(returns):.2f}") for part, returns in sorted(episodes.items())]


def main() -> None:
    script, *flags = sys.argv[1:]
    command = " ".join([script, *flags])
    if RESULTS.exists() and any(row["command"] == command for row in csv.DictReader(RESULTS.open())):
        return print("already there:", command)
    start, git = time.time(), ["git", "-C", ROOT, "log", "-1", "--format=%h", "--", ":(glob)*.py"]  # the scripts
    commit = subprocess.run(git, stdout=subprocess.PIPE, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:  # the run's own files are not needed
        done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        steps, mean, std, episodes = FINAL.findall(done.stdout)[-1]
        points = curve(folder, int(steps))
    append(CURVES, ["command", "step", "mean_return"], [[command, *point] for point in points])
    append(RESULTS, FIELDS, [[command, steps, episodes, mean, std, round(time.time() - start), commit]])
    print(command, mean, std)


if __name__ == "__main__":
    main()
