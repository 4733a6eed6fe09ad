"""What docs/symmetric_loss.md says about the losses: what their gradients are, and what noise does
to them on average.

Gradients are those of a small policy network (one linear layer, so that samples and action
dimensions share parameters). They are compared with −mean_i Σ_d c_id · ∇log π_id, where the
coefficients c are worked out by hand.
"""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sppo_continuous
from ppo_baseline import add_noise, ppo_loss
from sa2c_continuous import symmetric_a2c_loss
from sppo_atari import flip_rewards, gae, normalize
from sppo_continuous import symmetric_ppo_loss

# α, β, Z; 0 or well away from it: what is nearly 0 loses digits when it is scaled
COEFFICIENTS = st.tuples(
    st.just(0.0) | st.floats(0.01, 2),
    st.just(0.0) | st.floats(0.01, 20),
    st.floats(-4, -0.1),
)
ADVANTAGES = st.just(0.0) | st.floats(0.01, 3) | st.floats(-3, -0.01)
PROBABILITIES = st.floats(0, 1)
CLIP_COEFS = st.sampled_from([0.1, 0.2])
FEWER = settings(max_examples=25)  # whole batches take their time
FORMS = pytest.mark.parametrize("weighted", [True, False])


def make_args(alpha, beta, Z, weighted=True):
    return sppo_continuous.Args(alpha=alpha, beta=beta, Z=Z, importance_weighted_reverse=weighted)


class Samples:
    """Actions of the policy `old_weights` (features, D, bins), judged by the policy `weights`."""

    def __init__(self, obs, actions, advantage, old_weights, weights):
        self.obs = torch.tensor(obs)
        self.actions = torch.tensor(actions).unsqueeze(2)
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

    def sppo(self, coefficients, clip_coef, weighted=True, advantage=None):
        """The gradient of SPPO's loss."""
        advantage = self.advantage if advantage is None else advantage
        args = make_args(*coefficients, weighted)
        loss, _, _ = symmetric_ppo_loss(self.logprob, self.old_logprob, advantage, clip_coef, args)
        return self.gradient(loss)

    def ppo(self, clip_coef, advantage=None):
        """The gradient of PPO's loss."""
        advantage = self.advantage if advantage is None else advantage
        joint = self.logprob.sum(1), self.old_logprob.sum(1)
        return self.gradient(ppo_loss(*joint, advantage, clip_coef))

    def sa2c(self, coefficients, advantage=None):
        """The gradient of SA2C's loss."""
        advantage = self.advantage if advantage is None else advantage
        loss, _, _ = symmetric_a2c_loss(self.logprob, advantage, make_args(*coefficients))
        return self.gradient(loss)

    def by_coefficients(self, c):
        """The gradient of −mean_i Σ_d c_id · log π_id. `c`: (batch, D), or (batch, 1) for all d."""
        return self.gradient(-(c.detach() * self.logprob).sum(1).mean())

    def unclipped(self, clip_coef):
        """m, from its meaning: 0 where r has left the clip range in the direction in which A pushes
        it."""
        too_high = (self.advantage > 0) & (self.ratio > 1 + clip_coef)
        too_low = (self.advantage < 0) & (self.ratio < 1 - clip_coef)
        return (~(too_high | too_low)).double()

    def away_from_the_edge(self, clip_coef):
        """On which side of the clip range the others are, rounding decides."""
        return bool(((self.ratio - 1).abs() - clip_coef).abs().min() > 1e-9)


@st.composite
def samples(draw, max_dimensions=6, max_move=1.0):
    batch, features = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    shape = (features, draw(st.integers(1, max_dimensions)), draw(st.integers(2, 5)))
    advantage = draw(hnp.arrays(float, batch, elements=ADVANTAGES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    obs = rng.uniform(-1, 1, (batch, features))
    actions = rng.integers(0, shape[2], (batch, shape[1]))
    old_weights = rng.normal(0, 1, shape)
    weights = old_weights + rng.uniform(-max_move, max_move, shape)
    return Samples(obs, actions, advantage, old_weights, weights)


def moved_policy(num_samples, move=0.1):
    """A fixed batch, one dimension of 6 actions, after the policy has moved along PPO's gradient on
    that batch."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(num_samples, 8))
    advantage = rng.normal(size=num_samples)
    weights = rng.normal(0, 0.3, (8, 1, 6))
    logits = np.einsum("nf,fdk->ndk", obs, weights)
    actions = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
    gradient = Samples(obs, actions, advantage, weights, weights).ppo(0.1).numpy()
    moved = weights - move * gradient / np.abs(gradient).max()
    return Samples(obs, actions, advantage, weights, moved)


def assert_same(gradient, expected):
    atol = 1e-11 * (1 + expected.abs().max().item())
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=atol)


def cosine(x, y):
    return torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0).item()


# What the gradients are


@FEWER
@given(samples(), COEFFICIENTS, CLIP_COEFS)
def test_released_sppo_is_ppo_with_its_policy_loss_multiplied(batch, coefficients, clip_coef):
    assume(batch.away_from_the_edge(clip_coef))
    alpha, beta, Z = coefficients
    factor = alpha + beta * abs(Z)
    gradient = batch.sppo(coefficients, clip_coef)
    m_A_r = batch.unclipped(clip_coef) * batch.advantage * batch.ratio
    assert_same(gradient, batch.by_coefficients(factor * m_A_r.unsqueeze(1)))
    assert_same(gradient, factor * batch.ppo(clip_coef))


@FEWER
@given(samples(max_dimensions=1), COEFFICIENTS)
def test_sa2c_is_a2c_with_advantages_weighted_by_the_probability(batch, coefficients):
    alpha, beta, Z = coefficients
    weight = alpha + beta * abs(Z) * batch.logprob.exp()
    assert_same(
        batch.sa2c(coefficients), batch.by_coefficients(batch.advantage.unsqueeze(1) * weight)
    )


@FEWER
@given(samples(), COEFFICIENTS)
def test_sa2c_weighs_every_action_dimension_by_itself(batch, coefficients):
    alpha, beta, Z = coefficients
    weight = alpha + beta * abs(Z) * batch.logprob.exp() / batch.logprob.shape[1]
    assert_same(
        batch.sa2c(coefficients), batch.by_coefficients(batch.advantage.unsqueeze(1) * weight)
    )


@FEWER
@given(samples(max_dimensions=1), COEFFICIENTS, CLIP_COEFS)
def test_plain_sppo_is_ppo_with_advantages_weighted_by_the_old_probability(
    batch, coefficients, clip_coef
):
    assume(batch.away_from_the_edge(clip_coef))
    alpha, beta, Z = coefficients
    weight = alpha + beta * abs(Z) * batch.old_logprob.squeeze(1).exp()
    expected = batch.ppo(clip_coef, batch.advantage * weight)
    assert_same(batch.sppo(coefficients, clip_coef, weighted=False), expected)


@FEWER
@given(samples(), COEFFICIENTS, CLIP_COEFS)
def test_plain_sppo_weighs_every_action_dimension_by_itself(batch, coefficients, clip_coef):
    assume(batch.away_from_the_edge(clip_coef))
    alpha, beta, Z = coefficients
    m_A = (batch.unclipped(clip_coef) * batch.advantage).unsqueeze(1)
    share = batch.logprob.exp() / batch.logprob.shape[1]
    weight = alpha * batch.ratio.unsqueeze(1) + beta * abs(Z) * share
    gradient = batch.sppo(coefficients, clip_coef, weighted=False)
    assert_same(gradient, batch.by_coefficients(m_A * weight))


def test_reweighting_is_no_constant():
    """The facts above are not empty: the reweighted gradient is no multiple of the plain one."""
    batch = moved_policy(256, move=0)
    assert cosine(batch.sa2c((0.0, 1.0, -1.0)), batch.sa2c((1.0, 0.0, -1.0))) < 0.95


def logit_gradient(loss_of_logprob, pi):
    """|∂ loss / ∂ logit of the action taken| where its probability is `pi`, of three actions. The
    function gets log π of shape (1, 1)."""
    others = torch.tensor([0.0, 0.7], dtype=torch.float64)
    logit = torch.tensor([pi], dtype=torch.float64).logit() + others.logsumexp(0)
    logit.requires_grad_()
    logprob = torch.cat([logit, others]).log_softmax(0)[0].view(1, 1)
    return torch.autograd.grad(loss_of_logprob(logprob), logit)[0].abs().item()


PIS = st.floats(0.01, 0.99)
SIZES = st.floats(0.1, 3)  # of an advantage or a weight, away from 0
ONE = torch.ones(1, dtype=torch.float64)


@given(PIS, SIZES, st.sampled_from([-1, 1]), st.floats(-4, -0.1))
def test_the_reverse_term_of_a2c_pulls_hardest_at_one_half(pi, size, sign, Z):
    def pull(pi):
        args = make_args(1.0, 1.0, Z)
        return logit_gradient(lambda x: symmetric_a2c_loss(x, sign * size * ONE, args)[2], pi)

    assert pull(pi) == pytest.approx(size * abs(Z) * pi * (1 - pi), rel=1e-9)
    assert pull(0.5) >= pull(pi) == pytest.approx(pull(1 - pi), rel=1e-9)


@given(PIS, SIZES, SIZES)
def test_all_of_sa2c_pulls_hardest_below_one_half_or_at_zero(pi, alpha, beta):
    def pull(pi):
        args = make_args(alpha, beta, -1.0)
        return logit_gradient(lambda x: symmetric_a2c_loss(x, ONE, args)[0], pi)

    assert pull(pi) == pytest.approx((alpha + beta * pi) * (1 - pi), rel=1e-6)
    peak = max((1 - alpha / beta) / 2, 1e-6)
    assert pull(peak) * (1 + 1e-5) >= pull(pi)


@given(PIS, st.floats(-4, -0.1))
def test_divided_by_the_old_probability_the_reverse_term_has_no_such_peak(pi, Z):
    def pull(term):
        old_logprob = torch.tensor([[pi]], dtype=torch.float64).log()
        context = (old_logprob, ONE, 0.1, make_args(1.0, 1.0, Z))
        return logit_gradient(lambda x: symmetric_ppo_loss(x, *context)[term], pi)

    assert pull(2) == pytest.approx(abs(Z) * (1 - pi), rel=1e-9) == abs(Z) * pull(1)


# What the coefficients can change


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@FEWER
@given(samples(), COEFFICIENTS, st.integers(-8, 8))
def test_beta_and_Z_are_one_knob_bit_for_bit(weighted, dtype, batch, coefficients, exponent):
    alpha, beta, Z = coefficients
    knobs = make_args(alpha, beta, Z, weighted)
    same = make_args(alpha, beta * 2.0**exponent, Z / 2.0**exponent, weighted)
    logprob = batch.logprob.detach().to(dtype).requires_grad_()
    old_logprob, advantage = batch.old_logprob.to(dtype), batch.advantage.to(dtype)

    def ppo(args):
        return symmetric_ppo_loss(logprob, old_logprob, advantage, 0.2, args)[0]

    def a2c(args):
        return symmetric_a2c_loss(logprob, advantage, args)[0]

    for loss in (ppo, a2c):
        assert torch.equal(loss(knobs), loss(same))
        assert torch.equal(*(torch.autograd.grad(loss(x), logprob)[0] for x in (knobs, same)))


@FEWER
@given(samples(), COEFFICIENTS, st.floats(0, 1))
def test_in_released_sppo_alpha_and_beta_are_one_knob_too(batch, coefficients, share):
    alpha, beta, Z = coefficients
    factor = alpha + beta * abs(Z)
    same = (share * factor, (1 - share) * factor / abs(Z), Z)
    assert_same(batch.sppo(coefficients, 0.2), batch.sppo(same, 0.2))


def test_the_value_of_the_released_reverse_term_is_a_constant():
    """6 dimensions, 11 bins: near uniform it is 11^6 − r. Its gradient is PPO's all the same."""
    old_logprob = torch.full((1, 6), -np.log(11), dtype=torch.float64)
    values = []
    for ratio in (0.95, 1.05):
        logprob = (old_logprob + np.log(ratio) / 6).requires_grad_()
        _, *losses = symmetric_ppo_loss(logprob, old_logprob, ONE, 0.2, make_args(0.5, 20.0, -1.0))
        gradients = [torch.autograd.grad(x, logprob, retain_graph=True)[0] for x in losses]
        assert_same(*gradients)
        values.append(losses[1].item())
    assert values == pytest.approx([11**6 - 0.95, 11**6 - 1.05], rel=1e-12)
    assert abs(values[1] - values[0]) < 1e-6 * values[0]


class Learner:
    """A policy and a value network after two epochs of updates in float64, on one fixed batch."""

    def __init__(self, adam_eps, **flags):
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        spaces = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,))
        agent = sppo_continuous.BinnedAgent(*spaces, 5).double()
        obs = torch.tensor(rng.normal(size=(64, 3)))
        actions = torch.tensor(rng.integers(0, 5, (64, 2)))
        old_logprobs = agent(obs, actions)[0].detach()
        batch = (obs, actions, old_logprobs, *torch.tensor(rng.normal(size=(2, 64))))
        optimizer = torch.optim.Adam(agent.parameters(), lr=0.01, eps=adam_eps)
        args = sppo_continuous.Args(update_epochs=2, num_minibatches=4, **flags)
        sppo_continuous.update(agent, optimizer, batch, args)
        self.policy = torch.nn.utils.parameters_to_vector(agent.policy.parameters()).detach()
        self.value = torch.nn.utils.parameters_to_vector(agent.value.parameters()).detach()


SPPO = dict(alpha=0.5, beta=20.0, Z=-1.0)  # α + β|Z| = 20.5
PPO = dict(alpha=1.0, beta=0.0)


def test_released_sppo_is_ppo_with_everything_else_made_smaller():
    sppo = Learner(1e-5, **SPPO, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5)
    smaller = dict(ent_coef=0.01 / 20.5, vf_coef=0.5 / 20.5, max_grad_norm=0.5 / 20.5)
    ppo = Learner(1e-5 / 20.5, **PPO, **smaller)
    unmatched = Learner(1e-5, **PPO, ent_coef=0.01)
    for network in ("policy", "value"):
        learned, same, other = (vars(x)[network] for x in (sppo, ppo, unmatched))
        assert (learned - same).abs().max() < 1e-5  # clip_grad_norm_ adds 1e-6 to the norm
        assert (learned - other).abs().max() > 1e-3


def test_without_gradient_clipping_and_entropy_bonus_separate_networks_do_not_notice():
    sppo, ppo = (Learner(1e-30, **x, max_grad_norm=1e30) for x in (SPPO, PPO))
    assert (sppo.policy - ppo.policy).abs().max() < 1e-8
    assert (sppo.value - ppo.value).abs().max() < 1e-8
    clipped = Learner(1e-30, **SPPO, max_grad_norm=0.5)
    assert (clipped.policy - ppo.policy).abs().max() > 1e-3  # the clip is where it does notice


# Signs, baselines and normalisation


@given(hnp.arrays(float, st.integers(2, 30), elements=st.floats(-10, 10)))
def test_normalisation_flips_the_signs_between_zero_and_the_mean(advantage):
    mean = advantage.mean()
    assume(advantage.std() > 1e-3 and np.abs(advantage - mean).min() > 1e-9)
    normalized = normalize(torch.tensor(advantage)).numpy()
    flipped = (np.sign(normalized) != np.sign(advantage)) & (advantage != 0)
    between = (0 < advantage) & (advantage < mean) | (mean < advantage) & (advantage < 0)
    np.testing.assert_array_equal(flipped, between)


@given(hnp.arrays(float, 12, elements=st.floats(-10, 10)), st.floats(0.1, 10), st.floats(-10, 10))
def test_normalisation_undoes_scale_and_shift(advantage, scale, shift):
    assume(advantage.std() > 0.1)
    both = [normalize(torch.tensor(x)) for x in (advantage, advantage * scale + shift)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)


def expected_gradients(logits, advantage, Z):
    """Of the terms of A2C, over the actions of one state. `logits`, `advantage`: (actions,)."""
    args = make_args(1.0, 1.0, Z)
    logprobs, pi = logits.log_softmax(0), logits.softmax(0)
    expected = [0, 0]
    for action in range(len(logits)):
        only = slice(action, action + 1)
        _, *terms = symmetric_a2c_loss(logprobs[only].unsqueeze(1), advantage[only], args)
        for i, term in enumerate(terms):
            gradient = torch.autograd.grad(term, logits, retain_graph=True)[0]
            expected[i] += pi[action].item() * gradient
    return expected


LOGITS = hnp.arrays(float, 4, elements=st.floats(-3, 3))


@FEWER
@given(LOGITS, LOGITS)
def test_what_the_two_terms_of_a2c_climb_on_average(logits, advantage):
    """E[forward gradient] = −∇ Σ_a A π, E[reverse gradient] = −|Z| ∇ ½ Σ_a A π²."""
    logits, advantage = torch.tensor(logits, requires_grad=True), torch.tensor(advantage)
    forward, reverse = expected_gradients(logits, advantage, Z=-2.0)
    pi = logits.softmax(0)
    climbed = (advantage * pi).sum(), 2 * (advantage * pi.square()).sum() / 2
    for gradient, quantity in zip((forward, reverse), climbed):
        assert_same(gradient, -torch.autograd.grad(quantity, logits, retain_graph=True)[0])


@FEWER
@given(LOGITS, st.floats(-2, 2))
def test_a_baseline_is_free_for_a2c_and_not_for_its_reverse_term(logits, baseline):
    """One advantage for all actions: on average no gradient in A2C; the reverse term makes ½ Σ π²
    larger if A > 0."""
    logits = torch.tensor(logits, requires_grad=True)
    advantage = torch.full((4,), baseline, dtype=torch.float64)
    forward, reverse = expected_gradients(logits, advantage, Z=-1.0)
    sharper = torch.autograd.grad(logits.softmax(0).square().sum() / 2, logits)[0]
    assert forward.abs().max() < 1e-12
    assert_same(reverse, -baseline * sharper)


# Noise


def patterns(length, probability):
    """(probability, which of `length` are flipped), over all patterns."""
    for flips in itertools.product([False, True], repeat=length):
        flips = np.array(flips)
        yield np.where(flips, probability, 1 - probability).prod(), flips


def average(gradient, advantage, probability):
    """The mean of `gradient` over all sign flips of the advantages (batch,)."""
    total = 0
    for happens, flips in patterns(len(advantage), probability):
        total = total + happens * gradient(torch.where(torch.tensor(flips), -advantage, advantage))
    return total


REWARDS = st.sampled_from([-1.0, 0.0, 1.0])


@given(hnp.arrays(float, 4, elements=REWARDS | st.just(0.3)), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_a_flipped_reward_is_on_average_a_rescaled_reward_and_a_bonus(reward, p):
    happens, spared = (flip_rewards(torch.tensor(reward), x).numpy() for x in (1.0, 0.0))
    mean = p * happens + (1 - p) * spared
    np.testing.assert_allclose(mean, (1 - 2 * p) * reward + p, atol=1e-15)
    variance = p * (happens - mean) ** 2 + (1 - p) * (spared - mean) ** 2
    np.testing.assert_allclose(variance, p * (1 - p) * (1 - 2 * reward) ** 2, atol=1e-14)


@FEWER
@given(
    hnp.arrays(float, 5, elements=REWARDS),
    hnp.arrays(float, 6, elements=st.floats(-3, 3)),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.integers(0, 4),
)
def test_advantages_are_on_average_those_of_the_bonus(reward, values, p, end):
    """GAE is linear in the rewards: over all 2^5 patterns of flips its mean is GAE of
    (1 − 2p) · reward + p."""
    dones = np.arange(5) == end
    context = (values[:-1], values[1:] * ~dones, dones, 0.99, 0.95)
    flipped = flip_rewards(torch.tensor(reward), 1.0).numpy()
    mean = 0
    for happens, flips in patterns(5, p):
        mean = mean + happens * gae(np.where(flips, flipped, reward), *context)
    np.testing.assert_allclose(mean, gae((1 - 2 * p) * reward + p, *context), atol=1e-12)


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_the_bonus_pays_for_every_step_survived(steps):
    """Without rewards: p · (1 + γ + γ² + …), nothing after the end; up to p / (1 − γ) = 10 clipped
    rewards."""
    zeros = np.zeros(steps)
    dones = np.arange(steps) == steps - 1
    bonus = gae(zeros + 0.1, zeros, zeros, dones, 0.99, 1.0)[0]
    assert bonus == pytest.approx(0.1 * (1 - 0.99**steps) / (1 - 0.99))
    assert bonus < 10


def test_gaussian_reward_noise_leaves_the_mean_alone():
    torch.manual_seed(0)
    reward = torch.linspace(-10, 10, 200_000)
    noise = add_noise(reward, 0.5, is_game=False).double() - reward
    assert noise.mean().abs() < 5 * 0.5 / 200_000**0.5
    assert noise.std().item() == pytest.approx(0.5, rel=0.01)
    assert (noise.abs() < 0.5).double().mean().item() == pytest.approx(0.6827, abs=0.005)
    assert abs(np.corrcoef(noise, reward)[0, 1]) < 0.02


@FEWER
@given(samples(max_dimensions=2), COEFFICIENTS, PROBABILITIES)
def test_sign_flips_only_scale_the_expected_gradient_of_a2c(batch, coefficients, q):
    expected = average(lambda A: batch.sa2c(coefficients, A), batch.advantage, q)
    assert_same(expected, (1 - 2 * q) * batch.sa2c(coefficients))


@FORMS
@FEWER
@given(samples(max_dimensions=2, max_move=0.01), COEFFICIENTS, PROBABILITIES)
def test_sign_flips_only_scale_the_expected_gradient_of_ppo_inside_the_clip_range(
    weighted, batch, coefficients, q
):
    assert ((batch.ratio - 1).abs() < 0.2).all()
    expected = average(lambda A: batch.sppo(coefficients, 0.2, weighted, A), batch.advantage, q)
    assert_same(expected, (1 - 2 * q) * batch.sppo(coefficients, 0.2, weighted))


@FORMS
def test_sign_flips_turn_the_expected_gradient_of_ppo_once_samples_are_clipped(weighted):
    """Flips are independent and the loss is a mean over samples: the expectation is
    (1 − q) ∇L(A) + q ∇L(−A)."""
    batch, q = moved_policy(512), 0.3

    def turned(clip_coef):
        clean, opposite = (
            batch.sppo((0.5, 1.0, -1.0), clip_coef, weighted, sign * batch.advantage)
            for sign in (1, -1)
        )
        return cosine((1 - q) * clean + q * opposite, clean)

    assert 0.1 < 1 - batch.unclipped(0.1).mean() < 0.3
    assert turned(0.1) < 0.95
    assert turned(1e6) > 1 - 1e-12  # the same samples, nothing clipped


def test_the_linear_formula_for_sign_flips_is_the_enumeration():
    """What the test above takes for granted, with clipped samples among six."""
    batch, q = moved_policy(6, move=0.5), 0.3
    assert 0 < batch.unclipped(0.1).mean() < 1
    enumerated = average(lambda A: batch.ppo(0.1, A), batch.advantage, q)
    clean, opposite = batch.ppo(0.1), batch.ppo(0.1, -batch.advantage)
    assert_same(enumerated, (1 - q) * clean + q * opposite)


def test_sign_flips_neither_scale_nor_keep_the_expected_gradient_once_advantages_are_normalised():
    """Every minibatch of 8 is normalised after its flips. The clean gradient does not change with a
    shift of all advantages; what the flips leave of it does, and it turns."""
    batch, q = moved_policy(8, move=0), 0.3  # r = 1: nothing is clipped

    def gradient(advantage):
        return batch.ppo(0.1, normalize(advantage))

    def left(shift):
        clean = gradient(batch.advantage + shift)
        noisy = average(gradient, batch.advantage + shift, q)
        return (noisy.norm() / clean.norm()).item(), cosine(noisy, clean)

    (size, direction), (shifted_size, _) = left(0), left(5)
    assert abs(size - (1 - 2 * q)) > 0.01 and direction < 0.999
    assert shifted_size < 0.5 * size
