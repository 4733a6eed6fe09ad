"""README and docs: links lead somewhere, commands parse, the README is short, and results are what
the tables say."""

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
README, WORKFLOW = ROOT / "README.md", ROOT / ".github" / "workflows" / "tests.yml"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS, ROOT / "benchmark" / "README.md"]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*PAGES, WORKFLOW]
}
FIGURES = sorted((ROOT / "docs" / "figures").iterdir())
COMMAND = re.compile(r"\bpython ([\w/]+\.py)(?= |$|`)([^\n`&|;#]*?)(?= > |[\n`&|;#]|$)")


def prose(text: str) -> str:
    """Without code."""
    text = re.sub(r"(?m)^    .*$", "", text)
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub names them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text: str) -> list[tuple[str, str]]:
    """(script, flags) of all `python script.py …`, with the variables that the text sets."""
    text = text.replace("\\\n", " ")
    for name, value in re.findall(r'(?m)^(\w+)="(.+)"$', text):
        text = text.replace(f"${name}", value)
    return [(script, flags.strip()) for script, flags in COMMAND.findall(text)]


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    text = path.read_text(encoding="utf-8")
    references = dict(re.findall(r"(?m)^\[(.+?)\]: (\S+)", text))
    assert set(re.findall(r"\]\[(.+?)\]", prose(text))) <= references.keys()
    links = re.findall(r"\]\((\S+?)\)", prose(text)) + re.findall(r'src="(.+?)"', text)
    for link in links + [*references.values()]:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not link.startswith("http"):
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for link, test in re.findall(r'(?m)^\[.+?\]: (\S+) "(test_\w+)"', text):
        assert f"def {test}(" in (path.parent / link).read_text(encoding="utf-8")


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.name)
def test_figures_are_shown_somewhere_and_small(figure):
    assert any(f"figures/{figure.name}" in text for text in TEXTS.values())
    assert figure.stat().st_size < 1_000_000


class Parsed(Exception):
    """The flags were understood."""


def parsing(parse):
    """Parses, and goes no further."""

    def parse_only(*args, **options):
        raise Parsed(parse(*args, **options))

    return parse_only


def dry_run(script: str, flags: list[str], monkeypatch):
    """Calls a script's own parser. Its result; None for a script without flags."""
    if script == "benchmark/score.py":  # passes its flags on
        return dry_run(flags[0], flags[1:], monkeypatch)
    source = (ROOT / script).read_text(encoding="utf-8")
    if "argparse" not in source and "tyro" not in source:
        return None
    if script.startswith("benchmark/") and sys.platform != "linux":
        pytest.skip("benchmarks need Linux")
    monkeypatch.syspath_prepend(ROOT / Path(script).parent)
    module = importlib.import_module(Path(script).stem)
    assert Path(module.__file__) == ROOT / script
    if hasattr(module, "Args"):
        return tyro.cli(module.Args, args=flags)
    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(sys, "argv", [script, *flags])
        parse_args = argparse.ArgumentParser.parse_args
        patch.setattr(argparse.ArgumentParser, "parse_args", parsing(parse_args))
        module.main()
    return parsed.value.args[0]


@pytest.mark.parametrize("script, flags", COMMANDS, ids=lambda part: part)
def test_commands_parse(script, flags, monkeypatch):
    assert (ROOT / script).is_file()
    if script in ("engines/rllib_sppo.py", "engines/verl_sppo.py"):
        pytest.skip("needs an environment of its own")
    flags = shlex.split(flags.replace('"$run"', "run").rstrip('"'))  # a quote begins earlier
    args = dry_run(script, flags, monkeypatch)
    if args is None:
        assert set(flags) <= {"plot"}
    elif script == "studies/study.py":
        importlib.import_module("study_file").load(args.study, args.scale)
    elif re.fullmatch("(sppo|sa2c|ppo)_(atari|continuous|baseline).py", script):
        importlib.import_module(Path(script).stem).validate(args)


def test_study_files_in_the_docs_are_studies():
    blocks = re.findall(r"```toml\n(.*?)```", TEXTS["docs/studies.md"], re.DOTALL)
    for block in blocks:
        study = importlib.import_module("study_file").build(tomllib.loads(block), "example", None)
        assert study.cells
    assert blocks


def test_the_commands_were_found():
    scripts = {path.name for path in ROOT.glob("*.py")}
    for name in ("README.md", ".github/workflows/tests.yml"):
        assert scripts <= {script for script, _ in commands(TEXTS[name])}
    others = {"studies/study.py", "benchmark/speed.py", "docs/loss_anatomy.py"}
    assert others <= {script for script, _ in COMMANDS}


@pytest.mark.parametrize("page", TEXTS)
def test_files_to_install_or_test_exist(page):
    installs = "\n".join(re.findall(r"pip install.*", TEXTS[page]))
    files = re.findall(r"-r ([\w./-]+)", installs)
    for file in files + re.findall(r"pytest ([\w/]+\.py)", TEXTS[page]):
        assert (ROOT / file).is_file()


def test_the_readme_is_short_and_its_test_command_is_the_workflow_s():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 120 and len(text.encode()) <= 9 * 1024
    (command,) = re.findall(r"(?m)^pip install .* python -m pytest$", text)
    assert command in TEXTS[".github/workflows/tests.yml"]


def test_flags_in_the_readme_exist():
    """Those of commands parse; these are named in the text."""
    folders = (".", "studies", "benchmark", "small_models")
    scripts = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    for flag in set(re.findall(r"`--([\w-]+)", TEXTS["README.md"])) - {"help"}:
        name = flag.removeprefix("no-").replace("-", "_")
        assert re.search(rf'(?m)^    {name}: |"--{flag}"', source), flag


def test_the_results_are_what_the_tables_say(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    results = importlib.import_module("results")
    pages = {tmp_path / page.name: page.read_text(encoding="utf-8") for page in results.PAGES}
    for page, text in pages.items():
        table = r"(<!-- (?!end)\w+ -->).*?(<!-- end -->)"
        emptied = re.sub(table, r"\1\n\2", text, flags=re.DOTALL)
        page.write_text(emptied, encoding="utf-8")
        assert len(emptied) < len(text)
    monkeypatch.setattr(results, "PAGES", [*pages])
    results.main()
    assert {page: page.read_text(encoding="utf-8") for page in pages} == pages
