"""The networks: what they say, against equations and torch.distributions; and what is played."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.distributions import Categorical

from ppo_baseline import AtariAgent, ControlAgent
from sppo_continuous import BinnedAgent, Environment, collect, in_numpy

OBS_DIM, BINS = 5, 7
OBS_SPACE = gym.spaces.Box(-9, 9, (OBS_DIM,))
BOX = gym.spaces.Box(-1, 1, (3,))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def obs():
    return torch.randn(64, OBS_DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def binned():
    """A fresh policy is nearly uniform; this one is not."""
    torch.manual_seed(0)
    agent = BinnedAgent(OBS_SPACE, BOX, BINS).requires_grad_(False)
    agent.policy[-1].weight *= 100
    return agent


def assert_initialised(layers, gains):
    """Orthogonal weights, no biases."""
    layers = [layer for layer in layers if hasattr(layer, "weight")]
    for layer, gain in zip(layers, gains, strict=True):
        singular = torch.linalg.svdvals(layer.weight.flatten(1))
        torch.testing.assert_close(singular, torch.full_like(singular, gain), rtol=1e-4, atol=0)
        assert not layer.bias.any()


def test_agents_start_as_in_the_released_code(binned):
    agent = AtariAgent(4)
    assert_initialised([*agent.features, agent.policy, agent.value], [2**0.5] * 4 + [0.01, 1.0])
    gains = [2**0.5, 2**0.5, 0.01, 2**0.5, 2**0.5, 1.0]
    for agent in (BinnedAgent(OBS_SPACE, BOX, BINS), ControlAgent(OBS_DIM, BOX, None)):
        assert_initialised([*agent.policy, *agent.value], gains)
    assert agent.log_std.shape == (3,) and not agent.log_std.any()


def test_atari_agent_is_the_nature_cnn():
    """Policy, value and their gradients, against the layers written out in float64."""
    torch.manual_seed(0)
    agent = AtariAgent(6).to(memory_format=torch.channels_last)  # as in `main`
    agent.policy.weight.data *= 100
    obs = torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8)
    policy, value = agent(obs)
    names, parameters = zip(*agent.named_parameters())
    grads = torch.autograd.grad(policy.logits[:, 0].sum() + value.square().sum(), parameters)

    doubles = [x.detach().double().contiguous().requires_grad_() for x in parameters]
    w1, b1, w2, b2, w3, b3, w4, b4, w_policy, b_policy, w_value, b_value = doubles
    x = obs.double() / 255
    for weight, bias, stride in ((w1, b1, 4), (w2, b2, 2), (w3, b3, 1)):
        x = nn.functional.conv2d(x, weight, bias, stride).relu()
    x = (x.reshape(4, 64 * 7 * 7) @ w4.T + b4).relu()
    expected_value = (x @ w_value.T + b_value)[:, 0]
    expected = (x @ w_policy.T + b_policy).softmax(1).log()
    loss = expected[:, 0].sum() + expected_value.square().sum()
    expected_grads = torch.autograd.grad(loss, doubles)

    torch.testing.assert_close(policy.logits.double(), expected, **CLOSE)
    torch.testing.assert_close(value.double(), expected_value, **CLOSE)
    for name, grad, expected_grad in zip(names, grads, expected_grads):
        assert (grad - expected_grad).norm() < 1e-4 * expected_grad.norm(), name


def test_in_numpy_is_the_network(binned, obs):
    """Of one row or many; after the weights have changed the next one is."""
    for network in (binned.policy, binned.value):
        for _ in range(2):
            function = in_numpy(network)
            np.testing.assert_allclose(function(obs.numpy()), network(obs), **CLOSE)
            np.testing.assert_allclose(function(obs[0].numpy()), network(obs[0]), **CLOSE)
            network[0].weight += 0.1


def test_binned_agent_judges_as_torch_does(binned, obs):
    categorical = Categorical(logits=binned.policy(obs).view(64, 3, BINS))
    action = categorical.sample()
    logprob, entropy, value = binned(obs, action)
    torch.testing.assert_close(logprob, categorical.log_prob(action))
    torch.testing.assert_close(entropy, categorical.entropy().sum(1))
    torch.testing.assert_close(value, binned.value(obs)[:, 0])
    assert logprob.shape == (64, 3) and entropy.min() < 0.95 * 3 * np.log(BINS)


def test_the_baseline_judges_bins_as_sppo_does(binned, obs):
    baseline = ControlAgent(OBS_DIM, BOX, binned.bins)
    baseline.load_state_dict(binned.state_dict())
    policy, value = baseline(obs)
    action = policy.sample()
    logprob, entropy, expected_value = binned(obs, action)
    torch.testing.assert_close(policy.log_prob(action), logprob.sum(1))
    torch.testing.assert_close(policy.entropy(), entropy)
    torch.testing.assert_close(value, expected_value)


def test_gaussian_policy_in_float64(obs):
    """log π = Σ_d -½ ((a − μ) / σ)² − log σ − ½ log 2π, and its gradients."""
    torch.manual_seed(0)
    agent = ControlAgent(OBS_DIM, BOX, None).double()
    agent.log_std.data[:] = torch.tensor([-1.0, 0.0, 0.7])
    action = torch.linspace(-2, 2, 64 * 3, dtype=torch.float64).view(64, 3)
    policy, _ = agent(obs.double())
    logprob = policy.log_prob(action)
    with torch.no_grad():
        std = agent.log_std.exp()
        units = (action - agent.policy(obs.double())) / std
    expected = -(units**2 / 2 + agent.log_std + np.log(2 * np.pi) / 2).sum(1)
    torch.testing.assert_close(logprob, expected)
    entropy = (agent.log_std + np.log(2 * np.pi * np.e) / 2).sum().expand(64)
    torch.testing.assert_close(policy.entropy(), entropy)
    parameters = agent.policy[-1].bias, agent.log_std
    bias, log_std = torch.autograd.grad(logprob.sum(), parameters)
    torch.testing.assert_close(bias, (units / std).sum(0))
    torch.testing.assert_close(log_std, (units**2 - 1).sum(0))


class Still(gym.Env):
    """Always the same observation."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert action in self.action_space
        return np.zeros(2, np.float32), 1.0, False, False, {}


def test_control_acts_with_its_policy():
    """All combinations of bins as often as the product of their probabilities says: Pearson's
    chi-square test at 4 standard deviations, as Wilson and Hilferty approximate it."""
    torch.manual_seed(0)
    np.random.seed(0)
    agent = BinnedAgent(Still.observation_space, Still.action_space, 4)
    agent.policy[-1].bias.data.normal_()
    env = Environment(Still(), gamma=0.99)
    env.reset()
    rollout, finished = collect(env, agent, 4000)
    pi = agent.policy[-1].bias.detach().view(2, 4).double().softmax(1).numpy()
    draws = rollout["actions"] @ [4, 1]
    expected = 4000 * np.kron(*pi)
    statistic = ((np.bincount(draws, minlength=16) - expected) ** 2 / expected).sum()
    spread = 2 / 9 / 15
    assert (statistic / 15) ** (1 / 3) < 1 - spread + 4 * np.sqrt(spread)
    logprobs = np.log(pi)[[0, 1], rollout["actions"]]
    np.testing.assert_allclose(rollout["logprobs"], logprobs, rtol=1e-4)
    assert finished == []


@pytest.mark.parametrize("num_bins", [2, 11])
def test_bins_are_evenly_spaced_and_ends_included(num_bins):
    low, high = np.float32([-1, 0.4, -50]), np.float32([1, 0.5, 100])
    agent = BinnedAgent(OBS_SPACE, gym.spaces.Box(low, high), num_bins)
    for values, lowest, highest in zip(agent.bins, low, high, strict=True):
        step = (highest - lowest) / (num_bins - 1)
        np.testing.assert_allclose(
            values, lowest + step * np.arange(num_bins), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins_become_actions(dtype):
    """In a box of any shape."""
    low = np.array([[-1, 0], [0, -5]], dtype)
    high = np.array([[1, 2], [3, 5]], dtype)
    agent = BinnedAgent(OBS_SPACE, gym.spaces.Box(low, high, dtype=dtype), 11)
    expected = {(0,) * 4: low, (10,) * 4: high, (5, 1, 10, 4): [[0, 0.2], [3, -1]]}
    for bins, action in expected.items():
        played = agent.to_env(np.array(bins))
        np.testing.assert_allclose(played, action, rtol=1e-6)
        assert played in agent.space and played.dtype == dtype


@pytest.mark.parametrize("start", [0, 5])
def test_discrete_spaces_keep_their_actions(start):
    agent = BinnedAgent(OBS_SPACE, gym.spaces.Discrete(3, start=start), BINS)
    played = [agent.to_env(np.array([i])) for i in range(3)]
    assert played == [start, start + 1, start + 2]
    assert all(action in agent.space for action in played)
