"""Studies: what a file means, that runs survive what happens, and that reports are right."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import study
import study_report
from scipy import stats
from study_file import STUDIES, StudyError, load
from study_report import Results, holm, student
from study_results import collect, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent

# A script with the scripts' command line, output and checkpoints, that trains nothing.
STAND_IN = """
import os, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--resume" in flags:
    run = Path(flags["--resume"])
    step = int((run / "checkpoint.pt").read_text())
else:
    run, step = Path(f"runs/{flags['--env-id']}__stand_in__{flags['--seed']}__0"), 0
    run.mkdir(parents=True)
    (run / "flags").write_text(repr(flags))
flags = eval((run / "flags").read_text())
total = int(flags["--total-timesteps"])
print("begins at", step, "process", os.getpid(), flush=True)
while step < total:
    time.sleep(float(flags["--pause"]))
    step += 10
    print(f"\\r 50%|##   | {step}/{total} [00:00<00:00, 100 steps/s]", end="", file=sys.stderr)
    (run / "checkpoint.tmp").write_text(str(step))
    os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")
    if step == total // 2:
        print(f"\\rscore at {step} steps: -1.00 +- 0.00", flush=True)
        if flags.get("--breaks") == "True":
            sys.exit("it broke")
print(f"\\rscore at {step} steps: {flags['--seed']}.00 +- 0.00", flush=True)
"""

STUDY = """
question = "Does it work?"
beta = "Not used."
steps = 100
seeds = 2
flags = "--pause {pause}"
reference = "A"
[values]
pause = 0.001
[environments]
"CartPole-v1" = {}
[conditions]
"clean" = ""
[methods]
"A" = "SCRIPT"
"""


def write_study(folder: Path, text: str = STUDY, name: str = "small") -> Path:
    (folder / "stand_in.py").write_text(STAND_IN)
    text = text.replace("SCRIPT", str(folder / "stand_in.py"))
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder / f"{name}.toml"


def call(folder: Path, *words, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "studies/study.py"), *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)


@pytest.fixture
def main(tmp_path, monkeypatch):
    """The command in this process: its exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["study.py", *map(str, words)])
        return study.main()

    return run


def cell_of(folder: Path, seed: int, method: str = "A") -> Path:
    return folder / f"study_runs/small/{method}__CartPole-v1__clean__seed-{seed}"


def begun_at(cell: Path) -> list[int]:
    """The steps at which each start of a stand-in began."""
    return [int(step) for step in re.findall(r"begins at (\d+)", (cell / "log.txt").read_text())]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it does not happen"
        time.sleep(0.02)


# ------------------------------------------------------------------------------- the study file

FULL = """
question = "?"
beta = "by hand"
steps = 1000
seeds = [3, 4]
flags = "--eval-episodes 2"
reference = "PPO"
comparisons = [["DSPPO", "PPO"]]
[values]
alpha = 0.5
[environments]
"Hopper-v5" = { beta = 20.0 }
"CartPole-v1" = { beta = 2.0, steps = 3000 }
[conditions]
"clean" = ""
"noise" = "--reward-noise 0.05"
[methods]
"PPO" = "ppo_baseline.py"
"DSPPO" = "sppo_continuous.py --alpha {alpha} --beta {beta}"
"mean" = "ppo_baseline.py --pg-coef {mean_weight[DSPPO]}"
[pilot]
seeds = [101]
[scale.tiny]
question = "And of one?"
steps = 7
seeds = 1
flags = ""
environments = { "CartPole-v1" = { beta = 3.0 } }
conditions = { "clean" = "" }
"""


def test_a_study_is_every_method_environment_condition_and_seed(tmp_path):
    study = load(str(write_study(tmp_path, FULL)))
    pilots = [cell for cell in study.cells if cell.pilot]
    cells = [cell for cell in study.cells if not cell.pilot]
    assert study.cells == pilots + cells and study.clean == "clean"
    assert {(c.method, c.seed) for c in pilots} == {("DSPPO", 101)} and len(pilots) == 2 * 2
    assert len({c.name for c in study.cells}) == len(study.cells) and len(cells) == 3 * 2 * 2 * 2
    assert [cell.seed for cell in cells] == [3] * 12 + [4] * 12
    weights = {("DSPPO", "CartPole-v1", "noise"): "1.234"}
    asked = {(c.method, c.env_id, c.condition, c.seed): c.command(weights) for c in cells}
    common = "--env-id CartPole-v1 --seed 3 --total-timesteps 3000 --eval-episodes 2"
    for method, expected in {
        "PPO": f"ppo_baseline.py {common} --reward-noise 0.05",
        "DSPPO": f"sppo_continuous.py {common} --alpha 0.5 --beta 2.0 --reward-noise 0.05",
        "mean": f"ppo_baseline.py {common} --pg-coef 1.234 --reward-noise 0.05",
    }.items():
        assert asked[method, "CartPole-v1", "noise", 3] == expected
    assert asked["mean", "CartPole-v1", "clean", 3] is None  # its pilots are not finished
    hopper = "--env-id Hopper-v5 --seed 4 --total-timesteps 1000 --eval-episodes 2"
    expected = f"sppo_continuous.py {hopper} --alpha 0.5 --beta 20.0"
    assert asked["DSPPO", "Hopper-v5", "clean", 4] == expected


def test_a_scale_is_a_smaller_study(tmp_path):
    study = load(str(write_study(tmp_path, FULL)), "tiny")
    assert study.name == "small-tiny" and study.question == "And of one?"
    run = "--env-id CartPole-v1 --seed 1 --total-timesteps 7"
    assert [cell.command({}) for cell in study.cells if not cell.pilot] == [
        f"ppo_baseline.py {run}",
        f"sppo_continuous.py {run} --alpha 0.5 --beta 3.0",
        None,
    ]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_that_are_here(path):
    """They load at every scale, say how β was fixed, compare, and their scripts have their flags
    (but for what is there for its tables alone)."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "β" in text.split("\nquestion")[0]
    for scale in [None, *re.findall(r"^\[scale\.(\w+)\]", text, re.MULTILINE)]:
        study = load(path.stem, scale)
        assert study.clean and study.comparisons and study.reference in study.methods
        assert len({cell.seed for cell in study.cells if not cell.pilot}) >= 2
        if study.name != "robustness_continuous-laptop":
            common = " ".join([study.flags, *study.conditions.values()])
            for method in study.methods.values():
                assert set(re.findall(r"--(?:no-)?(\S+)", f"{method} {common}")) <= fields_of(
                    method.split()[0]
                )


@functools.cache
def fields_of(script: str) -> set[str]:
    source = (ROOT / script).read_text(encoding="utf-8")
    return {name.replace("_", "-") for name in re.findall(r"(?m)^    (\w+): ", source)}


@pytest.mark.parametrize(
    "change, message",
    [
        (("steps = 1000", ""), "missing 1 required .*: 'steps'"),
        (("steps = 1000", "steps = 1000\nstep = 1000"), "unexpected keyword argument 'step'"),
        (("seeds = [3, 4]", "seeds = [3, 3]"), "have one name as a folder"),
        (("seeds = [3, 4]", "seeds = [3, 101]"), "pilot seeds must be other ones"),
        (("seeds = [101]", ""), "there are no seeds"),
        (("[DSPPO]", "[SPPO]"), "methods: there is no 'SPPO'"),
        (("{beta}", "{betta}"), "there is no value 'betta'"),
        (("--eval-episodes 2", "--seed 2"), "the study itself sets --env-id, --seed"),
        (("steps = 1000", "steps = 1000\nscore = 'best'"), "score: there is no 'best'"),
        (('reference = "PPO"', 'reference = "A2C"'), "there is no 'A2C' among PPO, "),
        (('["DSPPO", "PPO"]', '["DSPPO", "A2C"]'), "there is no 'A2C'"),
        (('"noise" = ', '"clean " = ""\n"clean-" = '), "have one name as a folder"),
        (('"PPO" = "ppo_baseline.py"', '"PPO" = 1'), "small.toml: "),
        (("[methods]", "[methods"), "small.toml: Expected"),
        (("question", "\udcff"), "small.toml: .* can't decode"),
    ],
)
def test_a_bad_study_file_gives_a_clear_line(tmp_path, change, message):
    path = write_study(tmp_path, FULL)
    assert change[0] in path.read_text()
    path.write_bytes(path.read_text().replace(*change).encode(errors="surrogateescape"))
    with pytest.raises(StudyError, match=message) as error:
        load(str(path))
    assert "\n" not in str(error.value) and "small.toml" in str(error.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--workers", "0"], "--workers and --threads must be at least 1"),
        (["--results", "nowhere"], "nowhere holds no runs"),
        (["--scale", "tiny"], "scale: there is no 'tiny'"),
    ],
)
def test_a_bad_call_runs_nothing(tmp_path, main, words, message):
    with pytest.raises(StudyError, match=message):
        main("run", write_study(tmp_path), *words)
    assert not (tmp_path / "study_runs").exists()


def test_what_is_wrong_is_one_line_and_status_2(tmp_path):
    result = call(tmp_path, "run", "nothing")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("study.py: ")


# ----------------------------------------------------------------------------------------- runs


def test_a_study_runs_and_repeats_nothing(tmp_path, main, capsys):
    path = write_study(tmp_path)
    assert main("run", path, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("to do A__CartPole-v1__clean__seed-1: ")
    assert lines[2] == "small: 0 of 2 runs finished" and not (tmp_path / "study_runs").exists()
    assert main("run", path, "--workers", 2) == 0
    for seed in (1, 2):
        cell = cell_of(tmp_path, seed)
        record = json.loads((cell / "done.json").read_text())
        assert record["steps"] == 100 and record["score"] == seed
        assert record["command"] == (cell / "command.txt").read_text()
        assert f"--seed {seed} --total-timesteps 100 --pause 0.001" in record["command"]
        files = {"command.txt", "done.json", "log.txt", "runs"}
        assert {path.name for path in cell.iterdir()} == files
    assert main("run", path) == 0 and "2 of 2 runs finished" in capsys.readouterr().out
    assert all(begun_at(cell_of(tmp_path, seed)) == [0] for seed in (1, 2))


def test_crashed_runs_are_reported_and_the_others_go_on(tmp_path, main, capsys):
    """One breaks after a checkpoint, one has no script."""
    text = STUDY + '"B" = "SCRIPT --breaks True"\n"C" = "spo.py"\n'
    text = text.replace("seeds = 2", "seeds = 1")
    assert main("run", write_study(tmp_path, text), "--workers", 3) == 1
    shown = capsys.readouterr()
    assert "1 of 3 runs finished" in shown.out and (cell_of(tmp_path, 1) / "done.json").exists()
    assert "B__CartPole-v1__clean__seed-1: exit status 1: it broke" in shown.err
    assert re.search(r"C__CartPole-v1__clean__seed-1: exit status 1: .*spo\.py", shown.err)
    assert begun_at(cell_of(tmp_path, 1, "B")) == [0]  # tried again only by a new `run`


# What the command does once it has read the study.
RUN_HERE = """
import json, signal, sys
from pathlib import Path
from study_run import run_here
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
list(run_here(json.loads(sys.argv[1]), Path(sys.argv[2]), workers=1, threads=1))
"""


def run_until(signal_number: int, cell: Path, command: str) -> int:
    """Starts a run, sends a signal to the study after a checkpoint, and waits for the end of study
    and script. Returns the study's exit status."""
    checkpoint = cell / "runs/CartPole-v1__stand_in__1__0/checkpoint.pt"
    before = checkpoint.read_text() if checkpoint.exists() else None
    arguments = [RUN_HERE, json.dumps({cell.name: command}), str(cell.parent)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "studies")}
    process = subprocess.Popen(
        [sys.executable, "-c", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: checkpoint.exists() and checkpoint.read_text() != before)
    process.send_signal(signal_number)
    status = process.wait(20)
    script = re.findall(r"process (\d+)", (cell / "log.txt").read_text())[-1]
    wait_for(lambda: not Path("/proc", script).exists(), 10)
    return status


def test_a_study_ends_with_its_scripts_and_goes_on(tmp_path, main):
    """Whatever ends it: none of its scripts is left, and the next call resumes what they did."""
    path = write_study(tmp_path, STUDY.replace("pause = 0.001", "pause = 0.1"))
    first, second = cell_of(tmp_path, 1), cell_of(tmp_path, 2)
    command = load(str(path)).cells[0].command({})
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGKILL"):
        number = signal.Signals[name]
        assert run_until(number, first, command) == -number
    assert not (first / "done.json").exists()
    assert main("run", path, "--workers", 2) == 0
    starts = begun_at(first)
    assert starts == sorted(set(starts)) and len(starts) == 6 and begun_at(second) == [0]


def test_other_flags_are_another_run(tmp_path, main):
    """Nothing that has a checkpoint is thrown away; what has none begins anew."""
    path = write_study(tmp_path, STUDY + '"B" = "SCRIPT --breaks True"')
    assert main("run", path, "--workers", 4) == 1
    broken = cell_of(tmp_path, 1, "B")
    good = path.read_text()
    path.write_text(good.replace("--breaks True", "--beta 1"))
    with pytest.raises(StudyError, match="B__CartPole-v1__clean__seed-1 has other flags than"):
        main("run", path)
    assert list(broken.glob("runs/*/checkpoint.pt")) and begun_at(broken) == [0]
    for checkpoint in tmp_path.glob("study_runs/small/B*/runs/*/checkpoint.pt"):
        checkpoint.unlink()
    assert main("run", path) == 0 and begun_at(broken) == [0, 0]
    path.write_text(good.replace("--breaks True", "--beta 2"))
    with pytest.raises(StudyError, match="has other flags than the study"):  # it is finished
        main("run", path)


def test_scripts_find_modules_in_the_folder_of_the_call_and_beside_them(tmp_path, main):
    """Environments of one's own are registered there."""
    (tmp_path / "mine.py").touch()
    (tmp_path / "own").mkdir()
    (tmp_path / "own/beside.py").touch()
    script = STAND_IN.replace("import os", "import beside, mine, os", 1)
    (tmp_path / "own/other.py").write_text(script)
    text = STUDY.replace("SCRIPT", str(tmp_path / "own/other.py")).replace("seeds = 2", "seeds = 1")
    assert main("run", write_study(tmp_path, text)) == 0


def test_a_study_runs_on_ray(tmp_path, main):
    """One run is new, one goes on from its checkpoint; files come back, and nothing else."""
    pytest.importorskip("ray")
    path = write_study(tmp_path)
    assert main("run", path) == 0
    first, second = (cell_of(tmp_path, seed) for seed in (1, 2))
    shutil.rmtree(first)
    (second / "done.json").unlink()
    (checkpoint,) = second.glob("runs/*/checkpoint.pt")
    checkpoint.write_text("70")
    assert main("run", path, "--ray", "local") == 0
    assert begun_at(first) == [0] and begun_at(second) == [0, 70]
    for cell in (first, second):
        assert json.loads((cell / "done.json").read_text())["steps"] == 100
        assert {p.name for p in cell.iterdir()} == {"command.txt", "done.json", "log.txt", "runs"}


# -------------------------------------------------------------- the real scripts, a whole study


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`smoke` with one seed, 64 steps and a stand-in for PPO: its file, and the folder of its runs,
    where the stand-in, which logs nothing, has left none."""
    folder = tmp_path_factory.mktemp("smoke")
    text = (STUDIES / "smoke.toml").read_text(encoding="utf-8")
    text = re.sub(r'"PPO" = .*\n|\["DSPPO plain", "PPO"\], ', "", text)
    for change in (
        ("ppo_baseline.py", "SCRIPT --pause 0"),
        ('reference = "PPO"', 'reference = "DSPPO plain"'),
        ("seeds = 2", "seeds = 1"),
        ("steps = 2048", "steps = 64"),
        ('"--num-steps 512', '"--num-steps 16'),
        ("--eval-interval 1024", "--eval-interval 32"),
        ("--num-minibatches 8 ", "--num-minibatches 2 "),
    ):
        assert change[0] in text
        text = text.replace(*change)
    path = write_study(folder, text, "smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["study.py", "run", str(path)])
        assert study.main() == 0
    runs = folder / "study_runs/smoke"
    shutil.copy(runs / f"{STOOD_IN}/command.txt", folder)
    shutil.rmtree(runs / STOOD_IN)
    collect(load(str(path)), runs, runs / "results")
    return path, runs


STOOD_IN = "PPO-mean-weight__CartPole-v1__clean__seed-1"


def test_smoke_measures_the_mean_weight_in_its_pilot(smoke):
    path, runs = smoke
    (run,) = (runs / "pilot-DSPPO-plain__CartPole-v1__clean__seed-101/runs").iterdir()
    points = EventAccumulator(str(run)).Reload().Scalars("losses/mean_weight")
    weight = f"{np.mean([point.value for point in points]):.4g}"
    asked = (path.parent / "command.txt").read_text()
    assert asked.endswith(f"--pg-coef {weight}") and 0.5 < float(weight) < 20.5


def test_smoke_is_collected_as_it_was_logged(smoke):
    _, folder = smoke
    runs, evaluations = (pd.read_csv(folder / f"results/{x}.csv") for x in ("runs", "evaluations"))
    assert list(runs.pilot) == [1, 0]
    for row in runs.itertuples():
        method = "pilot-DSPPO-plain" if row.pilot else "DSPPO-plain"
        cell = folder / f"{method}__CartPole-v1__clean__seed-{row.seed}"
        (run,) = (cell / "runs").iterdir()
        events = EventAccumulator(str(run)).Reload()
        logged = [(x.step - 1, x.value) for x in events.Scalars("eval/episodic_return")]
        table = evaluations[evaluations.seed == row.seed][["step", "score"]].to_numpy()
        np.testing.assert_allclose(table, logged, rtol=1e-6)
        assert row.steps == table[-1, 0] == 64 and row.score == table[-1, 1]
        printed = re.findall(r"^score at 64 steps: (\S+)", (cell / "log.txt").read_text(), re.M)
        assert float(printed[-1]) == pytest.approx(row.score, abs=0.006)
        values = [x.value for x in events.Scalars("advantage/sign_flips_normalization")]
        assert row.flips_normalization == pytest.approx(np.mean(values), rel=1e-5)
        assert len(values) == 4


def test_smoke_is_reported(smoke):
    path, runs = smoke
    study_report.report(load(str(path)), runs / "results")
    text = (runs / "results/report.md").read_text(encoding="utf-8")
    assert "1 of 2 runs are finished, of 64 environment steps each" in text
    assert "CartPole-v1: 21.6" in text


def test_a_study_continues_from_its_tables(smoke, tmp_path, main, capsys):
    """On another machine, which has the tables of what was finished but not the folders."""
    path, runs = smoke
    (tmp_path / "tables").mkdir()
    tables = {file.name: file.read_text() for file in (runs / "results").glob("*.csv")}
    for name, text in tables.items():
        (tmp_path / "tables" / name).write_text(text)
    assert main("run", path, "--results", "tables", "--dry-run") == 0
    shown = capsys.readouterr().out
    command = (path.parent / "command.txt").read_text()
    assert shown == f"to do {STOOD_IN}: {command}\nsmoke: 2 of 3 runs finished\n"
    one = "DSPPO-plain__CartPole-v1__clean__seed-1"
    shutil.copytree(runs / one, tmp_path / "study_runs/smoke" / one)
    assert main("collect", path, "--results", "tables") == 0
    assert {file.name: file.read_text() for file in (tmp_path / "tables").iterdir()} == tables


# --------------------------------------------------------------------------- faults of others


def logged(folder: Path, *parts: tuple[int, int], score: float = 1.0) -> None:
    """A run of several processes, in steps of 10, whose files have their names in this order. Of
    each part the losses are its number."""
    run = folder / "runs/one"
    for i, (first, last) in enumerate(parts):
        with SummaryWriter(run, purge_step=first + 1) as writer:
            for step in range(first + 10, last + 1, 10):
                writer.add_scalar("losses/value_loss", i, step)
                writer.add_scalar("eval/episodic_return", score * step, step + 1)
        (path,) = run.glob("events.out.tfevents.[!x]*")
        path.rename(run / f"events.out.tfevents.x{i}")
    (run / "checkpoint.pt").touch()


def finish_by_hand(study, folder: Path, steps: int, score: float = 1.0) -> None:
    for cell in study.cells:
        place = folder / cell.name
        logged(place, (0, steps), score=score)
        text = cell.command({})
        (place / "command.txt").write_text(text)
        record = {"command": text, "steps": steps, "score": score * steps}
        (place / "done.json").write_text(json.dumps(record))


@pytest.fixture
def by_hand(tmp_path):
    """A study whose two runs are finished, and the folder of its runs."""
    study = load(str(write_study(tmp_path)))
    finish_by_hand(study, tmp_path / "study_runs/small", 100)
    return study, tmp_path / "study_runs/small"


def test_all_points_are_read(tmp_path):
    """TensorBoard's own reader keeps 10,000 of them, drawn at random."""
    with SummaryWriter(tmp_path / "runs/one") as writer:
        for step in range(10_500):
            writer.add_scalar("a", step, step)
    assert scalars(tmp_path)["a"] == [(step, step) for step in range(10_500)]


def test_a_resumed_run_is_read_whole_whatever_its_clocks_say(tmp_path):
    """Event files are named by the clock; the last part, of a machine behind, comes first."""
    logged(tmp_path, (40, 100), (0, 60), (20, 50))
    losses = dict(scalars(tmp_path)["losses/value_loss"])
    assert losses == dict.fromkeys((10, 20), 1) | dict.fromkeys((30, 40), 2) | dict.fromkeys(
        range(50, 101, 10), 0
    )
    steps = [step - 1 for step, _ in scalars(tmp_path)["eval/episodic_return"]]
    assert steps == list(range(10, 101, 10))


@pytest.mark.parametrize("score, expected", [("last", 100), ("last three", 90), ("mean", 55)])
def test_what_counts_of_a_runs_evaluations(by_hand, tmp_path, score, expected):
    study, folder = by_hand
    study.score = score
    collect(study, folder, tmp_path)
    assert list(pd.read_csv(tmp_path / "runs.csv").score) == [expected, expected]


def test_tables_that_would_hold_less_than_the_run_did_are_refused(by_hand, tmp_path):
    study, folder = by_hand
    done = folder / study.cells[0].name / "done.json"
    done.write_text(done.read_text().replace('"steps": 100', '"steps": 200'))
    with pytest.raises(StudyError, match="tells of 200 steps, its event files of 100"):
        collect(study, folder, tmp_path / "tables")
    assert not (tmp_path / "tables/runs.csv").exists()


def test_stray_files_and_runs_under_way_are_no_runs(by_hand, tmp_path):
    study, folder = by_hand
    for place in (folder, folder / study.cells[0].name, folder / study.cells[0].name / "runs"):
        (place / ".DS_Store").write_bytes(b"\0\xff")
    (folder / study.cells[1].name / "done.json").unlink()
    collect(study, folder, tmp_path / "tables")
    lines = (tmp_path / "tables/runs.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].startswith("A,CartPole-v1,clean,1,0,100,100,")


def test_a_full_disk_leaves_the_old_tables(by_hand, main):
    study, folder = by_hand
    collect(study, folder, folder / "results")
    tables = {path: path.read_text() for path in (folder / "results").iterdir()}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, old[1]))  # the first table does not fit
    try:
        with pytest.raises(OSError):
            main("collect", "small.toml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert all(path.read_text() == text for path, text in tables.items())


def test_any_locale_does(by_hand, tmp_path):
    """Pages and study files are UTF-8 where the locale knows ASCII alone."""
    study, folder = by_hand
    path = tmp_path / "small.toml"
    path.write_text(path.read_text().replace("work?", "work with β?"), encoding="utf-8")
    locale = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    collect(study, folder, folder / "results")
    result = call(tmp_path, "report", path, env=locale)
    assert result.returncode == 0, result.stderr
    assert "with β?" in (folder / "results/report.md").read_text(encoding="utf-8")


def test_a_run_without_a_score_stops_the_report(by_hand, tmp_path):
    study, _ = by_hand
    finish_by_hand(study, tmp_path / "nan", 100, np.nan)
    collect(study, tmp_path / "nan", tmp_path / "tables")
    with pytest.raises(StudyError, match="2 runs have no finite score: .*--seed 1"):
        Results(study, tmp_path / "tables")


def test_tables_are_trusted_by_their_flags(by_hand, tmp_path, main):
    study, folder = by_hand
    collect(study, folder, folder / "results")
    path = tmp_path / "small.toml"
    path.write_text(path.read_text().replace("0.001", "0.002"))
    shutil.copytree(folder / "results", tmp_path / "results")
    for command in ("run", "collect", "report"):  # without the folders of the runs
        with pytest.raises(StudyError, match="the tables hold a run that is not of this study"):
            main(command, path, "--results", "results", "--folder", "none")
    with pytest.raises(StudyError, match="other flags than the study"):
        main("run", path)


# ----------------------------------------------------------------------------------- statistics


def series(*values: float, seeds=range(1, 100)) -> pd.Series:
    return pd.Series(values, seeds[: len(values)], dtype=float)


def test_an_interval_is_students():
    value, low, high, p = student(series(1, 2, 6))
    assert (value, (high - low) / 2) == (3, pytest.approx(4.302653 * (7 / 3) ** 0.5))
    assert p == pytest.approx(2 * stats.t.sf(3 / (7 / 3) ** 0.5, 2))


def test_without_variance_there_is_no_interval():
    for values in ((1,), (5, 5, 5)):
        np.testing.assert_equal(student(series(*values)), (values[0], np.nan, np.nan, np.nan))


def test_holms_correction():
    """Smallest p times 4, the next times 3, ..., never falling, at most 1."""
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, 0.6])), [1, 1])
    assert len(holm(np.zeros(0))) == 0


# ----------------------------------------------------------------------------------- the report

CASES = STUDY + '"B" = "SCRIPT --beta 2"\n'
for change in (
    ('"CartPole-v1" = {}', '"E" = {}\n"F" = {}\n"G" = {}'),
    ('"clean" = ""', '"clean" = ""\n"noise" = "--beta 1"'),
    ('reference = "A"', 'reference = "A"\ncomparisons = [["B", "A"]]'),
    ("seeds = 2", "seeds = 3"),
):
    CASES = CASES.replace(*change)
SCORES = {  # by method, environment and condition, of seeds 1, 2, 3
    ("A", "E", "clean"): (10, 20, 30),
    ("B", "E", "clean"): (30, 20, 40),
    ("A", "E", "noise"): (5, 6, 7),
    ("B", "E", "noise"): (20, 30, 40),
    ("A", "F", "clean"): (0, 1, 2),
    ("B", "F", "clean"): (2, 4, 3),
    ("A", "F", "noise"): (0, 1, 0),
    ("B", "F", "noise"): (0, 1),
    ("A", "G", "clean"): (-2, -3, -4),
    ("B", "G", "clean"): (-1, -2, -3),
    ("A", "G", "noise"): (-20, -21, -22),
    ("B", "G", "noise"): (-1, -3, -2),
}
RANDOM = {"E": 10, "F": 0, "G": -1}


@pytest.fixture
def reported(tmp_path):
    """Study and folder of tables that were filled in by hand; one run is missing."""
    study = load(str(write_study(tmp_path, CASES)))
    folder = tmp_path / "results"
    folder.mkdir()
    key = "method,environment,condition,seed,pilot"
    runs = [f"{key},steps,score,mean_weight,flips_noise,flips_normalization,command"]
    points = [f"{key},step,score"]
    for cell in study.cells:
        scores = SCORES[cell.key[:3]]
        if cell.seed <= len(scores):
            score, row = scores[cell.seed - 1], ",".join(cell.key)
            runs.append(f"{row},96,{score},{cell.seed},0.1,0.3,{cell.command({})}")
            points += [f"{row},48,{score / 2}", f"{row},96,{score}"]
    random = [f"{env_id},100,{score},1" for env_id, score in RANDOM.items()]
    (folder / "runs.csv").write_text("\n".join(runs) + "\n")
    (folder / "evaluations.csv").write_text("\n".join(points) + "\n")
    (folder / "random.csv").write_text("\n".join(["environment,episodes,mean,std", *random]))
    return study, folder


def test_differences_are_students_of_the_seeds_that_both_have(reported):
    results = Results(*reported)
    found = results.differences.set_index(["environment", "condition", "of"])
    expected = stats.ttest_rel([30, 20, 40], [10, 20, 30])
    ends = expected.confidence_interval()
    x = found.loc["E", "clean", "score"]
    np.testing.assert_allclose(x.estimate, (10, *ends, expected.pvalue))
    x = found.loc["E", "noise", "loss"]  # A loses 5, 14 and 23, B 10, -10 and 0
    expected = stats.ttest_rel([5, 14, 23], [10, -10, 0])
    np.testing.assert_allclose(x.estimate, (14, *expected.confidence_interval(), expected.pvalue))
    assert list(found.loc["F", "noise", "score"].gaps.index) == [1, 2]


def test_differences_have_the_studys_own_clean_reference_as_their_unit(reported):
    results = Results(*reported)
    assert dict(results.reference) == {"E": 20, "F": 1, "G": -3}
    assert results.tasks == ["E", "F"]  # on G the reference is worse than the uniform policy
    assert set(results.differences.unit.dropna()) == {10, 1}


def test_the_report_says_what_the_tables_hold(reported):
    study, folder = reported
    study_report.report(study, folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "35 of 36 runs are finished, of 96 environment steps each" in text
    half = 4.302653 * 10 / 3**0.5
    row = f"| A | E | clean | 20.0 ({20 - half:.2f} to {20 + half:.1f}) | 3 | 2 | 0.1 | 0.3 |"
    assert row in text
    ends = f"({10 - half:.1f} to {10 + half:.1f})"  # of 20, 0 and 10; A's unit is 10
    percent = f"100 ({100 - 10 * half:.0f} to {100 + 10 * half:.0f})"
    assert f"| B − A | E | clean | score | 3, 1 equal | 10.0 {ends} | {percent} | 0.45 |" in text
    assert "| B − A | G | clean | score | 3, 0 equal | 1.00 (no interval) | – | – |" in text
    # Both have the same scores there: they are the same run, and prove nothing.
    row = "| B − A | F | noise | score | 2, 2 equal | 0.00 (no interval) | 0.00 (no interval) | – |"
    assert row in text
    # By noise A loses 18 on G and B nothing. G has no scale. Of seven p-values it is the smallest
    # but one, which is that of 19.
    p = f"{7 * 2 * stats.t.sf(19 * 3**0.5, 2):.2g}"
    assert f"| B − A | G | noise | score | 3, 0 equal | 19.0 (16.5 to 21.5) | – | {p} |" in text
    assert f"| B − A | G | noise | loss | 3, 0 equal | 18.0 (15.5 to 20.5) | – | {p} |" in text
    assert "Of **7 intervals** 3 exclude zero, where chance alone makes 0.4 do so." in text
    assert "Holm's correction leaves 2." in text


def test_methods_that_are_mostly_the_same_run_have_no_p_value(reported):
    """Their difference is 0 but for where rounding has led the runs apart."""
    study, folder = reported
    text = (folder / "runs.csv").read_text()
    for seed, score in ((1, 30), (3, 40)):
        row = f"A,E,clean,{seed},0,96,"
        assert row in text
        text = re.sub(f"{row}\\d+", f"{row}{score + (seed == 3)}", text)
    (folder / "runs.csv").write_text(text)
    found = Results(study, folder).differences.set_index(["environment", "condition", "of"])
    x = found.loc["E", "clean", "score"]
    assert list(x.gaps) == [0, 0, -1] and np.isnan(x.p) and np.isfinite(x.estimate[3])


def test_a_report_needs_runs(reported):
    study, folder = reported
    with pytest.raises(StudyError, match="`study.py collect` writes them"):
        study_report.report(study, folder / "empty")
