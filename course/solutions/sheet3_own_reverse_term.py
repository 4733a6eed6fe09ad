"""Sheet 3, solved with one example: generalised cross-entropy (Zhang and Sabuncu, 2018).

    python course/solutions/sheet3_own_reverse_term.py

w = (1 - π^q) / q with q = 1/2. For q = 1 it is the plain term, for q → 0 it is -log π, which is
A2C's own: q moves between the two. Its advantage over the plain term is that rare actions lose less
weight. A course that asks for a term gets as many right sheets as there are students.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checks import sheet3  # noqa: E402


def reverse_weight(logprob, old_logprob) -> torch.Tensor:
    return 2 * (1 - (logprob / 2).exp())


def reverse_slope(logprob, old_logprob) -> torch.Tensor:
    """d π^q / d log π = q · π^q."""
    return -(logprob / 2).exp()


def ppo_weight(old_logprob, alpha, beta, Z) -> torch.Tensor:
    """∇ reverse = -m · A · Z · dw/dlog π · ∇log π = -m · A · |Z|√π · ∇log π, and PPO's gradient is
    -m · A · r · ∇log π. At r = 1 the first is |Z|√π_old times the second."""
    return alpha + beta * abs(Z) * (old_logprob / 2).exp()


CONTROL = "mean weight"  # the weight depends on π_old, and for r ≠ 1 on r, too

# 5. The released code's noise of 0.05 is small beside noise 1, and one cannot know the sign: that a
#    reweighting helps against noise is the paper's claim about SA2C, and no test here has shown it.
#    With five seeds Student's factor is 2.8, so an interval reaches 2.8 / √5 = 1.24 standard
#    deviations of the difference to each side: a difference smaller than that is not seen.

if __name__ == "__main__":
    sheet3.main(sys.modules[__name__])
