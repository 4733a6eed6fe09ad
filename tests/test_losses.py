"""The losses: values and gradients against textbook.py. What follows is in test_loss_facts.py."""

import numpy as np
import pytest
import textbook
import torch

import ppo_baseline
import sa2c_atari
import sa2c_continuous
import sppo_atari
import sppo_continuous

FORMS = pytest.mark.parametrize("weighted", [True, False])
COEFFICIENTS = pytest.mark.parametrize(
    "alpha, beta, Z", [(0.5, 1.0, -1.0), (0.5, 20.0, -1.0), (1.0, 0.0, -1.0), (0.0, 3.0, -4.0)]
)
SPPO = pytest.mark.parametrize(
    "script, dimensions",
    [(sppo_atari, 1), (sppo_continuous, 1), (sppo_continuous, 3), (sppo_continuous, 6)],
)
SA2C = pytest.mark.parametrize(
    "script, dimensions",
    [(sa2c_atari, 1), (sa2c_continuous, 1), (sa2c_continuous, 3), (sa2c_continuous, 6)],
)
CLIP_COEF = 0.1


def away_from_the_edge(logprob, old_logprob):
    """On which side of the clip range the others are, rounding decides."""
    ratio = np.exp((logprob.astype(float) - old_logprob).sum(1))
    return np.abs(np.abs(ratio - 1) - CLIP_COEF) > 1e-3


def make_batch(dimensions, depth=2.0, dtype=float):
    """logprob and old_logprob (batch, D), of `depth` per dimension; advantage (batch,). Among them
    are advantages of 0, policies that did not move, and actions that are certain by now."""
    rng = np.random.default_rng(0)
    old_logprob = -depth * dimensions * rng.dirichlet(np.ones(dimensions), 400)
    old_logprob *= rng.uniform(0.5, 1, (400, 1))
    move = rng.normal(0, 0.2 / np.sqrt(dimensions), old_logprob.shape)
    move[:20] = 0
    logprob = np.minimum(old_logprob + move, 0)
    logprob[20:40] = 0
    advantage = rng.normal(size=400)
    advantage[::10] = 0
    logprob, old_logprob, advantage = (x.astype(dtype) for x in (logprob, old_logprob, advantage))
    keep = away_from_the_edge(logprob, old_logprob)
    return logprob[keep], old_logprob[keep], advantage[keep]


def evaluate(loss_function, logprob):
    """Of what the function returns: values, and gradients in logprob."""
    logprob = torch.tensor(logprob, requires_grad=True)
    values = loss_function(logprob)
    gradients = [torch.autograd.grad(x, logprob, retain_graph=True)[0].numpy() for x in values]
    return [value.item() for value in values], gradients


def as_given(script, logprob):
    """The scripts for games take (batch,), those for control (batch, D)."""
    return logprob if script.__name__.endswith("continuous") else logprob[:, 0]


def sppo(script, logprob, old_logprob, advantage, args):
    """(loss, forward, reverse) and their gradients, of the script's function."""
    context = (
        as_given(script, torch.tensor(old_logprob)),
        torch.tensor(advantage),
        CLIP_COEF,
        args,
    )
    return evaluate(lambda x: script.symmetric_ppo_loss(as_given(script, x), *context), logprob)


@SPPO
@FORMS
@COEFFICIENTS
def test_value_and_gradient_in_float64(script, dimensions, weighted, alpha, beta, Z):
    batch = make_batch(dimensions)
    args = script.Args(alpha=alpha, beta=beta, Z=Z, importance_weighted_reverse=weighted)
    (loss, forward, reverse), (gradient, _, _) = sppo(script, *batch, args)
    expected = textbook.symmetric_ppo(*batch, alpha, beta, Z, CLIP_COEF, weighted)
    forwards, reverses, expected_gradient = expected
    assert 0 < (expected_gradient == 0).all(1).mean() < 0.6  # some are clipped
    np.testing.assert_allclose(forward, forwards.mean(), atol=1e-13 * np.abs(forwards).max())
    np.testing.assert_allclose(reverse, reverses.mean(), atol=1e-13 * np.abs(reverses).max())
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-11, atol=1e-16)
    assert loss == alpha * forward + beta * reverse


@SPPO
@FORMS
@pytest.mark.parametrize(
    "ratio, advantage, has_gradient",
    [
        (0.5, 1, True),
        (1.0, 1, True),
        (1.5, 1, False),
        (0.5, -1, False),
        (1.0, -1, True),
        (1.5, -1, True),
    ],
)
def test_samples_moved_too_far_already_have_no_gradient(
    script, dimensions, weighted, ratio, advantage, has_gradient
):
    old_logprob = np.full((1, dimensions), np.log(0.3) / dimensions)
    logprob = old_logprob + np.log(ratio) / dimensions
    args = script.Args(alpha=1.0, beta=1.0, importance_weighted_reverse=weighted)
    values, gradients = sppo(script, logprob, old_logprob, np.array([float(advantage)]), args)
    assert (values[2] != 0) == has_gradient
    for gradient in gradients:
        assert (gradient != 0).all() == (gradient != 0).any() == has_gradient
        if has_gradient:
            assert (np.sign(gradient) == -advantage).all()  # A > 0 pushes π up


@SPPO
@FORMS
@pytest.mark.parametrize("joint", [1, 40, 80])
def test_float32_neither_overflows_nor_loses_the_gradient(script, dimensions, weighted, joint):
    """Down to log π_old = -80. In float32 1 / π_old is inf below -88."""
    batch = make_batch(dimensions, depth=joint / dimensions, dtype=np.float32)
    args = script.Args(alpha=0.5, beta=20.0, importance_weighted_reverse=weighted)
    (loss, forward, reverse), (gradient, _, _) = sppo(script, *batch, args)
    doubles = [x.astype(float) for x in batch]
    expected = textbook.symmetric_ppo(*doubles, 0.5, 20.0, -1.0, CLIP_COEF, weighted)
    forwards, reverses, expected_gradient = expected
    assert np.isfinite(loss)
    np.testing.assert_allclose(forward, forwards.mean(), atol=1e-5 * np.abs(forwards).max())
    np.testing.assert_allclose(reverse, reverses.mean(), atol=1e-5 * np.abs(reverses).max())
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-4, atol=1e-9)


@SPPO
@FORMS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_alpha_1_beta_0_is_the_baselines_loss(script, dimensions, weighted, dtype):
    """Bit for bit."""
    batch = make_batch(dimensions, dtype=dtype)
    args = script.Args(alpha=1.0, beta=0.0, importance_weighted_reverse=weighted)
    values, gradients = sppo(script, *batch, args)
    old, advantage = torch.tensor(batch[1]).sum(1), torch.tensor(batch[2])
    (ppo,), (gradient,) = evaluate(
        lambda x: [ppo_baseline.ppo_loss(x.sum(1), old, advantage, CLIP_COEF)], batch[0]
    )
    assert values[0] == values[1] == ppo
    np.testing.assert_array_equal(gradients[0], gradient)


@SA2C
@COEFFICIENTS
def test_a2c_value_and_gradient_in_float64(script, dimensions, alpha, beta, Z):
    logprob, _, advantage = make_batch(dimensions)
    args = script.Args(alpha=alpha, beta=beta, Z=Z)
    (loss, *terms), (gradient, *_) = evaluate(
        lambda x: script.symmetric_a2c_loss(as_given(script, x), torch.tensor(advantage), args),
        logprob,
    )
    *expected, expected_gradient = textbook.symmetric_a2c(logprob, advantage, alpha, beta, Z)
    for term, samples in zip(terms, expected):
        np.testing.assert_allclose(term, samples.mean(), atol=1e-14 * np.abs(samples).max())
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12)
    assert loss == alpha * terms[0] + beta * terms[1]


@SA2C
def test_sa2c_without_reverse_term_is_a2c(script, dimensions):
    """-k · A · Σ_d log π_d, value and gradient."""
    logprob, _, advantage = map(torch.tensor, make_batch(dimensions))
    logprob.requires_grad_()
    args = script.Args(alpha=1.7, beta=0.0)
    loss, _, _ = script.symmetric_a2c_loss(as_given(script, logprob), advantage, args)
    a2c = -1.7 * (advantage * logprob.sum(1)).mean()
    gradients = [torch.autograd.grad(x, logprob)[0] for x in (loss, a2c)]
    torch.testing.assert_close(loss, a2c)
    torch.testing.assert_close(*gradients)


def test_a2c_stays_finite_in_float32():
    for script, shape in ((sa2c_atari, (4,)), (sa2c_continuous, (4, 1))):
        logprob = torch.tensor([-1e4, -200.0, -1e-8, 0.0]).view(shape).requires_grad_()
        advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
        loss, _, _ = script.symmetric_a2c_loss(logprob, advantage, script.Args(beta=20.0))
        loss.backward()
        assert loss.isfinite() and logprob.grad.isfinite().all()
