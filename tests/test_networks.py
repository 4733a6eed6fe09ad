"""The networks: what they say when they act is what they judge, against torch.distributions; and what is played."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal

from ppo_baseline import AtariAgent, BinnedAgent, GaussianAgent, as_vector, in_numpy

OBS_DIM, BINS, SEEDS = 5, 7, st.integers(0, 2**32 - 1)
BOX = gym.spaces.Box(-1, 1, (3,))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def obs():
    return torch.randn(64, OBS_DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gaussian():
    torch.manual_seed(0)
    agent = GaussianAgent(OBS_DIM, BOX).requires_grad_(False)
    agent.policy[-1].weight *= 100  # a fresh policy is nearly the same everywhere
    agent.log_std[:] = torch.tensor([-1.0, 0.0, 0.7])
    return agent


@pytest.fixture
def binned():
    torch.manual_seed(0)
    agent = BinnedAgent(OBS_DIM, BOX, BINS).requires_grad_(False)
    agent.policy[-2].weight *= 300
    return agent


def atari(batch, bf16=False):
    """An agent whose policy is not uniform, and observations."""
    torch.manual_seed(0)
    agent, obs = AtariAgent(6, bf16), torch.randint(256, (batch, 84, 84, 4), dtype=torch.uint8)
    agent.policy.weight.data *= 100
    return agent, obs


def assert_frequencies(draws, probabilities):
    """Pearson's chi-square test at 4 standard deviations, in the approximation of Wilson and Hilferty."""
    expected = len(draws) * np.asarray(probabilities)
    statistic = ((np.bincount(draws, minlength=len(expected)) - expected) ** 2 / expected).sum()
    spread = 2 / 9 / (len(expected) - 1)
    assert (statistic / (len(expected) - 1)) ** (1 / 3) < 1 - spread + 4 * np.sqrt(spread)


def assert_initialised(layers, gains):
    """Orthogonal weights, no biases."""
    for layer, gain in zip([layer for layer in layers if hasattr(layer, "weight")], gains, strict=True):
        singular_values = torch.linalg.svdvals(layer.weight.flatten(1))
        torch.testing.assert_close(singular_values, torch.full_like(singular_values, gain), rtol=1e-4, atol=0)
        assert not layer.bias.any()


# ---------------------------------------------------------------------------------------------------------------- Atari


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("bf16", [False, True])
def test_atari_agent_judges_as_it_acts(batch, bf16):
    agent, obs = atari(batch, bf16)
    action, logprob, value = agent.act(obs.numpy(), np.random.default_rng(0))
    judged_logprob, entropy, judged_value = agent(obs, torch.from_numpy(action))
    categorical = Categorical(logits=agent.logprobs_and_value(obs)[0])
    torch.testing.assert_close(torch.from_numpy(logprob), judged_logprob.detach(), **CLOSE)
    torch.testing.assert_close(torch.from_numpy(value), judged_value.detach(), **CLOSE)
    torch.testing.assert_close(judged_logprob[:, 0], categorical.log_prob(torch.from_numpy(action[:, 0])))
    torch.testing.assert_close(entropy, categorical.entropy())
    assert logprob.shape == action.shape == (batch, 1) and value.shape == entropy.shape == (batch,)
    assert logprob.dtype == value.dtype == np.float32 and entropy.max() < np.log(6) - 0.01


def test_atari_agent_is_the_nature_cnn():
    """Policy, value and their gradients, against the layers written out in float64."""
    agent, obs = atari(4)
    logprobs, value = agent.logprobs_and_value(obs)
    names, parameters = zip(*agent.named_parameters())
    grads = torch.autograd.grad(logprobs[:, 0].sum() + value.square().sum(), parameters)

    doubles = [parameter.detach().double().requires_grad_() for parameter in parameters]
    w1, b1, w2, b2, w3, b3, w4, b4, policy, b5, critic, b6 = doubles
    x = (obs.permute(0, 3, 1, 2).double() / 255).contiguous()
    for weight, bias, stride in ((w1, b1, 4), (w2, b2, 2), (w3, b3, 1)):
        x = nn.functional.conv2d(x, weight, bias, stride).relu()
    x = (x.reshape(4, 64 * 7 * 7) @ w4.T + b4).relu()
    expected_value = (x @ critic.T + b6)[:, 0]
    expected = (x @ policy.T + b5).softmax(1).log()
    expected_grads = torch.autograd.grad(expected[:, 0].sum() + expected_value.square().sum(), doubles)

    torch.testing.assert_close(logprobs.double(), expected, **CLOSE)
    torch.testing.assert_close(value.double(), expected_value, **CLOSE)
    for name, grad, expected_grad in zip(names, grads, expected_grads):
        assert (grad - expected_grad).norm() < 1e-4 * expected_grad.norm(), name


def test_acting_in_bf16_follows_the_weights():
    """As in `main`, where autocast keeps converted weights for as long as a rollout lasts, and no longer."""
    (agent, obs), vectors = atari(4, bf16=True), []
    exact, parameters = AtariAgent(6), as_vector(agent)
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results = [agent.act(obs.numpy(), np.random.default_rng(0)) for _ in range(2)]
        exact.load_state_dict(agent.state_dict())
        expected = [x.detach().numpy() for x in exact(obs, torch.from_numpy(results[0][0]))]
        for _, logprob, value in results:
            np.testing.assert_allclose(logprob, expected[0], atol=0.1)
            np.testing.assert_allclose(value, expected[2], atol=0.02)
            assert 0 < np.abs(value - expected[2]).max()  # it is bfloat16
        vectors.append(expected[2])
        parameters.data *= 1.2  # as the optimizer does, in place
    assert np.abs(vectors[0] - vectors[1]).min() > 0.05


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6), SEEDS)
def test_atari_agent_samples_from_its_softmax(logits, seed):
    logits, agent = torch.tensor(logits).expand(20_000, len(logits)), AtariAgent.__new__(AtariAgent)
    nn.Module.__init__(agent)
    agent.value = nn.Linear(1, 1)
    agent.logprobs_and_value = lambda obs: (logits.log_softmax(1), obs)
    action, *_ = agent.act(np.zeros(20_000), np.random.default_rng(seed))
    assert_frequencies(action[:, 0], logits[0].double().softmax(0))


def test_atari_agent_starts_as_in_the_released_code():
    agent = AtariAgent(4)
    assert_initialised([*agent.features, agent.policy, agent.value], [2**0.5] * 4 + [0.01, 1.0])


@pytest.mark.parametrize("agent", [GaussianAgent(OBS_DIM, BOX), BinnedAgent(OBS_DIM, BOX, BINS)])
def test_control_agents_start_as_in_the_released_code(agent):
    assert_initialised([*agent.policy, *agent.value], [2**0.5, 2**0.5, 0.01, 2**0.5, 2**0.5, 1.0])
    assert not getattr(agent, "log_std", torch.zeros(3)).any()


# ------------------------------------------------------------------------------------------------------------- Gaussian


def test_gaussian_judges_as_torch_does(gaussian, obs):
    normal = Normal(gaussian.policy(obs), gaussian.log_std.exp())
    action = 3 * normal.sample()
    logprob, entropy, value = gaussian(obs, action)
    torch.testing.assert_close(logprob, normal.log_prob(action))
    torch.testing.assert_close(entropy, normal.entropy().sum(1))
    torch.testing.assert_close(value, torch.from_numpy(in_numpy(gaussian.value)(obs.numpy())[:, 0]))
    assert logprob.shape == (64, 3) and entropy.shape == value.shape == (64,)


def test_gaussian_gradient_in_float64(gaussian, obs):
    """∂ log π / ∂ μ = (a − μ) / σ², ∂ log π / ∂ log σ = ((a − μ) / σ)² − 1, ∂ entropy / ∂ log σ = 1."""
    gaussian.double().requires_grad_(True)
    obs, action = obs.double(), torch.linspace(-2, 2, 64 * 3, dtype=torch.float64).view(64, 3)
    logprob, entropy, _ = gaussian(obs, action)
    with torch.no_grad():
        deviation, std = action - gaussian.policy(obs), gaussian.log_std.exp()
    bias, log_std = torch.autograd.grad(logprob.sum(), (gaussian.policy[-1].bias, gaussian.log_std), retain_graph=True)
    torch.testing.assert_close(bias, (deviation / std**2).sum(0))
    torch.testing.assert_close(log_std, ((deviation / std) ** 2 - 1).sum(0))
    torch.testing.assert_close(torch.autograd.grad(entropy.sum(), gaussian.log_std)[0], torch.full_like(log_std, 64))


def test_gaussian_samples(gaussian, obs):
    """Kolmogorov-Smirnov on the standardised draws, each dimension by itself."""
    mean = in_numpy(gaussian.policy)(obs[:1].numpy())
    np.testing.assert_allclose(mean, gaussian.policy(obs[:1]), rtol=1e-5, atol=1e-5)
    noise = gaussian.noise((500, 100), np.random.default_rng(0)).reshape(-1, 3)
    draws = torch.from_numpy(gaussian.act(mean, noise))
    standard = ((draws - gaussian.policy(obs[:1])) / gaussian.log_std.exp()).double().sort(0)
    steps = torch.linspace(0, 1, len(draws), dtype=torch.float64).unsqueeze(1)
    assert (torch.special.ndtr(standard.values) - steps).abs().max() < 1.95 / np.sqrt(len(draws))  # p = 0.001
    np.testing.assert_allclose(np.corrcoef(draws.T), np.eye(3), atol=0.02)
    np.testing.assert_array_equal(gaussian.act(mean), mean)  # the most probable


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Pendulum-v1", "BipedalWalker-v3"])
def test_in_a_box_around_0_actions_are_only_clipped(env_id):
    space = gym.make(env_id).action_space
    action = np.random.default_rng(0).normal(size=(100, *space.shape), scale=3).astype(np.float32)
    stored = action.copy()
    played = GaussianAgent(OBS_DIM, space).to_env(action)
    np.testing.assert_array_equal(played, np.minimum(np.maximum(stored, space.low), space.high))
    np.testing.assert_array_equal(action, stored)  # judged as it was drawn
    assert all(row in space for row in played)


ENDS = st.tuples(st.integers(-99, 99), st.integers(-99, 99)).map(sorted).filter(lambda ends: ends[0] < ends[1])
CENTRED = st.integers(1, 99).map(lambda end: [-end, end])


@given(st.lists(ENDS | CENTRED, min_size=2, max_size=6).filter(lambda x: len(x) % 2 == 0), SEEDS)
def test_other_boxes_reach_from_minus_1_to_1(ends, seed):
    """Each dimension by itself, in a box of any shape."""
    shape = (len(ends) // 2, 2)
    low, high = np.array(ends, dtype=np.float32).T.reshape(2, *shape)
    action = np.random.default_rng(seed).normal(size=(50, len(ends)), scale=2).astype(np.float32)
    agent = GaussianAgent(OBS_DIM, gym.spaces.Box(low, high))
    played = agent.to_env(action)
    assert agent(torch.zeros(50, OBS_DIM), torch.from_numpy(action))[0].shape == action.shape
    assert played.shape == (50, *shape) and all(row in agent.space for row in played)
    for d, (lowest, highest) in enumerate(ends):
        units = action[:, d].astype(float)
        expected = units if lowest == -highest else lowest + (units + 1) / 2 * (highest - lowest)
        np.testing.assert_allclose(played.reshape(50, -1)[:, d], expected.clip(lowest, highest), rtol=1e-5, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- bins


def test_binned_judges_as_torch_does(binned, obs):
    categorical = Categorical(logits=binned.policy(obs))
    action = categorical.sample()
    logprob, entropy, value = binned(obs, action)
    torch.testing.assert_close(logprob, categorical.log_prob(action))
    torch.testing.assert_close(entropy, categorical.entropy().sum(1))
    torch.testing.assert_close(value, torch.from_numpy(in_numpy(binned.value)(obs.numpy())[:, 0]))
    np.testing.assert_array_equal(binned.act(in_numpy(binned.policy)(obs.numpy())), categorical.probs.argmax(2))
    assert logprob.shape == (64, 3) and entropy.shape == value.shape == (64,)
    assert entropy.min() < 0.9 * 3 * np.log(BINS)


def test_binned_samples(binned, obs):
    """All combinations of bins as often as the product of their probabilities says."""
    noise = binned.noise((1000, 100), np.random.default_rng(0)).reshape(-1, 3, BINS)
    draws = binned.act(in_numpy(binned.policy)(obs[:1].numpy()), noise)
    first, second, third = binned.policy(obs[:1])[0].double().softmax(1).numpy()
    assert_frequencies(draws @ [BINS**2, BINS, 1], np.kron(first, np.kron(second, third)))


@given(st.integers(2, 21), st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=1, max_size=4))
def test_bins_are_evenly_spaced_and_ends_included(num_bins, bounds):
    low, high = np.sort(np.array(bounds, dtype=np.float32)).T
    assume((high - low > 1e-3).all())
    actions = BinnedAgent(OBS_DIM, space := gym.spaces.Box(low, high), num_bins).actions
    assert actions.shape == (len(bounds), num_bins) and actions.dtype == space.dtype
    np.testing.assert_array_equal(actions[:, [0, -1]].T, [low, high])
    for values, lowest, highest in zip(actions, low.astype(float), high.astype(float)):
        expected = [lowest + (highest - lowest) * i / (num_bins - 1) for i in range(num_bins)]
        np.testing.assert_allclose(values, expected, rtol=0, atol=2e-7 * max(abs(lowest), abs(highest)))
        assert (np.diff(values) > 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins_become_actions(dtype):
    low, high = np.array([[-1, 0], [0, -5]], dtype), np.array([[1, 2], [3, 5]], dtype)
    agent = BinnedAgent(OBS_DIM, space := gym.spaces.Box(low, high, dtype=dtype), 11)
    actions = agent.to_env(np.array([[0, 0, 0, 0], [10, 10, 10, 10], [5, 1, 10, 4]]))
    np.testing.assert_allclose(actions, [low, high, [[0, 0.2], [3, -1]]], rtol=1e-6, atol=1e-30)
    assert all(action in space for action in actions) and actions.dtype == dtype


@pytest.mark.parametrize("start", [0, 5])
def test_discrete_spaces_keep_their_actions(start):
    agent = BinnedAgent(OBS_DIM, space := gym.spaces.Discrete(3, start=start), BINS)
    actions = agent.to_env(agent.act(np.array([[0.0, 1, 2], [2, 1, 0], [1, 2, 0]])))
    np.testing.assert_array_equal(actions, [start + 2, start, start + 1])
    assert agent.actions.shape == (1, 3) and all(action in space for action in actions)
