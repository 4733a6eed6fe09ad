"""README and docs: links lead somewhere, commands parse, the README is short, and results are what
the tables say."""

import argparse
import csv
import importlib
import itertools
import re
import shlex
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import tyro

import sa2c_atari

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
    assert len(text.split()) <= 1100
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


GENERATED = re.compile(r"(<!-- ?\w+ ?-->).*?(<!-- ?(?:/|end) ?-->)", re.DOTALL)


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("results")


def test_results_follow_from_the_tables(results, tmp_path, monkeypatch):
    pages = {tmp_path / page.name: page.read_text(encoding="utf-8") for page in results.PAGES}
    for page, text in pages.items():
        emptied = GENERATED.sub(r"\1\2", text)
        page.write_text(emptied, encoding="utf-8")
        assert len(emptied) < len(text)
    monkeypatch.setattr(results, "PAGES", [*pages])
    monkeypatch.setattr(results.figures, "FIGURES", tmp_path)
    results.main()
    assert {page: page.read_text(encoding="utf-8") for page in pages} == pages
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert {"forest.png", "bandit.png"} <= drawn <= {path.name for path in FIGURES}


def test_results_are_short_and_no_percentage_is_written_by_hand():
    text = TEXTS["docs/results.md"]
    words = re.sub(r"<!--.*?-->", "", text).split()
    assert len([word for word in words if re.search(r"\w", word)]) <= 1800
    by_hand = set(re.findall(r"[\d.,]+(?= %)", GENERATED.sub("", text)))
    assert by_hand <= {"10", "15", "90", "95", "100"}  # margins and levels
    assert not re.search(r"(?m)^\s*(- )?<!--\w+-->.", text)  # there it would end a paragraph


def test_answers_are_verdicts_of_twelve_words():
    block = re.search(r"<!--claims-->(.*?)<!--/-->", TEXTS["docs/results.md"], re.DOTALL)
    _, _, *rows = block[1].strip().splitlines()
    for row in rows:
        answer = row.split(" | ")[1]
        assert re.match(r"by algebra: |no gain above \d+ %|gain on |loss of |open ", answer)
        assert len(re.findall(r"[\w.,·−|-]+", answer)) <= 12, answer
    assert len(rows) > 12


def test_verdicts_follow_the_rules(results):
    def verdict(*estimates: tuple) -> str:
        columns = ["task", "value", "low", "high", "upper", "p"]
        return results.answer(pd.DataFrame(estimates, columns=columns))

    small = ("A", 0.01, -0.03, 0.05, 0.042, 0.6)
    wide = ("B", 0.28, -0.1, 0.66, 0.6, 0.14)
    loss = ("C", -0.2, -0.3, -0.1, -0.12, 0.001)
    gain = ("D", 0.2, 0.1, 0.3, 0.28, 0.001)
    assert verdict(small) == "no gain above 5 %"  # rounded up
    assert verdict(small, loss) == "no gain above 5 %; loss on C"
    assert verdict(small, wide) == "open (half-width 38 %) on B; else no gain above 5 %"
    assert verdict(gain, loss) == "gain on D; loss on C"
    assert verdict(gain, small) == "gain on D; else no gain above 5 %"
    weak = ("E", 0.2, 0.01, 0.39, 0.36, 0.04)  # Holm's correction for two asks for 0.025
    assert verdict(weak) == "gain on E"
    assert verdict(weak, small) == "open (half-width 19 %) on E; else no gain above 5 %"


def test_an_effect_is_what_the_table_of_evaluations_says(results):
    """The plain form on LunarLander with noise, at the end, with nothing of the report's code."""
    task, folder = "LunarLanderContinuous-v3", ROOT / "studies" / "results" / "robustness_calm"
    curves = defaultdict(list)  # in the order of steps
    with open(folder / "evaluations.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["pilot"] == "0":
                case = row["method"], row["environment"], row["condition"], int(row["seed"])
                curves[case].append(float(row["score"]))
    ends = {case: np.mean(curve[-3:]) for case, curve in curves.items()}
    seeds = range(1, 26)
    uniform = pd.read_csv(folder / "random.csv").set_index("environment")["mean"][task]
    unit = np.mean([ends["DPPO", task, "noise 0", seed] for seed in seeds]) - uniform
    gaps = np.zeros(25)
    for sign, method in ((1, "DSPPO plain"), (-1, "DPPO mean weight")):
        for noise in ("noise 0.05", "noise 0.2"):
            gaps += [sign * ends[method, task, noise, seed] / unit / 2 for seed in seeds]
    half = 2.0639 * np.std(gaps, ddof=1) / 5  # Student's 97.5 % and, below, 95 %, 24 degrees
    expected = dict(value=gaps.mean(), low=gaps.mean() - half, high=gaps.mean() + half)
    expected["upper"] = gaps.mean() + half * 1.7109 / 2.0639

    found = results.effects({"robustness_calm": results.load_studies()["robustness_calm"]})
    names = (results.PLAIN, "ends higher", "with noise", "LunarLander")
    (row,) = results.of(found, *names).to_dict("records")
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("beta, progress, even", [(1, 0.889, 1.625), (20, 0.422, 3.424)])
def test_numbers_of_the_bandit(results, beta, progress, even):
    bandit = results.bandit
    assert bandit.efficiency(0.9, beta) == pytest.approx(progress, abs=5e-4)
    assert bandit.break_even(0.9, beta) == pytest.approx(even, abs=5e-4)
    assert bandit.efficiency(0.9, beta, bandit.break_even(0.9, beta)) == pytest.approx(1)
    for pi in np.linspace(0.51, 0.99, 25):
        assert bandit.efficiency(pi, beta) < 1 == pytest.approx(bandit.efficiency(pi, 0))


@pytest.mark.parametrize("noise", [(0.0, 0.0), (3.0, 3.0), (0.5, 2.0)])
def test_the_bandit_has_the_gradients_of_the_script(results, noise):
    """All arms and all rewards, each with its probability; noise is one of two values."""
    pi, means = 0.9, (0.1, -0.9)  # of the likely arm; advantages, which differ by 1

    def progress(alpha: float, beta: float) -> float:
        args = sa2c_atari.Args(alpha=alpha, beta=beta)
        mean = square = 0.0
        for arm, sign in itertools.product((0, 1), (-1, 1)):
            logit = torch.tensor(pi, dtype=torch.float64).logit().requires_grad_()
            logprob = torch.stack([logit, 0 * logit]).log_softmax(0)[[arm]]
            advantage = torch.tensor([means[arm] + sign * noise[arm]], dtype=torch.float64)
            loss = sa2c_atari.symmetric_a2c_loss(logprob, advantage, args)[0]
            (gradient,) = torch.autograd.grad(loss, logit)
            mean += (pi, 1 - pi)[arm] / 2 * gradient
            square += (pi, 1 - pi)[arm] / 2 * gradient**2
        return (mean**2 / square).item()

    likely, rare = (mean**2 + size**2 for mean, size in zip(means, noise))
    for beta in results.bandit.BETAS:
        expected = results.bandit.efficiency(pi, beta, rare / likely)
        assert progress(0.5, beta) / progress(1, 0) == pytest.approx(expected)
