"""The scripts as texts: short, alone, alike where they do the same, and harmless to import, also without POSIX."""

import ast
import itertools
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
PAIRS = pytest.mark.parametrize("one, other", list(itertools.combinations(TEXTS, 2)))
LIMITS = {"sppo_atari": 450, "sppo_continuous": 450, "sa2c_atari": 450, "ppo_baseline": 600, "sppo_rlhf": 500}

# What scripts have in their own way, and which.
OWN = {
    **dict.fromkeys(("Args", "validate", "main"), set(TEXTS)),
    "read_flags": {"ppo_baseline", "sppo_rlhf"},  # defaults depend on the environment, or the preset
    "gradient": {"ppo_baseline"},  # another loss
    "update": {"sa2c_atari", "sppo_rlhf"},  # one step; tokens
    "Rollout": {"sppo_continuous"},  # has no invalid steps
}
# What `main` and the end of the file have in common, from a line that begins so to one that begins so.
STRETCHES = [
    ("    (run := Path", "    print(run"),
    ("    progress = tqdm", "            writer.flush()"),
    ('        stats["charts/SPS"]', '        stats["charts/SPS"]'),
    ("    writer.close()", "        sys.exit"),
    ("if __name__", "        stream.write"),
]
STRETCHES_OF_ENVIRONMENTS = [  # not language models
    ("    name = f", "    (run := Path"),
    ("            if not stop:", "            break"),
    ('        stats["charts/learning_rate"]', "            raise FloatingPointError"),
    ("        for t, episodic_return", "    writer.close()"),
    ("        stream.write", "    main(args, saved)"),
]


def definitions(script: str) -> dict[str, str]:
    """The source of each function and class, decorators included, by name."""
    lines = TEXTS[script].splitlines()
    nodes = [node for node in ast.parse(TEXTS[script]).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    first = {node.name: min([node, *node.decorator_list], key=lambda part: part.lineno).lineno for node in nodes}
    return {node.name: "\n".join(lines[first[node.name] - 1 : node.end_lineno]) for node in nodes}


def flags(script: str) -> dict[str, tuple[str, str]]:
    """Type, and the comment that --help shows, of each field of `Args`, by name."""
    return {
        name: (kind, text)
        for name, kind, text in re.findall(r"^    (\w+): (.+?) = .+?  # (.+)$", definitions(script)["Args"], re.M)
    }


def test_there_are_scripts():
    assert set(TEXTS) == set(LIMITS)


@SCRIPTS
def test_a_script_is_read_in_one_sitting(script):
    lines = TEXTS[script].splitlines()
    assert len(lines) <= LIMITS[script]
    assert max(map(len, lines)) <= 120


@PAIRS
def test_functions_and_classes_of_the_same_name_are_the_same_text(one, other):
    first, second = definitions(one), definitions(other)
    shared = {name for name in first.keys() & second.keys() if not OWN.get(name, set()) & {one, other}}
    assert {"gae", "normalize", "flip_signs", "save", "Forgiving"} <= shared
    assert {"layer_init", "as_vector"} <= shared or "sppo_rlhf" in (one, other)
    assert "symmetric_ppo_loss" in shared or not one.startswith("sppo") or not other.startswith("sppo")
    assert {name for name in shared if first[name] != second[name]} == set()


@pytest.mark.parametrize(
    "one, other, first, last",
    [
        (*pair, *stretch)
        for pair in itertools.combinations(TEXTS, 2)
        for stretch in STRETCHES + STRETCHES_OF_ENVIRONMENTS * ("sppo_rlhf" not in pair)
    ],
)
def test_what_the_mains_have_in_common_is_the_same_text(one, other, first, last):
    texts = []
    for script in (one, other):
        lines = [line for line in TEXTS[script].splitlines() if line]
        start = next(i for i, line in enumerate(lines) if line.startswith(first))
        end = next(i for i, line in enumerate(lines) if i >= start and line.startswith(last))
        texts.append(lines[start : end + 1])
    assert texts[0] == texts[1]


def test_sa2c_differs_from_sppo_where_the_algorithms_do():
    lines = [set(filter(None, map(str.strip, TEXTS[script].splitlines()))) for script in ("sppo_atari", "sa2c_atari")]
    assert len(lines[0] - lines[1]) < 100 and len(lines[1] - lines[0]) < 90


@PAIRS
def test_flags_of_the_same_name_have_the_same_type(one, other):
    first, second = flags(one), flags(other)
    assert {name for name in first.keys() & second.keys() if first[name][0] != second[name][0]} == set()


def test_flags_of_the_two_atari_scripts_read_the_same():
    """But for A2C's name, its RMSprop, and its one update per batch."""
    first, second = flags("sppo_atari"), flags("sa2c_atari")
    different = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert different == {"alpha", "learning_rate", "norm_adv", "advantage_noise", "seed"}


@SCRIPTS
def test_every_flag_says_what_it_does(script):
    """In a comment at the end of its line, which tyro shows."""
    (args,) = (node for node in ast.parse(TEXTS[script]).body if getattr(node, "name", "") == "Args")
    assert set(flags(script)) == {field.target.id for field in args.body[1:]}


@SCRIPTS
def test_a_script_names_what_it_needs_and_no_more(script):
    """`uv run script.py` reads the block at the end, `pip install -r` the file: the same versions."""
    block = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"  # from PEP 723
    (match,) = re.finditer(block, TEXTS[script])
    assert match["type"] == "script" and TEXTS[script].endswith("# ///\n")
    lines = match["content"].splitlines()
    metadata = tomllib.loads("\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))
    needs = set(metadata["dependencies"])
    assert metadata["requires-python"]
    assert needs <= set((ROOT / "requirements.txt").read_text().splitlines()) and all("==" in need for need in needs)
    assert any("ale-py" in need for need in needs) == ("import ale_py" in TEXTS[script])
    assert any("mujoco" in need for need in needs) == ("make_env" in TEXTS[script])
    names = {re.split(r"[\[=]", need)[0].replace("-", "_") for need in needs}
    third_party = imports(script) - sys.stdlib_module_names - {"wandb", "datasets"}
    assert third_party <= names and names - third_party <= {"mujoco", "box2d", "pygame_ce", "tensorboard"}


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


@SCRIPTS
def test_importing_starts_nothing_also_without_posix(script, tmp_path):
    """The libraries come first: some of them look at the platform before they ask for such modules."""
    third_party = sorted(imports(script) - sys.stdlib_module_names - {"wandb", "datasets"})
    code = f"""
import {", ".join(third_party)}, torch.utils.tensorboard
import os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"):
    sys.modules[name] = None
for module, names in ((os, "sched_setscheduler SCHED_BATCH fork"), (signal, "SIGHUP SIGUSR1")):
    for name in names.split():
        vars(module).pop(name, None)
sys.path.insert(0, {str(ROOT)!r})
import {script}
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["sppo_continuous", "ppo_baseline"])
def test_numpy_computes_with_one_thread_unless_told_otherwise(script, tmp_path):
    """--torch-threads does not govern OpenBLAS. It starts its threads when NumPy is imported; torch's come with use."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import {script}
print(os.environ["OPENBLAS_NUM_THREADS"], len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1)
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    for told in ({}, {"OPENBLAS_NUM_THREADS": "3"}):
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment | told, capture_output=True, text=True
        )
        number, threads = result.stdout.split()
        assert number == told.get("OPENBLAS_NUM_THREADS", "1") and (told or threads == "1")
