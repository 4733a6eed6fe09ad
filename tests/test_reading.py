"""The scripts are easy on the eye: formatted, short after that, and one thing a line."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import reading

ROOT = Path(__file__).parent.parent
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = pytest.mark.parametrize("script", TEXTS)
LONGER = {"ppo_baseline.py": 570, "sppo_rlhf.py": 580}
MOST_LINES = 450
MOST_TOKENS_A_LINE = 12
MOST_TOKENS_IN_A_LINE = 35

# Pairs that one line may assign, since they belong together. A new one is a decision.
PAIRS = {
    ("next_value", "next_advantage"),
    ("obs", "next_obs"),
    ("rollout['logprobs']", "rollout['values']"),
    ("self.obs_stats", "self.return_stats"),
    ("self.score", "self.length"),
    ("values", "dones"),
}


def test_ruff_format_changes_nothing():
    command = [sys.executable, "-m", "ruff", "format", "--check", ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, re.findall(r"--> (.+?):", done.stdout) or done.stderr


@SCRIPTS
def test_a_script_is_read_in_one_sitting(script):
    lines = reading.formatted(TEXTS[script]).splitlines()
    assert len(lines) <= LONGER.get(script, MOST_LINES)


@SCRIPTS
def test_the_formatter_is_not_kept_off(script):
    assert not re.search(r"fmt: *(off|skip)|yapf: *disable", TEXTS[script])


@SCRIPTS
def test_no_line_is_dense(script):
    assert reading.tokens_a_line(TEXTS[script]) <= MOST_TOKENS_A_LINE
    tokens = Counter(token.start[0] for token in reading.code_tokens(TEXTS[script]))
    assert {line: n for line, n in tokens.items() if n > MOST_TOKENS_IN_A_LINE} == {}


@SCRIPTS
def test_a_line_assigns_one_thing(script):
    """No walrus, no `a = b = c`, and no `a, b = c, d` but of what belongs together."""
    for node in ast.walk(ast.parse(TEXTS[script])):
        assert not isinstance(node, ast.NamedExpr), ast.unparse(node)
        if isinstance(node, ast.Assign):
            assert len(node.targets) == 1, ast.unparse(node)
            if isinstance(node.value, ast.Tuple | ast.List):
                names = getattr(node.targets[0], "elts", None)
                assert not names or tuple(map(ast.unparse, names)) in PAIRS, ast.unparse(node)
