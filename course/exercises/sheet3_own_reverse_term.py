"""Sheet 3: your own reverse term, in about two hours. Fill in the blanks, then run

    python course/exercises/sheet3_own_reverse_term.py

The reverse term of a sample is -m · A · Z · w. Two choices of w are known:

    released   w = (1 - π) / π_old    dw / d log π = -r     the gradient is |Z| times PPO's
    plain      w = 1 - π              dw / d log π = -π     likely actions count more

Think of a third: say, one that counts undecided actions most, or one between these two. The sheet
says "to do", "not yet" or "right" for each exercise. Once 1 to 3 are right, it writes
own/sppo_own_term.py, which is sppo_continuous.py with your w, and prints how to run a study with
five seeds of it, of PPO and of the control.

Notation as on sheet 1. Tensors have the shape (batch,). Your functions may use torch and nothing
else that you define, since their text is put into the script as it is.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checks import sheet3  # noqa: E402


def reverse_weight(logprob, old_logprob) -> torch.Tensor:
    """1. Your w. Only what depends on `logprob` has a gradient; where A > 0 the term must make the
    action likelier, so w must fall as log π grows. It must work for π close to 0 and to 1."""
    raise NotImplementedError


def reverse_slope(logprob, old_logprob) -> torch.Tensor:
    """2. dw / d log π, derived by hand. Do not call autograd here: the check does."""
    raise NotImplementedError


def ppo_weight(old_logprob, alpha, beta, Z) -> torch.Tensor:
    """3. At r = 1 your loss has PPO's gradient with each advantage multiplied by this weight.

    For the released term it is α + β|Z|, for the plain one α + β|Z|π_old. Its mean is logged as
    `losses/mean_weight`."""
    raise NotImplementedError


# 4. Your loss is to be compared with PPO. What is the fair control, `--alpha x --beta 0`?
#    "matched"      one x gives the same gradient in every sample, for any r: training is the same
#    "mean weight"  it depends on the sample; x is the mean of the weight, which pilot runs measure
CONTROL = None

# 5. (on paper, before the study has run) Which sign do you expect of each difference, and of which
#    size? Five seeds on CartPole-v1: how large must a difference be for you to believe it?

if __name__ == "__main__":
    sheet3.main(sys.modules[__name__])
