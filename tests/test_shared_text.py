"""The scripts share no module: what several of them need is the same text in each."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
PAIRS = pytest.mark.parametrize("one, other", list(itertools.combinations(SCRIPTS, 2)))

OWN = set("Args validate Batch Rollout collect gradient update main".split())  # what each script has in its own way
SHARED_BY_ALL = set("""
    layer_init gae flip_signs
    read_flags new_run_folder lock save load random_state restore_random catch_signals check_finite explain
""".split())


def definitions(script: str) -> dict[str, str]:
    """The source of each function and class, decorators included, by name."""
    lines = SCRIPTS[script].splitlines()
    nodes = [node for node in ast.parse(SCRIPTS[script]).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    first = {node.name: min([node, *node.decorator_list], key=lambda part: part.lineno).lineno for node in nodes}
    return {node.name: "\n".join(lines[first[node.name] - 1 : node.end_lineno]) for node in nodes}


def flags(script: str) -> dict[str, tuple[str, str, str]]:
    """Type, default and docstring of each field of `Args`, by name."""
    (args,) = (node for node in ast.parse(SCRIPTS[script]).body if getattr(node, "name", "") == "Args")
    fields = zip(args.body[1::2], args.body[2::2], strict=True)  # after the docstring: field, docstring, field, …
    return {
        field.target.id: (ast.unparse(field.annotation), ast.unparse(field.value), text.value.value)
        for field, text in fields
    }


def test_there_are_scripts():
    assert set(SCRIPTS) == {"ppo_baseline", "sa2c_atari", "sppo_atari", "sppo_continuous"}
    for script in SCRIPTS:
        assert OWN - {"collect"} | SHARED_BY_ALL <= set(definitions(script))  # the baseline has two ways to collect


@PAIRS
def test_functions_and_classes_of_the_same_name_are_the_same_text(one, other):
    first, second = definitions(one), definitions(other)
    assert {name for name in first.keys() & second.keys() - OWN if first[name] != second[name]} == set()


@PAIRS
def test_flags_of_the_same_name_have_the_same_type(one, other):
    """None, in the baseline, stands for a default that depends on the environment."""
    first, second = flags(one), flags(other)
    for name in first.keys() & second.keys():
        assert first[name][0].removesuffix(" | None") == second[name][0].removesuffix(" | None"), name


def test_flags_of_the_two_atari_scripts_read_the_same():
    """But for A2C's name, its RMSprop, and its one update per batch."""
    first, second = flags("sppo_atari"), flags("sa2c_atari")
    different = {name for name in first.keys() & second.keys() if first[name][2] != second[name][2]}
    assert different == {"alpha", "learning_rate", "norm_adv", "advantage_noise", "seed"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_says_what_it_does(script):
    assert all(text and "\n" not in text for _, _, text in flags(script).values())


def test_the_needs_are_the_same():
    """The block that `uv run` reads; it stands first."""
    blocks = {text[: text.index("# ///\n") + 6] for text in SCRIPTS.values()}
    assert len(blocks) == 1 and blocks.pop().startswith("# /// script\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    imported = set()
    for node in ast.walk(ast.parse(SCRIPTS[script])):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert not imported & set(SCRIPTS)
