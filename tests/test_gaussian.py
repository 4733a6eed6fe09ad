"""The policies: what they sample, and how they judge it, against torch.distributions; and what is played of it."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal

from ppo_baseline import AtariAgent, BinnedActions, BinnedAgent, ClippedActions, GaussianAgent, in_numpy, sample

OBS_DIM, DIMENSIONS, BINS = 5, 3, 7


def assert_frequencies(draws, probabilities):
    """Pearson's chi-square test at 4 standard deviations, in the approximation of Wilson and Hilferty."""
    expected = len(draws) * np.asarray(probabilities)
    statistic = ((np.bincount(draws, minlength=len(expected)) - expected) ** 2 / expected).sum()
    spread = 2 / 9 / (len(expected) - 1)
    assert (statistic / (len(expected) - 1)) ** (1 / 3) < 1 - spread + 4 * np.sqrt(spread)


@pytest.fixture
def obs():
    return torch.randn(64, OBS_DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gaussian():
    torch.manual_seed(0)
    agent = GaussianAgent(OBS_DIM, DIMENSIONS)
    with torch.no_grad():
        agent.policy[-1].weight *= 100  # a fresh policy is nearly the same everywhere
        agent.log_std[:] = torch.tensor([-1.0, 0.0, 0.7])
    return agent.requires_grad_(False)


@pytest.fixture
def binned():
    torch.manual_seed(0)
    agent = BinnedAgent(OBS_DIM, (DIMENSIONS, BINS))
    with torch.no_grad():
        agent.policy[-2].weight *= 300
    return agent.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------- Gaussian


def test_gaussian_judges_as_torch_does(gaussian, obs):
    normal = Normal(gaussian.policy(obs), gaussian.log_std.exp())
    action = 3 * normal.sample()
    logprob, entropy, value = gaussian(obs, action)
    torch.testing.assert_close(logprob, normal.log_prob(action))
    torch.testing.assert_close(entropy, normal.entropy().sum(1))
    torch.testing.assert_close(value, gaussian.value(obs))
    assert logprob.shape == (64, DIMENSIONS) and entropy.shape == value.shape == (64,)


def test_gaussian_gradient_in_float64(gaussian, obs):
    """∂ log π / ∂ μ = (a − μ) / σ², ∂ log π / ∂ log σ = ((a − μ) / σ)² − 1, ∂ entropy / ∂ log σ = 1."""
    gaussian.double().requires_grad_(True)
    obs, action = obs.double(), torch.linspace(-2, 2, 64 * DIMENSIONS, dtype=torch.float64).view(64, DIMENSIONS)
    logprob, entropy, _ = gaussian(obs, action)
    with torch.no_grad():
        deviation, std = action - gaussian.policy(obs), gaussian.log_std.exp()
    bias, log_std = torch.autograd.grad(logprob.sum(), (gaussian.policy[-1].bias, gaussian.log_std), retain_graph=True)
    torch.testing.assert_close(bias, (deviation / std**2).sum(0))
    torch.testing.assert_close(log_std, ((deviation / std) ** 2 - 1).sum(0))
    torch.testing.assert_close(torch.autograd.grad(entropy.sum(), gaussian.log_std)[0], torch.full_like(log_std, 64))


def test_gaussian_samples(gaussian, obs):
    """Kolmogorov-Smirnov on the standardised draws, each dimension by itself; and the same draws for the same seed."""
    mean = in_numpy(gaussian.policy)(obs[:1].numpy())
    np.testing.assert_allclose(mean, gaussian.policy(obs[:1]), rtol=1e-5, atol=1e-5)
    noise = gaussian.noise((500, 100), np.random.default_rng(0)).reshape(-1, DIMENSIONS)
    np.testing.assert_array_equal(noise, gaussian.noise((50_000,), np.random.default_rng(0)))
    draws = torch.from_numpy(gaussian.act(mean, noise))
    standard = ((draws - gaussian.policy(obs[:1])) / gaussian.log_std.exp()).double().sort(0)
    steps = torch.linspace(0, 1, len(draws), dtype=torch.float64).unsqueeze(1)
    assert (torch.special.ndtr(standard.values) - steps).abs().max() < 1.95 / np.sqrt(len(draws))  # p = 0.001
    np.testing.assert_allclose(np.corrcoef(draws.T), np.eye(DIMENSIONS), atol=0.02)
    np.testing.assert_array_equal(gaussian.act(mean), mean)  # the most probable


def test_gaussian_starts_with_standard_deviation_1():
    agent = GaussianAgent(OBS_DIM, DIMENSIONS)
    assert torch.equal(agent.log_std, torch.zeros(DIMENSIONS)) and agent.log_std.requires_grad
    assert agent.policy(torch.randn(64, OBS_DIM)).abs().max() < 0.1


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Pendulum-v1", "BipedalWalker-v3"])
def test_what_is_played_is_clipped(env_id):
    space = gym.make(env_id).action_space
    action = np.random.default_rng(0).normal(size=(100, *space.shape), scale=3).astype(np.float32)
    stored = action.copy()
    played = ClippedActions(space)(action)
    np.testing.assert_array_equal(played, np.minimum(np.maximum(stored, space.low), space.high))
    np.testing.assert_array_equal(action, stored)  # judged as it was drawn
    assert all(row in space for row in played)


def test_clipped_actions_take_the_shape_of_the_space():
    low, high = np.array([[-1, 0], [0, -5]], np.float32), np.array([[1, 2], [3, 5]], np.float32)
    played = ClippedActions(gym.spaces.Box(low, high))(np.array([[-9, 9, 1, -1], [0, 1, 9, -9]], np.float32))
    np.testing.assert_array_equal(played, [[[-1, 2], [1, -1]], [[0, 1], [3, -5]]])


# ---------------------------------------------------------------------------------------------------------- categorical


def test_binned_judges_as_torch_does(binned, obs):
    categorical = Categorical(logits=binned.policy(obs))
    action = categorical.sample()
    logprob, entropy, value = binned(obs, action)
    torch.testing.assert_close(logprob, categorical.log_prob(action))
    torch.testing.assert_close(entropy, categorical.entropy().sum(1))
    torch.testing.assert_close(value, binned.value(obs))
    np.testing.assert_array_equal(binned.act(in_numpy(binned.policy)(obs.numpy())), categorical.probs.argmax(2))
    assert logprob.shape == (64, DIMENSIONS) and entropy.shape == value.shape == (64,)
    assert entropy.min() < 0.9 * DIMENSIONS * np.log(BINS)


def test_binned_samples(binned, obs):
    """All combinations of bins as often as the product of their probabilities says; the same for the same seed."""
    logits = in_numpy(binned.policy)(obs[:1].numpy())
    noise = binned.noise((1000, 100), np.random.default_rng(0)).reshape(-1, DIMENSIONS, BINS)
    np.testing.assert_array_equal(noise, binned.noise((100_000,), np.random.default_rng(0)))
    draws = binned.act(logits, noise)
    first, second, third = binned.policy(obs[:1])[0].double().softmax(1).numpy()
    combinations = draws[:, 0] * BINS**2 + draws[:, 1] * BINS + draws[:, 2]
    assert_frequencies(combinations, np.kron(first, np.kron(second, third)))


def test_atari_judges_as_torch_does():
    torch.manual_seed(0)
    agent, obs = AtariAgent(6).requires_grad_(False), torch.randint(256, (32, 84, 84, 4), dtype=torch.uint8)
    agent.policy.weight *= 100
    action, logprob, value = agent.act(obs, torch.Generator().manual_seed(0))
    categorical = Categorical(logits=agent.policy(agent.features(obs.movedim(3, 1) / 255)))
    judged, entropy, judged_value = agent(obs, action)
    for says in (logprob, judged):
        torch.testing.assert_close(says[:, 0], categorical.log_prob(action))
    torch.testing.assert_close(entropy, categorical.entropy())
    torch.testing.assert_close(value, judged_value)


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6), st.integers(0, 2**32 - 1))
def test_sample_draws_from_softmax(logits, seed):
    logits = torch.tensor(logits)
    draws = sample(logits.expand(20_000, len(logits)), torch.Generator().manual_seed(seed))
    assert_frequencies(draws, logits.double().softmax(0))


# ----------------------------------------------------------------------------------------------------------------- bins


@given(st.integers(2, 21), st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=1, max_size=4))
def test_bins_are_evenly_spaced_and_ends_included(num_bins, bounds):
    low, high = np.sort(np.array(bounds, dtype=np.float32)).T
    assume((high - low > 1e-3).all())
    space = gym.spaces.Box(low, high)
    to_action = BinnedActions(space, num_bins)
    assert to_action.values.shape == (len(bounds), num_bins) and to_action.values.dtype == space.dtype
    np.testing.assert_array_equal(to_action.values[:, 0], low)
    np.testing.assert_array_equal(to_action.values[:, -1], high)
    for values, lowest, highest in zip(to_action.values, low.astype(float), high.astype(float)):
        expected = [lowest + (highest - lowest) * i / (num_bins - 1) for i in range(num_bins)]
        np.testing.assert_allclose(values, expected, rtol=0, atol=2e-7 * max(abs(lowest), abs(highest)))
        assert (np.diff(values) > 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins_become_actions(dtype):
    low, high = np.array([[-1, 0], [0, -5]], dtype), np.array([[1, 2], [3, 5]], dtype)
    space = gym.spaces.Box(low, high, dtype=dtype)
    to_action = BinnedActions(space, 11)
    actions = to_action(np.array([[0, 0, 0, 0], [10, 10, 10, 10], [5, 1, 10, 4]]))
    np.testing.assert_allclose(actions, [low, high, [[0, 0.2], [3, -1]]], rtol=1e-6, atol=1e-30)
    assert all(action in space for action in actions) and actions.dtype == dtype


def test_discrete_spaces_keep_their_actions():
    plain, shifted = gym.spaces.Discrete(3), gym.spaces.Discrete(3, start=5)
    bins = np.array([[2], [0], [1]])
    np.testing.assert_array_equal(BinnedActions(plain, 11)(bins), [2, 0, 1])
    np.testing.assert_array_equal(BinnedActions(shifted, 11)(bins), [7, 5, 6])
    assert BinnedActions(shifted, 11).values.shape == (1, 3)
    assert all(action in shifted for action in BinnedActions(shifted, 11)(bins))
