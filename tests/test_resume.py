"""Runs that are killed, fail, and go on."""

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import ale_py
import kill
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import EVERY, make_args, tensors

import ppo_baseline
import sa2c_atari
import sa2c_continuous
import sppo_atari
import sppo_continuous

ROOT = Path(__file__).parent.parent


def the_run(folder: Path) -> Path:
    (run,) = folder.glob("runs/*")
    return run


def checkpoint_of(folder: Path) -> dict:
    return torch.load(the_run(folder) / "checkpoint.pt", weights_only=True)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but the speed; steps do not fall within any tag."""
    events = EventAccumulator(str(the_run(folder)), size_guidance={"scalars": 0}).Reload()
    points = {}
    for tag in set(events.Tags()["scalars"]) - {"charts/SPS"}:
        points[tag] = [(point.step, point.value) for point in events.Scalars(tag)]
        steps = [step for step, _ in points[tag]]
        assert steps == sorted(steps), tag
        assert "episodic" in tag or len(steps) == len(set(steps)), tag
    return points


def resume(script, folder: Path, **flags) -> None:
    """As `--resume` does, with these flags typed."""
    for file in the_run(folder).glob("events*"):  # read in this order, here of the same second
        file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0")))
    saved = checkpoint_of(folder)
    script.main(script.Args(**saved["args"] | {"resume": str(the_run(folder))} | flags), saved)


@pytest.fixture
def short_games(monkeypatch):
    """Games are over after 16 steps and have no chance in them."""
    short = dict(max_num_frames_per_episode=64, noop_max=0)
    games = functools.partial(ale_py.vector_env.AtariVectorEnv, **short)
    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", games)


# ------------------------------------------------------------------------------------------ kills


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """By the command of benchmark/kill.py, which says what it checks."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = "--env-id CartPole-v1 --num-steps 64 --num-minibatches 2 --update-epochs 1"
    flags += " --eval-interval 640"
    args = kill.Args("sppo_continuous.py", flags, kills=1, seconds=2, checkpoint_interval=64)
    kill.main(args)
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 kills, ")


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    """Here as something in it cannot be saved."""
    path = tmp_path / "checkpoint.pt"
    part = torch.nn.Linear(100, 100)
    sppo_continuous.save_checkpoint(path, sppo_continuous.Args(), 3, {"agent": part})
    before = path.read_bytes()
    bad = torch.nn.Linear(100, 100)
    bad.state_dict = lambda: {"weight": part.weight, "function": lambda: None}
    with pytest.raises((AttributeError, pickle.PicklingError)):
        sppo_continuous.save_checkpoint(path, sppo_continuous.Args(), 4, {"agent": bad})
    assert path.read_bytes() == before


# -------------------------------------------------------------------------------- random numbers


@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari])
def test_a_resumed_run_is_the_uninterrupted_one(script, short_games, tmp_path, monkeypatch):
    """To the bit, as far as games are over at the checkpoint and have no chance in them. What was
    logged after the checkpoint is logged once."""
    save_checkpoint, kept = script.save_checkpoint, []

    def watched_save(path, *rest):
        save_checkpoint(path, *rest)
        kept.append(path.read_bytes())
        points = scalars(tmp_path).get("losses/value_loss", [(0, None)])
        assert points[-1][0] == rest[1]  # is on disk

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "save_checkpoint", watched_save)
    noise = dict(reward_noise=0.1, advantage_noise=0.1)
    script.main(make_args(script, checkpoint_interval=32, eval_interval=64, **noise))
    whole, points = checkpoint_of(tmp_path), scalars(tmp_path)
    assert len(kept) == 5 and len(points["eval/episodic_return"]) == 3
    (the_run(tmp_path) / "checkpoint.pt").write_bytes(kept[2])  # as if it had been killed
    resume(script, tmp_path)
    again = checkpoint_of(tmp_path)
    for one, other in zip(tensors(again), tensors(whole), strict=True):
        assert torch.equal(one, other)
    assert scalars(tmp_path) == points


@EVERY
def test_a_resumed_run_draws_the_same_random_numbers(script, tmp_path, monkeypatch):
    """Whatever was drawn before, here by environments and an evaluation."""
    if "atari" in script.__name__:
        pytest.skip("see above")
    collect, states = script.collect, []

    def watched(*args):
        states.append((np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
        return collect(*args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "collect", watched)
    script.main(make_args(script, env_id="tiny:Flat-v0", total_timesteps=64))
    resume(script, tmp_path, total_timesteps=128)
    resumed = list(states)
    states.clear()
    script.main(make_args(script, env_id="tiny:Flat-v0", eval_interval=32))
    assert resumed == states and states[0] != states[1]


@EVERY
def test_a_complete_run_is_evaluated_again_or_made_longer(
    script, short_games, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    script.main(make_args(script))
    before, points = checkpoint_of(tmp_path), scalars(tmp_path)
    resume(script, tmp_path, eval_episodes=2)
    now = scalars(tmp_path)
    for one, other in zip(tensors(checkpoint_of(tmp_path)), tensors(before), strict=True):
        assert torch.equal(one, other)
    (old,), (new,) = points.pop("eval/episodic_return"), now.pop("eval/episodic_return")
    assert old[0] == new[0] == 129 and points == now
    assert capsys.readouterr().out.count("score at 128 steps: ") == 2
    resume(script, tmp_path, total_timesteps=160)
    now = scalars(tmp_path)
    assert [step for step, _ in now["losses/value_loss"]] == [32, 64, 96, 128, 160]
    assert checkpoint_of(tmp_path)["step"] == 160
    if "obs" in before:
        assert checkpoint_of(tmp_path)["obs"]["count"] > before["obs"]["count"]


@pytest.mark.parametrize("script", [sppo_continuous, sa2c_continuous, ppo_baseline])
def test_steps_are_counted_on_with_another_rollout_length(script, tmp_path, monkeypatch):
    """From the last checkpoint: at 128 steps, of which two longer rollouts are 64 each."""
    monkeypatch.chdir(tmp_path)
    args = make_args(script)
    script.main(args)
    resume(script, tmp_path, num_steps=2 * args.num_steps, total_timesteps=256)
    steps = [step for step, _ in scalars(tmp_path)["losses/value_loss"]]
    assert steps == [32, 64, 96, 128, 192, 256]


# --------------------------------------------------------------------------- what --resume reads


def read_flags(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    return script.read_flags()


@EVERY
def test_what_is_typed_replaces_what_was_saved(script, tmp_path, monkeypatch):
    """Also where it is a default; all else is as it was."""
    stored = make_args(script, gamma=0.9, learning_rate=1e-3, total_timesteps=2048)
    script.save_checkpoint(tmp_path / "checkpoint.pt", stored, 7, {})
    folder = str(tmp_path)
    args, checkpoint = read_flags(script, monkeypatch, "--resume", folder)
    assert vars(args) == vars(stored) | {"resume": folder} and checkpoint["step"] == 7
    args, _ = read_flags(script, monkeypatch, "--resume", folder, "--gamma", "0.99")
    assert vars(args) == vars(stored) | {"resume": folder, "gamma": 0.99}


class Payload:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@EVERY
@pytest.mark.parametrize("kind", ["none", "cut", "another script's", "harmful"])
def test_a_file_that_is_no_checkpoint_ends_in_one_line(script, kind, tmp_path, monkeypatch, capsys):
    """And runs no code."""
    monkeypatch.chdir(tmp_path)
    path = Path("checkpoint.pt")
    if kind == "cut":
        script.save_checkpoint(path, make_args(script), 7, {"agent": torch.nn.Linear(9, 9)})
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "another script's":
        torch.save({"args": {"prompt_length": 5}, "step": 7}, path)
    elif kind == "harmful":
        torch.save({"args": {}, "step": Payload()}, path)
    with pytest.raises(SystemExit) as end:
        read_flags(script, monkeypatch, "--resume", ".")
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.startswith(f"{script.__name__}.py .: ")
    assert not Path("harm").exists()
    if kind in ("none", "another script's"):
        assert len(errors.splitlines()) == 1


def test_scripts_run_as_commands_and_print_ascii(tmp_path):
    """The whole way: flags, a run, its end; in a terminal that knows ASCII alone."""
    (script, *flags) = "sa2c_continuous.py --env-id tiny:Tiny-v0 --total-timesteps 64".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"score at 64 steps: " in done.stdout and (done.stdout + done.stderr).isascii()
