"""Sheet 2, solved. Start from what a bug touches, not from the return: that tells least.

    python course/solutions/sheet2_silent_bugs.py

B, "evaluation": the only copy whose run changes when evaluations are left out. An evaluation may
draw random numbers and use the policy, but training must not notice it. B's curves look healthy:
they are those of a run whose observations are normalised by other statistics.

C, "time limit": the explained variance stays near 0.6 where the script has almost 0.9, and the
value loss is the script's many times over. Pendulum ends by its time limit only. If what follows is
worth 0, the value of a state depends on the time that is left, and the observation does not tell
the time.

A, "returns": the value loss is the script's many times over, too, but the explained variance is as
good. The value network learns well; its targets have another scale, since their standard deviation
is made 1 in each batch. They also move from batch to batch, and the value loss jumps with them.

D, "old policy": the entropy falls fastest, and yet KL and the fraction clipped are not above the
script's. The policy goes further in an iteration than its KL says. The KL is measured from where
the first epoch has ended. The clip range starts anew there, and PPO's limit holds no longer.

With `--seed 2`, A, C and D give themselves away by the same curves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checks import sheet2  # noqa: E402

ANSWERS = {
    "A": "returns",
    "B": "evaluation",
    "C": "time limit",
    "D": "old policy",
}

if __name__ == "__main__":
    sheet2.main(sys.modules[__name__])
