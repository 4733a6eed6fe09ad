"""The released SPPO loss has the gradient of PPO's times α + β|Z|: the baseline with that `--pg-coef` is its match."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ppo_baseline
import sppo_continuous

# ----------------------------------------------------------------------------------------------------------- the losses


@st.composite
def batches(draw):
    """logprob and old_logprob (batch, D), advantage (batch,), clip range."""
    shape = draw(st.integers(1, 8)), draw(st.sampled_from([1, 3, 6]))
    old_logprob = draw(hnp.arrays(float, shape, elements=st.floats(-8, -0.01)))
    logprob = np.minimum(old_logprob + draw(hnp.arrays(float, shape, elements=st.floats(-0.4, 0.4))), 0)
    advantage = draw(hnp.arrays(float, shape[0], elements=st.floats(-3, 3)))
    return logprob, old_logprob, advantage, draw(st.floats(0.05, 0.4))


def differentiate(loss, logprob, old_logprob, advantage, *coefficients, dtype=torch.float64):
    """Value, and gradient with respect to logprob."""
    logprob = torch.tensor(logprob, dtype=dtype, requires_grad=True)
    value = loss(logprob, torch.tensor(old_logprob, dtype=dtype), torch.tensor(advantage, dtype=dtype), *coefficients)
    value = value[0] if isinstance(value, tuple) else value
    return value.detach().numpy(), torch.autograd.grad(value, logprob)[0].numpy()


def textbook_ppo(logprob, old_logprob, advantage, clip_coef):
    """−min(r·A, clip(r)·A), sample by sample; its gradient is −A·r where the first is the smaller one, in every d."""
    value, gradient = 0, np.zeros_like(logprob)
    for i, A in enumerate(advantage):
        r = np.exp((logprob[i] - old_logprob[i]).sum())
        objective, clipped = r * A, min(max(r, 1 - clip_coef), 1 + clip_coef) * A
        value -= min(objective, clipped) / len(advantage)
        gradient[i] = -A * r / len(advantage) if objective <= clipped else 0
    return value, gradient


@given(batches())
def test_ppo_loss_in_float64(batch):
    logprob, old_logprob, _, clip_coef = batch
    ratio = np.exp((logprob - old_logprob).sum(1))
    assume((np.abs(np.abs(ratio - 1) - clip_coef) > 1e-6).all())  # on the very edge rounding decides
    value, gradient = differentiate(ppo_baseline.ppo_loss, *batch)
    expected_value, expected_gradient = textbook_ppo(*batch)
    np.testing.assert_allclose(value, expected_value, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-11, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("importance_weighted", [True, False])
@given(batches())
def test_alpha_1_beta_0_is_the_baselines_loss_bit_for_bit(importance_weighted, dtype, batch):
    *batch, clip_coef = batch
    context = (1.0, 0.0, -1.0, clip_coef, importance_weighted)
    symmetric, gradient = differentiate(sppo_continuous.symmetric_ppo_loss, *batch, *context, dtype=dtype)
    ppo, ppo_gradient = differentiate(ppo_baseline.ppo_loss, *batch, clip_coef, dtype=dtype)
    assert symmetric == ppo
    np.testing.assert_array_equal(gradient, ppo_gradient)


@given(batches(), st.floats(0, 2), st.floats(0, 20), st.floats(-4, -0.1))
def test_several_dimensions_importance_weighted(batch, alpha, beta, Z):
    """∇(α·forward + β·reverse) = (α + β|Z|) · ∇forward, whatever the number of dimensions."""
    *batch, clip_coef = batch
    _, gradient = differentiate(sppo_continuous.symmetric_ppo_loss, *batch, alpha, beta, Z, clip_coef)
    _, ppo_gradient = differentiate(ppo_baseline.ppo_loss, *batch, clip_coef)
    np.testing.assert_allclose(gradient, (alpha + beta * abs(Z)) * ppo_gradient, rtol=1e-11, atol=1e-14)


@given(batches(), st.floats(0, 2), st.floats(0, 20), st.floats(-4, -0.1))
def test_several_dimensions_plain(batch, alpha, beta, Z):
    """Dimension d contributes −m·A·(α·r + β|Z|π_d / D)·∇ log π_d: a weight for each, m from the joint ratio."""
    logprob, _, advantage, clip_coef = batch
    _, gradient = differentiate(sppo_continuous.symmetric_ppo_loss, *batch[:3], alpha, beta, Z, clip_coef, False)
    _, ppo_gradient = differentiate(ppo_baseline.ppo_loss, *batch)
    m, dimensions = ppo_gradient[:, :1] != 0, logprob.shape[1]
    extra = m * advantage[:, np.newaxis] * beta * abs(Z) * np.exp(logprob) / dimensions / len(logprob)
    np.testing.assert_allclose(gradient, alpha * ppo_gradient - extra, rtol=1e-11, atol=1e-14)


# -------------------------------------------------------------------------------------------------------- the algorithm


class FirstUpdate(Exception):
    """What `main` had made and collected when it came to update for the first time."""

    def __init__(self, rollout, *arguments):
        self.rollout, self.arguments = rollout, arguments


@pytest.fixture(scope="module")
def first_update(tmp_path_factory):
    """A function: runs the `main` of a script up to its first update, on Hopper-v5 with the default settings."""
    patches = pytest.MonkeyPatch()

    def run(script, **settings):
        def update(*arguments):
            raise FirstUpdate(rollouts[-1], *arguments)

        name = "collect_episodes" if script is ppo_baseline else "collect"
        original = getattr(script, name)

        def collect(envs, to_action, agent, rollout, rng):
            original(envs, to_action, agent, rollout, rng)
            rollouts.append(rollout)

        rollouts, args = [], script.Args(env_id="Hopper-v5", cuda=False, **settings)
        if script is ppo_baseline:
            script.fill_in(args)
        script.validate(args)
        with patches.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("run"))
            patch.setattr(script, name, collect)
            patch.setattr(script, "update", update)
            with pytest.raises(FirstUpdate) as reached:
                script.main(args)
        return script, reached.value

    return run


def trajectory(script, first, dtype, update_epochs=10):
    """All parameters after each minibatch of the first iteration (minibatches, parameters)."""
    agent, optimizer, batch, clip_coef, args, rng, gradient = copy.deepcopy(first.arguments)
    parameters = script.as_vector(agent.to(dtype))
    optimizer = torch.optim.Adam([parameters], **{key: optimizer.defaults[key] for key in ("lr", "eps", "fused")})
    batch = type(batch)(*(field.to(dtype) if field.is_floating_point() else field for field in batch))
    args.update_epochs, visited, step = update_epochs, [], optimizer.step

    def watched_step():
        step()
        visited.append(torch.nn.utils.parameters_to_vector(agent.parameters()).detach().double())

    optimizer.step = watched_step
    script.update(agent, optimizer, batch, clip_coef, args, rng, gradient)
    assert len(visited) == update_epochs * 32
    return torch.stack(visited)


def gap(one, other):
    """Relative distance of the parameters, after each minibatch."""
    return (one - other).norm(dim=1) / other.norm(dim=1)


@pytest.fixture(scope="module")
def unmatched(first_update):
    """The trajectory without the factor."""
    return trajectory(*first_update(ppo_baseline, policy="discretized", pg_coef=1.0), torch.float64)


@pytest.mark.parametrize("alpha, beta, pg_coef", [(1.0, 1.0, 2.0), (0.5, 20.0, 20.5)])
def test_matched_control(first_update, unmatched, alpha, beta, pg_coef):
    sppo = first_update(sppo_continuous, alpha=alpha, beta=beta, Z=-1.0)
    matched = first_update(ppo_baseline, policy="discretized", pg_coef=pg_coef)

    for name in "obs actions logprobs values next_value rewards dones bootstraps".split():
        one, other = (torch.as_tensor(getattr(first.rollout, name)) for _, first in (sppo, matched))
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert sppo[1].rollout.finished == matched[1].rollout.finished != []

    single = [trajectory(*start, torch.float32, update_epochs=1) for start in (sppo, matched)]
    assert gap(*single)[0] < 1e-5
    double = [trajectory(*start, torch.float64) for start in (sppo, matched)]
    assert gap(*double)[-1] < 1e-9
    assert gap(double[0], unmatched)[-1] > 1e-3
