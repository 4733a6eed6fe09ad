"""Kills a run at random moments, resumes it each time, and checks that nothing is lost but the
steps since the last checkpoint.

    python benchmark/kill.py sppo_continuous.py --kills 20 --flags="--env-id CartPole-v1"
    python benchmark/kill.py sppo_atari.py --kills 5 --checkpoint-interval 4096

At each kill, the checkpoint is whole, not older than the one before, and its numbers are finite. At
the end, two copies of the killed run go on to the same parameters, bit for bit; the losses' curves
have each iteration once and in order; evaluations have each their step. An unbroken run has other
parameters: a run that goes on begins new episodes.
"""

import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = 1_000_000_000  # steps that no run of this command gets to


@dataclass
class Args:
    """Kills and resumes."""

    script: tyro.conf.Positional[str]  # the script, say sppo_continuous.py
    flags: str = ""  # flags of its own
    kills: int = 20  # how often it is killed
    seconds: float = 5.0  # a kill comes at most so long after the run's folder is there
    checkpoint_interval: int = 2048  # steps between checkpoints
    seed: int = 1  # of the moments


def start(args: Args, folder: Path, flags: str) -> subprocess.Popen:
    """The script in this folder; its output is what it prints."""
    command = [sys.executable, "-u", ROOT / args.script, *shlex.split(flags)]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return subprocess.Popen(command, cwd=folder, **quiet)


def read_checkpoint(run: Path) -> dict:
    """Raises an error unless it is whole and finite."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    if not all(tensor.isfinite().all() for tensor in state["agent"].values()):
        raise FloatingPointError(f"{run} has a checkpoint that is not finite")
    return state


def batch_size(flags: dict) -> int:
    return flags.get("num_envs", 1) * flags["num_steps"]


def kill_often(args: Args, folder: Path) -> Path:
    """The folder of a run that was killed so often."""
    moments = random.Random(args.seed)
    flags = f"{args.flags} --total-timesteps {ENDLESS} --eval-episodes 1"
    flags += f" --checkpoint-interval {args.checkpoint_interval}"
    before = 0
    for number in range(1, args.kills + 1):
        process = start(args, folder, flags)
        run = folder / process.stdout.readline().strip()
        time.sleep(moments.uniform(0, args.seconds))
        process.kill()
        process.wait()
        if not (run / "checkpoint.pt").exists():  # killed before the first one was written
            shutil.rmtree(run)
            print(f"kill {number}: before the first checkpoint", flush=True)
            continue
        saved = read_checkpoint(run)
        age = time.time() - (run / "checkpoint.pt").stat().st_mtime
        step = saved["step"]
        print(f"kill {number}: checkpoint of step {step}, {age:.1f} s old", flush=True)
        if step < before:
            raise AssertionError(f"the checkpoint before was of step {before}")
        before = step
        flags = f"--resume {run.relative_to(folder)}"
    return run


def finish(args: Args, run: Path, iterations: int = 3) -> dict:
    """Goes on for a few iterations, to the end of the run. The last checkpoint."""
    saved = read_checkpoint(run)
    end = saved["step"] + iterations * batch_size(saved["args"])
    flags = f"--resume {run.name} --total-timesteps {end}"
    process = start(args, run.parent, flags)
    process.communicate()
    if process.returncode:
        raise AssertionError(f"{args.script} {flags} ends with {process.returncode}")
    return read_checkpoint(run)


def check_curves(run: Path, saved: dict) -> None:
    """Each iteration's losses are there, once, and so are evaluations."""
    flags = saved["args"]
    batch = batch_size(flags)
    end = saved["step"]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    log_interval = flags.get("log_interval", 1)
    steps = [point.step for point in events.Scalars("losses/policy_loss")]
    if steps != [*range(batch, end + 1, batch * log_interval)]:
        raise AssertionError(f"steps of losses/policy_loss: {steps}")
    steps = [point.step for point in events.Scalars("charts/episodic_return")]
    if steps != sorted(steps):
        raise AssertionError(f"steps of charts/episodic_return: {steps}")
    steps = [point.step - 1 for point in events.Scalars("eval/episodic_return")]
    interval = flags["eval_interval"]
    due = [step for step in range(0, end, batch) if interval and step % interval < batch] + [end]
    if steps != due:
        raise AssertionError(f"evaluations at {steps}")


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        run = kill_often(args, Path(temporary))
        copy = Path(shutil.copytree(run, run.parent / "copy"))
        saved = finish(args, run)
        again = finish(args, copy)
        for name, parameter in saved["agent"].items():
            if not torch.equal(parameter, again["agent"][name]):
                raise AssertionError(f"{name} differs between two that go on from one checkpoint")
        check_curves(run, saved)
        step = saved["step"]
    print(f"{args.kills} kills, {step} steps: nothing lost, curves whole, two continuations equal")


if __name__ == "__main__":
    main(tyro.cli(Args))
