"""Whole runs: what they print and leave behind, that they can be repeated, and that what a user may
look at while they train does not change them."""

import contextlib
import functools
import importlib
import io
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import ale_py
import imageio
import numpy as np
import pytest
import tiny
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_baseline
import sa2c_atari
import sa2c_continuous
import sppo_atari
import sppo_continuous

GAMES = "--env-id ALE/Breakout-v5 --num-envs 4 --num-steps 64 --total-timesteps 600 --no-cuda"
POLE = "--env-id CartPole-v1 --num-steps 256 --total-timesteps 600"
NOISE = "--reward-noise 0.1 --advantage-noise 0.1"
WATCHED = "--eval-interval 250 --capture-video"
BATCH, LAST = 256, 512  # two iterations
COMMANDS = {
    "sppo": f"sppo_atari {GAMES} --update-epochs 1",
    "sppo, watched": f"sppo_atari {GAMES} --update-epochs 1 {WATCHED}",
    "sppo, noisy": f"sppo_atari {GAMES} --update-epochs 1 {NOISE}",
    "sa2c": f"sa2c_atari {GAMES} --log-interval 1",
    "pole": f"sppo_continuous {POLE} --update-epochs 2",
    "pole, watched": f"sppo_continuous {POLE} --update-epochs 2 {WATCHED}",
    "pole, noisy": f"sppo_continuous {POLE} --update-epochs 2 {NOISE}",
    "pole, other seed": f"sppo_continuous {POLE} --update-epochs 2 --seed 2",
    "baseline": f"ppo_baseline {GAMES} --update-epochs 1 --pg-coef 1.5",
    "baseline, pole": f"ppo_baseline {POLE} --update-epochs 1",
    "baseline, pole, watched": f"ppo_baseline {POLE} --update-epochs 1 --eval-interval 250",
    "sa2c, pole": f"sa2c_continuous {POLE} --log-interval 1",
    "sa2c, pole, watched": f"sa2c_continuous {POLE} --log-interval 1 {WATCHED}",
}
ALL = pytest.mark.parametrize("name", COMMANDS)

EVERYWHERE = set(
    """
    charts/episodic_return charts/episodic_length charts/SPS eval/episodic_return
    losses/value_loss losses/policy_loss losses/entropy
    losses/explained_variance losses/grad_norm advantage/sign_flips_normalization
""".split()
)
SYMMETRIC = {"losses/forward_loss", "losses/reverse_loss"}
PPO = {"losses/approx_kl", "losses/clipfrac"}
TAGS = {
    "sppo_atari": SYMMETRIC | PPO | {"charts/learning_rate"},
    "sppo_continuous": SYMMETRIC | PPO | {"advantage/sign_flips_noise"},
    "sa2c_atari": SYMMETRIC | {"charts/learning_rate", "losses/mean_weight"},
    "sa2c_continuous": SYMMETRIC | {"advantage/sign_flips_noise", "losses/mean_weight"},
    "ppo_baseline": PPO | {"charts/learning_rate"},
}


class Run(NamedTuple):
    script: str
    folder: Path
    output: str
    points: dict[str, list[tuple[int, float]]]  # (step, value), by tag
    flags: dict[str, str]  # the hyperparameter table
    state: dict  # the checkpoint

    def values(self, tag):
        return np.array([value for _, value in self.points[tag]])

    def steps(self, tag):
        return [step for step, _ in self.points[tag]]


def train(folder: Path, command: str) -> Run:
    script, *flags = command.split()
    module = importlib.import_module(script)
    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        module.main(tyro.cli(module.Args, args=[*flags, "--eval-episodes=1", "--torch-threads=1"]))
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    points = {}
    for tag in events.Tags()["scalars"]:
        points[tag] = [(point.step, point.value) for point in events.Scalars(tag)]
    (text,) = events.Tensors("hyperparameters/text_summary")
    rows = text.tensor_proto.string_val[0].decode().splitlines()[2:]
    flags = dict(row.strip("|").split("|") for row in rows)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return Run(script, run, output.getvalue(), points, flags, state)


@pytest.fixture(scope="module", autouse=True)
def short_games():
    """Games are over after 100 steps."""
    games = functools.partial(ale_py.vector_env.AtariVectorEnv, max_num_frames_per_episode=400)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", games)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {name: train(tmp_path_factory.mktemp("run"), x) for name, x in COMMANDS.items()}


def learning(run):
    """All that was logged but the speed and the evaluations."""
    left_out = ("charts/SPS", "eval/episodic_return")
    return {tag: points for tag, points in run.points.items() if tag not in left_out}


def tensors(state) -> list[torch.Tensor]:
    """Of a checkpoint: parameters, the optimiser's state, running statistics."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


# ---------------------------------------------------------------------------------- what is logged


@ALL
def test_everything_is_logged(runs, name):
    run = runs[name]
    assert set(run.points) == EVERYWHERE | TAGS[run.script]
    batch = int(run.flags["num_steps"]) * int(run.flags.get("num_envs", 1))
    for tag in run.points:
        assert np.isfinite(run.values(tag)).all()
        if not tag.startswith(("charts/episodic", "eval/")):
            assert run.steps(tag) == [*range(batch, LAST + 1, batch)]
    evaluations = [0, BATCH, LAST] if "watched" in name else [LAST]
    assert run.steps("eval/episodic_return") == [step + 1 for step in evaluations]
    first_over, length = run.points["charts/episodic_length"][0]
    assert first_over == int(run.flags.get("num_envs", 1)) * length  # it began with the run


@pytest.mark.parametrize("name", [name for name in COMMANDS if "baseline" not in name])
def test_the_policy_loss_is_made_of_its_terms(runs, name):
    run = runs[name]
    alpha, beta = float(run.flags["alpha"]), float(run.flags["beta"])
    reverse = run.values("losses/reverse_loss")
    expected = alpha * run.values("losses/forward_loss") + beta * reverse
    np.testing.assert_allclose(run.values("losses/policy_loss"), expected, rtol=1e-4, atol=1e-5)
    if "losses/mean_weight" in run.points:  # the mean of α + β|Z|π
        weights = run.values("losses/mean_weight")
        assert ((alpha < weights) & (weights < alpha + beta)).all()


@pytest.mark.parametrize("name, num_actions", [("sppo", 4), ("sa2c", 4), ("pole", 2)])
def test_the_first_policy_is_close_to_uniform(runs, name, num_actions):
    entropy = runs[name].values("losses/entropy")[0]
    assert entropy == pytest.approx(math.log(num_actions), abs=0.05)


@pytest.mark.parametrize("name", ["sppo", "pole"])
def test_the_learner_sees_the_noise_and_reported_returns_do_not_have_it(runs, name):
    """Up to the first update both play the very same episodes, and report them without noise."""
    clean, noisy = runs[name], runs[f"{name}, noisy"]
    for tag in ("charts/episodic_return", "charts/episodic_length"):
        both = [[point for point in run.points[tag] if point[0] <= BATCH] for run in (clean, noisy)]
        assert both[0] == both[1] and (both[0] or name == "sppo")  # whose games are longer
    assert clean.values("losses/value_loss")[0] != noisy.values("losses/value_loss")[0]
    if name == "pole":
        flips = noisy.values("advantage/sign_flips_noise")
        assert ((0 < flips) & (flips < 1)).all()
        assert (clean.values("advantage/sign_flips_noise") == 0).all()


@pytest.mark.parametrize("name", ["sppo", "pole", "sa2c, pole", "baseline, pole"])
def test_one_seed_gives_one_run_bit_for_bit_however_often_it_is_evaluated(runs, name):
    plain, watched = runs[name], runs[f"{name}, watched"]
    assert learning(plain) == learning(watched)
    assert plain.values("eval/episodic_return") == watched.values("eval/episodic_return")[-1]
    for one, other in zip(tensors(plain.state), tensors(watched.state), strict=True):
        assert torch.equal(one, other)


def test_another_seed_gives_another_run(runs):
    one, other = learning(runs["pole"]), learning(runs["pole, other seed"])
    assert all(one[tag] != other[tag] for tag in ("losses/entropy", "charts/episodic_length"))


# --------------------------------------------------------------------------------- what is written


@ALL
def test_the_output_is_the_folder_and_a_score_for_each_evaluation(runs, name):
    """In ASCII."""
    run = runs[name]
    folder, *scores = run.output.splitlines()
    assert folder == str(Path("runs", run.folder.name)) and run.output.isascii()
    expected = []
    for step, value in run.points["eval/episodic_return"]:
        expected.append(f"score at {step - 1} steps: {value:.2f} +- 0.00")
    assert [line.strip() for line in scores] == expected
    env_id, script, seed, started = run.folder.name.split("__")
    assert (env_id, seed) == (run.flags["env_id"].replace("/", "-"), run.flags["seed"])
    milliseconds, process = map(int, started.split("_"))
    assert script == run.script and process == os.getpid()
    assert 0 <= time.time() - milliseconds / 1000 < 3600


@ALL
def test_the_checkpoint_holds_the_flags_and_the_policy_that_was_scored(runs, name, tmp_path):
    run = runs[name]
    saved = run.state
    assert {flag: str(value) for flag, value in saved["args"].items()} == run.flags
    assert saved["step"] == LAST
    again = tmp_path / "runs" / run.folder.name
    again.mkdir(parents=True)
    torch.save(saved, again / "checkpoint.pt")
    module = importlib.import_module(run.script)
    output = io.StringIO()
    flags = saved["args"] | {"resume": str(again)}
    with contextlib.redirect_stdout(output):
        module.main(module.Args(**flags), saved)
    assert output.getvalue().splitlines()[-1] == run.output.splitlines()[-1]


def read_video(path):
    """Frames (time, height, width, 3)."""
    return np.stack([frame for frame in imageio.get_reader(path)]).astype(int)


@pytest.mark.parametrize("name, size", [("sppo", (336, 336)), ("pole", (400, 608))])
def test_videos_show_the_evaluations(runs, name, size):
    run = runs[f"{name}, watched"]
    videos = {int(video.stem): read_video(video) for video in run.folder.glob("*.mp4")}
    assert set(videos) == {0, BATCH, LAST}
    for frames in videos.values():
        assert frames.shape[1:] == (*size, 3) and (frames[-1] != frames[0]).any()
    if name == "pole":  # a frame and a reward of 1 per step
        lengths = [len(videos[step]) for step in (0, BATCH, LAST)]
        assert lengths == run.values("eval/episodic_return").tolist()


# ---------------------------------------------------------------------------- what happens within


SCRIPTS = [sppo_atari, sa2c_atari, sppo_continuous, sa2c_continuous, ppo_baseline]
EVERY = pytest.mark.parametrize("script", SCRIPTS)


def make_args(script, **flags):
    """Four iterations of 32 steps, on Breakout or `Tiny`; flags that the script lacks are left
    out."""
    is_game = "atari" in script.__name__
    given = dict(
        env_id="ALE/Breakout-v5" if is_game else "tiny:Tiny-v0",
        num_envs=2 if is_game else 1,
        num_steps=16 if is_game else 32,
        total_timesteps=128,
        num_minibatches=2,
        update_epochs=1,
        log_interval=1,
        eval_episodes=1,
        cuda=False,
        torch_threads=1,
    )
    known = {name: x for name, x in (given | flags).items() if hasattr(script.Args, name)}
    return script.Args(**known)


@EVERY
def test_checkpoints_come_at_intervals_and_before_evaluations(script, tmp_path, monkeypatch):
    """The first before the first update. The run of 128 steps is evaluated at 0, 96 and 128."""
    events = []
    evaluate, save_checkpoint = script.evaluate, script.save_checkpoint

    def watched_evaluate(*args):
        events.append("evaluation")
        return evaluate(*args)

    def watched_save(path, args, step, parts):
        save_checkpoint(path, args, step, parts)
        events.append(step)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "evaluate", watched_evaluate)
    monkeypatch.setattr(script, "save_checkpoint", watched_save)
    script.main(make_args(script, eval_interval=90, checkpoint_interval=64))
    assert events == [0, "evaluation", 64, 96, "evaluation", 128, "evaluation"]


@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, ppo_baseline])
@pytest.mark.parametrize("anneal", [True, False])
def test_schedules_fall_linearly(script, anneal, tmp_path, monkeypatch):
    """Of learning rate and clip range, to 1/4 in the last of four iterations."""
    seen, update = [], script.update

    def spy(agent, optimizer, batch, *rest):
        clip_coef = rest[0] if script is not sa2c_atari else None
        seen.append((optimizer.param_groups[0]["lr"], clip_coef))
        return update(agent, optimizer, batch, *rest)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "update", spy)
    args = make_args(script, anneal_lr=anneal, anneal_clip=anneal)
    script.main(args)
    remaining = np.array([1, 3 / 4, 2 / 4, 1 / 4]) if anneal else np.ones(4)
    rates, clips = zip(*seen)
    np.testing.assert_allclose(rates, args.learning_rate * remaining)
    if script is not sa2c_atari:
        np.testing.assert_allclose(clips, args.clip_coef * remaining, rtol=1e-6)


@EVERY
def test_two_runs_that_start_at_once_have_folders_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    args = make_args(script)
    folders = set()
    for process in (7, 8):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        folder, writer = script.start_logging(args, 1)
        writer.close()
        folders.add(folder)
    assert len(folders) == 2


@pytest.mark.parametrize("script", [sppo_continuous, sa2c_continuous, ppo_baseline])
@pytest.mark.parametrize("log_interval", [1, 25])
def test_a_run_that_diverges_stops_before_it_is_saved(script, log_interval, tmp_path, monkeypatch):
    """A reward of the third iteration is not a number. torch's distributions may see it first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny.Tiny, "steps", 0)
    flags = dict(env_id="tiny:Diverging-v0", checkpoint_interval=1, log_interval=log_interval)
    with pytest.raises((FloatingPointError, ValueError)):
        script.main(make_args(script, **flags))
    (checkpoint,) = tmp_path.glob("runs/*/checkpoint.pt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["step"] == 64
    assert all(tensor.isfinite().all() for tensor in tensors(saved))


@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari])
def test_a_run_on_atari_that_diverges_stops_before_it_is_saved(script, tmp_path, monkeypatch):
    step, calls = script.Games.step, itertools.count()

    def explode(self, action):
        reward, done = step(self, action)
        return reward * (float("nan") if next(calls) == 40 else 1), done

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.Games, "step", explode)
    with pytest.raises((FloatingPointError, ValueError)):
        script.main(make_args(script, checkpoint_interval=1))
    (checkpoint,) = tmp_path.glob("runs/*/checkpoint.pt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["step"] == 64
    assert all(tensor.isfinite().all() for tensor in tensors(saved))


@EVERY
def test_custom_environments_draw_from_global_random_numbers(script, tmp_path, monkeypatch):
    """And yet a run can be repeated, however often it is evaluated."""
    if "atari" in script.__name__:
        pytest.skip("plays games")
    states = []
    for number, flags in enumerate([{}, {"eval_interval": 32}, {"seed": 4}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        script.main(make_args(script, env_id="tiny:Flat-v0", **flags))
        (checkpoint,) = folder.glob("runs/*/checkpoint.pt")
        states.append(tensors(torch.load(checkpoint, weights_only=True)["agent"]))
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))


WANDB = """
def init(**options):
    with open("calls", "a") as file:
        print(options["id"], options["resume"], options["sync_tensorboard"], file=file)
"""


@EVERY
def test_weights_and_biases_goes_on_with_the_same_run(script, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    run, writer = script.start_logging(make_args(script, track=True), 1)
    writer.close()
    _, writer = script.start_logging(make_args(script, track=True, resume=str(run)), 33)
    writer.close()
    assert (tmp_path / "calls").read_text() == 2 * f"{run.name} allow True\n"
