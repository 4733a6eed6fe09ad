"""Whole runs of the four scripts as a user starts them: what they leave behind, and that they can be repeated."""

import itertools
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import imageio
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_baseline
import sa2c_atari
import sppo_atari
import sppo_continuous

ROOT = Path(__file__).parent.parent
BATCH, LAST = 512, 1024  # two iterations; 1,100 steps are asked for
SHORT = "--total-timesteps 1100 --eval-episodes 1 --no-cuda --torch-threads 1"
GAMES = f"--env-id ALE/Breakout-v5 --num-envs 4 --num-steps 128 {SHORT}"
TASKS = f"--num-envs 2 --num-steps 256 --num-minibatches 4 --update-epochs 2 {SHORT}"
NOISE = "--reward-noise 0.1 --advantage-noise 0.1"
WATCHED = "--eval-interval 500 --capture-video"  # due at 512 and 1,024 steps
COMMANDS = {
    "sppo": f"sppo_atari.py {GAMES} --update-epochs 1",
    "sppo, watched": f"sppo_atari.py {GAMES} --update-epochs 1 {WATCHED}",
    "sppo, noisy": f"sppo_atari.py {GAMES} --update-epochs 1 {NOISE} --survival-bonus 0.125",
    "sppo, other seed": f"sppo_atari.py {GAMES} --update-epochs 1 --seed 2",
    "sa2c": f"sa2c_atari.py {GAMES} {NOISE} --log-interval 1",
    "sa2c, watched": f"sa2c_atari.py {GAMES} {NOISE} --log-interval 2 --eval-interval 500",
    "pole": f"sppo_continuous.py --env-id CartPole-v1 {TASKS}",
    "pole, watched": f"sppo_continuous.py --env-id CartPole-v1 {TASKS} {WATCHED}",
    "hopper": f"sppo_continuous.py --env-id Hopper-v5 {TASKS} {NOISE}",
    "baseline, bins": f"ppo_baseline.py --env-id Hopper-v5 --policy discretized --pg-coef 20.5 {TASKS}",
    "baseline, Gaussian": f"ppo_baseline.py --env-id Hopper-v5 {TASKS} {NOISE}",
    "baseline, game": f"ppo_baseline.py {GAMES} --update-epochs 1 {NOISE} --survival-bonus 0.125 --no-anneal-lr",
}
ALL = pytest.mark.parametrize("name", COMMANDS)
SCRIPTS = pytest.mark.parametrize("script", [sppo_atari, sppo_continuous, sa2c_atari, ppo_baseline])

EVERYWHERE = set("""
    charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate eval/episodic_return
    losses/value_loss losses/policy_loss losses/forward_loss losses/entropy losses/explained_variance losses/mean_weight
    losses/grad_norm advantage/sign_flips_normalization advantage/sign_flips_noise
""".split())
PPO, SYMMETRIC = {"losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac"}, {"losses/reverse_loss"}
TAGS = {
    sppo_atari: EVERYWHERE | PPO | SYMMETRIC,
    sppo_continuous: EVERYWHERE | PPO | SYMMETRIC,
    sa2c_atari: EVERYWHERE | SYMMETRIC,
    ppo_baseline: EVERYWHERE | PPO,
}


class Run(NamedTuple):
    process: subprocess.CompletedProcess
    folder: Path
    points: dict[str, list[tuple[int, float]]]  # (step, value), by tag
    flags: dict[str, str]  # the hyperparameter table

    def values(self, tag):
        return np.array([value for _, value in self.points[tag]])

    def steps(self, tag):
        return [step for step, _ in self.points[tag]]


def train(folder: Path, command: str) -> Run:
    script, *flags = command.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, ROOT / script, *flags], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    points = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (text,) = events.Tensors("hyperparameters/text_summary")
    rows = text.tensor_proto.string_val[0].decode().splitlines()[2:]
    return Run(process, run, points, dict(row.strip("|").split("|") for row in rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("run") for _ in COMMANDS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(COMMANDS, pool.map(train, folders, COMMANDS.values())))


def script_of(name):
    return {"sppo": sppo_atari, "sa2c": sa2c_atari, "baseline": ppo_baseline}.get(name.split(",")[0], sppo_continuous)


def learning(run):
    """All that was logged but the speed and the evaluations."""
    return {tag: points for tag, points in run.points.items() if tag not in ("charts/SPS", "eval/episodic_return")}


# ------------------------------------------------------------------------------------------------------- what is logged


@ALL
def test_everything_is_logged(runs, name):
    run = runs[name]
    assert set(run.points) == TAGS[script_of(name)]
    for tag in run.points:
        assert np.isfinite(run.values(tag)).all()
        if not tag.startswith(("charts/episodic", "eval/")):
            assert run.steps(tag) == ([LAST] if name == "sa2c, watched" else [BATCH, LAST])
    assert run.steps("eval/episodic_return") == ([BATCH + 1, LAST + 1] if "watched" in name else [LAST + 1])
    first_over, length = run.points["charts/episodic_length"][0]
    assert first_over == int(run.flags["num_envs"]) * length  # the first to end began with the run


@ALL
def test_the_policy_loss_is_made_of_its_terms(runs, name):
    run, script = runs[name], script_of(name)
    forward, mean_weight = run.values("losses/forward_loss"), run.values("losses/mean_weight")
    if script is ppo_baseline:
        expected, weight = float(run.flags["pg_coef"]) * forward, float(run.flags["pg_coef"])
    else:
        alpha, beta = float(run.flags["alpha"]), float(run.flags["beta"])
        expected, weight = alpha * forward + beta * run.values("losses/reverse_loss"), alpha + beta
    np.testing.assert_allclose(run.values("losses/policy_loss"), expected, rtol=1e-4, atol=1e-6)
    if script is sa2c_atari:  # the mean of α + β|Z|π
        assert ((alpha < mean_weight) & (mean_weight < weight)).all()
    else:
        np.testing.assert_allclose(mean_weight, weight, rtol=1e-6)


@pytest.mark.parametrize(
    "name, entropy",
    [
        ("sppo", math.log(4)),
        ("pole", math.log(2)),
        ("hopper", 3 * math.log(11)),
        ("baseline, Gaussian", 1.5 * math.log(2 * math.pi * math.e)),
    ],
)
def test_the_first_policy_is_close_to_uniform_or_standard_normal(runs, name, entropy):
    assert runs[name].values("losses/entropy")[0] == pytest.approx(entropy, abs=0.05)


@pytest.mark.parametrize(
    "clean, noisy",
    [("sppo", "sppo, noisy"), ("sppo", "sa2c"), ("sppo", "baseline, game"), ("baseline, bins", "hopper")],
)
def test_the_noise_is_seen_in_the_advantages_and_never_in_the_reported_returns(runs, clean, noisy):
    """Up to the first update all scripts play the very same episodes, and report them without the noise."""
    clean, noisy = runs[clean], runs[noisy]
    flips = noisy.values("advantage/sign_flips_noise")
    assert ((0 < flips) & (flips < 1)).all() and (clean.values("advantage/sign_flips_noise") == 0).all()
    for tag in ("charts/episodic_return", "charts/episodic_length"):
        first, noisy_first = ([point for point in run.points[tag] if point[0] <= BATCH] for run in (clean, noisy))
        assert first == noisy_first and first
    assert clean.values("losses/value_loss")[0] != noisy.values("losses/value_loss")[0]


@pytest.mark.parametrize("name", ["sppo", "pole"])
def test_one_seed_gives_one_run_however_often_it_is_evaluated(runs, name):
    plain, watched = runs[name], runs[f"{name}, watched"]
    assert learning(plain) == learning(watched)
    assert plain.points["eval/episodic_return"] == watched.points["eval/episodic_return"][1:]


def test_another_seed_gives_another_run(runs):
    one, other = learning(runs["sppo"]), learning(runs["sppo, other seed"])
    assert all(one[tag] != other[tag] for tag in ("losses/policy_loss", "losses/entropy", "charts/episodic_length"))


def test_sa2c_logs_means_over_the_log_interval(runs):
    each, both = runs["sa2c"], runs["sa2c, watched"]
    for tag in learning(both):
        if tag.startswith("charts/episodic"):
            assert both.points[tag] == each.points[tag]
        else:
            np.testing.assert_allclose(both.values(tag), each.values(tag).mean(), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ what is written


@ALL
def test_the_folder_is_named_after_the_run(runs, name):
    run = runs[name]
    env_id, script, seed, started = run.folder.name.split("__")
    assert (env_id, seed) == (run.flags["env_id"].replace("/", "-"), run.flags["seed"])
    assert script == script_of(name).__name__ and 0 <= time.time() - int(started) < 3600


@ALL
def test_the_output_is_short_and_ends_with_the_score(runs, name):
    """And with one score per evaluation: the last is the final one."""
    run = runs[name]
    first, *scores = run.process.stdout.splitlines()
    assert first.split() == [f"runs/{run.folder.name}", "on", "cpu"]
    evaluations = [(step - 1, value) for step, value in run.points["eval/episodic_return"]]
    assert scores == [f"score at {step} steps: {value:.2f} ± 0.00 (1 episodes)" for step, value in evaluations]
    assert f"{LAST}/{LAST} [" in run.process.stderr and "Warning" not in run.process.stderr


@ALL
def test_the_hyperparameter_table_shows_the_flags(runs, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", COMMANDS[name].split())
    args, _ = script_of(name).read_flags()
    assert runs[name].flags == {flag: str(value) for flag, value in vars(args).items()}


@ALL
def test_the_checkpoint_loads_safely_and_holds_the_policy_that_was_scored(runs, name):
    run, script = runs[name], script_of(name)
    saved = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    args = replace(script.Args(**saved["args"]), capture_video=False)
    assert saved["iteration"] == 2 and {key: str(value) for key, value in saved["args"].items()} == run.flags
    if "ALE" in args.env_id:
        agent = script.AtariAgent(4)
        evaluate, evaluated = script.evaluate_games, (agent,)
    else:
        envs = script.Environments(args, np.array([0]))
        for stats, values in zip(envs.stats, saved["stats"]):
            vars(stats).update({key: value.numpy() for key, value in values.items()})
        size, space = envs.obs.shape[1], envs.envs[0].action_space
        agent = script.GaussianAgent(size, space) if "Gaussian" in name else script.BinnedAgent(size, space, 11)
        evaluate, evaluated = script.evaluate_episodes, (agent, envs)
    agent.load_state_dict(saved["agent"])
    assert evaluate(*evaluated, args, [], None) == pytest.approx(run.values("eval/episodic_return")[-1], rel=1e-6)


def read_video(path):
    """Frames (time, height, width, 3)."""
    return np.stack([frame for frame in imageio.get_reader(path)]).astype(int)  # list() would ask for its length


@pytest.mark.parametrize("name, size", [("sppo, watched", (336, 336)), ("pole, watched", (400, 608))])
def test_the_videos_play(runs, name, size):
    videos = {int(video.stem): read_video(video) for video in runs[name].folder.glob("*.mp4")}
    assert set(videos) == {0, BATCH, LAST} and len(videos[0]) == 1
    assert all(frames.shape[1:] == (*size, 3) for frames in videos.values())
    assert all((frames[-1] != frames[0]).any() for step, frames in videos.items() if step)
    if name == "pole, watched":  # a frame and a reward of 1 per step
        lengths = [len(videos[step]) for step in (BATCH, LAST)]
        assert lengths == runs[name].values("eval/episodic_return").tolist()


def test_the_video_shows_the_game_that_was_scored(tmp_path, monkeypatch):
    step, seen = sppo_atari.Games.step, []

    def watched(self, action):
        obs, result = self.obs[:, :, :, -1], step(self, action)
        seen.append((obs, self.over.copy(), self.score.copy()))
        return result

    monkeypatch.setattr(sppo_atari.Games, "step", watched)
    torch.manual_seed(0)
    args = sppo_atari.Args(eval_episodes=3, capture_video=True)
    scores = sppo_atari.evaluate_games(sppo_atari.AtariAgent(4), args, [], tmp_path / "game.mp4")
    obs, over, score = map(np.stack, zip(*seen))
    np.testing.assert_array_equal(scores, score[over.argmax(0), range(3)])
    assert len(set(scores)) > 1
    frames = read_video(tmp_path / "game.mp4")
    assert len(frames) == over.argmax(0)[0] + 1
    errors = [np.abs(frames[:, ::4, ::4, 0] - obs[: len(frames), game]).mean() for game in range(3)]
    assert min(errors) == errors[0] < 4  # compression


def test_the_first_game_of_each_environment_is_the_score(monkeypatch):
    """Short games come twice before the longest is over; counting them again would favour short games."""
    step, scores = sppo_atari.Games.step, itertools.count(1000)

    def end_soon(self, action):
        result = step(self, action)
        if self.length[1] == 5:
            self.over[1], self.score[1] = True, next(scores)
        return result

    monkeypatch.setattr(sppo_atari.Games, "step", end_soon)
    args = sppo_atari.Args(eval_episodes=2)
    first, second = sppo_atari.evaluate_games(sppo_atari.AtariAgent(4), args, [], None)
    assert first < 1000 and second == 1000 and next(scores) > 1010


# ------------------------------------------------------------------------------------------------ what happens within


def run_within(script, tmp_path, monkeypatch, **settings):
    """Four iterations of 32 steps; settings that the script does not have are left out. Its flags."""
    monkeypatch.chdir(tmp_path)
    settings |= dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=1, total_timesteps=128, eval_episodes=1,
                     cuda=False, torch_threads=1)  # fmt: skip
    settings |= dict(env_id="ALE/Breakout-v5" if "atari" in script.__name__ else "CartPole-v1")
    args = script.Args(**{flag: value for flag, value in settings.items() if hasattr(script.Args, flag)})
    script.main(args)
    return args


@SCRIPTS
@pytest.mark.parametrize("anneal", [True, False])
def test_schedules_fall_linearly(script, anneal, tmp_path, monkeypatch):
    """Of learning rate and clip range, to 1/4 in the last of four iterations; sa2c_atari.py has no clip range."""
    seen, update = [], script.update

    def spy(agent, optimizer, batch, samples, clip_coef, *rest):
        seen.append((optimizer.param_groups[0]["lr"], clip_coef))
        return update(agent, optimizer, batch, samples, clip_coef, *rest)

    monkeypatch.setattr(script, "update", spy)
    args = run_within(script, tmp_path, monkeypatch, anneal_lr=anneal, anneal_clip=anneal)
    remaining = np.array([1, 3 / 4, 2 / 4, 1 / 4]) if anneal else np.ones(4)
    rates, clips = zip(*seen)
    np.testing.assert_allclose(rates, args.learning_rate * remaining)
    if script is not sa2c_atari:
        np.testing.assert_allclose(clips, args.clip_coef * remaining, rtol=1e-6)


@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, ppo_baseline])
def test_the_survival_bonus_is_added_to_every_reward_that_the_learner_sees(script, tmp_path, monkeypatch):
    seen, gae = [], script.gae
    monkeypatch.setattr(script, "gae", lambda rewards, *rest: seen.append(rewards.copy()) or gae(rewards, *rest))
    run_within(script, tmp_path, monkeypatch, survival_bonus=0.125)
    assert len(seen) == 2 * 4
    for learned, clean in zip(seen[::2], seen[1::2]):
        np.testing.assert_array_equal(learned, clean + np.float32(0.125))
        assert learned.dtype == np.float32


# ---------------------------------------------------------------------------------------------- the baseline's defaults


@pytest.mark.parametrize(
    "flags, sibling",
    [
        ("--env-id ALE/Breakout-v5", sppo_atari),
        ("--seed 1 --env-id=BreakoutNoFrameskip-v4", sppo_atari),
        ("--env-id CartPole-v1", sppo_continuous),
        ("", sppo_continuous),
    ],
)
def test_the_baselines_defaults_are_those_of_the_sibling(flags, sibling, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ppo_baseline.py", *flags.split()])
    args, _ = ppo_baseline.read_flags()
    shared = {flag: value for flag, value in vars(sibling.Args()).items() if hasattr(args, flag) and flag != "env_id"}
    assert len(shared) > 25 and {flag: getattr(args, flag) for flag in shared} == shared
    assert args.env_id == (flags.replace("=", " ").split() or ["Hopper-v5"])[-1]
    sys.argv.append("--help")
    with pytest.raises(SystemExit) as end:
        ppo_baseline.read_flags()
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"(default: {shared[flag]})" in text for flag in ("learning_rate", "total_timesteps", "num_steps"))


def test_a_schedule_of_the_baseline_can_be_switched_off(runs):
    np.testing.assert_allclose(runs["sppo"].values("charts/learning_rate"), [2.5e-4, 1.25e-4], rtol=1e-6)
    np.testing.assert_allclose(runs["baseline, game"].values("charts/learning_rate"), [2.5e-4, 2.5e-4], rtol=1e-6)
