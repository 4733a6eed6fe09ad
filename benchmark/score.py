"""Final scores of our scripts: trains one seed and appends a line to `benchmark/results/scores.csv`.

    python benchmark/score.py sppo_atari.py --env-id ALE/Boxing-v5 --seed 1 --total-timesteps 200000

Whatever stands behind the script's name goes to the script. A line that is already there is not computed again.
"""

import csv
import fcntl
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "scores.csv"
FIELDS = ["command", "steps", "episodes", "mean", "std", "seconds"]
FINAL = re.compile(r"final score at (\d+) steps: (-?[\d.]+) ± ([\d.]+) \((\d+) ")


def main() -> None:
    script, *flags = sys.argv[1:]
    command = " ".join([script, *flags])
    if RESULTS.exists() and any(row["command"] == command for row in csv.DictReader(RESULTS.open())):
        return print("already there:", command)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:  # the run's own files are not needed
        done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    steps, mean, std, episodes = FINAL.search(done.stdout).groups()
    with RESULTS.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several calls may run at once
        file.seek(0, 2)
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(FIELDS)
        writer.writerow([command, steps, episodes, mean, std, round(time.time() - start)])
    print(command, mean, std)


if __name__ == "__main__":
    main()
