"""The losses: value and gradient against the formulas. What follows from them is in test_loss_facts.py."""

import numpy as np
import pytest
import textbook
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ppo_baseline import ppo_loss
from sa2c_atari import symmetric_a2c_loss
from sppo_atari import symmetric_ppo_loss

FORMS = pytest.mark.parametrize("importance_weighted", [True, False])
COEFFICIENTS = st.tuples(st.floats(0, 2), st.floats(0, 20), st.floats(-4, -0.1))  # α, β, Z


@st.composite
def batches(draw, dimensions=(1, 2, 6)):
    """logprob and old_logprob (batch, D), advantage (batch,), clip range; no ratio on the very edge of the range."""
    shape = draw(st.integers(1, 6)), draw(st.sampled_from(dimensions))
    clip_coef = draw(st.sampled_from([0.1, 0.2]))
    old_logprob = draw(hnp.arrays(float, shape, elements=st.floats(-60 / shape[1], -0.01)))
    logprob = np.minimum(old_logprob + draw(hnp.arrays(float, shape, elements=st.floats(-0.4, 0.4))), 0)
    advantage = draw(hnp.arrays(float, shape[0], elements=st.floats(-3, 3)))
    assume(away_from_the_edge(logprob, old_logprob, clip_coef).all())
    return logprob, old_logprob, advantage, clip_coef


def away_from_the_edge(logprob, old_logprob, clip_coef):
    """Rounding decides on which side of the clip range the others are."""
    ratio = np.exp((logprob - old_logprob).sum(1))
    return np.abs(np.abs(ratio - 1) - clip_coef) > 1e-3


def torch_loss(logprob, old_logprob, advantage, *coefficients):
    """Loss, forward and reverse term; then the gradient of each with respect to logprob."""
    logprob = torch.tensor(logprob, requires_grad=True)
    values = symmetric_ppo_loss(logprob, torch.tensor(old_logprob), torch.tensor(advantage), *coefficients)
    gradients = [torch.autograd.grad(value, logprob, retain_graph=True)[0] for value in values]
    return [value.item() for value in values], [gradient.numpy() for gradient in gradients]


@FORMS
@given(batches(), COEFFICIENTS)
def test_value_and_gradient_in_float64(importance_weighted, batch, coefficients):
    logprob, old_logprob, advantage, clip_coef = batch
    alpha, beta, _ = coefficients
    context = (*coefficients, clip_coef, importance_weighted)
    (loss, forward, reverse), (gradient, _, _) = torch_loss(logprob, old_logprob, advantage, *context)
    forwards, reverses, expected = textbook.symmetric_ppo(logprob, old_logprob, advantage, *context)

    np.testing.assert_allclose(forward, forwards.mean(), rtol=0, atol=1e-12 * (1 + np.abs(forwards).max()))
    # 1 / π_old − r cancels where π is near 1, so the yardstick is 1 / π_old
    yardstick = np.abs(advantage).max() * np.exp(-old_logprob.sum(1)).max()
    np.testing.assert_allclose(reverse, reverses.mean(), rtol=0, atol=1e-12 * (1 + 4 * yardstick))
    np.testing.assert_allclose(gradient, expected, rtol=1e-11, atol=1e-14)
    assert loss == alpha * forward + beta * reverse


@FORMS
@pytest.mark.parametrize(
    "ratio, advantage, has_gradient",
    [(0.5, 1, True), (1.0, 1, True), (1.5, 1, False), (0.5, -1, False), (1.0, -1, True), (1.5, -1, True)],
)
def test_samples_moved_too_far_already_have_no_gradient(importance_weighted, ratio, advantage, has_gradient):
    old_logprob = np.log([[0.3]])
    context = (1.0, 1.0, -1.0, 0.1, importance_weighted)
    (_, _, reverse), gradients = torch_loss(old_logprob + np.log(ratio), old_logprob, np.array([advantage]), *context)
    assert [gradient.item() != 0 for gradient in gradients] == [has_gradient] * 3
    assert (reverse != 0) == has_gradient
    assert all(np.sign(gradient.item()) == -advantage for gradient in gradients if has_gradient)  # A > 0 pushes π up


@FORMS
@pytest.mark.parametrize("dimensions", [1, 6, 17])
@pytest.mark.parametrize("joint", [-1, -40, -80, -87, -100, -200])
def test_float32_neither_overflows_nor_loses_the_gradient(joint, dimensions, importance_weighted):
    """1 / π_old overflows float32 near log π_old = −88: one inf makes the loss, or all gradients, NaN."""
    rng = np.random.default_rng(0)
    old_logprob = rng.dirichlet(np.ones(dimensions), 256) * joint
    logprob = np.minimum(old_logprob + rng.normal(0, 0.2 / np.sqrt(dimensions), old_logprob.shape), 0)
    logprob, old_logprob = logprob.astype(np.float32), old_logprob.astype(np.float32)
    keep = away_from_the_edge(logprob.astype(float), old_logprob.astype(float), 0.1)
    logprob, old_logprob, advantage = logprob[keep], old_logprob[keep], rng.normal(size=keep.sum()).astype(np.float32)

    context = (0.5, 20.0, -1.0, 0.1, importance_weighted)
    (loss, forward, reverse), (gradient, _, _) = torch_loss(logprob, old_logprob, advantage, *context)
    float64 = (x.astype(float) for x in (logprob, old_logprob, advantage))
    forwards, reverses, expected = textbook.symmetric_ppo(*float64, *context)
    assert np.isfinite([loss, forward, reverse]).all()
    np.testing.assert_allclose(forward, forwards.mean(), rtol=0, atol=1e-4)
    if joint >= -80 or not importance_weighted:
        np.testing.assert_allclose(reverse, reverses.mean(), rtol=0, atol=1e-4 * np.abs(reverses).mean())
    np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=1e-6 * np.abs(expected).max())


@FORMS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(batches())
def test_alpha_1_beta_0_is_the_baselines_loss_bit_for_bit(importance_weighted, dtype, batch):
    *batch, clip_coef = batch
    logprob, old_logprob, advantage = (x.astype(dtype) for x in batch)
    context = (1.0, 0.0, -1.0, clip_coef, importance_weighted)
    values, gradients = torch_loss(logprob, old_logprob, advantage, *context)
    logprob = torch.tensor(logprob, requires_grad=True)
    ppo = ppo_loss(logprob, torch.tensor(old_logprob), torch.tensor(advantage), clip_coef)
    assert values[0] == ppo.item()
    np.testing.assert_array_equal(gradients[0], torch.autograd.grad(ppo, logprob)[0].numpy())


@given(hnp.arrays(float, (2, 8), elements=st.floats(0, 1)), COEFFICIENTS)
def test_a2c_value_and_gradient_in_float64(draws, coefficients):
    logprob, advantage = -50 * draws[0], 6 * draws[1] - 3
    tensor = torch.tensor(logprob, requires_grad=True)
    loss, *terms = symmetric_a2c_loss(tensor, torch.tensor(advantage), *coefficients)
    *expected, gradient = textbook.symmetric_a2c(logprob, advantage, *coefficients)
    for term, samples in zip(terms, expected):
        np.testing.assert_allclose(term.item(), samples.mean(), rtol=1e-12, atol=1e-11 * np.abs(advantage).max())
    np.testing.assert_allclose(torch.autograd.grad(loss, tensor)[0], gradient, rtol=1e-12, atol=1e-300)
    assert loss == coefficients[0] * terms[0] + coefficients[1] * terms[1]


def test_a2c_stays_finite_in_float32():
    logprob = torch.tensor([-1e4, -200.0, -1e-8, 0.0], requires_grad=True)
    loss, _, _ = symmetric_a2c_loss(logprob, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.5, 20.0, -1.0)
    loss.backward()
    assert loss.isfinite() and logprob.grad.isfinite().all()
