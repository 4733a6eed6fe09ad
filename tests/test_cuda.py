"""The scripts on a GPU, skipped where there is none: the same gradients as on the CPU; runs that change the device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_updates import CLIP_COEF, make
from tiny_models import save_models

import ppo_baseline
import sppo_atari
import sppo_continuous

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ROOT = Path(__file__).parent.parent
GAME = "--env-id ALE/Breakout-v5 --eval-episodes 1"
TASK = "--env-id Hopper-v5 --num-steps 256 --num-minibatches 4 --eval-episodes 1"
KINDS = [(sppo_atari, "atari"), (sppo_continuous, "binned")]
KINDS += [(ppo_baseline, kind) for kind in ("atari", "binned", "gaussian")]
COMMANDS = {  # with a number of steps that makes a few iterations
    "sppo_atari.py": (GAME, 2048),
    "ppo_baseline.py": (GAME, 2048),
    "sa2c_atari.py": (f"{GAME} --log-interval 1", 800),
    "sppo_continuous.py": (TASK, 512),
    "ppo_baseline.py, Gaussian": (TASK, 512),
    "ppo_baseline.py, binned": (f"{TASK} --policy discretized", 512),
}
FAST = [
    ["sppo_atari.py", "--bf16"],
    ["sppo_atari.py", "--compile"],
    ["sppo_atari.py", "--bf16 --compile"],
    ["ppo_baseline.py", "--bf16 --compile"],
    ["sa2c_atari.py", "--bf16"],
    ["sppo_continuous.py", "--compile"],
    ["ppo_baseline.py, Gaussian", "--compile"],
]


def start(name: str, flags: str, folder: Path) -> str:
    """What a run in this folder prints, after it ended well."""
    command = [sys.executable, ROOT / name.partition(",")[0], *flags.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script, kind", KINDS)
def test_gradient_is_that_of_the_cpu(script, kind):
    agent, batch, samples = make(script, kind)
    minibatch = [x[samples] for x in batch]
    args = script.Args(env_id="ALE/Breakout-v5" if kind == "atari" else "Hopper-v5")
    expected = script.gradient(agent, *minibatch, CLIP_COEF, args)
    found = script.gradient(agent.cuda(), *(x.cuda() for x in minibatch), CLIP_COEF.cuda(), args)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, flags", [[name, ""] for name in COMMANDS] + FAST)
def test_run_goes_on_on_either_device(name, flags, tmp_path):
    """A run on the GPU, resumed there and then on the CPU; checkpoints are finite (scripts end if they are not)."""
    given, steps = COMMANDS[name]
    output = start(name, f"{given} {flags} --total-timesteps {steps}", tmp_path)
    assert " on cuda" in output and f"score at {steps} steps" in output
    (run,) = tmp_path.glob("runs/*")
    output = start(name, f"--resume {run} --total-timesteps {2 * steps}", tmp_path)
    assert " on cuda" in output and f"score at {2 * steps} steps" in output
    if "--compile" not in flags:  # some CPUs compile for minutes
        output = start(name, f"--resume {run} --total-timesteps {3 * steps} --no-cuda", tmp_path)
        assert " on cpu" in output and f"score at {3 * steps} steps" in output


@pytest.mark.parametrize("name", COMMANDS)
def test_run_is_repeated_bit_for_bit(name, tmp_path):
    given, steps = COMMANDS[name]
    states = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        start(name, f"{given} --total-timesteps {steps}", folder)
        (path,) = folder.glob("runs/*/checkpoint.pt")
        states.append(torch.load(path, weights_only=True)["agent"])
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("flags", ["", "--bf16", "--lora-rank 4", "--bf16 --lora-rank 4"])
def test_language_model(flags, tmp_path):
    models = save_models(tmp_path / "models")
    names = f"--model {models}/policy --reward-model {models}/proxy --prompts {models}/prompts.csv --reward-label 1"
    sizes = "--prompt-length 12 --response-length 8 --batch-size 8 --num-minibatches 2 --eval-episodes 6"
    output = start("sppo_rlhf.py", f"{names} {sizes} {flags} --total-episodes 32", tmp_path)
    assert " on cuda" in output and "score at 32 steps" in output
    (run,) = tmp_path.glob("runs/*")
    assert " on cpu" in start("sppo_rlhf.py", f"--resume {run} --total-episodes 64 --no-cuda", tmp_path)
