"""The scripts on a GPU, skipped where there is none: they learn there as on the CPU, repeat a run,
and change the device when they go on."""

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from tiny_models import save_models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ROOT = Path(__file__).parent.parent
GAME = "--env-id ALE/Breakout-v5 --eval-episodes 1"
STEPS = {"sppo_atari.py": 2048, "ppo_baseline.py": 2048, "sa2c_atari.py": 800}  # a few iterations
FLAGS = ["", "--bf16", "--compile", "--bf16 --compile"]


class Seen(Exception):
    """Leaves the script's `main`, with what its `update` is given."""


def start(script: str, flags: str, folder: Path) -> str:
    """What a run in this folder prints, after it ended well."""
    command = [sys.executable, ROOT / script, *flags.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def agent_in(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the only run there, on the device that they were on."""
    (path,) = folder.glob("runs/*/checkpoint.pt")
    return torch.load(path, weights_only=True)["agent"]


def device_in(folder: Path) -> str:
    (device,) = {weight.device.type for weight in agent_in(folder).values()}
    return device


def vector(agent: torch.nn.Module) -> torch.Tensor:
    """A copy of all its weights, on the CPU."""
    return torch.cat([x.detach().flatten().cpu() for x in agent.parameters()])


@pytest.mark.parametrize("script", STEPS)
def test_update_is_that_of_the_cpu(script, tmp_path, monkeypatch):
    """From the same weights, on a batch that was played on the GPU."""
    module = importlib.import_module(script.removesuffix(".py"))
    update = module.update

    def look(agent, optimizer, batch, *rest):
        raise Seen(agent, batch, rest)

    monkeypatch.setattr(module, "update", look)
    monkeypatch.chdir(tmp_path)
    args = tyro.cli(module.Args, args=[*GAME.split(), "--total-timesteps", str(STEPS[script])])
    with pytest.raises(Seen) as seen:
        module.main(args)
    agent, batch, rest = seen.value.args
    assert {x.device.type for x in batch} == {"cuda"}
    changes = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        ours = copy.deepcopy(agent).to(device)
        before = vector(ours)
        optimizer = torch.optim.SGD(ours.parameters(), lr=1e-3)
        with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):
            update(ours, optimizer, [x.to(device) for x in batch], *rest)
        changes.append(vector(ours) - before)
    expected, found = changes
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("script", STEPS)
def test_run_goes_on_on_either_device(script, flags, tmp_path):
    """A run on the GPU, resumed there and then on the CPU; checkpoints are finite (scripts end if
    they are not)."""
    if "--compile" in flags and script == "sa2c_atari.py":
        pytest.skip("has no --compile")
    steps = STEPS[script]
    output = start(script, f"{GAME} {flags} --total-timesteps {steps}", tmp_path)
    assert f"score at {steps} steps" in output and device_in(tmp_path) == "cuda"
    (run,) = tmp_path.glob("runs/*")
    output = start(script, f"--resume {run} --total-timesteps {2 * steps}", tmp_path)
    assert f"score at {2 * steps} steps" in output and device_in(tmp_path) == "cuda"
    if "--compile" not in flags:  # some CPUs compile for minutes
        output = start(script, f"--resume {run} --total-timesteps {3 * steps} --no-cuda", tmp_path)
        assert f"score at {3 * steps} steps" in output and device_in(tmp_path) == "cpu"


@pytest.mark.parametrize("script", STEPS)
def test_run_is_repeated_bit_for_bit(script, tmp_path):
    states = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        start(script, f"{GAME} --total-timesteps {STEPS[script]}", folder)
        states.append(agent_in(folder))
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("flags", ["", "--bf16", "--lora-rank 4", "--bf16 --lora-rank 4"])
def test_language_model(flags, tmp_path):
    models = save_models(tmp_path / "models")
    names = f"--model {models}/policy --reward-model {models}/proxy --reward-label 1"
    names += f" --prompts {models}/prompts.csv"
    sizes = "--prompt-length 12 --response-length 8 --batch-size 8 --num-minibatches 2"
    sizes += " --eval-episodes 6"
    output = start("sppo_rlhf.py", f"{names} {sizes} {flags} --total-episodes 32", tmp_path)
    assert "score at 32 " in output and device_in(tmp_path) == "cuda"
    (run,) = tmp_path.glob("runs/*")
    start("sppo_rlhf.py", f"--resume {run} --total-episodes 64 --no-cuda", tmp_path)
    assert device_in(tmp_path) == "cpu"
