"""SA2C: its loss and gradient against the formulas, its optimiser against TensorFlow's rule, what an update logs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

from sa2c_atari import Args, AtariAgent, Batch, RMSpropTF, symmetric_a2c_loss, update

COEFFICIENTS = st.tuples(st.floats(0, 2), st.floats(0, 20), st.floats(-4, -0.1))  # α, β, Z


@st.composite
def batches(draw):
    """logprob, advantage: (batch,)"""
    size = draw(st.integers(1, 8))
    return (draw(hnp.arrays(float, size, elements=elements)) for elements in (st.floats(-50, 0), st.floats(-3, 3)))


def textbook(logprob, advantage, alpha, beta, Z):
    """Terms per sample; gradient of the mean loss: d log π = 1, d π = π, with respect to log π."""
    pi = np.exp(logprob)
    forward, reverse = -advantage * logprob, -advantage * Z * (1 - pi)
    return forward, reverse, (-alpha * advantage + beta * advantage * Z * pi) / len(advantage)


def torch_loss(logprob, advantage, *coefficients):
    """Loss, forward and reverse term, and the gradient of the loss with respect to logprob."""
    logprob = torch.tensor(logprob, requires_grad=True)
    values = symmetric_a2c_loss(logprob, torch.tensor(advantage), *coefficients)
    return [value.item() for value in values], torch.autograd.grad(values[0], logprob)[0].numpy()


# ----------------------------------------------------------------------------------------------------------------- loss


@given(batches(), COEFFICIENTS)
def test_value_and_gradient_in_float64(batch, coefficients):
    logprob, advantage = batch
    alpha, beta, _ = coefficients
    (loss, forward, reverse), gradient = torch_loss(logprob, advantage, *coefficients)
    forwards, reverses, expected = textbook(logprob, advantage, *coefficients)
    np.testing.assert_allclose(forward, forwards.mean(), rtol=1e-12, atol=1e-12 * np.abs(forwards).max())
    np.testing.assert_allclose(reverse, reverses.mean(), rtol=1e-12, atol=1e-12 * np.abs(reverses).max())
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-300)
    assert loss == alpha * forward + beta * reverse


@given(batches())
def test_alpha_1_beta_0_is_a2c(batch):
    logprob, advantage = batch
    (loss, _, _), gradient = torch_loss(logprob, advantage, 1.0, 0.0, -1.0)
    logprob = torch.tensor(logprob, requires_grad=True)
    a2c = -(torch.tensor(advantage) * logprob).mean()
    assert loss == a2c.item()
    np.testing.assert_array_equal(gradient, torch.autograd.grad(a2c, logprob)[0].numpy())


@given(batches(), COEFFICIENTS)
def test_the_gradient_is_a2cs_with_weighted_advantages(batch, coefficients):
    logprob, advantage = batch
    alpha, beta, Z = coefficients
    _, symmetric = torch_loss(logprob, advantage, *coefficients)
    _, a2c = torch_loss(logprob, advantage * (alpha + beta * abs(Z) * np.exp(logprob)), 1.0, 0.0, Z)
    np.testing.assert_allclose(symmetric, a2c, rtol=1e-12, atol=1e-300)


def test_the_reverse_term_helps_ambiguous_actions_most():
    """Its gradient in the logit z of the action taken is −A·|Z|·π(1 − π), largest at π = ½."""
    logit = torch.linspace(-6, 6, 121, dtype=torch.float64, requires_grad=True)
    logprob = torch.nn.functional.logsigmoid(logit)  # two actions
    _, _, reverse = symmetric_a2c_loss(logprob, torch.ones(121, dtype=torch.float64), 0.0, 1.0, -2.0)
    (gradient,) = torch.autograd.grad(reverse * 121, logit)
    pi = logprob.exp().detach()
    torch.testing.assert_close(gradient, -2 * pi * (1 - pi))
    assert gradient.argmin() == 60  # z = 0


def test_float32_stays_finite():
    logprob = torch.tensor([-1e4, -200.0, -1e-8, 0.0], requires_grad=True)
    loss, _, _ = symmetric_a2c_loss(logprob, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.5, 20.0, -1.0)
    loss.backward()
    assert loss.isfinite() and logprob.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ optimiser


def test_rmsprop_by_hand():
    """v starts at 1: v ← ρv + (1 − ρ)g², p ← p − lr·g / √(v + ε)."""
    rng = np.random.default_rng(0)
    parameter = torch.nn.Parameter(torch.from_numpy(rng.normal(size=(3, 2))))
    optimizer = RMSpropTF([parameter], lr=0.1, decay=0.9, eps=0.5)
    expected, v = parameter.detach().numpy().copy(), np.ones((3, 2))
    for step in range(20):
        optimizer.param_groups[0]["lr"] = lr = 0.1 / (step + 1)  # as --anneal-lr sets it
        gradient = rng.normal(size=(3, 2)) * 10 ** rng.uniform(-3, 1)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        v = 0.9 * v + 0.1 * gradient**2
        expected -= lr * gradient / np.sqrt(v + 0.5)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-30)


def test_rmsprop_is_stable_baselines():
    """With the settings A2C uses; several parameters, float32."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (5,))] for _ in range(2))
    optimizers = [RMSpropTF(ours, lr=7e-4), RMSpropTFLike(theirs, lr=7e-4, alpha=0.99, eps=1e-5)]
    for _ in range(50):
        for one, other in zip(ours, theirs):
            one.grad = other.grad = torch.randn(one.shape)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs):
        assert (one - 1).abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------------------- update


@pytest.fixture
def agent():
    torch.manual_seed(0)
    agent = AtariAgent(4)
    with torch.no_grad():
        agent.policy.weight *= 100  # a fresh policy is uniform
    return agent


def some_batch(size=40):
    """About one sample in four was FIRE pressed for the learner: its numbers must not count."""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randint(256, (size, 84, 84, 4), dtype=torch.uint8, generator=generator)
    actions = torch.randint(4, (size,), generator=generator)
    advantages, returns, draws = torch.randn((3, size), generator=generator)
    valid = (draws < 0.7).float()
    assert 0 < valid.sum() < size
    return Batch(obs, actions, advantages * (1 + 100 * (1 - valid)), returns, valid)


def flatten(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("norm_adv", [False, True])
def test_what_an_update_logs(agent, norm_adv):
    """Means over the valid samples alone, of what the policy was before the step."""
    args, batch = Args(norm_adv=norm_adv, alpha=0.5, beta=3.0, Z=-2.0), some_batch()
    with torch.no_grad():
        logprobs, value = (x.double().numpy() for x in agent.get_logprobs_and_value(batch.obs))
    stats = update(agent, RMSpropTF(agent.parameters(), lr=7e-4), batch, args, np.random.default_rng(0))

    assert stats.pop("losses/grad_norm") > 0
    keep = batch.weight.bool().numpy()
    logprob = logprobs[np.arange(len(keep)), batch.actions][keep]
    advantage = batch.advantages.double().numpy()[keep]
    normalized = (advantage - advantage.mean()) / advantage.std(ddof=1) if norm_adv else advantage
    forward, reverse, _ = textbook(logprob, normalized, args.alpha, args.beta, args.Z)
    expected = {
        "losses/policy_loss": args.alpha * forward.mean() + args.beta * reverse.mean(),
        "losses/forward_loss": forward.mean(),
        "losses/reverse_loss": reverse.mean(),
        "losses/value_loss": np.mean((value - batch.returns.numpy())[keep] ** 2),
        "losses/entropy": -(np.exp(logprobs) * logprobs).sum(1)[keep].mean(),
        "losses/mean_weight": np.mean(0.5 + 3 * 2 * np.exp(logprob)),
        "advantage/sign_flips_normalization": np.mean(np.sign(normalized) != np.sign(advantage)),
    }
    assert stats == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_an_update_is_one_step_down_the_loss(agent):
    """The whole batch, the three losses with their weights, the gradient's norm cut: the parameters move by it."""
    args, batch = Args(), some_batch()
    logprob, entropy, value = agent(batch.obs, batch.actions)
    keep = batch.weight.bool()
    policy_loss, _, _ = symmetric_a2c_loss(logprob[keep, 0], batch.advantages[keep], args.alpha, args.beta, args.Z)
    value_loss = (value - batch.returns)[keep].square().mean()
    loss = policy_loss - 0.01 * entropy[keep].mean() + 0.25 * value_loss
    gradient = flatten(torch.autograd.grad(loss, agent.parameters()))
    before = flatten(agent.parameters())
    assert gradient.norm() > args.max_grad_norm

    stats = update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, args, np.random.default_rng(0))
    assert stats["losses/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)  # before it is cut
    moved = flatten(agent.parameters()) - before
    expected = -gradient * args.max_grad_norm / gradient.norm()
    assert (moved - expected).norm() < 1e-4 * expected.norm()
