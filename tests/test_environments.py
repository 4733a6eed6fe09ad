"""Environments for control, their running statistics, and what is collected from them, against
real episodes that are played once more with the same seeds and the same actions."""

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ppo_baseline
import sa2c_continuous
import sppo_continuous
from sppo_continuous import Args, BinnedAgent, Environment, RunningMeanStd, evaluate, make_env

GAMMA = 0.9
SEED = 3
SCRIPTS = pytest.mark.parametrize("script", [sppo_continuous, sa2c_continuous])

# Time limits as short as the episodes: a random policy runs into both, now and then in one step.
HOPPER, CARTPOLE = "test/Hopper-v0", "test/CartPole-v0"
gym.register(HOPPER, "gymnasium.envs.mujoco.hopper_v5:HopperEnv", max_episode_steps=14)
gym.register(CARTPOLE, "gymnasium.envs.classic_control.cartpole:CartPoleEnv", max_episode_steps=11)


class Stream(NamedTuple):
    """What really happened; arrays (num_steps, …)."""

    obs: np.ndarray  # acted on; one more than steps
    next_obs: np.ndarray  # at an end the last observation, else the next one that is acted on
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


def replay(env_id, actions) -> Stream:
    """Plays `actions` in an environment of its own."""
    env = gym.make(env_id)
    all_obs, steps = [env.reset(seed=SEED)[0]], []
    for action in actions:
        obs, *outcome, _ = env.step(action)
        steps.append((obs, *outcome))
        if any(outcome[1:]):
            obs, _ = env.reset()
        all_obs.append(obs)
    stream = Stream(np.array(all_obs), *map(np.array, zip(*steps)))
    ends = set(zip(stream.terminated.tolist(), stream.truncated.tolist()))
    assert ends == {(False, False), (True, False), (False, True), (True, True)}
    return stream


def normalize(sample, seen):
    """With mean and standard deviation of all that was `seen`, at once; clipped to ±10."""
    std = np.sqrt(np.var(seen, axis=0) + 1e-8)
    return np.clip((sample - np.mean(seen, axis=0)) / std, -10, 10)


# ----------------------------------------------------------------------------- running statistics


@settings(max_examples=30)
@given(
    hnp.arrays(
        float,
        hnp.array_shapes(min_dims=1, max_dims=2, max_side=30),
        elements=st.floats(-1e4, 1e4),
    )
)
def test_running_mean_and_std_are_numpys(samples):
    """Scalars and vectors, after every sample."""
    stats = RunningMeanStd()
    for count, sample in enumerate(samples, start=1):
        stats.update(sample)
        so_far = samples[:count].astype(np.longdouble)
        std = np.sqrt(so_far.var(0).astype(float) + 1e-8)
        np.testing.assert_allclose(stats.mean, so_far.mean(0).astype(float), rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(stats.std, std, rtol=1e-7)


def test_running_std_far_from_zero():
    """Where the mean of squares less the square of the mean has no correct digit."""
    samples = 1e8 + np.random.default_rng(0).normal(size=5000)
    stats = RunningMeanStd()
    for sample in samples:
        stats.update(sample)
    np.testing.assert_allclose(stats.std, samples.std(), rtol=1e-6)


@pytest.mark.parametrize("kind", [float, np.float64, lambda x: np.array([x, 2 * x])])
def test_saved_statistics_go_on_as_if_nothing_had_been(kind):
    """To the bit, whatever the environment's numbers are."""
    samples = [kind(x) for x in np.random.default_rng(0).normal(100, 1, 40)]
    stats, again = RunningMeanStd(), RunningMeanStd()
    for i, sample in enumerate(samples):
        stats.update(sample)
        if i == 20:
            again.load_state_dict(stats.state_dict())
        elif i > 20:
            again.update(sample)
    for name, value in vars(stats).items():
        np.testing.assert_array_equal(vars(again)[name], value)


# ------------------------------------------------------------------------------------ environment


@pytest.fixture(scope="module")
def hopper():
    """A random policy: the environment, what it told, what really happened."""
    env = Environment(make_env(HOPPER), GAMMA)
    env.reset(seed=SEED)
    actions = np.random.default_rng(0).uniform(-1, 1, (400, 3)).astype(np.float32)
    told = []
    for action in actions:
        obs = env.obs
        reward, terminated, truncated = env.step(action)
        told.append((obs, env.obs, reward, env.score, env.length))
        if terminated or truncated:
            env.reset()
    return env, [np.array(values) for values in zip(*told)], replay(HOPPER, actions)


def test_observations_are_normalised_with_all_that_were_acted_on(hopper):
    """The newest included; last observations of episodes are normalised and leave no trace."""
    env, (obs, next_obs, *_), stream = hopper
    over = stream.terminated | stream.truncated
    for t in range(len(obs)):
        expected = normalize(stream.obs[t], stream.obs[: t + 1])
        np.testing.assert_allclose(obs[t], expected, rtol=1e-4, atol=1e-5)
        seen = stream.obs[: t + 1 if over[t] else t + 2]
        expected = normalize(stream.next_obs[t], seen)
        np.testing.assert_allclose(next_obs[t], expected, rtol=1e-4, atol=1e-5)
    assert env.obs_stats.count == len(stream.obs)
    np.testing.assert_allclose(env.obs_stats.mean, stream.obs.mean(0), rtol=1e-10)
    assert obs.dtype == np.float32


def test_rewards_are_divided_by_the_std_of_the_discounted_return(hopper):
    """R ← γR + reward, from 0 in each episode, also after a truncation."""
    env, (_, _, rewards, *_), stream = hopper
    over = stream.terminated | stream.truncated
    discounted_return, seen = 0, []
    for t, raw in enumerate(stream.rewards):
        discounted_return = GAMMA * discounted_return + raw
        seen.append(discounted_return)
        assert rewards[t] == pytest.approx(raw / np.sqrt(np.var(seen) + 1e-8), rel=1e-8)
        if over[t]:
            discounted_return = 0
    assert env.return_stats.count == len(rewards)


def test_scores_and_lengths_are_raw_and_begin_anew_with_each_episode(hopper):
    _, (*_, score, length), stream = hopper
    begin = 0
    for t in range(len(score)):
        assert score[t] == pytest.approx(stream.rewards[begin : t + 1].sum())
        assert length[t] == t + 1 - begin
        if stream.terminated[t] or stream.truncated[t]:
            begin = t + 1


def test_normalize_clips_and_does_not_learn(hopper):
    env, *_ = hopper
    count = env.obs_stats.count
    far = env.obs_stats.mean + np.outer([-1e6, 0, 0.5, 1e6], env.obs_stats.std)
    expected = np.outer([-10, 0, 0.5, 10], np.ones(11))
    np.testing.assert_allclose(env.normalize(far), expected, atol=1e-5)
    assert env.obs_stats.count == count


def test_the_baselines_environment_is_the_same():
    """But that it resets itself, clips the reward, and keeps the last observation apart."""
    np.random.seed(SEED)
    seed = np.random.randint(2**31, size=1).item()
    np.random.seed(SEED)
    envs = ppo_baseline.Environments(ppo_baseline.Args(HOPPER, gamma=GAMMA), 1)
    env = Environment(make_env(HOPPER), GAMMA)
    env.reset(seed=seed)
    np.testing.assert_array_equal(envs.obs, [env.obs])
    for action in np.random.default_rng(0).uniform(-1, 1, (200, 1, 3)).astype(np.float32):
        rewards, over = envs.step(action)
        reward, terminated, truncated = env.step(action[0])
        assert rewards == pytest.approx(np.clip(reward, -10, 10))
        assert (envs.score, envs.length) == (env.score, env.length)
        assert envs.truncated == (truncated and not terminated)
        assert over == envs.over == (terminated or truncated)
        if over:
            np.testing.assert_array_equal(envs.last_obs, [env.obs])
            env.reset()
        np.testing.assert_array_equal(envs.obs, [env.obs])


def test_the_baselines_environments_know_nothing_of_each_other():
    """Their statistics are of all together."""
    np.random.seed(SEED)
    seeds = np.random.randint(2**31, size=3).tolist()
    np.random.seed(SEED)
    envs = ppo_baseline.Environments(ppo_baseline.Args(CARTPOLE), 3)
    alone = [gym.make(CARTPOLE) for _ in seeds]
    seen = [env.reset(seed=seed)[0] for env, seed in zip(alone, seeds)]
    score = np.zeros(3)
    for action in np.random.default_rng(0).integers(2, size=(60, 3)):
        _, over = envs.step(action[:, np.newaxis])
        for i, env in enumerate(alone):
            obs, reward, *ended, _ = env.step(action[i])
            score[i] += reward
            assert (envs.score[i], over[i]) == (score[i], any(ended))
            if any(ended):
                score[i] = 0
                obs, _ = env.reset()
            seen.append(obs)
    np.testing.assert_allclose(envs.stats["obs"].mean, np.mean(seen, axis=0), rtol=1e-6)
    assert envs.stats["obs"].count == len(seen) == 61 * 3


# ---------------------------------------------------------------------------------------- rollout


class Collected(NamedTuple):
    rollout: dict
    finished: list
    agent: torch.nn.Module
    env: Environment
    first: int  # steps before this rollout
    stream: Stream  # with them


@pytest.fixture(scope="module", params=[sppo_continuous, sa2c_continuous])
def collected(request):
    """The second of two rollouts, so that it begins within an episode."""
    script = request.param
    torch.manual_seed(2)
    np.random.seed(2)
    env = script.Environment(script.make_env(CARTPOLE), GAMMA)
    env.reset(seed=SEED)
    agent = script.BinnedAgent(env.env.observation_space, env.env.action_space, 11)
    before, _ = script.collect(env, agent, 300)
    rollout, finished = script.collect(env, agent, 300)
    actions = np.concatenate([before["actions"], rollout["actions"]])[:, 0]
    return Collected(rollout, finished, agent, env, 300, replay(CARTPOLE, actions))


def values_of(agent, obs):
    with torch.no_grad():
        return agent.value(torch.from_numpy(obs))[:, 0].numpy()


def test_rows_after_an_end_belong_to_the_next_episode(collected):
    rollout, _, _, _, first, stream = collected
    for t, row in enumerate(rollout["obs"], start=first):
        expected = normalize(stream.obs[t], stream.obs[: t + 1])
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
    over = stream.terminated | stream.truncated
    np.testing.assert_array_equal(rollout["dones"], over[first:])


def test_truncations_bootstrap_with_the_last_observation_and_terminations_with_0(collected):
    """A pole that falls at the time limit has fallen. All other steps: the next row's value."""
    rollout, _, agent, env, first, stream = collected
    terminated = stream.terminated[first:]
    cut = stream.truncated[first:] & ~terminated
    next_values = rollout["next_values"]
    assert (next_values[terminated] == 0).all() and (next_values[~terminated] != 0).all()
    for t in np.flatnonzero(cut):
        seen = stream.obs[: first + t + 1]
        last = normalize(stream.next_obs[first + t], seen).astype(np.float32)
        expected = values_of(agent, last[np.newaxis])
        np.testing.assert_allclose(next_values[t], expected[0], rtol=1e-3, atol=1e-4)
    following = np.append(rollout["values"][1:], values_of(agent, env.obs[np.newaxis]))
    goes_on = ~cut & ~terminated
    np.testing.assert_allclose(next_values[goes_on], following[goes_on], rtol=1e-5, atol=1e-6)


def test_what_is_stored_is_what_the_agent_says(collected):
    rollout, _, agent, *_ = collected
    obs, actions = torch.from_numpy(rollout["obs"]), torch.from_numpy(rollout["actions"])
    with torch.no_grad():
        logprobs, _, values = agent(obs, actions)
    np.testing.assert_allclose(rollout["values"], values, rtol=1e-5, atol=1e-6)
    if "logprobs" in rollout:
        np.testing.assert_allclose(rollout["logprobs"], logprobs, rtol=1e-5)


def test_finished_episodes_are_reported_where_they_end(collected):
    _, finished, _, _, first, stream = collected
    ends = np.flatnonzero(stream.terminated | stream.truncated)
    lengths = np.diff(ends, prepend=-1)
    expected = [(t - first, n, n) for t, n in zip(ends, lengths) if t >= first]
    assert finished == expected  # CartPole pays 1 per step


def test_the_baseline_bootstraps_where_a_time_limit_cuts(monkeypatch):
    """With the value of the last observation."""
    torch.manual_seed(2)
    np.random.seed(2)
    args = ppo_baseline.Args(CARTPOLE, num_envs=2)
    envs, agent = ppo_baseline.make(args, torch.device("cpu"))
    step, seen = envs.step, []

    def watched(action):
        result = step(action)
        seen.append((envs.truncated.copy(), envs.last_obs.copy()))
        return result

    monkeypatch.setattr(envs, "step", watched)
    rollout, finished = ppo_baseline.collect(envs, agent, 100, torch.device("cpu"))
    truncated, last_obs = map(np.stack, zip(*seen))
    values = values_of(agent, last_obs.reshape(200, 4)).reshape(100, 2)
    expected = values * truncated
    np.testing.assert_allclose(rollout["bootstraps"], expected, rtol=1e-4, atol=1e-5)
    assert truncated.any() and (truncated <= rollout["dones"].numpy()).all()
    following = np.append(rollout["values"][1:], [values_of(agent, envs.obs)], axis=0)
    following = following * ~rollout["dones"].numpy() + expected
    np.testing.assert_allclose(rollout["next_values"], following, rtol=1e-4, atol=1e-5)
    assert all(score == length for _, score, length in finished)


@SCRIPTS
def test_actions_are_drawn_from_the_policy(script):
    """In each dimension on its own."""
    env = script.Environment(script.make_env("tiny:Matrix-v0"), GAMMA)
    env.reset()
    agent = script.BinnedAgent(env.env.observation_space, env.env.action_space, 3)
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3], [0, 0.5, 0.5]])
    with torch.no_grad():
        agent.policy[-1].weight.zero_()
        agent.policy[-1].bias.copy_(probs.log().clamp(min=-50).flatten())
    np.random.seed(0)
    rollout, _ = script.collect(env, agent, 1500)
    frequencies = (rollout["actions"][:, :, np.newaxis] == np.arange(3)).mean(0)
    np.testing.assert_allclose(frequencies, probs, atol=0.04)


# ------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_is_repeatable_and_changes_nothing():
    """Raw returns of whole episodes, most probable actions, the statistics as training left them,
    environments of its own, the same seeds each time."""
    torch.manual_seed(2)
    env = Environment(make_env("CartPole-v1"), GAMMA)
    env.reset(seed=SEED)
    agent = BinnedAgent(env.env.observation_space, env.env.action_space, 11)
    sppo_continuous.collect(env, agent, 50)

    def state():
        numbers = [*vars(env.obs_stats).values(), *vars(env.return_stats).values(), env.obs]
        return [np.copy(x) for x in (*numbers, env.score, env.length, env.env.unwrapped.state)]

    before = state()
    args = Args(env_id="CartPole-v1", eval_episodes=4, seed=5)
    returns = [evaluate(agent, env.normalize, args, None) for _ in range(2)]
    np.testing.assert_array_equal(*returns)
    for one, other in zip(before, state(), strict=True):
        np.testing.assert_array_equal(one, other)
    other_seed = Args(env_id="CartPole-v1", eval_episodes=4, seed=6)
    assert list(evaluate(agent, env.normalize, other_seed, None)) != list(returns[0])

    sppo_continuous.set_seeds(5, "evaluation")
    alone = gym.make("CartPole-v1")
    for expected, seed in zip(returns[0], np.random.randint(2**31, size=4).tolist()):
        obs, _ = alone.reset(seed=seed)
        score, over = 0, False
        while not over:
            logits = agent.policy(torch.from_numpy(env.normalize(obs)))
            obs, reward, terminated, truncated, _ = alone.step(logits.argmax().item())
            score += reward
            over = terminated or truncated
        assert score == expected
    assert len(set(returns[0])) > 1


# --------------------------------------------------------------------------- unusual environments


@SCRIPTS
@pytest.mark.parametrize("name", tiny.UNUSUAL)
def test_observations_of_any_shape_and_actions_that_the_space_has(name, script):
    args = script.Args(env_id=f"tiny:{name}-v0")
    script.validate(args)
    env = script.Environment(script.make_env(args.env_id), GAMMA)
    env.reset()
    agent = script.BinnedAgent(env.env.observation_space, env.env.action_space, 11)
    rollout, finished = script.collect(env, agent, 32)
    assert rollout["obs"].shape == (32, tiny.UNUSUAL[name][2])
    assert finished == [(15, 16, 16), (31, 16, 16)]  # each action earned 1


@SCRIPTS
@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Blackjack-v1", "CliffWalking-v1"])
def test_tables_and_cards(env_id, script):
    """Whose observations are numbers, and which look up what an action does."""
    env = script.Environment(script.make_env(env_id), GAMMA)
    env.reset(seed=SEED)
    agent = script.BinnedAgent(env.env.observation_space, env.env.action_space, 11)
    script.collect(env, agent, 64)


@SCRIPTS
def test_bins_span_the_range_of_an_action_and_discrete_actions_may_begin_anywhere(script):
    matrix = gym.spaces.Box(np.float32([[-1, 0], [2, -4]]), np.float32([[1, 10], [3, 4]]))
    agent = script.BinnedAgent(tiny.FLAT, matrix, 5)
    expected = np.float32([[-1, 10], [2.5, -2]])
    np.testing.assert_allclose(agent.to_env(np.array([0, 4, 2, 1])), expected)
    agent = script.BinnedAgent(tiny.FLAT, gym.spaces.Discrete(4, start=-2), 5)
    assert [agent.to_env(np.array([i])) for i in range(4)] == [-2, -1, 0, 1]
