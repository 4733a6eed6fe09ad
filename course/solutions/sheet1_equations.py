"""Sheet 1, solved.

python course/solutions/sheet1_equations.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checks import sheet1  # noqa: E402


def gae(rewards, values, next_values, dones, gamma, gae_lambda) -> np.ndarray:
    """Backwards, since A_t needs A_{t+1}. An end by a time limit differs from a termination only in
    V'_t, which `next_values` has already."""
    advantages = np.zeros(len(rewards))
    following = 0.0  # A_{t+1}
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] - values[t]
        if dones[t]:
            following = 0.0
        advantages[t] = delta + gamma * gae_lambda * following
        following = advantages[t]
    return advantages


def forward_term(logprob, old_logprob, advantage, clip_coef) -> torch.Tensor:
    """The minus sign makes a loss of what is to grow."""
    ratio = (logprob - old_logprob).exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantage, clipped_ratio * advantage).mean()


def clip_mask(logprob, old_logprob, advantage, clip_coef) -> torch.Tensor:
    """There is no gradient where the action is to become likelier (A > 0) and is likelier by more
    than ε already, or is to become less likely (A < 0) and is so already. In the other two cases
    outside the clip range the gradient leads back into it."""
    ratio = (logprob - old_logprob).exp()
    too_high = (ratio > 1 + clip_coef) & (advantage > 0)
    too_low = (ratio < 1 - clip_coef) & (advantage < 0)
    return (~(too_high | too_low)).float()


def reverse_term(logprob, old_logprob, advantage, Z, clip_coef) -> torch.Tensor:
    mask = clip_mask(logprob, old_logprob, advantage, clip_coef)
    weight = (1 - logprob.exp()) / old_logprob.exp()
    return -(mask * advantage * Z * weight).mean()


def matched_alpha(alpha, beta, Z) -> float:
    """Where m is 1:

        ∇ forward = -A · ∇r = -A · r · ∇log π
        ∇ reverse = A · Z · ∇π / π_old = A · Z · r · ∇log π = |Z| · ∇ forward

    and where m is 0 both are 0. So SPPO has PPO's policy gradient times α + β|Z|, and nothing else
    distinguishes the two."""
    return alpha + beta * abs(Z)


def sa2c_weight(logprob, alpha, beta, Z) -> torch.Tensor:
    """∇ forward = -A · ∇log π and ∇ reverse = A · Z · ∇π = -A · |Z|π · ∇log π. Actions that the
    policy is sure of count more."""
    return alpha + beta * abs(Z) * logprob.exp()


if __name__ == "__main__":
    sheet1.check(sys.modules[__name__])
