"""Sheet 2: silent bugs, in about an hour. Four copies of sppo_continuous.py have one bug each.

    python course/exercises/sheet2_silent_bugs.py

The first call makes the copies A, B, C and D and trains the script and each copy twice, with
evaluations and without. That takes minutes; `--workers 4` trains four at a time. Later calls find
the runs done. Each call prints a table, draws runs/sheet2/curves.png, and says "to do", "not yet"
or "right" for each copy.

No copy crashes or warns. Say which copy has which bug:

    "time limit"   an episode cut off by the time limit is taken for one that terminated: the value
                   of what follows is 0
    "returns"      the returns that the value network learns are normalised in each batch
    "old policy"   log π_old is from after the first epoch, not from when the actions were taken
    "evaluation"   evaluations move the statistics that normalise observations

Before you look at the curves, write down for each bug: which curve must change, and which cannot?
When all four are right, compare the copies with the script: `diff sppo_continuous.py
runs/sheet2/A/sppo_continuous.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checks import sheet2  # noqa: E402

ANSWERS = {
    "A": None,
    "B": None,
    "C": None,
    "D": None,
}

if __name__ == "__main__":
    sheet2.main(sys.modules[__name__])
