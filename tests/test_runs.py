"""Whole runs of the script as a user starts them: what they leave behind, and that they can be repeated."""

import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import imageio
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sppo_atari
from sppo_atari import Args, AtariAgent

ROOT = Path(__file__).parent.parent
BATCH, TOTAL = 640, 1280
SHORT = f"--num-envs 4 --num-steps {BATCH // 4} --total-timesteps {TOTAL} --update-epochs 1 --no-cuda --torch-threads 1"
FLAGS = {
    "plain": "--eval-episodes 1",
    "again": "--eval-episodes 1",
    "evaluated in between": f"--eval-episodes 1 --eval-interval {BATCH}",
    "other seed": "--eval-episodes 1 --seed 2",
    "everything": "--eval-episodes 2 --capture-video --reward-noise 0.1 --advantage-noise 0.1",
}
TAGS = """
    charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate
    losses/value_loss losses/policy_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac
    losses/explained_variance losses/forward_loss losses/reverse_loss losses/mean_weight losses/grad_norm
    advantage/sign_flips_normalization advantage/sign_flips_noise eval/episodic_return
""".split()


class Run(NamedTuple):
    process: subprocess.CompletedProcess
    folder: Path
    scalars: dict[str, list[tuple[int, float]]]
    text: str  # the hyperparameters


def train(folder: Path, flags: str) -> Run:
    command = [sys.executable, ROOT / "sppo_atari.py", *SHORT.split(), *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (text,) = events.Tensors("hyperparameters/text_summary")
    return Run(process, run, scalars, text.tensor_proto.string_val[0].decode())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(train, tmp_path_factory.mktemp("run"), flags) for name, flags in FLAGS.items()}
    return {name: future.result() for name, future in futures.items()}


def read_video(path):
    """Frames (time, height, width, 3)."""
    return np.stack([frame for frame in imageio.get_reader(path)]).astype(int)  # list() would ask for its length


def learning(run):
    """All that was logged but the speed and the evaluations."""
    return {tag: points for tag, points in run.scalars.items() if tag != "charts/SPS" and not tag.startswith("eval/")}


def test_one_seed_gives_one_run(runs):
    assert learning(runs["plain"]) == learning(runs["again"])
    assert runs["plain"].scalars["eval/episodic_return"] == runs["again"].scalars["eval/episodic_return"]


def test_evaluations_do_not_disturb_learning(runs):
    plain, evaluated = runs["plain"], runs["evaluated in between"]
    assert learning(plain) == learning(evaluated)
    assert [step for step, _ in evaluated.scalars["eval/episodic_return"]] == [BATCH, TOTAL]
    assert evaluated.scalars["eval/episodic_return"][-1:] == plain.scalars["eval/episodic_return"]


def test_another_seed_gives_another_run(runs):
    one, other = (learning(runs[name]) for name in ("plain", "other seed"))
    assert all(one[tag] != other[tag] for tag in ("losses/policy_loss", "losses/entropy", "charts/episodic_length"))


def test_noise_changes_what_is_learned_and_not_what_is_reported(runs):
    """Up to the first update the very same games are played; their scores are reported without the noise."""
    for tag in ("charts/episodic_return", "charts/episodic_length"):
        first, noisy = ([p for p in runs[name].scalars[tag] if p[0] <= BATCH] for name in ("plain", "everything"))
        assert first == noisy and first
    assert learning(runs["plain"])["losses/value_loss"] != learning(runs["everything"])["losses/value_loss"]
    assert all(value == 0 for _, value in runs["plain"].scalars["advantage/sign_flips_noise"])
    assert all(0 < value < 1 for _, value in runs["everything"].scalars["advantage/sign_flips_noise"])


def test_the_folder_is_named_after_the_run(runs):
    for name, seed in (("everything", "1"), ("other seed", "2")):
        env_id, script, run_seed, started = runs[name].folder.name.split("__")
        assert (env_id, script, run_seed) == ("ALE-Breakout-v5", "sppo_atari", seed)
        assert 0 <= time.time() - int(started) < 3600


def test_everything_is_logged(runs):
    scalars = runs["everything"].scalars
    assert set(TAGS) <= set(scalars)
    assert all(np.isfinite(value) for points in scalars.values() for _, value in points)
    for tag in TAGS:
        if not tag.startswith(("charts/episodic", "eval/")):
            assert [step for step, _ in scalars[tag]] == [BATCH, TOTAL]
    assert [step for step, _ in scalars["eval/episodic_return"]] == [TOTAL]
    for name, value in vars(Args(reward_noise=0.1, total_timesteps=TOTAL, capture_video=True, seed=1)).items():
        assert f"|{name}|" in runs["everything"].text
        if name in ("reward_noise", "total_timesteps", "capture_video", "seed", "Z"):
            assert f"|{name}|{value}|" in runs["everything"].text


def test_what_is_logged_is_right(runs):
    scalars = {tag: np.array(points) for tag, points in runs["everything"].scalars.items()}
    policy, forward, reverse = (scalars[f"losses/{name}_loss"][:, 1] for name in ("policy", "forward", "reverse"))
    np.testing.assert_allclose(policy, Args.alpha * forward + Args.beta * reverse, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scalars["charts/learning_rate"][:, 1], [2.5e-4, 1.25e-4], rtol=1e-6)
    np.testing.assert_allclose(scalars["losses/mean_weight"][:, 1], 1.5, rtol=1e-6)
    assert np.log(4) - 0.1 < scalars["losses/entropy"][0, 1] <= np.log(4) + 1e-6  # a fresh policy over 4 actions
    first_over, length = scalars["charts/episodic_length"][0]
    assert first_over == 4 * length  # the first game to end began with the run


def test_the_output_is_short(runs):
    """Without a terminal: no progress bar, and no warning."""
    process, folder, scalars, _ = runs["everything"]
    first, progress, result = process.stdout.splitlines()
    assert process.stderr == "" and "\r" not in process.stdout
    assert f"runs/{folder.name}" in first and str(TOTAL) in progress
    assert f"{scalars['eval/episodic_return'][0][1]:.2f}" in result


def test_the_model_loads_safely(runs):
    saved = torch.load(runs["everything"].folder / "model.pt", weights_only=True)
    agent = AtariAgent(4)
    agent.load_state_dict(saved["agent"])
    fresh = AtariAgent(4)
    assert not torch.equal(agent.value.weight, fresh.value.weight)


def test_the_video_plays(runs):
    (video,) = (runs["everything"].folder / "videos").iterdir()
    assert video.name == f"{TOTAL}.mp4"
    frames = read_video(video)
    assert len(frames) > 100 and frames.shape[1:] == (210, 160, 3)
    assert len(np.unique(frames, axis=0)) > 50
    assert np.abs(frames[..., 0] - frames[..., 2]).max() > 100  # Breakout's bricks are coloured


def test_the_video_shows_the_game_that_was_scored(tmp_path, monkeypatch):
    """Games are looked at through the two environments of an evaluation, the games in grey and the first in colour."""
    logs, make_games = [], sppo_atari.make_games

    def watched(*args, **options):
        env, log = make_games(*args, **options), []
        step = env.step
        env.step = lambda action: log.append(step(action)) or log[-1]
        logs.append(log)
        return env

    monkeypatch.setattr(sppo_atari, "make_games", watched)
    torch.manual_seed(0)
    video = tmp_path / "videos" / "game.mp4"
    sequence = np.random.SeedSequence(2)
    scores = sppo_atari.evaluate_games(AtariAgent(4), Args(eval_episodes=3), sequence, video)

    (_, grey, _, _, infos), (obs, colour, *_) = (list(zip(*log)) for log in logs)
    grey, lives = np.stack(grey), np.stack([info["lives"] for info in infos])
    colour = np.stack(colour)
    lengths = (np.diff(lives, axis=0) > 0).argmax(0) + 2  # a new game has all lives again
    np.testing.assert_array_equal(scores, [grey[:length, i].sum() for i, length in enumerate(lengths)])
    np.testing.assert_array_equal(colour[:, 0], grey[: lengths[0], 0])
    assert len(set(scores)) > 1 and scores[0] > 0

    frames = read_video(video)
    assert len(frames) == lengths[0]
    played = np.stack(obs)[:-1, 0, 0]  # after the last step it shows the next game
    assert np.abs(frames[1:] - played).mean() < 4  # compression


def test_the_first_game_of_each_environment_is_the_score(monkeypatch):
    """Short games come twice before the longest is over; counting them again would favour short games."""
    step, scores = sppo_atari.Games.step, itertools.count(1000)

    def end_soon(self, action):
        result = step(self, action)
        if self.length[1] == 5:
            self.over[1], self.score[1] = True, next(scores)
        return result

    monkeypatch.setattr(sppo_atari.Games, "step", end_soon)
    args, sequence = Args(eval_episodes=2), np.random.SeedSequence(0)
    first, second = sppo_atari.evaluate_games(AtariAgent(4), args, sequence, video=None)
    assert first < 1000 and second == 1000 and next(scores) > 1010
