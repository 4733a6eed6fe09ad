"""Which steps of a rollout the learner learns from, and what it takes them to be worth.

Real Breakout is played through `collect`, cut off at 500 frames so that lost lives, game overs and truncations all
happen; then each game is played again, alone, by ale-py without any of the script's settings for lives and resets.
"""

import copy
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import textbook
import torch
from ale_py.vector_env import AtariVectorEnv

import sppo_atari
from sppo_atari import Args, AtariAgent, Batch, Games, Rollout

SEEDS, FIRE, FRAMES = np.array([123, 456, 789, 1011]), 1, {"max_num_frames_per_episode": 500}
NUM_STEPS, NUM_ROLLOUTS = 16, 30


class Played(NamedTuple):
    """Arrays of shape (steps, games, …), the rollouts one after the other."""

    obs: np.ndarray
    actions: np.ndarray  # the learner's
    logprobs: np.ndarray
    values: np.ndarray
    rewards: np.ndarray
    dones: np.ndarray
    valid: np.ndarray
    bootstraps: np.ndarray
    action_played: np.ndarray


class Truth(NamedTuple):
    """The same games played alone."""

    obs: np.ndarray
    rewards: np.ndarray
    lost_life: np.ndarray  # and the game went on
    game_over: np.ndarray
    truncated: np.ndarray
    last_obs: np.ndarray  # what the step led to, before any reset
    score: np.ndarray  # of the game so far
    length: np.ndarray


def limit_games(monkeypatch):
    make_games = sppo_atari.make_games
    monkeypatch.setattr(sppo_atari, "make_games", lambda *args, **options: make_games(*args, **options, **FRAMES))


def play_again(seed, actions):
    """One game, NEXT_STEP: the end of a game is seen before the reset, which takes one call more."""
    env = AtariVectorEnv(
        "breakout", 1, reward_clipping=False, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP, **FRAMES
    )
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


@pytest.fixture(scope="module")
def agent():
    torch.manual_seed(0)
    return AtariAgent(4)


@pytest.fixture(scope="module")
def story(agent):
    """Played, Truth, and (step, score, length) of the finished games as `collect` reports them."""
    played, action_played, finished = [], [], []
    with pytest.MonkeyPatch.context() as monkeypatch:
        limit_games(monkeypatch)
        games = Games("ALE/Breakout-v5", SEEDS, 0.0)
    step = games.step
    games.step = lambda action: (step(action), action_played.append(games.action.copy()))[0]
    rollout, generator = Rollout(NUM_STEPS, len(SEEDS), torch.device("cpu")), torch.Generator().manual_seed(0)
    for i in range(NUM_ROLLOUTS):
        sppo_atari.collect(games, agent, rollout, generator)
        names = ("obs", "actions", "logprobs", "values", "rewards", "dones", "valid", "bootstraps")
        played.append([np.asarray(getattr(rollout, name)).copy() for name in names])
        finished += [(i * NUM_STEPS + t, score, length) for t, score, length in rollout.finished]
    columns = [np.concatenate(column) for column in zip(*played)]
    action_played = np.stack(action_played)
    again = [play_again(seed, actions) for seed, actions in zip(SEEDS, np.transpose(action_played))]
    truth = Truth(*(np.stack([np.stack(field) for field in column], axis=1) for column in zip(*again)))
    return Played(*columns, action_played), truth, finished


def test_the_story_has_everything(story):
    _, truth, _ = story
    ends = truth.game_over | truth.truncated
    assert truth.game_over.sum() > 1 and truth.truncated.sum() > 1 and (truth.lost_life & ~ends).sum() > 10
    assert truth.lost_life[NUM_STEPS - 1 :: NUM_STEPS].any()  # with the last step of a rollout
    assert truth.rewards.any()


def test_observations_and_rewards_are_those_of_the_games(story):
    """So the row after a game over shows the new game, and none shows a mixture."""
    played, truth, _ = story
    np.testing.assert_array_equal(played.obs, truth.obs)
    np.testing.assert_array_equal(played.rewards, np.sign(truth.rewards))
    new_game = np.roll(truth.game_over | truth.truncated, 1, axis=0)
    new_game[0] = True
    assert not played.obs[new_game][..., :3].any()  # a stack with one frame in it


def test_log_probabilities_and_values_are_those_of_their_row(story, agent):
    played, _, _ = story
    rows = slice(None, None, 7)
    obs, actions = (torch.from_numpy(x[rows]).flatten(0, 1) for x in (played.obs, played.actions))
    with torch.inference_mode():
        logprobs, _, values = agent(obs, actions)
    np.testing.assert_allclose(played.logprobs[rows].reshape(-1, 1), logprobs, rtol=1e-4)
    np.testing.assert_allclose(played.values[rows].flatten(), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_any_number_of_games_can_be_collected(agent, num_envs):
    games, generator = Games("ALE/Breakout-v5", SEEDS[:num_envs], 0.0), torch.Generator().manual_seed(0)
    rollout = Rollout(8, num_envs, torch.device("cpu"))
    for _ in range(2):
        sppo_atari.collect(games, agent, rollout, generator)
    with torch.inference_mode():
        logprobs, _, values = agent(rollout.obs.flatten(0, 1), rollout.actions.flatten())
        next_value = agent.get_value(games.obs)
    torch.testing.assert_close(rollout.logprobs.flatten(), logprobs.flatten(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.values.flatten(), values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.next_value, next_value, rtol=1e-4, atol=1e-5)


def test_dones_are_lost_lives_game_overs_and_truncations(story):
    played, truth, _ = story
    np.testing.assert_array_equal(played.dones, truth.lost_life | truth.game_over | truth.truncated)


def test_after_a_lost_life_fire_is_played_and_is_no_sample(story):
    played, truth, _ = story
    valid = np.roll(~truth.lost_life, 1, axis=0)
    valid[0] = True
    np.testing.assert_array_equal(played.valid, valid)
    np.testing.assert_array_equal(played.action_played, np.where(valid, played.actions, FIRE))


def test_only_truncation_bootstraps(story, agent):
    """With the value of the old game's last observation, not of the new game's first."""
    played, truth, _ = story
    with torch.inference_mode():
        values = agent.get_value(torch.from_numpy(truth.last_obs[truth.truncated]))
    np.testing.assert_allclose(played.bootstraps[truth.truncated], values, rtol=1e-4)
    assert np.unique(values).size > 1 and not played.bootstraps[~truth.truncated].any()


def test_finished_games_are_reported_with_score_and_length(story):
    _, truth, finished = story
    over = truth.game_over | truth.truncated
    expected = [(truth.score[t][over[t]].mean(), truth.length[t][over[t]].mean()) for t in np.flatnonzero(over.any(1))]
    assert finished == [(t, *means) for t, means in zip(np.flatnonzero(over.any(1)), expected)]


def test_what_stands_in_a_fire_row_changes_no_update(story, agent):
    played, _, _ = story
    obs, actions, valid = (torch.from_numpy(x[-128:]).flatten(0, 1) for x in (played.obs, played.actions, played.valid))
    logprobs, advantages, returns = torch.randn(3, len(valid), generator=torch.Generator().manual_seed(0)) / 4
    clean = Batch(obs, actions, logprobs.unsqueeze(1) - 1.4, advantages, returns, valid.float())
    garbage = Batch(255 - obs, 3 - actions, clean.logprobs - 2, advantages + 1e4, returns - 1e4, clean.weight)

    def train(corrupted_rows):
        fields = zip(clean, garbage)
        batch = Batch(*(torch.where(corrupted_rows.view(-1, *[1] * (x.dim() - 1)), y, x) for x, y in fields))
        trained = copy.deepcopy(agent)
        optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
        args = Args(update_epochs=1, num_minibatches=4, advantage_noise=0.1)
        stats = sppo_atari.update(trained, optimizer, batch, 0.1, args, np.random.default_rng(0))
        return stats, trained.state_dict()

    stats, parameters = train(torch.zeros_like(valid))
    other_stats, other_parameters = train(~valid)
    assert not valid.all() and stats == other_stats
    assert all(torch.equal(parameters[name], other_parameters[name]) for name in parameters)
    one_sample = torch.arange(len(valid)) == valid.nonzero()[0]
    assert train(one_sample)[0] != stats  # the same garbage in a single sample does show


def one_vector(parameters):
    return torch.cat([parameter.flatten() for parameter in parameters])


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.1])
def test_an_update_is_a_step_on_the_whole_loss(agent, max_grad_norm):
    """At π = π_old the policy gradient is that of −(α + β|Z|) A log π; the entropy is raised, the value error lowered.
    Means are over the valid samples."""
    trained = copy.deepcopy(agent).double()
    obs, actions = torch.randint(256, (32, 84, 84, 4), dtype=torch.uint8), torch.arange(32) % 4
    advantages, returns = torch.randn(2, 32, dtype=torch.float64)
    valid = (torch.arange(32) % 5 > 0).double()
    logprobs, value = trained.get_logprobs_and_value(obs)
    logprob, entropy = logprobs[torch.arange(32), actions], torch.distributions.Categorical(logits=logprobs).entropy()
    samples = -(0.3 + 2 * 0.5) * advantages * logprob - 0.01 * entropy + 0.5 * (value - returns) ** 2
    parameters = list(trained.parameters())
    gradient = one_vector(torch.autograd.grad(samples[valid > 0].mean(), parameters))
    grad_norm = gradient.norm().item()
    gradient *= min(1, max_grad_norm / grad_norm)

    before = one_vector(parameters).detach()
    args = Args(update_epochs=1, num_minibatches=1, norm_adv=False, max_grad_norm=max_grad_norm)
    args.alpha, args.beta, args.Z = 0.3, 2.0, -0.5
    batch = Batch(obs, actions, logprob.detach().unsqueeze(1), advantages, returns, valid)
    stats = sppo_atari.update(trained, torch.optim.SGD(parameters, lr=1.0), batch, 0.1, args, np.random.default_rng(0))
    assert stats["losses/grad_norm"] == pytest.approx(grad_norm, rel=1e-4)  # before it is cut
    torch.testing.assert_close(before - one_vector(parameters), gradient, rtol=1e-4, atol=1e-8)


def test_too_large_a_kl_ends_the_updates(agent):
    obs, zeros = torch.randint(256, (8, 84, 84, 4), dtype=torch.uint8), torch.zeros(8)
    batch = Batch(obs, zeros.long(), zeros.unsqueeze(1) - 1.0, torch.arange(8.0), zeros, zeros + 1)  # far from π_old
    for target_kl, epochs in ((1e-6, 1), (None, 3), (1e6, 3)):
        trained, args = copy.deepcopy(agent), Args(update_epochs=3, num_minibatches=2, target_kl=target_kl)
        optimizer = torch.optim.Adam(trained.parameters())
        sppo_atari.update(trained, optimizer, batch, 0.1, args, np.random.default_rng(0))
        assert optimizer.state[trained.value.weight]["step"] == 2 * epochs


def test_main_hands_over_what_collect_and_gae_say(tmp_path, monkeypatch):
    """One iteration of the real thing, with truncations; `update` and `Games` are looked at, not replaced."""
    rollouts, batches, seeds = [], [], []
    collect, update, games = sppo_atari.collect, sppo_atari.update, Games

    def watched_collect(games, agent, rollout, generator):
        collect(games, agent, rollout, generator)
        rollouts.append(copy.deepcopy(rollout))

    def watched_update(agent, optimizer, batch, *rest):
        batches.append(copy.deepcopy(batch))  # it shares memory with the rollout
        return update(agent, optimizer, batch, *rest)

    monkeypatch.chdir(tmp_path)
    limit_games(monkeypatch)
    monkeypatch.setattr(sppo_atari, "collect", watched_collect)
    monkeypatch.setattr(sppo_atari, "update", watched_update)
    monkeypatch.setattr(sppo_atari, "Games", lambda *args: seeds.append(args[1].tolist()) or games(*args))
    args = Args(num_envs=2, num_steps=160, total_timesteps=640, update_epochs=1, eval_episodes=2, cuda=False)
    sppo_atari.main(args)

    assert len(batches) == 2 and rollouts[0].bootstraps.any() and not rollouts[0].valid.all()
    for rollout, batch in zip(rollouts, batches):
        values = rollout.values.numpy()
        context = (rollout.dones, rollout.bootstraps, rollout.next_value.numpy(), args.gamma, args.gae_lambda)
        advantages = textbook.gae(rollout.rewards, values, *context)
        np.testing.assert_allclose(batch.advantages.view(160, 2), advantages, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(batch.returns.view(160, 2), advantages + values, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(batch.weight.view(160, 2), rollout.valid)
        for name in ("obs", "actions", "logprobs"):
            assert torch.equal(getattr(batch, name), getattr(rollout, name).flatten(0, 1))
    assert not set(seeds[0]) & set(seeds[1])  # training and evaluation share no game
