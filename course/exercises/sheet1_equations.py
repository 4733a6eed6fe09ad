"""Sheet 1: the equations, in about an hour. Fill in what raises NotImplementedError, then run

    python course/exercises/sheet1_equations.py

It says "to do", "not yet" or "right" for each exercise. It compares your functions with slow ones
that were written independently, and their gradients, too.

π is the probability of the action taken, π_old the same when it was taken, r = π / π_old, A the
advantage, ε is `clip_coef`. `logprob` is log π and `old_logprob` is log π_old. Z is negative.
Tensors have the shape (batch,) unless the exercise says otherwise.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checks import sheet1  # noqa: E402


def gae(rewards, values, next_values, dones, gamma, gae_lambda) -> np.ndarray:
    """1. Advantages A_t = δ_t + γλ A_{t+1}, with δ_t = r_t + γ V'_t - V_t. Arrays (num_steps,).

    V'_t (`next_values`) is the value of what follows step t; where the episode terminated it is 0
    already. Where dones[t] is True an episode ended, terminated or cut off by a time limit: no
    A_{t+1} is carried over. After the last step there is no A_{t+1} either."""
    raise NotImplementedError


def forward_term(logprob, old_logprob, advantage, clip_coef) -> torch.Tensor:
    """2. PPO's loss: the mean of -min(r·A, clip(r, 1-ε, 1+ε)·A), of the shape ()."""
    raise NotImplementedError


def clip_mask(logprob, old_logprob, advantage, clip_coef) -> torch.Tensor:
    """3. m (batch,), as floats: 1 where the loss of exercise 2 has a gradient, else 0.

    r is below, in or above the clip range, and A is positive or negative: six cases. In which two
    of them is there no gradient?"""
    raise NotImplementedError


def reverse_term(logprob, old_logprob, advantage, Z, clip_coef) -> torch.Tensor:
    """4. SPPO's reverse term: the mean of -m · A · Z · (1 - π) / π_old, of the shape ()."""
    raise NotImplementedError


def matched_alpha(alpha, beta, Z) -> float:
    """5. On paper: what is the gradient of exercise 4, sample by sample, if that of exercise 2 is
    given? Use that the gradient of π is π times the gradient of log π.

    Then return the number α' for which `--alpha α' --beta 0` has the policy gradient of α, β, Z."""
    raise NotImplementedError


def sa2c_weight(logprob, alpha, beta, Z) -> torch.Tensor:
    """6. A2C's term is -A · log π, and SA2C adds to it the reverse term -A · Z · (1 - π), without a
    division. So SA2C has the gradient of A2C with each advantage multiplied by a weight.

    Return this weight, (batch,). Which samples count more than others?"""
    raise NotImplementedError


if __name__ == "__main__":
    sheet1.check(sys.modules[__name__])
