"""The Atari environment, by how it behaves: what is played, seen and scored."""

import os
from collections import deque

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, WarpFrame

import sppo_atari
from sppo_atari import Args, Games, game_seeds, make_games

SEEDS = np.array([11, 22, 33, 44])


def play(env_id, num_steps=100, sticky=Args.repeat_action_probability):
    """Observations and rewards of four games under random actions, the same ones on every call."""
    games, rng = Games(env_id, SEEDS, sticky), np.random.default_rng(0)
    actions = rng.integers(games.num_actions, size=(num_steps, 4))
    rows = [(games.step(action)[0], games.obs.numpy().copy()) for action in actions]
    return [np.stack(column) for column in zip(*rows)]


def test_both_names_of_a_game_mean_the_same():
    """gym.make gives `ALE/Breakout-v5` sticky actions and `BreakoutNoFrameskip-v4` none."""
    for one, other in zip(play("ALE/Breakout-v5"), play("BreakoutNoFrameskip-v4")):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(play("ALE/Breakout-v5")[1], play("ALE/Breakout-v5", sticky=0.25)[1])


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4"])
@pytest.mark.parametrize("sticky", [Args.repeat_action_probability, 0.25])
def test_actions_are_sticky_only_if_asked(env_id, sticky):
    """Breakout has no chance in it: without no-ops and sticky actions, games with different seeds are one game."""
    games, rng = make_games(env_id, 4, sticky, noop_max=0), np.random.default_rng(0)
    games.reset(seed=SEEDS)
    for _ in range(100):
        obs, *_ = games.step(np.repeat(rng.integers(4), 4))
    assert (obs == obs[0]).all() == (sticky == 0)


def test_rewards_are_the_raw_score():
    rewards, _ = play("ALE/MsPacman-v5")
    assert rewards.max() >= 10  # a dot


@pytest.mark.parametrize("game, tolerance", [("Breakout", 0), ("Boxing", 0), ("MsPacman", 0.006)])
def test_preprocessing_is_that_of_stable_baselines(game, tolerance):
    """`tolerance`: share of pixels that may differ by more than 1; ale-py maximises over greys, not over colours."""
    games = make_games(f"ALE/{game}-v5", 1, 0.0, noop_max=0, use_fire_reset=False)
    # AtariWrapper without no-ops, lives and clipping, and without its FIRE at reset
    wrapped = WarpFrame(MaxAndSkipEnv(gym.make(f"{game}NoFrameskip-v4")))
    obs, frames = games.reset(seed=SEEDS[:1])[0], deque([np.zeros((84, 84))] * 3, maxlen=4)
    frames.append(wrapped.reset()[0][:, :, 0])
    rng, differences, rewards = np.random.default_rng(0), [], []
    for t in range(400):
        difference = np.abs(obs[0] - np.stack(frames))
        differences.append(difference.max() if tolerance == 0 else difference > 1)
        action = np.array([1]) if t % 40 == 0 else rng.integers(games.single_action_space.n, size=1)  # 1 serves
        obs, reward, *_ = games.step(action)
        frame, expected_reward, terminated, *_ = wrapped.step(int(action[0]))
        frames.append(frame[:, :, 0])
        assert reward[0] == expected_reward
        rewards.append(expected_reward)
        if terminated:  # what is seen after that is a matter of the reset
            break
    assert len(differences) > 200 and any(rewards)
    assert np.mean(differences) <= tolerance


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "ALE/Qbert-v5"])
def test_score_and_length_of_whole_games(env_id):
    """Over several games in a row: the sums start anew with each, and lost lives do not interrupt them."""
    games, rng = Games(env_id, SEEDS, 0.0), np.random.default_rng(0)
    score, length, overs, lost_lives = np.zeros(4), np.zeros(4), np.zeros(4), 0
    while overs.min() < 2:
        reward, terminated, *_ = games.step(rng.integers(games.num_actions, size=4))
        score, length = score + reward, length + 1
        np.testing.assert_array_equal(games.score, score)
        np.testing.assert_array_equal(games.length, length)
        lost_lives += (terminated & ~games.over).sum()
        overs += games.over
        score[games.over] = length[games.over] = 0
    assert lost_lives >= 3 * overs.sum()


def test_points_made_while_fire_is_pressed_for_the_learner_count():
    games = Games("ALE/DemonAttack-v5", SEEDS, 0.0)
    total = np.zeros(4)
    for _ in range(80):
        games.must_fire[:] = True
        reward, *_ = games.step(np.zeros(4, dtype=int))
        assert not games.valid.any()
        total += reward
    assert total.min() > 0
    np.testing.assert_array_equal(games.score, total)


def test_no_game_stands_waiting_for_fire():
    """Native Breakout waits for FIRE after a lost life; a learner that never presses it would play on forever."""
    games = Games("ALE/Breakout-v5", SEEDS, 0.0)
    over = np.zeros(4, dtype=bool)
    for _ in range(300):
        games.step(np.zeros(4, dtype=int))
        over |= games.over
    assert over.all()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="another kind of system")
@pytest.mark.parametrize("refused", [False, True])
def test_the_scheduling_policy_of_the_process_stays(monkeypatch, refused):
    """Some sandboxes know no other policy than the usual one."""
    before, calls = os.sched_getscheduler(0), []

    def refuse(*args):
        calls.append(args)
        raise OSError("not permitted")

    if refused:
        monkeypatch.setattr(os, "sched_setscheduler", refuse)
    make_games("ALE/Breakout-v5", 1, 0.0).reset(seed=SEEDS[:1])
    assert os.sched_getscheduler(0) == before and len(calls) == 2 * refused


def test_a_game_does_not_depend_on_the_games_beside_it():
    games, alone = (Games("ALE/Qbert-v5", seeds, 0.0) for seeds in (SEEDS, SEEDS[2:3]))
    rng = np.random.default_rng(0)
    for _ in range(300):
        action = rng.integers(games.num_actions, size=4)
        (reward, *_), (own_reward, *_) = games.step(action), alone.step(action[2:3])
        assert reward[2] == own_reward[0] and torch.equal(games.obs[2], alone.obs[0])


def test_a_game_without_fire_is_played_as_it_is():
    games, rng = Games("ALE/MsPacman-v5", SEEDS, 0.0), np.random.default_rng(0)
    lost_lives = 0
    for _ in range(400):
        action = rng.integers(games.num_actions, size=4)
        _, terminated, *_ = games.step(action)
        assert games.valid.all() and (games.action == action).all()
        lost_lives += terminated.sum()
    assert lost_lives > 0


def test_runs_with_different_seeds_share_no_game(tmp_path, monkeypatch):
    """ale-py's own way, seed, seed + 1, …, gives the runs with seeds 1 and 2 seven of eight games in common."""

    class Caught(Exception):
        pass

    def catch(env_id, seeds, *_):
        raise Caught(seeds.tolist())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sppo_atari, "Games", catch)
    seeds = []
    for seed in range(20):
        with pytest.raises(Caught) as caught:
            sppo_atari.main(Args(seed=seed, cuda=False))
        seeds += caught.value.args[0]
    assert len(set(seeds)) == len(seeds) == 20 * Args.num_envs
    assert 0 <= min(seeds) and max(seeds) < 2**31  # what ale-py takes


def test_game_seeds_are_reproducible():
    one, again = (game_seeds(np.random.SeedSequence(5), 8).tolist() for _ in range(2))
    assert one == again and len(set(one)) == 8
