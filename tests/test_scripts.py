"""The scripts as texts: alone, alike where they do the same, and harmless to import."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = pytest.mark.parametrize("script", TEXTS)
GAMES = {"sppo_atari", "sa2c_atari"}
CONTROL = {"sppo_continuous", "sa2c_continuous"}
ENVIRONMENTS = GAMES | CONTROL | {"ppo_baseline"}

# What each script has in its own way.
OWN = {"Args", "validate", "collect", "minibatch_loss", "update", "main"}
# What is one text in these scripts, and another in those.
DIFFERENT = {
    "evaluate": [GAMES, CONTROL, {"ppo_baseline"}, {"sppo_rlhf"}],  # sampled, most probable, both
    "Games": [GAMES, {"ppo_baseline"}],  # which has one interface for all its environments
    "symmetric_ppo_loss": [{"sppo_atari", "sppo_rlhf"}, {"sppo_continuous"}],  # over dimensions
    "symmetric_a2c_loss": [{"sa2c_atari"}, {"sa2c_continuous"}],
    "read_flags": [GAMES | CONTROL, {"ppo_baseline"}, {"sppo_rlhf"}],  # defaults, presets
    "start_logging": [ENVIRONMENTS, {"sppo_rlhf"}],
}


def definitions(script: str) -> dict[str, str]:
    """The source of each function and class, decorators included, by name."""
    found = {}
    lines = TEXTS[script].splitlines()
    for node in ast.parse(TEXTS[script]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node, *node.decorator_list], key=lambda part: part.lineno).lineno
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def flags(script: str) -> dict[str, tuple[str, str]]:
    """Type and comment of each field of `Args`, by name."""
    fields = re.findall(r"^    (\w+): (.+?) = .+?  # (.+)$", definitions(script)["Args"], re.M)
    return {name: (kind, comment) for name, kind, comment in fields}


DEFINITIONS = {script: definitions(script) for script in TEXTS}
NAMES = sorted({name for defined in DEFINITIONS.values() for name in defined} - OWN)


def test_there_are_scripts():
    assert set(TEXTS) == ENVIRONMENTS | {"sppo_rlhf"}
    shared = {"gae", "normalize", "flip_signs", "set_seeds", "save_checkpoint", "read_flags"}
    for defined in DEFINITIONS.values():
        assert shared | {"Args", "validate", "update", "main"} <= defined.keys()


@pytest.mark.parametrize("name", NAMES)
def test_functions_and_classes_of_the_same_name_are_the_same_text(name):
    """But for those above, which do differ."""
    groups = {}
    for script, defined in DEFINITIONS.items():
        if name in defined:
            groups.setdefault(defined[name], set()).add(script)
    expected = DIFFERENT.get(name, [set.union(*groups.values())])
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected))


def test_flags_of_the_same_name_have_the_same_type():
    types = {}
    for script in TEXTS:
        for name, (kind, _) in flags(script).items():
            types.setdefault(name, set()).add(kind)
    assert {name: kinds for name, kinds in types.items() if len(kinds) > 1} == {}


@pytest.mark.parametrize("kind", ["atari", "continuous"])
def test_flags_of_sppo_and_sa2c_read_the_same(kind):
    """But for A2C's name, its RMSprop, its one update per batch, and what was tuned."""
    first, second = flags(f"sppo_{kind}"), flags(f"sa2c_{kind}")
    different = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert different - {"beta"} == {"alpha", "learning_rate", "norm_adv", "advantage_noise", "seed"}


@SCRIPTS
def test_every_flag_says_what_it_does(script, monkeypatch, capsys):
    """In an ASCII comment at the end of its line, which --help shows."""
    comments = {name: comment for name, (_, comment) in flags(script).items()}
    module = importlib.import_module(script)
    assert comments.keys() == vars(module.Args()).keys()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        module.read_flags()
    output, error = capsys.readouterr()
    assert end.value.code in (0, None) and error == "" and output.isascii()
    for name, comment in comments.items():
        assert f"--{name.replace('_', '-')}" in output
        assert comment in " ".join(output.split()), name


@SCRIPTS
def test_a_script_names_what_it_needs_and_no_more(script):
    """`uv run script.py` reads the block at the end, `pip install -r` the file: one version."""
    block = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"  # PEP 723's
    (match,) = re.finditer(block, TEXTS[script])
    assert match["type"] == "script" and TEXTS[script].endswith("# ///\n")
    lines = match["content"].splitlines()
    metadata = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    assert metadata["requires-python"] == ">=3.11,<3.14"  # box2d has no later wheels
    needs = set(metadata["dependencies"])
    assert needs <= set((ROOT / "requirements.txt").read_text().splitlines())
    assert all("==" in need for need in needs)
    names = {re.split(r"[\[=]", need)[0].replace("-", "_") for need in needs}
    makes_environments = "FlattenObservation" in TEXTS[script]
    assert ({"mujoco", "box2d", "pygame_ce"} <= names) == makes_environments
    third_party = imports(script) - OPTIONAL
    indirect = {"mujoco", "box2d", "pygame_ce", "tensorboard"}
    assert third_party <= names and names - third_party <= indirect


OPTIONAL = sys.stdlib_module_names | {"wandb", "datasets"}


def imports(script: str) -> set[str]:
    imported = set()
    for node in ast.walk(ast.parse(TEXTS[script])):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    return imported


@SCRIPTS
def test_no_script_imports_another(script):
    assert not imports(script) & set(TEXTS)


def run_python(code: str, folder: Path, environment: dict | None = None) -> str:
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_importing_starts_nothing_also_without_posix(tmp_path):
    """The libraries come first: some look at the platform before they ask for such modules."""
    third_party = sorted(set.union(*(imports(script) - OPTIONAL for script in TEXTS)))
    code = f"""
import {", ".join(third_party)}, torch.utils.tensorboard
import os, signal
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"):
    sys.modules[name] = None
for name in ("sched_setscheduler", "SCHED_BATCH", "sched_param", "fork"):
    vars(os).pop(name, None)
for name in ("SIGHUP", "SIGUSR1", "SIGKILL"):
    vars(signal).pop(name, None)
import {", ".join(TEXTS)}
"""
    assert run_python(code, tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_numpy_computes_with_one_thread_unless_told_otherwise(tmp_path):
    """--torch-threads does not govern OpenBLAS, which starts its threads when NumPy is imported;
    torch's come with use."""
    code = """
import os, sppo_continuous
print(os.environ["OPENBLAS_NUM_THREADS"], len(os.listdir("/proc/self/task")))
"""
    if sys.platform == "linux":
        names = [name for name in os.environ if not name.endswith("_NUM_THREADS")]
        environment = {name: os.environ[name] for name in names}
        assert run_python(code, tmp_path, environment) == "1 1\n"
    for script in CONTROL | {"ppo_baseline"}:
        before_numpy = TEXTS[script].partition("import numpy")[0]
        assert 'os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")' in before_numpy
