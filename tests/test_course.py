"""The course: blank sheets say "to do", solutions "right", wrong answers "not yet". The bugs of
sheet 2 are bugs and silent. The notebook runs. The map names what is there."""

import re
import sys
import tomllib
from pathlib import Path

import nbclient
import nbformat
import pytest
import study_file
import torch
import tyro

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "course"
sys.path[:0] = [str(COURSE), str(ROOT / "docs")]
import map as drawing  # noqa: E402
from checks import NOT_YET, RIGHT, TO_DO, load, patched, sheet1, sheet2, sheet3  # noqa: E402

import sppo_continuous  # noqa: E402

CHECKS = {
    "sheet1_equations": sheet1,
    "sheet2_silent_bugs": sheet2,
    "sheet3_own_reverse_term": sheet3,
}
SHEETS = pytest.mark.parametrize("name", CHECKS)


def verdicts(folder: str, name: str) -> list[str]:
    sheet = load(COURSE / folder / f"{name}.py", f"{folder}_{name}")
    return [*CHECKS[name].check(sheet).values()]


@SHEETS
def test_a_blank_sheet_is_to_do(name):
    assert set(verdicts("exercises", name)) == {TO_DO}


@SHEETS
def test_its_solution_is_right(name):
    assert set(verdicts("solutions", name)) == {RIGHT}


WRONG = {  # exercise: what a solution says, and what a student may say instead
    "sheet1_equations": {
        "gae": [
            (
                "rewards[t] + gamma * next_values[t]",
                "rewards[t] + gamma * next_values[t] * ~dones[t]",
            ),
            ("if dones[t]:", "if False:"),
            ("gamma * gae_lambda * following", "gae_lambda * following"),
            ("gamma * gae_lambda * following", "0.99 * 0.95 * following"),
            ("reversed(range(len(rewards)))", "range(len(rewards))"),
            ("    return advantages\n", "    return advantages + values\n"),
            ("    return advantages\n", ""),
        ],
        "forward_term": [
            ("-torch.min(", "torch.min("),
            ("-torch.min(", "-torch.max("),
            ("clipped_ratio * advantage).mean()", "clipped_ratio * advantage).sum()"),
            ("clipped_ratio * advantage).mean()", "clipped_ratio * advantage)"),
            (
                "-torch.min(ratio * advantage, clipped_ratio * advantage)",
                "-(clipped_ratio * advantage)",
            ),
            ("-torch.min(ratio * advantage, clipped_ratio * advantage)", "-(ratio * advantage)"),
            ("clipped_ratio * advantage).mean()", "clipped_ratio * advantage).mean().detach()"),
            ("    clipped_ratio = ratio.clamp(", "    clipped_ratio = ratio.detach().clamp("),
        ],
        "clip_mask": [
            ("~(too_high | too_low)", "(too_high | too_low)"),
            ("(ratio > 1 + clip_coef) & (advantage > 0)", "ratio > 1 + clip_coef"),
            (
                "(ratio < 1 - clip_coef) & (advantage < 0)",
                "(ratio < 1 - clip_coef) & (advantage > 0)",
            ),
            ("~(too_high | too_low)", "torch.ones_like(ratio)"),
            ("ratio > 1 + clip_coef", "ratio > 1.2"),
        ],
        "reverse_term": [
            ("-(mask * advantage", "-(advantage"),
            (" / old_logprob.exp()", ""),
            (" / old_logprob.exp()", " / logprob.exp().detach()"),
            ("(1 - logprob.exp())", "(1 - logprob.detach().exp())"),
            ("-(mask * advantage * Z", "(mask * advantage * Z"),
            ("-(mask * advantage * Z * weight).mean()", "-(mask * advantage * Z * weight).sum()"),
        ],
        "matched_alpha": [
            ("return alpha + beta * abs(Z)\n", "return alpha + beta * Z\n"),
            ("return alpha + beta * abs(Z)\n", "return 20.5\n"),
            ("return alpha + beta * abs(Z)\n", "return beta * abs(Z)\n"),
        ],
        "sa2c_weight": [
            ("abs(Z) * logprob.exp()", "abs(Z)"),
            ("abs(Z) * logprob.exp()", "abs(Z) * (1 - logprob.exp())"),
            ("abs(Z) * logprob.exp()", "abs(Z) * logprob"),
        ],
    },
    "sheet3_own_reverse_term": {
        "reverse_weight": [
            ("return 2 * (1 - (logprob / 2).exp())", "return 2 * (logprob / 2).exp()"),
            ("return 2 * (1 - (logprob / 2).exp())", "return 1 - logprob.exp()"),
            ("return 2 * (1 - (logprob / 2).exp())", "return 1 - (logprob - old_logprob).exp()"),
            ("return 2 * (1 - (logprob / 2).exp())", "return 2 * (1 - (old_logprob / 2).exp())"),
            ("return 2 * (1 - (logprob / 2).exp())", "return 2 * (1 - (logprob / 2).exp()).mean()"),
            ("return 2 * (1 - (logprob / 2).exp())", "return -logprob * logprob.exp().mean()"),
        ],
        "reverse_slope": [
            ("return -(logprob / 2).exp()", "return (logprob / 2).exp()"),
            ("return -(logprob / 2).exp()", "return -(logprob / 2).exp() / 2"),
            ("return -(logprob / 2).exp()", "return -(old_logprob / 2).exp()"),
        ],
        "ppo_weight": [
            ("abs(Z) * (old_logprob / 2).exp()", "abs(Z)"),
            ("abs(Z) * (old_logprob / 2).exp()", "Z * (old_logprob / 2).exp()"),
            ("(old_logprob / 2).exp()", "helper(old_logprob)"),
        ],
        "CONTROL": [('CONTROL = "mean weight"', 'CONTROL = "matched"'), ('"mean weight"', '"PPO"')],
    },
}
MISTAKES = [
    (name, exercise, *pair)
    for name, exercises in WRONG.items()
    for exercise, pairs in exercises.items()
    for pair in pairs
]


def changed_verdicts(name: str, pairs: list, folder: Path) -> dict[str, str]:
    """The verdicts on a solution with some text of it replaced."""
    text = (COURSE / "solutions" / f"{name}.py").read_text(encoding="utf-8")
    text = text.replace("Path(__file__).resolve().parent.parent", repr(str(COURSE)))
    path = folder / "sheet.py"
    path.write_text(patched(text, pairs), encoding="utf-8")
    return CHECKS[name].check(load(path, "changed_sheet"))


@pytest.mark.parametrize("name, exercise, right, wrong", MISTAKES)
def test_a_wrong_answer_is_not_right_yet(name, exercise, right, wrong, tmp_path):
    assert changed_verdicts(name, [(right, wrong)], tmp_path)[exercise].startswith(NOT_YET)


@pytest.mark.parametrize(
    "exercise, right, wrong, hint",
    [
        ("gae", "following = 0.0  # A_{t+1}", "following = 1.0  # A_{t+1}", "the last at t = 39"),
        ("reverse_term", "-(mask * advantage", "-(advantage", "is m missing?"),
    ],
)
def test_a_verdict_says_where_to_look(exercise, right, wrong, hint, tmp_path):
    verdicts = changed_verdicts("sheet1_equations", [(right, wrong)], tmp_path)
    assert verdicts[exercise].endswith(hint)


def test_the_mask_of_sheet_1_may_have_booleans(tmp_path):
    verdicts = changed_verdicts("sheet1_equations", [(").float()", ")")], tmp_path)
    assert set(verdicts.values()) == {RIGHT}


def test_a_factor_on_the_released_term_has_the_matched_control(tmp_path):
    """The other answer of sheet 3, exercise 4, can be right, too."""
    pairs = [
        ("2 * (1 - (logprob / 2).exp())", "-2 * (logprob - old_logprob).exp()"),
        ('CONTROL = "mean weight"', 'CONTROL = "matched"'),
    ]
    verdicts = changed_verdicts("sheet3_own_reverse_term", pairs, tmp_path)
    assert verdicts["reverse_weight"] == verdicts["CONTROL"] == RIGHT


def test_the_answers_of_sheet_2_are_one_to_one():
    blank = load(COURSE / "exercises" / "sheet2_silent_bugs.py", "blank_sheet2")
    for answer in [*sheet2.BUGS, "terminated"]:
        blank.ANSWERS = dict.fromkeys(sheet2.COPIES, answer)
        found = [*sheet2.check(blank).values()]
        assert found.count(RIGHT) == (answer in sheet2.BUGS)
        assert all(verdict == RIGHT or verdict.startswith(NOT_YET) for verdict in found)
    assert set(re.findall(r'(?m)^    "(.+?)"  ', blank.__doc__)) == set(sheet2.BUGS)


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory) -> dict:
    """Curves of the script and of each copy, by (name, evaluations): a few updates on Pendulum."""
    curves = {}
    flags = dict(env_id="Pendulum-v1", total_timesteps=512, num_steps=256, num_minibatches=2)
    flags |= dict(update_epochs=2, eval_episodes=1)
    for name in ["script", *sheet2.COPIES]:
        path = tmp_path_factory.mktemp("copy") / "sppo_continuous.py"
        path.write_text(sheet2.source(name), encoding="utf-8")
        script = load(path, "copied_script")
        for evaluations in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("run"))
                interval = 256 * evaluations
                script.main(script.Args(**flags, eval_interval=interval))
                curves[name, evaluations] = sheet2.read_curves(next(Path("runs").iterdir()))
    return curves


def test_each_bug_is_silent_and_changes_the_run(tiny_runs):
    for name, bug in sheet2.COPIES.items():
        for evaluations in (True, False):
            run = tiny_runs[name, evaluations]
            assert run["eval/episodic_return"][0][-1] == 513  # it has reached its end
            touched = evaluations or bug != "evaluation"
            assert sheet2.same(run, tiny_runs["script", evaluations]) != touched


def test_only_the_bug_of_the_evaluation_lets_evaluations_change_the_run(tiny_runs):
    for name in ["script", *sheet2.COPIES]:
        changed = not sheet2.same(tiny_runs[name, True], tiny_runs[name, False])
        assert changed == (sheet2.COPIES.get(name) == "evaluation")


def test_sheet_2_shows_every_run(tiny_runs, tmp_path):
    table = sheet2.make_table(tiny_runs)
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["script", *"ABCD"]
    sheet2.draw(tiny_runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_patch_that_no_longer_fits_is_an_error():
    for text in ("nothing", "twice twice"):
        with pytest.raises(ValueError, match="instead of once"):
            patched(text, [("twice", "once")])
    assert patched("x  # why\ny\n", [("x\ny\n", "z\n")]) == "z\n"  # whatever a comment says


def test_the_own_reverse_term_is_what_the_written_script_trains(tmp_path):
    """The script with the plain term put in as one's own has the gradient of the plain form."""
    solution = load(COURSE / "solutions" / "sheet3_own_reverse_term.py", "solution3")
    path = tmp_path / "own.py"
    source = sheet3.own_source(solution).replace(
        "2 * (1 - (logprob / 2).exp())", "1 - logprob.exp()"
    )
    path.write_text(source, encoding="utf-8")
    own = load(path, "own_script")
    logprob, old_logprob = sheet3.make_logprobs()
    plain = sppo_continuous.Args(importance_weighted_reverse=False)
    columns = [logprob[:, None], old_logprob[:, None], torch.ones_like(logprob), 0.2]
    expected = sppo_continuous.symmetric_ppo_loss(*columns, plain)
    assert torch.allclose(
        torch.stack(own.symmetric_ppo_loss(*columns, own.Args())), torch.stack(expected)
    )


def test_the_study_of_sheet_3_is_a_study():
    """Of the written script and of PPO, with flags that they have."""
    table = tomllib.loads((ROOT / sheet3.STUDY).read_text(encoding="utf-8"))
    study = study_file.build(table, "own", None)
    written = sheet3.OWN_SCRIPT.relative_to(ROOT).as_posix()
    weights = {("own", "CartPole-v1", condition): "7" for condition in study.conditions}
    commands = [cell.command(weights).split() for cell in study.cells]
    for script, *flags in commands:
        assert script in (written, "sppo_continuous.py")
        sppo_continuous.validate(tyro.cli(sppo_continuous.Args, args=flags))
    assert study.seeds == 5 and len(commands) == 2 + 5 * 3 * 2


def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("COURSE_STEPS", "2048")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(COURSE / "symmetric_loss.ipynb", as_version=4)
    assert 20 <= len(notebook.cells) <= 30
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": COURSE}}
    ).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
    table = printed.split("predicted\n")[1].splitlines()[:8]
    assert [row.split()[4:] for row in table] == [["1.5000", "nan"]] * 8
    assert printed.count("score at 2048 steps") == 2


def test_the_notebook_is_light_and_tells_nothing_of_the_machine():
    path = COURSE / "symmetric_loss.ipynb"
    text = path.read_text(encoding="utf-8")
    assert len(text) < 500_000
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert (
                output.output_type in ("stream", "display_data") and output.get("name") != "stderr"
            )
            assert not re.search(r"/(tmp|home|work|root)/", output.get("text", ""))


def test_the_map_is_of_the_script_as_it_is():
    flow = drawing.flow(sppo_continuous.Args())
    names = drawing.names(flow)
    assert {"collect", "gae", "update", "minibatch_loss", "symmetric_ppo_loss"} <= set(names)
    for name in names:
        found = sppo_continuous
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)
    svg = drawing.FIGURE.read_text(encoding="utf-8")
    assert svg == drawing.draw(sppo_continuous.Args())
    assert set(re.findall(r'class="code"[^>]*>([\w.]+)<', svg)) == set(names)
    sizes = [float(size) for size in re.findall(r"([\d.]+)px", drawing.STYLE)]
    assert min(sizes) * 72 / 96 >= 8  # points, where the picture is 400 px wide
    assert 'viewBox="0 0 400 ' in svg


def test_the_map_s_fields_and_flags_are_the_script_s():
    flow = str(drawing.flow(sppo_continuous.Args()))
    flags = {f"--{name.replace('_', '-')}" for name in vars(sppo_continuous.Args())}
    assert set(re.findall(r"--[\w-]+", flow)) <= flags
    source = (ROOT / "sppo_continuous.py").read_text(encoding="utf-8")
    for name in re.findall(r"\b[a-z]+_[a-z_]+\b", flow):
        assert name in source


def test_the_page_of_the_course_is_short_and_names_files_that_exist():
    text = (COURSE / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for link in re.findall(r"\]\((\S+?)\)", text):
        assert link.startswith("http") or (COURSE / link.partition("#")[0]).exists()
    for file in re.findall(r"\bpython ([\w/.]+\.py)", text):
        assert (ROOT / file).is_file()
