"""The symmetric loss: value and gradient against the formulas, and what its gradient is said to be."""

import numpy as np
import pytest
import textbook
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sppo_atari import mean_weight, symmetric_ppo_loss

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
@given(batches())
def test_alpha_1_beta_0_is_ppo(importance_weighted, batch):
    logprob, old_logprob, advantage, clip_coef = batch
    values, gradients = torch_loss(logprob, old_logprob, advantage, 1.0, 0.0, -1.0, clip_coef, importance_weighted)

    logprob = torch.tensor(logprob, requires_grad=True)
    advantage = torch.tensor(advantage)
    ratio = torch.exp(logprob.sum(1) - torch.tensor(old_logprob).sum(1))
    ppo = torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - clip_coef, 1 + clip_coef)).mean()
    assert values[0] == ppo.item()
    np.testing.assert_array_equal(gradients[0], torch.autograd.grad(ppo, logprob)[0].numpy())


@given(batches(), COEFFICIENTS)
def test_importance_weighted_gradient_is_a_multiple_of_ppos(batch, coefficients):
    logprob, old_logprob, advantage, clip_coef = batch
    alpha, beta, Z = coefficients
    _, (loss, forward, reverse) = torch_loss(logprob, old_logprob, advantage, alpha, beta, Z, clip_coef, True)
    np.testing.assert_allclose(reverse, abs(Z) * forward, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(loss, (alpha + beta * abs(Z)) * forward, rtol=1e-11, atol=1e-14)


@given(batches(dimensions=(1,)), COEFFICIENTS)
def test_plain_gradient_is_that_of_ppo_with_weighted_advantages(batch, coefficients):
    logprob, old_logprob, advantage, clip_coef = batch
    alpha, beta, Z = coefficients
    _, (symmetric, _, _) = torch_loss(logprob, old_logprob, advantage, alpha, beta, Z, clip_coef, False)
    weighted = advantage * (alpha + beta * abs(Z) * np.exp(old_logprob[:, 0]))
    _, (ppo, _, _) = torch_loss(logprob, old_logprob, weighted, 1.0, 0.0, Z, clip_coef, False)
    np.testing.assert_allclose(symmetric, ppo, rtol=1e-11, atol=1e-14)


@FORMS
@given(batches())
def test_only_the_product_of_beta_and_Z_matters(importance_weighted, batch):
    *batch, clip_coef = batch
    (loss, _, _), (gradient, _, _) = torch_loss(*batch, 0.5, 2.0, -1.0, clip_coef, importance_weighted)
    (same, _, _), (same_gradient, _, _) = torch_loss(*batch, 0.5, 1.0, -2.0, clip_coef, importance_weighted)
    assert loss == same
    np.testing.assert_array_equal(gradient, same_gradient)


@given(batches(), COEFFICIENTS)
def test_mean_weight(batch, coefficients):
    _, old_logprob, _, _ = batch
    alpha, beta, Z = coefficients
    pi = np.exp(old_logprob)
    weights = [alpha + beta * abs(Z) * (sum(row) / len(row)) / len(row) for row in pi]
    plain = mean_weight(torch.tensor(old_logprob), alpha, beta, Z, importance_weighted=False)
    weighted = mean_weight(torch.tensor(old_logprob), alpha, beta, Z, importance_weighted=True)
    assert plain == pytest.approx(np.mean(weights), rel=1e-12)
    assert weighted == pytest.approx(alpha + beta * abs(Z), rel=1e-12)
