"""Environments side by side, their running statistics, and what is collected from them, against real episodes that are
played once more with the same seeds and the same actions."""

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sppo_continuous import (
    Args,
    BinnedAgent,
    Environments,
    Rollout,
    RunningMeanStd,
    collect_episodes,
    evaluate_episodes,
    main,
    validate,
)

SEEDS, GAMMA = np.array([3, 4]), 0.9

# Time limits as short as the episodes: a random policy runs into both, now and then in the same step.
gym.register("test/Hopper-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", max_episode_steps=14)
gym.register("test/CartPole-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=11)


class Stream(NamedTuple):
    """What really happened; arrays (num_steps, num_envs, …)."""

    obs: np.ndarray  # acted on; one more than steps
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_obs: np.ndarray  # NaN while the episode goes on


def replay(env_id, actions):
    """Plays `actions` (num_steps, num_envs, …) in environments of its own."""
    streams = []
    for i, seed in enumerate(SEEDS):
        env = gym.make(env_id)
        all_obs, steps = [env.reset(seed=int(seed))[0]], []
        for action in actions[:, i]:
            obs, reward, terminated, truncated, _ = env.step(action)
            final_obs = np.full_like(obs, np.nan)
            if terminated or truncated:
                final_obs, (obs, _) = obs, env.reset()
            all_obs.append(obs)
            steps.append((reward, terminated, truncated, final_obs))
        streams.append((np.array(all_obs), *map(np.array, zip(*steps))))
    stream = Stream(*(np.stack(arrays, axis=1) for arrays in zip(*streams)))
    ends = set(zip(stream.terminated.flatten().tolist(), stream.truncated.flatten().tolist()))
    assert ends == {(False, False), (True, False), (False, True), (True, True)}
    return stream


def normalize(samples, seen):
    """With mean and standard deviation of all that was `seen`, at once; clipped to ±10."""
    return np.clip((samples - np.mean(seen, axis=0)) / np.sqrt(np.var(seen, axis=0) + 1e-8), -10, 10)


# --------------------------------------------------------------------------------------------------- running statistics


@given(hnp.arrays(float, hnp.array_shapes(min_dims=1, max_dims=2, max_side=30), elements=st.floats(-1e4, 1e4)))
def test_running_mean_and_std_are_numpys(samples):
    """Scalars and vectors, after every sample."""
    stats = RunningMeanStd(samples.shape[1:])
    for count, sample in enumerate(samples, start=1):
        stats.update(sample)
        so_far = samples[:count].astype(np.longdouble)
        np.testing.assert_allclose(stats.mean, so_far.mean(0).astype(float), rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(stats.std, np.sqrt(so_far.var(0).astype(float) + 1e-8), rtol=1e-7, atol=1e-30)


def test_running_std_far_from_zero():
    """Where the mean of squares less the square of the mean has no correct digit."""
    samples = 1e8 + np.random.default_rng(0).normal(size=5000)
    stats = RunningMeanStd()
    for sample in samples:
        stats.update(sample)
    np.testing.assert_allclose(stats.std, samples.std(), rtol=1e-6, atol=1e-30)


# --------------------------------------------------------------------------------------------------------- environments


@pytest.fixture(scope="module")
def hopper():
    """A random policy in two environments: the environments, what `step` gave, what really happened."""
    envs = Environments(Args(env_id="test/Hopper-v0", gamma=GAMMA), SEEDS)
    actions = np.random.default_rng(0).uniform(-1, 1, (300, *SEEDS.shape, 3)).astype(np.float32)
    obs, steps = [envs.obs.copy()], []
    for action in actions:
        steps.append((*envs.step(action), envs.score.copy(), envs.length.copy(), envs.over.copy()))
        obs.append(envs.obs.copy())
    return envs, np.array(obs), [np.array(values) for values in zip(*steps)], replay("test/Hopper-v0", actions)


def test_observations_are_normalised_with_all_that_were_acted_on(hopper):
    """Environment after environment, the newest included; last observations of episodes are not among them."""
    envs, obs, _, stream = hopper
    acted_on = stream.obs.reshape(-1, 11)
    for i, (normalized, raw) in enumerate(zip(obs.reshape(-1, 11), acted_on, strict=True)):
        np.testing.assert_allclose(normalized, normalize(raw, acted_on[: i + 1]), rtol=1e-4, atol=1e-5)
    assert envs.obs_stats.count == len(acted_on)
    np.testing.assert_allclose(envs.obs_stats.mean, acted_on.mean(0), rtol=1e-10, atol=1e-30)
    np.testing.assert_allclose(envs.obs_stats.std, np.sqrt(acted_on.var(0) + 1e-8), rtol=1e-8, atol=1e-30)
    assert obs.dtype == np.float32


def test_last_observations_are_normalised_and_leave_no_trace(hopper):
    _, _, (_, terminated, truncated, final_obs, *_), stream = hopper
    np.testing.assert_array_equal(terminated, stream.terminated)
    np.testing.assert_array_equal(truncated, stream.truncated)
    acted_on = stream.obs.reshape(-1, 11)
    for t, i in np.argwhere(terminated | truncated):
        seen = acted_on[: (t + 1) * len(SEEDS) + i]  # up to the environments before it, in this step
        np.testing.assert_allclose(final_obs[t, i], normalize(stream.final_obs[t, i], seen), rtol=1e-4, atol=1e-5)


def test_rewards_are_normalised_by_the_discounted_return(hopper):
    """R ← γR + reward, from 0 in each episode, also after a truncation; reward / std of all R so far."""
    envs, _, (rewards, *_), stream = hopper
    discounted_return, seen = np.zeros(len(SEEDS)), []
    for t, raw in enumerate(stream.rewards):
        for i in range(len(SEEDS)):
            discounted_return[i] = GAMMA * discounted_return[i] + raw[i]
            seen.append(discounted_return[i])
            expected = np.clip(raw[i] / np.sqrt(np.var(seen) + 1e-8), -10, 10)
            np.testing.assert_allclose(rewards[t, i], expected, rtol=1e-8, atol=1e-30)
        discounted_return[stream.terminated[t] | stream.truncated[t]] = 0
    np.testing.assert_allclose(envs.return_stats.std, np.sqrt(np.var(seen) + 1e-8), rtol=1e-8, atol=1e-30)
    assert rewards[0, 0] == 10  # of a single sample the variance is 0


def test_scores_are_raw_and_whole(hopper):
    _, _, (*_, score, length, over), stream = hopper
    np.testing.assert_array_equal(over, stream.terminated | stream.truncated)
    total, steps = np.zeros((2, len(SEEDS)))
    for t, raw in enumerate(stream.rewards):
        total, steps = total + raw, steps + 1
        np.testing.assert_allclose(score[t], total, rtol=1e-12, atol=1e-30)
        np.testing.assert_array_equal(length[t], steps)
        total[over[t]] = steps[over[t]] = 0


def test_normalize_clips_and_does_not_learn(hopper):
    envs, *_ = hopper
    before = envs.obs_stats.count, envs.obs_stats.mean.copy(), envs.obs_stats.std.copy()
    far = envs.obs_stats.mean + np.outer([-1e6, 0, 0.5, 1e6], envs.obs_stats.std)
    np.testing.assert_allclose(envs.normalize(far), np.outer([-10, 0, 0.5, 10], np.ones(11)), atol=1e-5)
    assert envs.normalize(far).dtype == np.float32
    for one, other in zip(before, (envs.obs_stats.count, envs.obs_stats.mean, envs.obs_stats.std)):
        np.testing.assert_array_equal(one, other)


# -------------------------------------------------------------------------------------------------------------- rollout


@pytest.fixture
def cartpole():
    torch.manual_seed(2)
    envs = Environments(Args(env_id="test/CartPole-v0", gamma=GAMMA), SEEDS)
    return envs, BinnedAgent(4, envs.envs[0].action_space, 11).requires_grad_(False)


@pytest.fixture
def collected(cartpole):
    """Two rollouts into the same arrays, so that the second one begins within an episode and must clear the first."""
    envs, agent = cartpole
    rollout, actions, rng = Rollout(300, envs.obs, action_dims=1), [], np.random.default_rng(0)
    for _ in range(2):
        collect_episodes(envs, agent, rollout, rng)
        actions.append(rollout.actions[..., 0].copy())
    stream = replay("test/CartPole-v0", np.concatenate(actions))
    return rollout, agent, Stream(stream.obs[300:], *(array[300:] for array in stream[1:])), stream


def test_rows_after_an_end_belong_to_the_next_episode(collected):
    rollout, _, second, stream = collected
    before = stream.obs[:300].reshape(-1, 4)
    acted_on = np.concatenate([before, second.obs[:-1].reshape(-1, 4)])
    for i, row in enumerate(rollout.obs.reshape(-1, 4), start=len(before)):
        np.testing.assert_allclose(row, normalize(acted_on[i], acted_on[: i + 1]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rollout.dones, second.terminated | second.truncated)


def test_only_truncations_bootstrap(collected):
    """With the value of the last observation, normalised; a pole that falls at the time limit has fallen."""
    rollout, agent, second, stream = collected
    acted_on = stream.obs.reshape(-1, 4)
    cut = second.truncated & ~second.terminated
    assert (second.truncated & second.terminated).any()
    for t, i in np.ndindex(cut.shape):
        seen = acted_on[: (300 + t + 1) * len(SEEDS) + i]
        last = torch.from_numpy(normalize(second.final_obs[t, i], seen)[np.newaxis]).float()
        expected = agent.value(last).item() if cut[t, i] else 0
        assert rollout.bootstraps[t, i] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert (rollout.bootstraps[cut] != 0).all() and (rollout.bootstraps[~cut] == 0).all()


def test_what_is_stored_is_what_the_agent_says(collected, cartpole):
    rollout, agent, second, _ = collected
    obs, actions = (torch.from_numpy(x).flatten(0, 1) for x in (rollout.obs, rollout.actions))
    logprobs, _, values = agent(obs, actions)
    next_value = agent.value(torch.from_numpy(cartpole[0].obs))
    for stored, said in ((rollout.logprobs, logprobs), (rollout.values, values), (rollout.next_value, next_value)):
        torch.testing.assert_close(torch.from_numpy(stored).flatten(), said.flatten())
    over = second.terminated | second.truncated
    assert [t for t, _, _ in rollout.finished] == np.flatnonzero(over.any(1)).tolist()
    assert all(score == length for _, score, length in rollout.finished)  # CartPole pays 1 per step


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_is_repeatable_and_changes_nothing(cartpole):
    """Raw returns of whole episodes, most probable actions, the statistics as training left them."""
    envs, agent = cartpole
    for t in range(50):
        envs.step(np.array([t % 2, 1]))

    def state():
        return [np.copy(x) for stats in envs.stats for x in vars(stats).values()] + [envs.obs.copy(), envs.score.copy()]

    before, torch_state = state(), torch.get_rng_state()
    args = Args(env_id="CartPole-v1", eval_episodes=4, seed=5)
    returns = [evaluate_episodes(agent, envs, args, [], None) for _ in range(2)]
    np.testing.assert_array_equal(*returns)
    for one, other in zip(before, state(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert torch.equal(torch_state, torch.get_rng_state())

    env = gym.make("CartPole-v1")
    for expected, seed in zip(returns[0], np.random.default_rng([5, 0, 4]).integers(2**31, size=4), strict=True):
        (obs, _), score, over = env.reset(seed=int(seed)), 0, False
        while not over:
            normalized = (obs - envs.obs_stats.mean) / envs.obs_stats.std
            logits = agent.policy(torch.from_numpy(normalized.clip(-10, 10)[np.newaxis]).float())
            obs, reward, terminated, truncated, _ = env.step(logits.argmax().item())
            score, over = score + reward, terminated or truncated
        assert score == expected
    assert len(set(returns[0])) > 1


# ----------------------------------------------------------------------------------------------- unusual environments


class Unusual(gym.Env):
    """Observations of any shape, rewards that are arrays with one number. The last ones of an episode can be given."""

    action_space = gym.spaces.Box(-1, 1, (2, 2))

    def __init__(self, observation_space, last_reward=25.0, last_but_one_obs=None):
        self.observation_space, self.last_reward, self.obs = observation_space, last_reward, last_but_one_obs

    def reset(self, seed=None, options=None):
        self.steps = 0
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert action in self.action_space
        self.steps += 1
        reward = np.array([self.steps if self.steps < 25 else self.last_reward])
        obs = self.observation_space.sample() if self.obs is None or self.steps != 24 else self.obs
        return obs, reward, False, self.steps == 25, {}


MATRIX = gym.spaces.Box(-1, 1, (2, 3))
DICT = gym.spaces.Dict(position=MATRIX, gear=gym.spaces.Discrete(3))
for name, kwargs in {
    "Matrix": dict(observation_space=MATRIX),
    "Dict": dict(observation_space=DICT),
    "NaNReward": dict(observation_space=MATRIX, last_reward=np.nan),
    "InfiniteReward": dict(observation_space=MATRIX, last_reward=-np.inf),
    "NaNObservation": dict(observation_space=MATRIX, last_but_one_obs=np.full((2, 3), np.nan)),
    "InfiniteObservation": dict(observation_space=MATRIX, last_but_one_obs=np.full((2, 3), np.inf)),
}.items():
    gym.register(f"test/{name}-v0", Unusual, disable_env_checker=True, kwargs=kwargs)

SMALL = dict(total_timesteps=64, num_steps=32, num_minibatches=2, update_epochs=2, eval_episodes=2, cuda=False)


@pytest.mark.parametrize("name, size", [("Matrix", 6), ("Dict", 9)])
def test_observations_become_vectors_and_rewards_numbers(name, size, tmp_path, monkeypatch, capsys):
    args = Args(env_id=f"test/{name}-v0", **SMALL)
    envs, space = Environments(args, SEEDS), gym.make(args.env_id).observation_space
    assert envs.obs.shape == (2, size)
    for _ in range(24):
        envs.step(np.zeros((2, 2, 2), np.float32))
    np.testing.assert_array_equal(envs.score, sum(range(25)))
    raw = []
    for seed in SEEDS:
        space.seed(int(seed))
        raw += [gym.spaces.flatten(space, space.sample()) for _ in range(25)]
    np.testing.assert_allclose(envs.obs_stats.mean, np.mean(raw, axis=0), rtol=1e-5, atol=1e-6)
    validate(args)
    monkeypatch.chdir(tmp_path)
    main(args)
    assert f"score at 64 steps: {sum(range(26)):.2f} ± 0.00" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*(NaN|bounds|inf)")
@pytest.mark.parametrize("name", ["NaNReward", "InfiniteReward", "NaNObservation", "InfiniteObservation"])
def test_what_is_not_finite_in_an_environment_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = "rewards" if "Reward" in name else "obs"
    with pytest.raises(FloatingPointError, match=rf"step=0, .*rollout\.{array}\.mean\(\)=\S*nan"):
        main(Args(env_id=f"test/{name}-v0", **SMALL))
