"""Kills runs with SIGKILL at random moments and resumes them until they are complete; checks what is left.

    python benchmark/survival.py > benchmark/results/survival.txt

After every kill the checkpoint, if there is one yet, must load; at the end all steps must be there, and TensorBoard's
must grow within every tag. A run that is killed before its first checkpoint starts anew.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
POLE = "--env-id CartPole-v1 --num-steps 256 --total-timesteps {steps} --checkpoint-interval 256 --eval-interval 10240"
GAMES = "--env-id ALE/Breakout-v5 --num-envs 4 --num-steps 32 --total-timesteps {steps} --checkpoint-interval 128"
RUNS = [  # script, flags, steps for each kill, a whole number of batches
    ("sppo_continuous.py", POLE, 5_120),
    ("ppo_baseline.py", POLE.replace("CartPole-v1", "Hopper-v5"), 5_120),
    ("sppo_atari.py", GAMES, 1_280),
    ("sa2c_atari.py", GAMES + " --log-interval 3", 1_280),
]


@dataclass
class Args:
    """How often to kill."""

    kills: int = 20
    """of sppo_continuous.py"""
    other_kills: int = 5
    """of each other script"""
    seed: int = 1
    """of the moments"""


def check_checkpoint(run: Path) -> int:
    """The step of its checkpoint, which must be whole; 0 without one."""
    path = run / "checkpoint.pt"
    if not path.exists():
        return 0
    assert zipfile.ZipFile(path).testzip() is None
    saved = torch.load(path, weights_only=True)
    return saved["iteration"] * saved["args"]["num_envs"] * saved["args"]["num_steps"]


def check_curves(run: Path) -> int:
    """How many points TensorBoard shows; steps must grow within every tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    points = 0
    for tag in events.Tags()["scalars"]:
        steps = [point.step for point in events.Scalars(tag)]
        assert all(x < y for x, y in zip(steps, steps[1:])), tag
        points += len(steps)
    return points


def survive(script: str, flags: str, total: int, kills: int, rng: random.Random) -> dict:
    """One run with so many kills, each at a random step and a random moment after it."""
    start, done, checkpoints, early, all_kills = time.time(), 0, 0, 0, kills
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", ROOT / script]
        run = None
        while True:
            here = [*command, "--resume", str(run)] if done else [*command, *flags.format(steps=total).split()]
            log = open(Path(folder, "stderr"), "w+")  # progress bars would fill a pipe
            process = subprocess.Popen(here, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
            if kills:
                line = process.stdout.readline()  # "runs/… on cpu": from here on it trains
                assert line.startswith("runs/"), Path(log.name).read_text()
                run = Path(line.split()[0])
                moment = done + rng.randrange(total // (2 * all_kills))
                while check_checkpoint(Path(folder, run)) < moment and process.poll() is None:
                    time.sleep(0.02)
                time.sleep(rng.uniform(0, 0.3))
                process.kill()
                kills -= 1
            output, _ = process.communicate()
            errors = Path(log.name).read_text()
            log.close()
            if process.returncode == 0:
                assert not kills, "complete before all kills"
                break
            assert process.returncode == -9, errors
            step = check_checkpoint(Path(folder, run))
            checkpoints, early = checkpoints + (step > 0), early + (step == 0)
            assert step >= done
            done = step
        run = Path(folder, run)
        assert check_checkpoint(run) == total and f"score at {total} steps" in output
        points = check_curves(run)
    return dict(checkpoints=checkpoints, early=early, points=points, seconds=time.time() - start)


def main(args: Args) -> None:
    rng = random.Random(args.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("| script | kills | whole checkpoints found | none yet | steps | points in TensorBoard, in order | minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for script, flags, per_kill in RUNS:
        kills = args.kills if script == "sppo_continuous.py" else args.other_kills
        total = kills * per_kill
        more = f" --eval-episodes 1 --no-cuda --torch-threads 1 --seed {args.seed}"
        r = survive(script, flags + more, total, kills, rng)
        print(f"| `{script}` | {kills} | {r['checkpoints']} | {r['early']} | {total:,} of {total:,} "
              f"| {r['points']:,} | {r['seconds'] / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
