"""What docs/symmetric_loss.md says about the losses: what their gradients are, and what noise does to them on average.

Gradients are those of a small policy network (one linear layer, so that samples and action dimensions share
parameters). They are compared with −mean_i Σ_d c_id · ∇log π_id, whose coefficients c are worked out by hand.
"""

import itertools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ppo_baseline
import sppo_continuous
from ppo_baseline import ppo_loss
from sa2c_atari import symmetric_a2c_loss
from sppo_atari import flip_rewards, flip_signs, gae, normalize
from sppo_continuous import add_noise, symmetric_ppo_loss

COEFFICIENTS = st.tuples(  # α, β, Z; 0 or well away from it: what is nearly 0 loses digits when it is scaled
    st.just(0.0) | st.floats(0.01, 2), st.just(0.0) | st.floats(0.01, 20), st.floats(-4, -0.1)
)
ADVANTAGES = st.just(0.0) | st.floats(0.01, 3) | st.floats(-3, -0.01)
PROBABILITIES = st.floats(0, 1)
FEWER = settings(max_examples=25)  # whole batches take their time
FORMS = pytest.mark.parametrize("importance_weighted", [True, False])


class Samples:
    """Actions taken by the policy `old_weights` (features, D, bins), judged by the policy `weights`."""

    def __init__(self, obs, actions, advantage, old_weights, weights):
        self.obs, self.actions = torch.tensor(obs), torch.tensor(actions).unsqueeze(2)
        self.advantage = torch.tensor(advantage)
        self.weights = torch.tensor(weights, requires_grad=True)
        self.old_logprob = self.judge(torch.tensor(old_weights))
        self.logprob = self.judge(self.weights)
        self.ratio = (self.logprob - self.old_logprob).sum(1).exp().detach()

    def judge(self, weights):
        """Log-probabilities of the actions, by dimension (batch, D)."""
        logprobs = torch.einsum("nf,fdk->ndk", self.obs, weights).log_softmax(-1)
        return logprobs.gather(2, self.actions).squeeze(2)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.weights, retain_graph=True)[0]

    def weighted_gradient(self, coefficients):
        """Of −mean_i Σ_d c_id · log π_id. `coefficients`: (batch, D), or (batch, 1) for all dimensions alike."""
        return self.gradient(-(coefficients.detach() * self.logprob).sum(1).mean())

    def unclipped(self, clip_coef):
        """m, from its meaning: 0 where r has already left the clip range in the direction in which A pushes it."""
        too_high, too_low = self.ratio > 1 + clip_coef, self.ratio < 1 - clip_coef
        return (~((self.advantage > 0) & too_high | (self.advantage < 0) & too_low)).double()

    def away_from_the_edge(self, clip_coef):
        """Rounding decides on which side of the clip range the others are."""
        return bool(((self.ratio - 1).abs() - clip_coef).abs().min() > 1e-9)


@st.composite
def samples(draw, max_dimensions=6, max_move=1.0):
    batch, features = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    shape = (features, draw(st.integers(1, max_dimensions)), draw(st.integers(2, 5)))
    advantage = draw(hnp.arrays(float, batch, elements=ADVANTAGES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))  # the rest is rarely better for being simple
    obs, actions = rng.uniform(-1, 1, (batch, features)), rng.integers(0, shape[2], (batch, shape[1]))
    old_weights = rng.normal(0, 1, shape)
    return Samples(obs, actions, advantage, old_weights, old_weights + rng.uniform(-max_move, max_move, shape))


def moved_policy(num_samples, move=0.1, seed=0):
    """A fixed batch, one dimension of 6 actions, after the policy has moved along PPO's gradient on that batch."""
    rng = np.random.default_rng(seed)
    obs, advantage = rng.normal(size=(num_samples, 8)), rng.normal(size=num_samples)
    weights = rng.normal(0, 0.3, (8, 1, 6))
    logits = np.einsum("nf,fdk->ndk", obs, weights)
    actions = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
    before = Samples(obs, actions, advantage, weights, weights)
    gradient = before.weighted_gradient(before.advantage.unsqueeze(1)).numpy()
    return Samples(obs, actions, advantage, weights, weights - move * gradient / np.abs(gradient).max())


def assert_same(gradient, expected):
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11 * (1 + expected.abs().max().item()))


def cosine(x, y):
    return torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0).item()


# ----------------------------------------------------------------------------------------------- what the gradients are


@FEWER
@given(samples(), COEFFICIENTS, st.sampled_from([0.1, 0.2]))
def test_released_sppo_is_ppo_with_its_policy_loss_multiplied(batch, coefficients, clip_coef):
    assume(batch.away_from_the_edge(clip_coef))
    alpha, beta, Z = coefficients
    factor = alpha + beta * abs(Z)
    loss, _, _ = symmetric_ppo_loss(batch.logprob, batch.old_logprob, batch.advantage, *coefficients, clip_coef)
    m_A_r = batch.unclipped(clip_coef) * batch.advantage * batch.ratio
    assert_same(batch.gradient(loss), batch.weighted_gradient(factor * m_A_r.unsqueeze(1)))
    pg_loss = factor * ppo_loss(batch.logprob, batch.old_logprob, batch.advantage, clip_coef)
    assert_same(batch.gradient(loss), batch.gradient(pg_loss))


@FEWER
@given(samples(max_dimensions=1), COEFFICIENTS)
def test_sa2c_is_a2c_with_advantages_weighted_by_the_probability(batch, coefficients):
    alpha, beta, Z = coefficients
    logprob = batch.logprob.squeeze(1)
    loss, _, reverse_loss = symmetric_a2c_loss(logprob, batch.advantage, *coefficients)
    pi = logprob.exp()
    assert_same(batch.gradient(reverse_loss), batch.weighted_gradient((batch.advantage * abs(Z) * pi).unsqueeze(1)))
    weighted = batch.advantage * (alpha + beta * abs(Z) * pi)
    assert_same(batch.gradient(loss), batch.weighted_gradient(weighted.unsqueeze(1)))


@FEWER
@given(samples(max_dimensions=1), COEFFICIENTS, st.sampled_from([0.1, 0.2]))
def test_plain_sppo_is_ppo_with_advantages_weighted_by_the_old_probability(batch, coefficients, clip_coef):
    assume(batch.away_from_the_edge(clip_coef))
    alpha, beta, Z = coefficients
    loss, _, _ = symmetric_ppo_loss(batch.logprob, batch.old_logprob, batch.advantage, *coefficients, clip_coef, False)
    weighted = batch.advantage * (alpha + beta * abs(Z) * batch.old_logprob.squeeze(1).exp())
    assert_same(batch.gradient(loss), batch.gradient(ppo_loss(batch.logprob, batch.old_logprob, weighted, clip_coef)))


@FEWER
@given(samples(), COEFFICIENTS, st.sampled_from([0.1, 0.2]))
def test_plain_sppo_weighs_every_action_dimension_by_itself(batch, coefficients, clip_coef):
    assume(batch.away_from_the_edge(clip_coef))
    alpha, beta, Z = coefficients
    loss, _, _ = symmetric_ppo_loss(batch.logprob, batch.old_logprob, batch.advantage, *coefficients, clip_coef, False)
    m_A = (batch.unclipped(clip_coef) * batch.advantage).unsqueeze(1)
    dimensions = batch.logprob.shape[1]
    per_dimension = alpha * batch.ratio.unsqueeze(1) + beta * abs(Z) * batch.logprob.exp() / dimensions
    assert_same(batch.gradient(loss), batch.weighted_gradient(m_A * per_dimension))


def test_reweighting_is_no_constant():
    """The facts above are not empty: no multiple of the plain gradient comes near the reweighted one."""
    batch = moved_policy(256, move=0)
    reweighted = batch.gradient(symmetric_a2c_loss(batch.logprob.squeeze(1), batch.advantage, 0.0, 1.0, -1.0)[0])
    assert cosine(reweighted, batch.weighted_gradient(batch.advantage.unsqueeze(1))) < 0.95


def logit_gradient(loss_of_logprob, pi):
    """|∂ loss / ∂ logit of the action taken| where its probability is `pi`, of three actions."""
    others = torch.tensor([0.0, 0.7], dtype=torch.float64)
    logit = (torch.tensor([pi], dtype=torch.float64).logit() + others.logsumexp(0)).requires_grad_()
    loss = loss_of_logprob(torch.cat([logit, others]).log_softmax(0)[:1])
    return torch.autograd.grad(loss, logit)[0].abs().item()


PIS = st.floats(0.01, 0.99)
SIZES = st.floats(0.1, 3)  # of an advantage or a weight, away from 0


@given(PIS, SIZES, st.sampled_from([-1, 1]), st.floats(-4, -0.1))
def test_the_reverse_term_of_a2c_pulls_hardest_at_one_half(pi, size, sign, Z):
    advantage = torch.tensor([sign * size], dtype=torch.float64)

    def pull(pi):
        return logit_gradient(lambda logprob: symmetric_a2c_loss(logprob, advantage, 1.0, 1.0, Z)[2], pi)

    assert pull(pi) == pytest.approx(size * abs(Z) * pi * (1 - pi), rel=1e-9)
    assert pull(0.5) >= pull(pi) == pytest.approx(pull(1 - pi), rel=1e-9)


@given(PIS, SIZES, SIZES)
def test_all_of_sa2c_pulls_hardest_below_one_half_or_at_zero(pi, alpha, beta):
    def pull(pi):
        return logit_gradient(lambda logprob: symmetric_a2c_loss(logprob, torch.ones(1), alpha, beta, -1.0)[0], pi)

    assert pull(pi) == pytest.approx((alpha + beta * pi) * (1 - pi), rel=1e-6)
    peak = max((1 - alpha / beta) / 2, 1e-6)
    assert pull(peak) * (1 + 1e-5) >= pull(pi)


@given(PIS, st.floats(-4, -0.1))
def test_divided_by_the_old_probability_the_reverse_term_has_no_such_peak(pi, Z):
    def pull(term, pi):
        old_logprob, advantage = torch.tensor([[pi]], dtype=torch.float64).log(), torch.ones(1, dtype=torch.float64)
        arguments = (old_logprob, advantage, 1.0, 1.0, Z, 0.1)
        return logit_gradient(lambda logprob: symmetric_ppo_loss(logprob.unsqueeze(0), *arguments)[term], pi)

    assert pull(2, pi) == pytest.approx(abs(Z) * (1 - pi), rel=1e-9) == abs(Z) * pull(1, pi)


# ------------------------------------------------------------------------------------- what the coefficients can change


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@FEWER
@given(samples(), COEFFICIENTS, st.integers(-8, 8))
def test_beta_and_Z_are_one_knob_bit_for_bit(importance_weighted, dtype, batch, coefficients, exponent):
    alpha, beta, Z = coefficients
    same = alpha, beta * 2.0**exponent, Z / 2.0**exponent
    logprob = batch.logprob.detach().to(dtype).requires_grad_()
    old_logprob, advantage = batch.old_logprob.to(dtype), batch.advantage.to(dtype)

    def ppo(alpha, beta, Z):
        return symmetric_ppo_loss(logprob, old_logprob, advantage, alpha, beta, Z, 0.2, importance_weighted)[0]

    def a2c(alpha, beta, Z):
        return symmetric_a2c_loss(logprob.sum(1), advantage, alpha, beta, Z)[0]

    for loss in (ppo, a2c):
        assert torch.equal(loss(*coefficients), loss(*same))
        assert torch.equal(*(torch.autograd.grad(loss(*c), logprob)[0] for c in (coefficients, same)))


@FEWER
@given(samples(), COEFFICIENTS, st.floats(0, 1))
def test_in_released_sppo_alpha_and_beta_are_one_knob_too(batch, coefficients, share):
    alpha, beta, Z = coefficients
    factor = alpha + beta * abs(Z)
    same = share * factor, (1 - share) * factor / abs(Z), Z
    gradients = [
        batch.gradient(symmetric_ppo_loss(batch.logprob, batch.old_logprob, batch.advantage, *knobs, 0.2)[0])
        for knobs in (coefficients, same)
    ]
    assert_same(*gradients)


def test_the_value_of_the_released_reverse_term_is_a_constant():
    """6 dimensions, 11 bins: near uniform it is 11^6 − r. Its gradient is PPO's all the same."""
    old_logprob = torch.full((1, 6), -np.log(11), dtype=torch.float64)
    advantage = torch.ones(1, dtype=torch.float64)
    values, gradients = [], []
    for ratio in (0.95, 1.05):
        logprob = (old_logprob + np.log(ratio) / 6).requires_grad_()
        _, forward_loss, reverse_loss = symmetric_ppo_loss(logprob, old_logprob, advantage, 0.5, 20.0, -1.0, 0.2)
        values.append(reverse_loss.item())
        losses = forward_loss, reverse_loss
        gradients.append([torch.autograd.grad(loss, logprob, retain_graph=True)[0] for loss in losses])
    assert values == pytest.approx([11**6 - 0.95, 11**6 - 1.05], rel=1e-12)
    assert abs(values[1] - values[0]) < 1e-6 * values[0]
    for forward_gradient, reverse_gradient in gradients:
        assert_same(reverse_gradient, forward_gradient)


class Learner:
    """A policy and a value network after two epochs of updates in float64, on a batch that is always the same."""

    def __init__(self, script, adam_eps, **settings):
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        agent = script.BinnedAgent(3, gym.spaces.Box(-1, 1, (2,)), 5).double()
        obs, actions = torch.tensor(rng.normal(size=(64, 3))), torch.tensor(rng.integers(0, 5, (64, 2)))
        batch = obs, actions, agent(obs, actions)[0].detach(), *torch.tensor(rng.normal(size=(2, 64)))
        optimizer = torch.optim.Adam([script.as_vector(agent)], lr=0.01, eps=adam_eps)
        args = script.Args(update_epochs=2, num_minibatches=4, **settings)
        script.update(agent, optimizer, batch, np.arange(64), torch.tensor(0.2), args, np.random.default_rng(1))
        self.policy, self.value = (
            torch.nn.utils.parameters_to_vector(net.parameters()).detach() for net in (agent.policy, agent.value)
        )


SPPO = dict(alpha=0.5, beta=20.0, Z=-1.0)  # α + β|Z| = 20.5


def test_released_sppo_is_ppo_with_everything_else_made_smaller():
    sppo = Learner(sppo_continuous, 1e-5, **SPPO, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5)
    others = dict(ent_coef=0.01 / 20.5, vf_coef=0.5 / 20.5, max_grad_norm=0.5 / 20.5)
    ppo, unmatched = Learner(ppo_baseline, 1e-5 / 20.5, **others), Learner(ppo_baseline, 1e-5, ent_coef=0.01)
    for x, y, other in ((sppo.policy, ppo.policy, unmatched.policy), (sppo.value, ppo.value, unmatched.value)):
        assert (x - y).abs().max() < 1e-5  # clip_grad_norm_ adds 1e-6 to the norm: not quite the same
        assert (x - other).abs().max() > 1e-3


def test_without_gradient_clipping_and_entropy_bonus_separate_networks_do_not_notice():
    free = dict(ent_coef=0.0, max_grad_norm=1e30)
    sppo, ppo = Learner(sppo_continuous, 1e-30, **SPPO, **free), Learner(ppo_baseline, 1e-30, **free)
    assert (sppo.policy - ppo.policy).abs().max() < 1e-8 and (sppo.value - ppo.value).abs().max() < 1e-8
    clipped = Learner(sppo_continuous, 1e-30, **SPPO, ent_coef=0.0, max_grad_norm=0.5)
    assert (clipped.policy - ppo.policy).abs().max() > 1e-3  # so the clip is where it does notice


# ----------------------------------------------------------------------------------- signs, baselines and normalisation


@given(hnp.arrays(float, st.integers(2, 30), elements=st.floats(-10, 10)))
def test_normalisation_flips_the_signs_between_zero_and_the_mean(advantage):
    mean = advantage.mean()
    assume(advantage.std() > 1e-3 and np.abs(advantage - mean).min() > 1e-9)
    normalized = normalize(torch.tensor(advantage)).numpy()
    flipped = (np.sign(normalized) != np.sign(advantage)) & (advantage != 0)
    between = (0 < advantage) & (advantage < mean) | (mean < advantage) & (advantage < 0)
    np.testing.assert_array_equal(flipped, between)


@FEWER
@given(hnp.arrays(float, 4, elements=st.floats(-3, 3)), hnp.arrays(float, 4, elements=st.floats(-3, 3)))
def test_what_the_two_terms_of_a2c_climb_on_average(logits, advantage):
    """Over the actions of one state: E[forward gradient] = −∇ Σ_a A π, E[reverse gradient] = −|Z| ∇ ½ Σ_a A π²."""
    logits, advantage = torch.tensor(logits, requires_grad=True), torch.tensor(advantage)
    logprobs, pi = logits.log_softmax(0), logits.softmax(0)
    expected = [0, 0]
    for action in range(4):
        _, *terms = symmetric_a2c_loss(logprobs[action : action + 1], advantage[action : action + 1], 1.0, 1.0, -2.0)
        for i, term in enumerate(terms):
            expected[i] += pi[action].item() * torch.autograd.grad(term, logits, retain_graph=True)[0]
    assert_same(expected[0], -torch.autograd.grad((advantage * pi).sum(), logits, retain_graph=True)[0])
    assert_same(expected[1], -2 * torch.autograd.grad((advantage * pi.square()).sum() / 2, logits)[0])


@FEWER
@given(hnp.arrays(float, 4, elements=st.floats(-3, 3)), st.floats(-2, 2))
def test_a_baseline_is_free_for_a2c_and_not_for_its_reverse_term(logits, baseline):
    """One advantage for all actions: on average no gradient in A2C; the reverse term makes ½ Σ π² larger if A > 0."""
    logits = torch.tensor(logits, requires_grad=True)
    logprobs, pi = logits.log_softmax(0), logits.softmax(0)
    advantage = torch.full((4,), baseline, dtype=torch.float64)
    per_action = [symmetric_a2c_loss(logprobs[a : a + 1], advantage[a : a + 1], 1.0, 1.0, -1.0) for a in range(4)]
    _, forward_loss, reverse_loss = (sum(pi.detach() * torch.stack(terms)) for terms in zip(*per_action))
    losses = forward_loss, reverse_loss, pi.square().sum() / 2
    forward, reverse, sharper = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses)
    assert forward.abs().max() < 1e-12
    assert_same(reverse, -baseline * sharper)


# ---------------------------------------------------------------------------------------------------------------- noise


def dice(values):
    """In place of a random generator: its next draws are these. Below a probability means that something happens."""
    return SimpleNamespace(random=lambda shape: np.asarray(values, dtype=float).reshape(shape))


def sign_patterns(advantage, probability):
    """All noisy advantages that flip_signs can make of these, each with its probability."""
    for flips in itertools.product([False, True], repeat=len(advantage)):
        happens = np.prod([probability if flip else 1 - probability for flip in flips])
        if happens > 0:
            draws = np.where(flips, 0.0, np.nextafter(1, 0))
            noisy = flip_signs(advantage, probability, dice(draws)) if probability < 1 else -advantage
            yield happens, noisy


@given(hnp.arrays(float, 4, elements=st.sampled_from([-1.0, 0.0, 1.0, 0.3])), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_a_flipped_reward_is_on_average_a_rescaled_reward_and_a_bonus(reward, p):
    happens, spared = flip_rewards(reward, p, dice(np.zeros(4))), flip_rewards(reward, p, dice(np.ones(4)))
    mean = p * happens + (1 - p) * spared
    np.testing.assert_allclose(mean, (1 - 2 * p) * reward + p, atol=1e-15)
    variance = p * (happens - mean) ** 2 + (1 - p) * (spared - mean) ** 2
    np.testing.assert_allclose(variance, p * (1 - p) * (1 - 2 * reward) ** 2, atol=1e-14)


@given(
    hnp.arrays(float, (5, 1), elements=st.sampled_from([-1.0, 0.0, 1.0])),
    hnp.arrays(float, (5, 1), elements=st.floats(-3, 3)),
    st.floats(-3, 3),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.integers(0, 4),
)
@FEWER
def test_advantages_are_on_average_those_of_the_bonus(reward, values, next_value, p, end):
    """GAE is linear in the rewards: over all 2^5 patterns of flips its mean is GAE of (1 − 2p) · reward + p."""
    dones = np.arange(5).reshape(5, 1) == end
    context = (values, dones, np.array([next_value]), 0.99, 0.95)
    mean = 0
    for flips in itertools.product([0.0, np.nextafter(1, 0)], repeat=5):  # draws: 0 flips
        happens = np.prod([p if draw == 0 else 1 - p for draw in flips])
        mean = mean + happens * gae(flip_rewards(reward, p, dice(flips)), *context)
    np.testing.assert_allclose(mean, gae((1 - 2 * p) * reward + p, *context), atol=1e-12)


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_the_bonus_pays_for_every_step_survived(steps):
    """Without rewards: p · (1 + γ + γ² + …), nothing after the end; up to p / (1 − γ) = 10 clipped rewards."""
    dones = np.arange(steps).reshape(-1, 1) == steps - 1
    zeros = np.zeros((steps, 1))
    bonus = gae(zeros + 0.1, zeros, dones, np.zeros(1), 0.99, 1.0)[0, 0]
    assert bonus == pytest.approx(0.1 * (1 - 0.99**steps) / (1 - 0.99))
    assert bonus < 10


@given(hnp.arrays(float, 6, elements=st.floats(-10, 10)), hnp.arrays(float, 6, elements=st.floats(-3, 3)))
def test_gaussian_reward_noise_leaves_the_mean_alone(reward, draws):
    both = [
        add_noise(reward, 0.05, SimpleNamespace(standard_normal=lambda shape, dtype, z=z: z)) for z in (draws, -draws)
    ]
    np.testing.assert_allclose(sum(both) / 2, reward, atol=1e-14)


@FEWER
@given(samples(max_dimensions=1), COEFFICIENTS, PROBABILITIES)
def test_sign_flips_only_scale_the_expected_gradient_of_a2c(batch, coefficients, q):
    def gradient(advantage):
        return batch.gradient(symmetric_a2c_loss(batch.logprob.squeeze(1), advantage, *coefficients)[0])

    expected = sum(happens * gradient(noisy) for happens, noisy in sign_patterns(batch.advantage, q))
    assert_same(expected, (1 - 2 * q) * gradient(batch.advantage))


@FORMS
@FEWER
@given(samples(max_dimensions=2, max_move=0.01), COEFFICIENTS, PROBABILITIES)
def test_sign_flips_only_scale_the_expected_gradient_of_ppo_inside_the_clip_range(
    importance_weighted, batch, coefficients, q
):
    assert ((batch.ratio - 1).abs() < 0.2).all()

    def gradient(advantage):
        terms = (batch.logprob, batch.old_logprob, advantage)
        return batch.gradient(symmetric_ppo_loss(*terms, *coefficients, 0.2, importance_weighted)[0])

    expected = sum(happens * gradient(noisy) for happens, noisy in sign_patterns(batch.advantage, q))
    assert_same(expected, (1 - 2 * q) * gradient(batch.advantage))


@FORMS
def test_sign_flips_turn_the_expected_gradient_of_ppo_once_samples_are_clipped(importance_weighted):
    """Flips are independent and the loss is a mean over samples: the expectation is (1 − q) ∇L(A) + q ∇L(−A)."""
    batch, q = moved_policy(512), 0.3

    def gradient(advantage, clip_coef):
        terms = (batch.logprob, batch.old_logprob, advantage)
        return batch.gradient(symmetric_ppo_loss(*terms, 0.5, 1.0, -1.0, clip_coef, importance_weighted)[0])

    def turned(clip_coef):
        noisy = (1 - q) * gradient(batch.advantage, clip_coef) + q * gradient(-batch.advantage, clip_coef)
        return cosine(noisy, gradient(batch.advantage, clip_coef))

    assert 0.1 < 1 - batch.unclipped(0.1).mean() < 0.3
    assert turned(0.1) < 0.95
    assert turned(1e6) > 1 - 1e-12  # the same samples, nothing clipped


def test_the_linear_formula_for_sign_flips_is_the_enumeration():
    """What the test above takes for granted, with clipped samples among six."""
    batch, q = moved_policy(6, move=0.5), 0.3
    assert 0 < batch.unclipped(0.1).mean() < 1

    def gradient(advantage):
        return batch.gradient(ppo_loss(batch.logprob, batch.old_logprob, advantage, 0.1))

    enumerated = sum(happens * gradient(noisy) for happens, noisy in sign_patterns(batch.advantage, q))
    assert_same(enumerated, (1 - q) * gradient(batch.advantage) + q * gradient(-batch.advantage))


def test_sign_flips_neither_scale_nor_keep_the_expected_gradient_once_advantages_are_normalised():
    """Every minibatch of 8 is normalised after its flips. The clean gradient does not change with a shift of all
    advantages; what the flips leave of it does, and it turns."""
    batch, q = moved_policy(8, move=0), 0.3  # r = 1: nothing is clipped

    def gradient(advantage):
        return batch.gradient(ppo_loss(batch.logprob, batch.old_logprob, normalize(advantage), 0.1))

    def left(shift):
        clean = gradient(batch.advantage + shift)
        noisy = sum(happens * gradient(noisy) for happens, noisy in sign_patterns(batch.advantage + shift, q))
        return (noisy.norm() / clean.norm()).item(), cosine(noisy, clean)

    (size, direction), (shifted_size, _) = left(0), left(5)
    assert abs(size - (1 - 2 * q)) > 0.01 and direction < 0.999
    assert shifted_size < 0.5 * size


@given(hnp.arrays(float, 12, elements=st.floats(-10, 10)), st.floats(0.1, 10), st.floats(-10, 10))
def test_normalisation_undoes_scale_and_shift(advantage, scale, shift):
    assume(advantage.std() > 0.1)
    same = advantage * scale + shift
    torch.testing.assert_close(*(normalize(torch.tensor(x)) for x in (advantage, same)), rtol=1e-5, atol=1e-5)
