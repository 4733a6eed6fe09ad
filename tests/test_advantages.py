"""Advantages: estimation, normalisation, the noise on rewards and advantages, random numbers."""

import random

import numpy as np
import pytest
import textbook
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ppo_baseline import add_noise
from sppo_atari import flip_rewards, flip_signs, gae, normalize, set_seeds

PROBABILITIES = pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
NUMBERS = st.floats(-10, 10)


@st.composite
def rollouts(draw):
    """rewards, values, terminated, truncated, values of last observations (num_steps, num_envs),
    and the value of what follows the rollout (num_envs,)."""
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rewards = draw(hnp.arrays(float, shape, elements=NUMBERS))
    values = draw(hnp.arrays(float, shape, elements=NUMBERS))
    final_values = draw(hnp.arrays(float, shape, elements=NUMBERS))
    next_value = draw(hnp.arrays(float, shape[1], elements=NUMBERS))
    terminated = draw(hnp.arrays(bool, shape))
    truncated = draw(hnp.arrays(bool, shape)) & ~terminated
    return rewards, values, terminated, truncated, final_values, next_value


@settings(max_examples=30)
@given(rollouts(), st.floats(0, 1), st.floats(0, 1))
def test_gae_against_the_sum_of_deltas(rollout, gamma, gae_lambda):
    """A termination is worth nothing, a truncation what the last observation is worth. Arrays and
    tensors alike, but that torch multiplies a number and a mask in float32."""
    rewards, values, terminated, truncated, final_values, next_value = rollout
    dones = terminated | truncated
    next_values = np.concatenate([values[1:], next_value[np.newaxis]])
    next_values = np.where(truncated, final_values, next_values) * ~terminated
    arrays = (rewards, values, next_values, dones)
    expected = textbook.gae(
        rewards, values, dones, final_values * truncated, next_value, gamma, gae_lambda
    )
    for kind, rtol in ((np.asarray, 1e-10), (torch.from_numpy, 1e-5)):
        inputs = [kind(x.copy()) for x in arrays]
        advantages = gae(*inputs, gamma, gae_lambda)
        np.testing.assert_allclose(advantages, expected, rtol=rtol, atol=10 * rtol)
        for x, before in zip(inputs, arrays):
            np.testing.assert_array_equal(x, before)  # they are still needed


def test_gae_of_one_environment():
    """(num_steps,) is a column of (num_steps, num_envs); float32 stays float32."""
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, 9, 1)).astype(np.float32)
    inputs = rewards, values, next_values, rng.random((9, 1)) < 0.3
    column = gae(*inputs, 0.99, 0.95)
    alone = gae(*(x[:, 0] for x in inputs), 0.99, 0.95)
    assert column.dtype == alone.dtype == np.float32
    np.testing.assert_array_equal(column[:, 0], alone)


@settings(max_examples=30)
@given(rollouts(), st.integers(0, 2**32 - 1))
def test_nothing_in_a_row_of_fire_reaches_another_advantage(rollout, seed):
    """The row in which FIRE is pressed for the learner follows the end of an episode, and belongs
    to none."""
    rewards, values, terminated, _, _, next_value = rollout
    fire = np.zeros_like(terminated)
    fire[1:] = terminated[:-1]
    fire[0] = True  # its lost life was in the rollout before
    rng = np.random.default_rng(seed)
    other_rewards = np.where(fire, rng.normal(0, 1e6, fire.shape), rewards)
    other_values = np.where(fire, rng.normal(0, 1e6, fire.shape), values)
    other_dones = terminated | fire & (rng.random(fire.shape) < 0.5)
    other_next = np.where(fire[-1], 1e6, next_value)

    def advantages(rewards, values, dones, next_value):
        next_values = np.concatenate([values[1:], next_value[np.newaxis]]) * ~dones
        return gae(rewards, values, next_values, dones, 0.99, 0.95)

    before = advantages(rewards, values, terminated, next_value)
    after = advantages(other_rewards, other_values, other_dones, other_next)
    np.testing.assert_array_equal(before[~fire], after[~fire])


@given(hnp.arrays(float, st.integers(2, 20), elements=st.floats(-100, 100)))
def test_normalize(advantage):
    expected = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
    normalized = normalize(torch.tensor(advantage))
    np.testing.assert_allclose(normalized, expected, rtol=1e-9, atol=1e-5)


def assert_binomial(count, trials, probability):
    deviation = np.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) <= 5 * deviation


@PROBABILITIES
@pytest.mark.parametrize("reward", [-1.0, 0.0, 1.0])
def test_flip_rewards(reward, probability):
    torch.manual_seed(0)
    rewards = torch.full((500, 40), reward)
    noisy = flip_rewards(rewards, probability)
    assert noisy.dtype == rewards.dtype and (rewards == reward).all()  # which are still needed
    flipped = noisy == 1 - reward
    assert (flipped | (noisy == reward)).all()
    assert_binomial(flipped.sum().item(), noisy.numel(), probability)
    torch.manual_seed(0)
    assert torch.equal(add_noise(rewards, probability, is_game=True), noisy)  # the baseline's


@PROBABILITIES
def test_flip_signs(probability):
    torch.manual_seed(0)
    advantage = torch.rand(20_000) + 1
    first, second = (flip_signs(advantage, probability) for _ in range(2))
    assert torch.equal(first.abs(), advantage)
    assert_binomial((first < 0).sum().item(), 20_000, probability)
    once = ((first < 0) != (second < 0)).sum().item()  # redrawn: independent of the first time
    assert_binomial(once, 20_000, 2 * probability * (1 - probability))


def draws(*names):
    """From each of the three generators that the scripts use."""
    set_seeds(*names)
    return random.random(), np.random.random(), torch.rand(1).item()


def test_random_numbers_follow_from_seed_and_iteration_alone():
    names = [
        (seed, part, n) for seed in (1, 2, 11) for part in ("start", "iteration") for n in (0, 1)
    ]
    first = {x: draws(*x) for x in names}
    assert first == {x: draws(*x) for x in reversed(names)}
    for generator in zip(*first.values()):
        assert len(set(generator)) == len(names)


def test_runs_with_neighbouring_seeds_share_no_games():
    seeds = []
    for seed in range(50):
        set_seeds(seed, "start", 0)
        seeds += np.random.randint(2**31, size=8).tolist()  # as the environments are seeded
    assert len(set(seeds)) == len(seeds)
