"""Atari, by how it behaves: what is played, seen and scored, and what the learner gets of it.

Real games are played through `collect_games`, cut off at 500 frames so that lost lives, game overs and truncations all
happen; then each is played again, alone, by ale-py without any of the scripts' settings for lives and resets.
"""

import copy
import functools
from collections import deque
from types import SimpleNamespace

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import textbook
import torch
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, WarpFrame

import ppo_baseline
import sa2c_atari
import sppo_atari
from sppo_atari import Args, AtariAgent, Games, Rollout

SEEDS, FIRE, FRAMES = np.array([123, 456, 789, 1011]), 1, {"max_num_frames_per_episode": 500}
NUM_STEPS, NUM_ROLLOUTS = 16, 30
AtariVectorEnv = ale_py.vector_env.AtariVectorEnv


def set_options(monkeypatch, **options):
    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", functools.partial(AtariVectorEnv, **options))


# ------------------------------------------------------------------------------------------------------------ the games


@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_actions_are_sticky_only_if_asked(monkeypatch, sticky):
    """By both names of the game, though gym.make has sticky actions for one of them. Breakout has no chance in it:
    without no-ops and sticky actions, games with different seeds are one game."""
    set_options(monkeypatch, noop_max=0)
    names, rng = ("ALE/Breakout-v5", "BreakoutNoFrameskip-v4"), np.random.default_rng(0)
    one, other = (Games(Args(name, repeat_action_probability=sticky), SEEDS) for name in names)
    for _ in range(100):
        action = np.full((4, 1), rng.integers(4))
        one.step(action), other.step(action)
        np.testing.assert_array_equal(one.obs, other.obs)
    assert (one.obs == one.obs[0]).all() == (sticky == 0)


@pytest.mark.parametrize("game, tolerance", [("Breakout", 0), ("Boxing", 0), ("MsPacman", 0.006)])
def test_preprocessing_and_score_are_those_of_stable_baselines(monkeypatch, game, tolerance):
    """`tolerance`: share of pixels that may differ by more than 1; ale-py maximises over greys, not over colours."""
    set_options(monkeypatch, noop_max=0, use_fire_reset=False)
    games = Games(Args(f"ALE/{game}-v5"), SEEDS[:1])
    # AtariWrapper without no-ops, lives and clipping, and without its FIRE at reset
    wrapped = WarpFrame(MaxAndSkipEnv(gym.make(f"{game}NoFrameskip-v4")))
    frames = deque([np.zeros((84, 84))] * 3 + [wrapped.reset()[0][:, :, 0]], maxlen=4)
    rng, differences, score = np.random.default_rng(0), [], 0
    for t in range(400):
        difference = np.abs(games.obs[0].astype(float) - np.stack(frames, axis=2))
        differences.append(difference.max() if tolerance == 0 else difference > 1)
        action = FIRE if t % 40 == 0 or games.must_fire[0] else rng.integers(games.num_actions)  # it serves
        (sign,), *_ = games.step(np.array([[action]]))
        frame, reward, terminated, *_ = wrapped.step(action)
        frames.append(frame[:, :, 0])
        score += reward
        assert sign == np.sign(reward) and games.score == score and games.length == t + 1
        if terminated:  # what is seen after that is a matter of the reset
            break
    assert len(differences) > 150 and score
    assert np.mean(differences) <= tolerance


def test_points_made_while_fire_is_pressed_for_the_learner_count():
    games = Games(Args("ALE/DemonAttack-v5"), SEEDS)
    for _ in range(80):
        games.must_fire[:] = True
        games.step(np.zeros((4, 1), int))
        assert not games.valid.any()
    assert games.score.min() >= 10


def test_no_game_stands_waiting_for_fire():
    """Native Breakout waits for FIRE after a lost life; a learner that never presses it would play on forever."""
    games, over = Games(Args("ALE/Breakout-v5"), SEEDS), np.zeros(4, dtype=bool)
    for _ in range(300):
        games.step(np.zeros((4, 1), int))
        over |= games.over
    assert over.all()


@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, ppo_baseline])
def test_runs_with_different_seeds_share_no_game(tmp_path, monkeypatch, script):
    """ale-py's own way, seed, seed + 1, …, gives the runs with seeds 1 and 2 seven of eight games in common. And a run
    that is resumed does not begin with the games that it began with before."""

    class Caught(Exception):
        pass

    def catch(args, seeds):
        raise Caught(seeds.tolist())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "Games", catch)
    seeds = []
    for seed in range(20):
        for iteration in (0, 1, 7):
            with pytest.raises(Caught) as caught:
                script.main(script.Args("ALE/Breakout-v5", seed=seed, num_envs=8), {"iteration": iteration})
            seeds += caught.value.args[0]
    assert len(set(seeds)) == len(seeds) == 20 * 3 * 8
    assert 0 <= min(seeds) and 2**30 < max(seeds) < 2**31  # what ale-py takes


# ---------------------------------------------------------------------------------------------------------- the rollout


def play_again(env_id, seed, actions):
    """One game, NEXT_STEP: the end of a game is seen before the reset, which takes one call more."""
    env = AtariVectorEnv(gym.spec(env_id).kwargs["game"], 1, reward_clipping=False, **FRAMES)
    rows, score, length = [], 0, 0
    obs, info = env.reset(seed=np.array([seed]))
    for action in actions:
        before, lives = obs[0].transpose(1, 2, 0), info["lives"][0]
        obs, reward, (terminated,), (truncated,), info = env.step(np.array([action]))
        last_obs, lost_life = obs[0].transpose(1, 2, 0), info["lives"][0] < lives and not terminated and not truncated
        score, length = score + reward[0], length + 1
        rows.append((before, reward[0], lost_life, terminated, truncated, last_obs, score, length))
        if terminated or truncated:
            obs, _, _, _, info = env.step(np.array([action]))
            score = length = 0
    return zip(*rows)


@pytest.fixture(scope="module", params=["ALE/Breakout-v5", "ALE/MsPacman-v5"])
def story(request):
    """What `collect_games` says of the games, and what is true; arrays (steps, games, …), rollout after rollout."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_options(monkeypatch, **FRAMES)
        games = Games(Args(request.param), SEEDS)
    torch.manual_seed(0)
    agent, rollout, rng = AtariAgent(games.num_actions), Rollout(NUM_STEPS, games.obs, 1), np.random.default_rng(0)
    told, action_played, finished, step = [], [], [], games.envs.step
    games.envs.step = lambda action: action_played.append(action.copy()) or step(action)
    for i in range(NUM_ROLLOUTS):
        sppo_atari.collect_games(games, agent, rollout, rng)
        told.append({name: x[np.newaxis] if name == "next_value" else x for name, x in vars(rollout).items()})
        told[-1] = copy.deepcopy(told[-1])
        finished += [(i * NUM_STEPS + t, score, length) for t, score, length in told[-1].pop("finished")]
    told = SimpleNamespace(**{name: np.concatenate([x[name] for x in told]) for name in told[0]}, finished=finished)
    told.action_played = np.stack(action_played)
    again = [play_again(request.param, seed, actions) for seed, actions in zip(SEEDS, told.action_played.T)]
    columns = [np.stack([np.stack(field) for field in column], axis=1) for column in zip(*again)]
    names = ("obs", "rewards", "lost_life", "game_over", "truncated", "last_obs", "score", "length")
    truth = SimpleNamespace(**dict(zip(names, columns)), has_fire="Breakout" in request.param)
    return told, truth, agent


def test_the_story_has_everything(story):
    _, truth, _ = story
    assert truth.truncated.sum() > 1 and truth.lost_life.any() and truth.rewards.any()
    if truth.has_fire:
        assert truth.game_over.sum() > 1 and truth.lost_life.sum() > 10
        assert truth.lost_life[NUM_STEPS - 1 :: NUM_STEPS].any()  # with the last step of a rollout
    else:
        assert truth.rewards.max() >= 10  # a dot


def test_observations_and_rewards_are_those_of_the_games(story):
    """So the row after a game over shows the new game, and none shows a mixture. A game knows nothing of its
    neighbours."""
    told, truth, _ = story
    np.testing.assert_array_equal(told.obs, truth.obs)
    np.testing.assert_array_equal(told.rewards, np.sign(truth.rewards))
    new_game = np.roll(truth.game_over | truth.truncated, 1, axis=0)
    new_game[0] = True
    assert not told.obs[new_game][..., :3].any()  # a stack with one frame in it


def test_log_probabilities_and_values_are_those_of_their_row(story):
    told, _, agent = story
    rows = slice(None, None, 7)
    obs, actions = (torch.from_numpy(x[rows]).flatten(0, 1) for x in (told.obs, told.actions))
    with torch.inference_mode():
        logprobs, _, values = agent(obs, actions)
    np.testing.assert_allclose(told.logprobs[rows].reshape(-1, 1), logprobs, rtol=1e-4)
    np.testing.assert_allclose(told.values[rows].flatten(), values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(told.next_value[:-1], told.values[NUM_STEPS::NUM_STEPS], rtol=1e-4, atol=1e-5)


def test_dones_are_lost_lives_game_overs_and_truncations(story):
    told, truth, _ = story
    np.testing.assert_array_equal(told.dones, truth.lost_life | truth.game_over | truth.truncated)


def test_after_a_lost_life_fire_is_played_and_is_no_sample(story):
    """Where the game has it."""
    told, truth, _ = story
    valid = np.roll(~truth.lost_life, 1, axis=0) | (not truth.has_fire)
    valid[0] = True
    np.testing.assert_array_equal(told.valid, valid)
    np.testing.assert_array_equal(told.action_played, np.where(valid, told.actions[:, :, 0], FIRE))


def test_only_truncation_bootstraps(story):
    """With the value of the old game's last observation, not of the new game's first."""
    told, truth, agent = story
    with torch.inference_mode():
        _, values = agent.logprobs_and_value(torch.from_numpy(truth.last_obs[truth.truncated]))
    np.testing.assert_allclose(told.bootstraps[truth.truncated], values, rtol=1e-4, atol=1e-5)
    assert np.ptp(values.numpy()) > 1e-3 and not told.bootstraps[~truth.truncated].any()


def test_finished_games_are_reported_with_score_and_length(story):
    """Raw scores of whole games, over several in a row: the sums start anew with each, lost lives do not matter."""
    told, truth, _ = story
    over = truth.game_over | truth.truncated
    times = np.flatnonzero(over.any(1))
    assert told.finished == [(t, truth.score[t][over[t]].mean(), truth.length[t][over[t]].mean()) for t in times]


# ---------------------------------------------------------------------------------------------- what the learner learns


FEW_STEPS = {"update_epochs": 1, "num_minibatches": 4}


@pytest.mark.parametrize("script, flags", [(sppo_atari, FEW_STEPS), (ppo_baseline, FEW_STEPS), (sa2c_atari, {})])
def test_main_hands_over_what_collect_games_and_gae_say(tmp_path, monkeypatch, script, flags):
    """Two iterations of the real thing, with truncations; `update` and `Games` are looked at, not replaced. The steps
    at which FIRE was pressed for the learner never reach it."""
    rollouts, batches, seeds = [], [], []
    collect_games, update, games = script.collect_games, script.update, script.Games

    def watched_collect(games, agent, rollout, rng):
        collect_games(games, agent, rollout, rng)
        rollouts.append(copy.deepcopy(rollout))

    def watched_update(agent, optimizer, batch, samples, *rest):
        batches.append(copy.deepcopy((batch, samples)))  # it shares memory with the rollout
        return update(agent, optimizer, batch, samples, *rest)

    monkeypatch.chdir(tmp_path)
    set_options(monkeypatch, max_num_frames_per_episode=300)
    monkeypatch.setattr(script, "collect_games", watched_collect)
    monkeypatch.setattr(script, "update", watched_update)
    monkeypatch.setattr(script, "Games", lambda *args: seeds.append(args[1].tolist()) or games(*args))
    args = script.Args("ALE/Breakout-v5", num_envs=2, num_steps=160, total_timesteps=640, cuda=False, **flags)
    args.eval_episodes = 2
    script.main(args)

    assert len(batches) == 2 and rollouts[0].bootstraps.any() and not rollouts[0].valid.all()
    for rollout, ((obs, actions, *logprobs, advantages, returns), samples) in zip(rollouts, batches):
        context = (rollout.dones, rollout.bootstraps, rollout.next_value, args.gamma, args.gae_lambda)
        expected = textbook.gae(rollout.rewards, rollout.values, *context)
        np.testing.assert_allclose(advantages.view(160, 2), expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(returns.view(160, 2), expected + rollout.values, rtol=1e-3, atol=1e-5)
        for x, stored in zip((obs, actions, *logprobs), (rollout.obs, rollout.actions, rollout.logprobs)):
            np.testing.assert_array_equal(x, stored.reshape(320, *stored.shape[2:]))
        valid = np.flatnonzero(rollout.valid)
        assert len(samples) == 320 and set(samples) == set(valid)
        assert np.bincount(samples).max() <= 3  # others, at random, take their places
    assert not set(seeds[0]) & set(seeds[-1])  # training and evaluation share no game
    assert seeds[1] == seeds[2]  # every evaluation plays the same
