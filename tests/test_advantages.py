"""Advantages: estimation, normalisation, and the noise on rewards and advantages."""

import numpy as np
import pytest
import textbook
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sppo_atari import flip_rewards, flip_signs, gae, normalize
from sppo_continuous import add_noise

PROBABILITIES = pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])


@st.composite
def rollouts(draw):
    """rewards, values, terminated, truncated, final values (num_steps, num_envs) and next value (num_envs,)."""
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    numbers = st.floats(-10, 10)
    rewards, values, final_values = (draw(hnp.arrays(float, shape, elements=numbers)) for _ in range(3))
    next_value = draw(hnp.arrays(float, shape[1], elements=numbers))
    terminated, truncated = (draw(hnp.arrays(bool, shape)) for _ in range(2))
    truncated &= ~terminated
    return rewards, values, terminated, truncated, final_values * truncated, next_value


@given(rollouts(), st.floats(0, 1), st.floats(0, 1))
def test_gae_against_the_sum_of_deltas(rollout, gamma, gae_lambda):
    rewards, values, terminated, truncated, final_values, next_value = rollout
    dones = terminated | truncated
    advantages = gae(rewards + gamma * final_values, values, dones, next_value, gamma, gae_lambda)
    expected = textbook.gae(rewards, values, dones, final_values, next_value, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-10, atol=1e-10)


@given(rollouts(), st.integers(0, 2**32 - 1))
def test_nothing_in_a_masked_row_reaches_another_advantage(rollout, seed):
    """The row in which FIRE is pressed for the learner follows the end of an episode, and belongs to none."""
    rewards, values, terminated, _, _, next_value = rollout
    masked = np.zeros_like(terminated)
    masked[1:] = terminated[:-1]
    masked[0] = True  # its lost life was in the rollout before
    rng = np.random.default_rng(seed)
    other_rewards, other_values = (np.where(masked, rng.normal(0, 1e6, x.shape), x) for x in (rewards, values))
    other_dones = terminated | masked & (rng.random(masked.shape) < 0.5)
    other_next = np.where(masked[-1], 1e6, next_value)

    before = gae(rewards, values, terminated, next_value, 0.99, 0.95)
    after = gae(other_rewards, other_values, other_dones, other_next, 0.99, 0.95)
    np.testing.assert_array_equal(before[~masked], after[~masked])


@given(hnp.arrays(float, st.tuples(st.integers(1, 3), st.integers(2, 20)), elements=st.floats(-100, 100)))
def test_every_row_is_normalised_by_itself(advantages):
    for row, normalized in zip(advantages, normalize(torch.tensor(advantages))):
        expected = (row - row.mean()) / (row.std(ddof=1) + 1e-8)
        np.testing.assert_allclose(normalized, expected, rtol=1e-9, atol=1e-5)


def within_binomial_bounds(count, trials, probability):
    return abs(count - trials * probability) <= 5 * np.sqrt(trials * probability * (1 - probability))


@PROBABILITIES
@pytest.mark.parametrize("reward", [-1.0, 0.0, 1.0])
def test_flip_rewards(reward, probability):
    rewards = np.full((500, 40), reward, dtype=np.float32)
    noisy = flip_rewards(rewards, probability, np.random.default_rng(0))
    assert noisy.dtype == rewards.dtype and (rewards == reward).all()  # a copy: the clean rewards are still needed
    assert np.isin(noisy, [reward, 1 - reward]).all()
    assert within_binomial_bounds((noisy == 1 - reward).sum(), noisy.size, probability)
    mean, deviation = (1 - 2 * probability) * reward + probability, abs(1 - 2 * reward) / 2
    assert noisy.mean() == pytest.approx(mean, abs=5 * deviation / np.sqrt(noisy.size))
    assert (noisy == flip_rewards(rewards, probability, np.random.default_rng(0))).all()


@PROBABILITIES
def test_flip_signs(probability):
    advantage, rng = torch.rand(20_000) + 1, np.random.default_rng(0)
    first, second = flip_signs(advantage, probability, rng), flip_signs(advantage, probability, rng)
    assert torch.equal(first.abs(), advantage)
    assert within_binomial_bounds((first < 0).sum().item(), len(advantage), probability)
    flipped_once = ((first < 0) != (second < 0)).sum().item()  # redrawn: independent of the first time
    assert within_binomial_bounds(flipped_once, len(advantage), 2 * probability * (1 - probability))
    assert torch.equal(first, flip_signs(advantage, probability, np.random.default_rng(0)))


def test_gaussian_reward_noise():
    """Mean 0, standard deviation as given; the same for the same generator; rewards stay float32."""
    reward = np.linspace(-10, 10, 200_000, dtype=np.float32).reshape(-1, 2)
    clean = reward.copy()
    noisy = add_noise(reward, 0.5, np.random.default_rng(0))
    noise = (noisy - reward).astype(float)
    assert abs(noise.mean()) < 5 * 0.5 / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(0.5, rel=0.01)
    assert np.mean(np.abs(noise) < 0.5) == pytest.approx(0.6827, abs=0.005)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.02
    assert noisy.dtype == np.float32
    np.testing.assert_array_equal(reward, clean)
    np.testing.assert_array_equal(noisy, add_noise(reward, 0.5, np.random.default_rng(0)))
    np.testing.assert_array_equal(reward, add_noise(reward, 0.0, np.random.default_rng(0)))
