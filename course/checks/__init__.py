"""What the sheets of the course share: verdicts, and copies of a script made by a patch.

The modules beside this one check the sheets. They hold answers: read them last.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
for folder in (ROOT, ROOT / "tests"):  # our scripts, and tests/textbook.py
    sys.path.insert(0, str(folder))

SCRIPT = ROOT / "sppo_continuous.py"
TO_DO, NOT_YET, RIGHT = "to do", "not yet", "right"


def verdict(run) -> str:
    """TO_DO, RIGHT, or NOT_YET and why. `run` returns what is wrong, or an empty text."""
    try:
        wrong = run()
    except Exception as error:
        if isinstance(error, NotImplementedError) and not error.args:  # the sheet's own blank
            return TO_DO
        return f"{NOT_YET}: {type(error).__name__}: {error}"
    return f"{NOT_YET}: {wrong}" if wrong else RIGHT


def report(exercises: dict) -> dict[str, str]:
    """Prints a line for each exercise, a function by its name. Returns the verdicts."""
    verdicts = {name: verdict(run) for name, run in exercises.items()}
    for number, (name, text) in enumerate(verdicts.items(), 1):
        print(f"{number}. {name}: {text}")
    return verdicts


def to_array(x) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach().numpy()
    return np.asarray(x, dtype=np.float64)


def differs(answer, expected, what: str = "the result", index: str = "i") -> str:
    """What is wrong with an answer; an empty text if it is the same but for rounding. `index` is
    what the equations call a place."""
    if answer is None:
        return f"{what} is None; is a `return` missing?"
    answer, expected = to_array(answer), to_array(expected)
    if answer.shape != expected.shape:
        return f"{what} has the shape {answer.shape}; wanted is {expected.shape}"
    wrong = ~np.isclose(answer, expected, rtol=1e-6, atol=1e-9)
    if not wrong.any():
        return ""
    if wrong.ndim == 0:
        return f"{what} is wrong"
    places = f"in {wrong.sum()} of {wrong.size} places"
    return f"{what} is wrong {places}; the last at {index} = {np.flatnonzero(wrong)[-1]}"


def patched(text: str, replacements: list[tuple[str, str]]) -> str:
    """`text` with each first string of a pair replaced by the second. A first string must occur
    exactly once, but for comments at the ends of its lines: if a script has changed, this raises
    ValueError."""
    for old, new in replacements:
        pattern = re.escape(old).replace("\\\n", "(?:  #.*)?\n")
        found = re.findall(pattern, text)
        if len(found) != 1:
            raise ValueError(f"found {len(found)} times instead of once, in {SCRIPT.name}:\n{old}")
        text = text.replace(found[0], new)
    return text


def load(path: Path, name: str) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
