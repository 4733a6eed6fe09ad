"""The network: what it says when it acts and when it judges a stored action is the same."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from ppo_baseline import BinnedAgent, GaussianAgent
from sppo_atari import AtariAgent, for_acting, sample


def test_sampled_actions_have_the_softmax_frequencies():
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5])
    draws = sample(logits.expand(100_000, 4), torch.Generator().manual_seed(0))
    expected = logits.softmax(0).numpy()
    frequencies = np.bincount(draws, minlength=4) / len(draws)
    np.testing.assert_array_less(np.abs(frequencies - expected), 5 * np.sqrt(expected * (1 - expected) / len(draws)))


def test_atari_agent_judges_as_it_acts():
    torch.manual_seed(0)
    agent, obs = AtariAgent(6), torch.randint(256, (32, 84, 84, 4), dtype=torch.uint8)
    with torch.no_grad():
        agent.policy.weight *= 100  # a fresh policy is uniform
        action, logprob, value = agent.act(obs, torch.Generator().manual_seed(0))
        judged_logprob, entropy, judged_value = agent(obs, action)
        probabilities = agent.policy(agent.features(obs.movedim(3, 1) / 255)).softmax(1)
    torch.testing.assert_close(logprob, judged_logprob)
    torch.testing.assert_close(value, judged_value)
    torch.testing.assert_close(value, agent.get_value(obs))
    torch.testing.assert_close(logprob[:, 0].exp(), probabilities[torch.arange(32), action])
    torch.testing.assert_close(entropy, torch.distributions.Categorical(probabilities).entropy())
    assert entropy.max() < np.log(6) - 0.01


def test_atari_agent_is_the_nature_cnn():
    """Policy, value and their gradients, against the layers written out in float64."""
    torch.manual_seed(0)
    agent, obs = AtariAgent(6), torch.randint(256, (4, 84, 84, 4), dtype=torch.uint8)
    logprobs, value = agent.get_logprobs_and_value(obs)
    names, parameters = zip(*agent.named_parameters())
    grads = torch.autograd.grad(logprobs[:, 0].sum() + value.square().sum(), parameters)

    doubles = [parameter.detach().double().requires_grad_() for parameter in parameters]
    w1, b1, w2, b2, w3, b3, hidden, b4, policy, b5, critic, b6 = doubles
    x = (obs.permute(0, 3, 1, 2).double() / 255).contiguous()
    for weight, bias, stride in ((w1, b1, 4), (w2, b2, 2), (w3, b3, 1)):
        x = nn.functional.conv2d(x, weight, bias, stride).relu()
    x = (x.reshape(4, 64 * 7 * 7) @ hidden + b4).relu()
    expected_value = (x @ critic.T + b6)[:, 0]
    expected = (x @ policy.T + b5).softmax(1).log()
    expected_grads = torch.autograd.grad(expected[:, 0].sum() + expected_value.square().sum(), doubles)

    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-4, atol=1e-5)
    for name, grad, expected_grad in zip(names, grads, expected_grads):
        assert (grad - expected_grad).norm() < 1e-4 * expected_grad.norm(), name


@pytest.mark.parametrize("bf16", [False, True])
def test_what_acts_says_the_same(bf16):
    torch.manual_seed(0)
    agent, obs = AtariAgent(6, bf16), torch.randint(256, (4, 84, 84, 4), dtype=torch.uint8)
    before = copy.deepcopy(agent.state_dict())
    with torch.inference_mode():
        few = for_acting(agent)
        assert few.features[-2].weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
        for expected, result in zip(agent.get_logprobs_and_value(obs), few.get_logprobs_and_value(obs)):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        if few is not agent:
            few.value.weight += 1  # it is a copy
    for name, parameter in agent.state_dict().items():
        assert torch.equal(parameter, before[name]) and parameter.stride() == before[name].stride()


def test_atari_agent_starts_as_in_the_released_code():
    """Orthogonal weights: √2 in the hidden layers, 0.01 for the policy, 1 for the value; no biases."""
    agent = AtariAgent(4)
    layers = [layer for layer in agent.features if hasattr(layer, "weight")] + [agent.policy, agent.value]
    assert_initialised(layers, [2**0.5] * 4 + [0.01, 1.0])


@pytest.mark.parametrize("agent", [GaussianAgent(5, 3), BinnedAgent(5, (3, 7))])
def test_control_agents_start_as_in_the_released_code(agent):
    layers = [layer for layer in (*agent.policy, *agent.value) if hasattr(layer, "weight")]
    assert_initialised(layers, [2**0.5, 2**0.5, 0.01] + [2**0.5, 2**0.5, 1.0])


def assert_initialised(layers, gains):
    for layer, gain in zip(layers, gains, strict=True):
        torch.testing.assert_close(torch.linalg.svdvals(layer.weight.flatten(1)).max().item(), gain, rtol=1e-4, atol=0)
        assert not layer.bias.any()
