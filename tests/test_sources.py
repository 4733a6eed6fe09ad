"""The scripts as files: each says itself what it needs, and does nothing when imported."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)


@SCRIPTS
def test_metadata_equals_the_requirements(script):
    """`uv run script.py` reads the block at the top, `pip install -r` the file."""
    block = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"  # from PEP 723
    (match,) = re.finditer(block, script.read_text(encoding="utf-8"))
    assert match["type"] == "script"
    lines = match["content"].splitlines()
    metadata = tomllib.loads("\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().splitlines()
    assert all("==" in requirement for requirement in metadata["dependencies"])
    assert metadata["requires-python"]


@SCRIPTS
def test_importing_starts_nothing(script, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script.stem}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
