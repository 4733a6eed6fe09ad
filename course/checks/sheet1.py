"""Checks sheet 1 against tests/textbook.py, and against the scripts by autograd."""

import sys
from functools import partial
from types import ModuleType

import numpy as np
import textbook
import torch

import sa2c_continuous
import sppo_continuous
from checks import differs, report

BATCHES = [(0.2, -1.0), (0.1, -2.0), (0.3, -0.5)]  # ε, Z
WEIGHTS = [(0.5, 20.0, -1.0), (0.5, 1.0, -2.0), (1.0, 0.0, -1.0), (0.3, 2.0, -0.7)]  # α, β, Z


def make_batch(seed: int, clip_coef: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log π, log π_old and A, each (96,), float64. The first 36 samples have all six cases: r
    below, in or above the clip range, A positive or negative. The others are random."""
    rng = np.random.default_rng(seed)
    ratio = np.exp(rng.normal(0, 0.4, 96))
    advantage = rng.normal(0, 1, 96)
    ratio[:36] = np.repeat([1 - 2 * clip_coef, 1 - clip_coef / 2, 1 + 2 * clip_coef], 12)
    advantage[:36] = np.tile([-1.5, -0.4, 0.3, 2.0], 9)
    old_logprob = -1.5 - 2 * rng.random(96)  # so that no π is above 1
    logprob = torch.from_numpy(old_logprob + np.log(ratio).clip(max=1.4)).requires_grad_()
    return logprob, torch.from_numpy(old_logprob), torch.from_numpy(advantage)


def slow_terms(batch: tuple, clip_coef: float, Z: float) -> dict:
    """Forward and reverse terms (batch,), and the gradients of their means in log π (batch,)."""
    arrays = [x.detach().numpy() for x in batch]
    arrays[:2] = [x[:, np.newaxis] for x in arrays[:2]]  # one action dimension
    forward, reverse, forward_grad = textbook.symmetric_ppo(*arrays, 1, 0, Z, clip_coef, True)
    _, _, reverse_grad = textbook.symmetric_ppo(*arrays, 0, 1, Z, clip_coef, True)
    return dict(
        forward=forward.mean(),
        reverse=reverse.mean(),
        forward_grad=forward_grad[:, 0],
        reverse_grad=reverse_grad[:, 0],
    )


def copies(batch: tuple) -> list[torch.Tensor]:
    """An answer may change what it is given."""
    return [x.detach().clone() for x in batch]


def wrong_loss(loss, logprob: torch.Tensor, value: float, gradient: np.ndarray) -> str:
    """What is wrong with a mean loss of log π, or an empty text."""
    wrong = differs(loss, value, "the value")
    if wrong:
        return wrong
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return "the value is right, but autograd finds no gradient in log π"
    (actual,) = torch.autograd.grad(loss, logprob, allow_unused=True)
    return differs(0 * gradient if actual is None else actual, gradient, "the gradient")


def gae_cases():
    """Rollouts as `gae` gets them, and their advantages by the slow definition."""
    for seed, (gamma, gae_lambda) in enumerate([(0.99, 0.95), (0.9, 0.5), (0.97, 1.0)]):
        rng = np.random.default_rng(seed)
        rewards, values, final_values = rng.normal(0, 1, (3, 40, 1))
        dones = rng.random((40, 1)) < 0.2
        dones[-1] = seed == 1
        terminated = dones & (rng.random((40, 1)) < 0.5)  # the others end by a time limit
        final_values[terminated] = 0
        last_value = rng.normal(0, 1, 1)
        following = np.append(values[1:], [last_value], axis=0)
        next_values = np.where(dones, final_values, following)
        rollout = (rewards, values, dones, final_values, last_value)
        expected = textbook.gae(*rollout, gamma, gae_lambda)[:, 0]
        arrays = [x[:, 0] for x in (rewards, values, next_values, dones)]
        yield (*arrays, gamma, gae_lambda), expected


def check_gae(sheet: ModuleType) -> str:
    for (*arrays, gamma, gae_lambda), expected in gae_cases():
        advantages = sheet.gae(*[x.copy() for x in arrays], gamma, gae_lambda)
        wrong = differs(advantages, expected, "the array of advantages", "t")
        if wrong:
            return wrong
    return ""


def check_forward_term(sheet: ModuleType) -> str:
    for seed, (clip_coef, Z) in enumerate(BATCHES):
        batch = make_batch(seed, clip_coef)
        slow = slow_terms(batch, clip_coef, Z)
        loss = sheet.forward_term(*batch, clip_coef)
        wrong = wrong_loss(loss, batch[0], slow["forward"], slow["forward_grad"])
        if wrong:
            return wrong
    return ""


def check_clip_mask(sheet: ModuleType) -> str:
    for seed, (clip_coef, Z) in enumerate(BATCHES):
        batch = make_batch(seed, clip_coef)
        mask = sheet.clip_mask(*copies(batch), clip_coef)
        expected = slow_terms(batch, clip_coef, Z)["forward_grad"] != 0
        wrong = differs(mask, expected, "the mask")
        if wrong:
            return wrong
    return ""


def unmasked_reverse_term(logprob, old_logprob, advantage, Z: float) -> torch.Tensor:
    """A typical mistake."""
    return -(advantage * Z * (1 - logprob.exp()) / old_logprob.exp()).mean()


def check_reverse_term(sheet: ModuleType) -> str:
    for seed, (clip_coef, Z) in enumerate(BATCHES):
        batch = make_batch(seed, clip_coef)
        slow = slow_terms(batch, clip_coef, Z)
        loss = sheet.reverse_term(*batch, Z, clip_coef)
        wrong = wrong_loss(loss, batch[0], slow["reverse"], slow["reverse_grad"])
        if wrong:
            unmasked = unmasked_reverse_term(*copies(batch), Z)
            return wrong if differs(loss, unmasked) else f"{wrong}; is m missing?"
    return ""


def check_matched_alpha(sheet: ModuleType) -> str:
    """The script's gradient with α, β, Z, over that with 1, 0: one number for all samples."""
    batch = make_batch(0, 0.2)
    columns = [batch[0][:, None], batch[1][:, None], batch[2], 0.2]
    for alpha, beta, Z in WEIGHTS:
        gradients = []
        for a, b in [(alpha, beta), (1.0, 0.0)]:
            args = sppo_continuous.Args(alpha=a, beta=b, Z=Z)
            loss, _, _ = sppo_continuous.symmetric_ppo_loss(*columns, args)
            gradients += torch.autograd.grad(loss, batch[0])
        ratio = (gradients[0] / gradients[1])[gradients[1] != 0]
        assert torch.allclose(ratio, ratio[0])
        wrong = differs(sheet.matched_alpha(alpha, beta, Z), ratio[0], "the number")
        if wrong:
            return f"{wrong} for alpha = {alpha}, beta = {beta}, Z = {Z}"
    return ""


def check_sa2c_weight(sheet: ModuleType) -> str:
    """The same for SA2C, sample by sample."""
    logprob, _, advantage = make_batch(0, 0.2)
    for alpha, beta, Z in WEIGHTS:
        gradients = []
        for a, b in [(alpha, beta), (1.0, 0.0)]:
            args = sa2c_continuous.Args(alpha=a, beta=b, Z=Z)
            loss, _, _ = sa2c_continuous.symmetric_a2c_loss(logprob[:, None], advantage, args)
            gradients += torch.autograd.grad(loss, logprob)
        weight = sheet.sa2c_weight(logprob.detach().clone(), alpha, beta, Z)
        wrong = differs(weight, gradients[0] / gradients[1], "the weight")
        if wrong:
            return f"{wrong} for alpha = {alpha}, beta = {beta}, Z = {Z}"
    return ""


def check(sheet: ModuleType) -> dict[str, str]:
    """Prints and returns the verdicts on a sheet."""
    names = ["gae", "forward_term", "clip_mask", "reverse_term", "matched_alpha", "sa2c_weight"]
    checks = [getattr(sys.modules[__name__], f"check_{name}") for name in names]
    return report({name: partial(run, sheet) for name, run in zip(names, checks)})
