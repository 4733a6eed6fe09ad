"""Sheet 2, solved.

python course/solutions/sheet2_silent_bugs.py
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
