"""Studies: what a file means, that runs survive what happens, and that reports are right."""

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

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import study
import study_report
from scipy import stats
from study_file import STUDIES, StudyError, load
from study_report import MARGIN, Results, contrast, holm, verdict
from study_results import collect, commands, play_uniformly, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent

# A script with the scripts' command line, output and checkpoints, that trains nothing.
STAND_IN = """
import os, sys, time
from pathlib import Path

class Args:
    breaks: bool = False
    pause: float = 0
    beta: float = 0

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
"E" = {}
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


def command(*words) -> list[str]:
    return [sys.executable, str(ROOT / "studies/study.py"), *map(str, words)]


def call(folder: Path, *words, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, **options)


@pytest.fixture
def main(tmp_path, monkeypatch):
    """The command in this process: its exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["study.py", *map(str, words)])
        return study.main()

    return run


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
comparisons = [["DSPPO", "PPO"], ["weighted", "PPO"]]
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
"matched" = "ppo_baseline.py --pg-coef {matched}"
"mean" = "ppo_baseline.py --pg-coef {mean_weight[DSPPO]}"
"weighted" = "ppo_baseline.py --pg-coef {k} --clip-coef {c}"
[grid]
k = [1.5, 2]
c = [0.1, 0.2]
[pilot]
seeds = [101]
[scale.tiny]
question = "And of one?"
steps = 7
seeds = 1
flags = ""
environments = ["CartPole-v1"]
conditions = ["clean"]
methods = ["PPO", "matched"]
"""


def test_a_study_is_every_method_environment_condition_and_seed(tmp_path):
    study = load(str(write_study(tmp_path, FULL)))
    pilots = [cell for cell in study.cells if cell.pilot]
    cells = [cell for cell in study.cells if not cell.pilot]
    assert study.cells == pilots + cells
    assert {(c.method, c.seed) for c in pilots} == {("DSPPO", 101)} and len(pilots) == 2 * 2
    grid = [f"weighted k={k} c={c}" for k in ("1.5", "2") for c in ("0.1", "0.2")]
    assert list(study.methods) == ["PPO", "DSPPO", "matched", "mean", *grid]
    assert study.families == {"weighted": grid} and study.clean == "clean"
    assert len({c.name for c in study.cells}) == len(study.cells) and len(cells) == 8 * 2 * 2 * 2
    assert [cell.seed for cell in cells] == [3] * 32 + [4] * 32
    weights = {("DSPPO", "CartPole-v1", "noise"): "1.234"}
    asked = {(c.method, c.env_id, c.condition, c.seed): c.command(weights) for c in cells}
    common = "--env-id CartPole-v1 --seed 3 --total-timesteps 3000 --eval-episodes 2"
    for method, expected in {
        "PPO": f"ppo_baseline.py {common} --reward-noise 0.05",
        "DSPPO": f"sppo_continuous.py {common} --alpha 0.5 --beta 2.0 --reward-noise 0.05",
        "matched": f"ppo_baseline.py {common} --pg-coef 2.5 --reward-noise 0.05",
        "mean": f"ppo_baseline.py {common} --pg-coef 1.234 --reward-noise 0.05",
        "weighted k=2 c=0.1": f"ppo_baseline.py {common} --pg-coef 2 --clip-coef 0.1 "
        "--reward-noise 0.05",
    }.items():
        assert asked[method, "CartPole-v1", "noise", 3] == expected
    assert asked["mean", "CartPole-v1", "clean", 3] is None  # its pilots are not finished
    hopper = "ppo_baseline.py --env-id Hopper-v5 --seed 4 --total-timesteps 1000 --eval-episodes 2"
    assert asked["matched", "Hopper-v5", "clean", 4] == f"{hopper} --pg-coef 20.5"


def test_a_scale_is_a_smaller_study(tmp_path):
    study = load(str(write_study(tmp_path, FULL)), "tiny")
    assert study.name == "small-tiny" and study.question == "And of one?"
    assert study.comparisons == []
    assert [cell.command({}) for cell in study.cells] == [
        "ppo_baseline.py --env-id CartPole-v1 --seed 1 --total-timesteps 7",
        "ppo_baseline.py --env-id CartPole-v1 --seed 1 --total-timesteps 7 --pg-coef 2.5",
    ]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_that_are_here(path):
    """They load at every scale, say how β was fixed, and compare at two seeds or more."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "β" in text.split("\nquestion")[0]
    scales = [None, *re.findall(r"^\[scale\.(\w+)\]", text, re.MULTILINE)]
    assert path.stem == "smoke" or len(scales) > 1
    for scale in scales:
        study = load(path.stem, scale)
        assert study.clean and study.comparisons and study.reference in study.methods
        assert len({cell.seed for cell in study.cells if not cell.pilot}) >= 2


@pytest.mark.parametrize(
    "change, message",
    [
        (("steps = 1000", ""), "missing 1 required .*: 'steps'"),
        (("steps = 1000", "steps = 'many'"), "steps must be a positive number; they are 'many'"),
        (("steps = 3000", "steps = 0"), "steps must be a positive number"),
        (("steps = 1000", "steps = 1000\nstep = 1000"), "unexpected keyword argument 'step'"),
        (("seeds = [3, 4]", "seeds = [3, 3]"), "seeds must be"),
        (("seeds = [3, 4]", "seeds = [3, 101]"), "pilot seeds must be other ones"),
        (("seeds = [101]", ""), "seeds must be"),
        (("[DSPPO]", "[SPPO]"), "mean_weight: there is no 'SPPO'"),
        (("{beta}", "{betta}"), "there is no value 'betta'"),
        (("--eval-episodes 2", "--seed 2"), "the study itself sets --env-id, --seed"),
        (("steps = 1000", "steps = 1000\nscore = 'best'"), "score: there is no 'best'"),
        (('reference = "PPO"', 'reference = "A2C"'), "there is no 'A2C'; there are PPO, "),
        (('["DSPPO", "PPO"]', '["DSPPO"]'), "a comparison is a pair"),
        (('["DSPPO", "PPO"]', '["DSPPO", "A2C"]'), "there is no 'A2C'"),
        (('"clean" = ""', '"noise " = ""\n"noise-" = ""'), "have one name as a folder"),
        (('methods = ["PPO"', 'methods = ["DDPO"'), "methods: there is no 'DDPO'"),
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
        load(str(path), "tiny" if "DDPO" in message else None)
    assert "\n" not in str(error.value) and "small.toml" in str(error.value)


def test_a_bad_call_gives_one_line_and_status_2(tmp_path):
    path = write_study(tmp_path)
    for words in (["nothing"], [path, "--workers", 0]):
        result = call(tmp_path, "run", *words)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith("study.py: ")


@pytest.mark.parametrize(
    "change, words, message",
    [
        (("", ""), ["--results", "nowhere"], "nowhere holds no runs"),
        (("", ""), ["--threads", "0"], "--threads must be at least 1"),
        (("SCRIPT", "spo.py"), [], "there is no script 'spo.py'"),
        (("SCRIPT", "SCRIPT --betta 1"), [], "stand_in.py has no flag --betta"),
    ],
)
def test_slips_are_found_before_the_first_run(tmp_path, main, change, words, message):
    path = write_study(tmp_path, STUDY.replace(*change))
    with pytest.raises(StudyError, match=message):
        main("run", path, *words)
    assert not (tmp_path / "study_runs").exists()


# ----------------------------------------------------------------------------------------- runs


def test_a_study_runs_and_repeats_nothing(tmp_path, main, capsys):
    path = write_study(tmp_path)
    assert main("run", path, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("to do A__E__clean__seed-1: ") and "--seed 1 --total" in lines[0]
    assert lines[2] == "small: 0 of 2 runs finished" and not (tmp_path / "study_runs").exists()
    assert main("run", path, "--workers", 2) == 0
    cells = sorted((tmp_path / "study_runs/small").iterdir())
    assert [cell.name for cell in cells] == ["A__E__clean__seed-1", "A__E__clean__seed-2"]
    for seed, cell in enumerate(cells, 1):
        record = json.loads((cell / "done.json").read_text())
        assert record["steps"] == 100 and record["score"] == seed
        assert record["command"] == (cell / "command.txt").read_text()
        assert f"--seed {seed} --total-timesteps 100 --pause 0.001" in record["command"]
        files = {"command.txt", "done.json", "log.txt", "runs"}
        assert {path.name for path in cell.iterdir()} == files
    assert main("run", path) == 0 and "2 of 2 runs finished" in capsys.readouterr().out
    assert all(begun_at(cell) == [0] for cell in cells)


def test_crashed_runs_are_reported_and_the_others_go_on(tmp_path, main, capsys):
    """With a real script that refuses its flags; the stand-in breaks after a checkpoint."""
    text = STUDY + '"B" = "SCRIPT --breaks True"\n' + '"C" = "sppo_continuous.py --Z 1"\n'
    text = text.replace('flags = "--pause {pause}"', "").replace("seeds = 2", "seeds = 1")
    text = text.replace("SCRIPT", "SCRIPT --pause {pause}")
    assert main("run", write_study(tmp_path, text), "--workers", 3) == 1
    folder = tmp_path / "study_runs/small"
    shown = capsys.readouterr()
    assert (
        "1 of 3 runs finished" in shown.out and (folder / "A__E__clean__seed-1/done.json").exists()
    )
    assert "B__E__clean__seed-1: exit status 1: it broke" in shown.err
    assert "C__E__clean__seed-1: exit status 2: sppo_continuous.py" in shown.err
    assert begun_at(folder / "B__E__clean__seed-1") == [0]  # tried again only by a new `run`


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_study_ends_with_its_scripts_and_goes_on(tmp_path, main, name):
    """Whatever ends it: none of its scripts is left, and the next call resumes what they did."""
    path = write_study(tmp_path, STUDY.replace("pause = 0.001", "pause = 0.1"))
    first, second = (tmp_path / f"study_runs/small/A__E__clean__seed-{seed}" for seed in (1, 2))
    process = subprocess.Popen(command("run", path), cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(first.glob("runs/*/checkpoint.pt")))
    process.send_signal(signal.Signals[name])
    assert process.wait(20) == -signal.Signals[name]
    script = int(re.findall(r"process (\d+)", (first / "log.txt").read_text())[0])
    wait_for(lambda: not Path(f"/proc/{script}").exists(), 10)
    assert not (first / "done.json").exists() and not second.exists()
    assert main("run", path, "--workers", 2) == 0
    before, after = begun_at(first)
    assert before == 0 < after < 100 and begun_at(second) == [0]


def test_other_flags_are_another_run(tmp_path, main):
    """Nothing that has a checkpoint is thrown away; what has none begins anew."""
    path = write_study(tmp_path, STUDY + '"B" = "SCRIPT --breaks True"')
    assert main("run", path) == 1
    broken = tmp_path / "study_runs/small/B__E__clean__seed-1"
    good = path.read_text()
    path.write_text(good.replace("--breaks True", "--beta 1"))
    with pytest.raises(StudyError, match="B__E__clean__seed-1 has other flags than the study"):
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
    text = STUDY.replace("SCRIPT", str(tmp_path / "own/other.py"))
    assert main("run", write_study(tmp_path, text)) == 0


def test_a_study_runs_on_ray(tmp_path, main):
    """One run is new, one goes on from its checkpoint; files come back, and nothing else."""
    pytest.importorskip("ray")
    path = write_study(tmp_path)
    assert main("run", path) == 0
    first, second = (tmp_path / f"study_runs/small/A__E__clean__seed-{seed}" for seed in (1, 2))
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
    """`smoke` with one seed and without its method PPO, killed in the middle and continued: the
    study, its folder, and what was finished when it was killed."""
    folder = tmp_path_factory.mktemp("smoke")
    text = (STUDIES / "smoke.toml").read_text(encoding="utf-8")
    text = re.sub(r'"PPO" = .*\n|\["DSPPO plain", "PPO"\], ', "", text)
    text = text.replace('reference = "PPO"', 'reference = "PPO mean weight"')
    text = text.replace("seeds = 2", "seeds = 1")
    path = write_study(folder, text, "smoke")
    run = command("run", path, "--workers", 2)
    process = subprocess.Popen(run, cwd=folder, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(folder.glob("study_runs/smoke/pilot*/done.json")), 300)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("study_runs/*/*/done.json")}
    result = call(folder, "run", path, "--workers", 2)
    assert result.returncode == 0, result.stderr
    study, runs = load(str(path)), folder / "study_runs/smoke"
    collect(study, runs, runs / "results")
    study_report.report(study, runs / "results")
    return study, runs, before


def test_smoke_survives_and_repeats_nothing(smoke):
    study, folder, before = smoke
    assert all(path.stat().st_mtime_ns == at for path, at in before.items()) and len(before) < 3
    assert {path.parent.name for path in folder.glob("*/done.json")} == {
        c.name for c in study.cells
    }
    for cell in study.cells:
        steps = [step for step, _ in scalars(folder / cell.name)["losses/value_loss"]]
        assert steps == [512, 1024, 1536, 2048]


def test_smoke_measures_the_mean_weight_in_its_pilot(smoke):
    _, folder, _ = smoke
    (run,) = (folder / "pilot-DSPPO-plain__CartPole-v1__clean__seed-101/runs").iterdir()
    points = EventAccumulator(str(run)).Reload().Scalars("losses/mean_weight")
    weight = f"{np.mean([point.value for point in points]):.4g}"
    done = folder / "PPO-mean-weight__CartPole-v1__clean__seed-1/done.json"
    asked = json.loads(done.read_text())["command"]
    assert asked.endswith(f"--pg-coef {weight}") and 0.5 < float(weight) < 20.5


def test_smoke_is_collected_as_it_was_logged(smoke):
    _, folder, _ = smoke
    runs, evaluations = (pd.read_csv(folder / f"results/{x}.csv") for x in ("runs", "evaluations"))
    assert list(runs.pilot) == [1, 0, 0]
    for row in runs.itertuples():
        method = ("pilot " * row.pilot + row.method).replace(" ", "-")
        cell = folder / f"{method}__CartPole-v1__clean__seed-{row.seed}"
        (run,) = (cell / "runs").iterdir()
        events = EventAccumulator(str(run)).Reload()
        logged = [(x.step - 1, x.value) for x in events.Scalars("eval/episodic_return")]
        here = (evaluations.method == row.method) & (evaluations.seed == row.seed)
        table = evaluations[here][["step", "score"]].to_numpy()
        np.testing.assert_allclose(table, logged, rtol=1e-6)
        assert row.steps == table[-1, 0] == 2048 and row.score == table[-1, 1]
        printed = re.findall(r"^score at 2048 steps: (\S+)", (cell / "log.txt").read_text(), re.M)
        assert float(printed[-1]) == pytest.approx(row.score, abs=0.006)
        values = [x.value for x in events.Scalars("advantage/sign_flips_normalization")]
        assert row.flips_normalization == pytest.approx(np.mean(values), rel=1e-5)
        assert len(values) == 4


def test_a_score_may_be_the_mean_of_all_evaluations(smoke, tmp_path):
    study = load(str(smoke[1].parent.parent / "smoke.toml"))
    study.score = "mean"
    collect(study, smoke[1], tmp_path)
    runs, evaluations = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("runs", "evaluations"))
    means = evaluations.groupby(["pilot", "method", "seed"]).score.mean()
    expected = [means[row.pilot, row.method, row.seed] for row in runs.itertuples()]
    np.testing.assert_allclose(runs.score, expected, rtol=1e-6)


def test_runs_under_way_have_a_curve_so_far(smoke, tmp_path):
    shutil.copytree(smoke[1], tmp_path / "smoke")
    lost = "DSPPO plain,CartPole-v1,clean,1,0,"
    (tmp_path / "smoke/PPO-mean-weight__CartPole-v1__clean__seed-1/done.json").unlink()
    shutil.rmtree(tmp_path / "smoke/DSPPO-plain__CartPole-v1__clean__seed-1")
    collect(smoke[0], tmp_path / "smoke", tmp_path)
    begun, whole = ((x / "evaluations.csv").read_text() for x in (tmp_path, smoke[1] / "results"))
    assert begun == "".join(x for x in whole.splitlines(True) if not x.startswith(lost))
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + 1


def test_smoke_is_reported(smoke):
    text = (smoke[1] / "results/report.md").read_text(encoding="utf-8")
    assert "2 runs of 2,048 environment steps, 1 seeds each" in text
    assert "All of its runs are finished" in text and "CartPole-v1: 21.6" in text
    for figure in re.findall(r"\]\((.*\.png)\)", text):
        assert (smoke[1] / "results" / figure).stat().st_size > 5000


def test_a_study_continues_from_its_tables(smoke, tmp_path, main, capsys):
    """On another machine, which has the tables of what was finished but not the folders."""
    tables = {path.name: path.read_text() for path in (smoke[1] / "results").glob("*.csv")}
    path = smoke[1].parent.parent / "smoke.toml"
    (tmp_path / "tables").mkdir()
    for name, text in tables.items():
        (tmp_path / "tables" / name).write_text(text)
    lines = tables["runs.csv"].splitlines(keepends=True)
    (tmp_path / "tables/runs.csv").write_text("".join(lines[:-1]))  # the last one is under way
    assert main("run", path, "--results", "tables", "--dry-run") == 0
    assert capsys.readouterr().out.count("to do") == 1
    assert main("run", path, "--results", "tables") == 0
    assert len(list((tmp_path / "study_runs/smoke").glob("*/log.txt"))) == 1
    assert main("collect", path, "--results", "tables") == 0
    assert {path.name: path.read_text() for path in (tmp_path / "tables").iterdir()} == tables


# --------------------------------------------------------------------------- faults of others


def log_run(folder: Path, steps: int, first: int = 0, score: float = 1.0, tag: str = "1") -> None:
    """What a script logs from one checkpoint to its end, in steps of 10."""
    run = folder / "runs/one"
    with SummaryWriter(run, purge_step=first + 1) as writer:
        for step in range(first + 10, steps + 1, 10):
            writer.add_scalar("losses/value_loss", step, step)
            writer.add_scalar("eval/episodic_return", score, step + 1)
    (path,) = run.glob("events.out.tfevents.*")
    path.rename(run / f"x{tag}.events")


def logged(folder: Path, *parts: tuple[int, int], score: float = 1.0) -> None:
    """A run of several processes, whose files have their names in this order."""
    for i, (first, last) in enumerate(parts):
        log_run(folder, last, first, score, str(i))
    (folder / "runs/one/checkpoint.pt").touch()
    for path in (folder / "runs/one").glob("x*.events"):
        path.rename(path.with_name(f"events.out.tfevents.{path.name}"))


def finish_by_hand(study, folder: Path, steps: int, score: float = 1.0) -> None:
    for cell in study.cells:
        place = folder / cell.name
        logged(place, (0, steps), score=score)
        text = cell.command({})
        (place / "command.txt").write_text(text)
        record = {"command": text, "steps": steps, "score": score}
        (place / "done.json").write_text(json.dumps(record))


@pytest.fixture
def by_hand(tmp_path):
    """A study on CartPole whose two runs are finished, and the folder of its runs."""
    path = write_study(tmp_path, STUDY.replace('"E"', '"CartPole-v1"'))
    study = load(str(path))
    finish_by_hand(study, tmp_path / "study_runs/small", 100)
    return study, tmp_path / "study_runs/small"


def test_all_points_are_read(tmp_path):
    """TensorBoard's own reader keeps 10,000 of them, drawn at random."""
    with SummaryWriter(tmp_path / "runs/one") as writer:
        for step in range(10_500):
            writer.add_scalar("a", step, step)
    (tmp_path / "runs/one/checkpoint.pt").touch()
    assert scalars(tmp_path)["a"] == [(step, step) for step in range(10_500)]


def test_a_resumed_run_is_read_whole_whatever_its_clocks_say(tmp_path):
    """Event files are named by the clock; the last part, of a machine behind, comes first."""
    logged(tmp_path, (40, 100), (0, 60), (20, 50))
    assert [step for step, _ in scalars(tmp_path)["losses/value_loss"]] == list(range(10, 101, 10))
    steps = [step - 1 for step, _ in scalars(tmp_path)["eval/episodic_return"]]
    assert steps == list(range(10, 101, 10))


def test_tables_that_would_hold_less_than_the_run_did_are_refused(by_hand, tmp_path):
    study, folder = by_hand
    done = folder / study.cells[0].name / "done.json"
    done.write_text(done.read_text().replace('"steps": 100', '"steps": 200'))
    with pytest.raises(StudyError, match="tells of 200 steps, its event files of 100"):
        collect(study, folder, tmp_path / "tables")
    assert not (tmp_path / "tables/runs.csv").exists()


def test_stray_files_are_no_runs(by_hand, tmp_path):
    study, folder = by_hand
    for place in (folder, folder / study.cells[0].name, folder / study.cells[0].name / "runs"):
        (place / ".DS_Store").write_bytes(b"\0\xff")
    collect(study, folder, tmp_path / "tables")
    assert len((tmp_path / "tables/runs.csv").read_text().splitlines()) == 3


def test_a_full_disk_leaves_the_old_tables(by_hand, tmp_path):
    study, folder = by_hand
    collect(study, folder, folder / "results")
    table = folder / "results/runs.csv"
    rows = table.read_text()
    long = (folder / "results/evaluations.csv").read_text()
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(long) - 9,) * 2)}
    result = call(tmp_path, "collect", tmp_path / "small.toml", **limit)
    assert result.returncode == 1 and result.stderr.startswith("study.py: "), result.stderr
    assert table.read_text() == rows
    assert (folder / "results/evaluations.csv").read_text() == long


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
    study, folder = by_hand
    finish_by_hand(study, tmp_path / "nan", 100, np.nan)
    collect(study, tmp_path / "nan", tmp_path / "tables")
    with pytest.raises(StudyError, match="2 runs have no finite score: .*--seed 1"):
        Results(study, tmp_path / "tables")


def test_tables_are_trusted_by_their_flags(by_hand, tmp_path):
    study, folder = by_hand
    collect(study, folder, folder / "results")
    path = tmp_path / "small.toml"
    path.write_text(path.read_text().replace("0.001", "0.002"))
    other = load(str(path))
    for use in (
        lambda: Results(other, folder / "results"),
        lambda: collect(other, tmp_path / "none", folder / "results"),
        lambda: commands(other, folder, []),
    ):
        with pytest.raises(StudyError, match="is not of this study|other flags than the study"):
            use()


class Endless(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


def test_the_uniform_policy_ends_what_does_not_end_by_itself():
    gym.register("Endless-v0", Endless)
    assert play_uniformly("Endless-v0", 1) == [100_000]


# ----------------------------------------------------------------------------------- statistics


def series(*values: float, seeds=range(1, 100)) -> pd.Series:
    return pd.Series(values, seeds[: len(values)], dtype=float)


def test_a_difference_is_students_of_the_seeds_that_both_have():
    x, y = series(3, 5, 10, 7), series(1, 2, 2, 9, seeds=[1, 2, 3, 9])
    expected = stats.ttest_rel([3, 5, 10], [1, 2, 2])
    ends = expected.confidence_interval()
    np.testing.assert_allclose(contrast((1, x), (-1, y)), (13 / 3, *ends, expected.pvalue))


def test_the_mean_of_one_sample_is_students():
    value, low, high, _ = contrast((1, series(1, 2, 6)))
    assert (value, (high - low) / 2) == (3, pytest.approx(4.302653 * (7 / 3) ** 0.5))


def test_a_difference_of_differences_is_taken_within_seeds():
    x = series(1, 2, 3)
    value, low, high, _ = contrast((1, x + 10), (-1, x + 4), (-1, 2 * x), (1, x + 1))
    assert (value, (high - low) / 2) == (5, pytest.approx(4.302653 / 3**0.5))


def test_without_variance_there_is_no_interval_and_no_tie():
    one, same, other = series(1), series(5, 5, 5), series(6, 6, 6)
    np.testing.assert_equal(contrast((1, one), (-1, same)), (-4, np.nan, np.nan, np.nan))
    np.testing.assert_equal(contrast((1, same), (-1, other)), (-1, np.nan, np.nan, np.nan))
    np.testing.assert_equal(contrast((1, same), (-1, same)), (0, np.nan, np.nan, np.nan))
    assert verdict((0, np.nan, np.nan), "a", "b", "higher", 1) == "no verdict"


def test_verdicts():
    words = "a", "b", "higher"
    estimates = (2, 1, 3), (-2, -3, -1), (1, -1, 3), (1, 0, 2)
    for margin, expected in ((3, ["tie", "tie"]), (2, ["undecided", "tie"])):
        found = [verdict(estimate, *words, margin) for estimate in estimates]
        assert found == ["a higher", "b higher", *expected]
    assert verdict((0, -1, 1), *words, 3, 0.5) == "tie"
    assert verdict((0, -1, 1), *words, 3, 0.6) == "same run"


def test_holms_correction():
    """Smallest p times 4, the next times 3, ..., never falling, at most 1."""
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, 0.6])), [1, 1])
    assert len(holm(np.zeros(0))) == 0


def test_intervals_contain_the_truth_as_often_as_they_say():
    """Of methods that do not differ, on five seeds, whose scores go together; some runs fail."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        x, y = rng.normal(0.8, 0.2, (2, 5)) + rng.normal(0, 0.3, 5)
        x, y = (np.where(rng.random(5) < 0.3, rng.normal(0.1, 0.05, 5), z) for z in (x, y))
        _, low, high, p = contrast((1, series(*x)), (-1, series(*y)))
        hits += low <= 0 <= high
        assert (p > 0.05) == (low <= 0 <= high)
    assert 0.93 < hits / 400 < 0.985


# ----------------------------------------------------------------------------------- the report

CASES = STUDY + '"B" = "SCRIPT --beta 2"\n'
for change in (
    ('"E" = {}', '"E" = {}\n"F" = {}\n"G" = {}'),
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


def test_differences_have_the_studys_own_clean_reference_as_their_unit(reported):
    results = Results(*reported)
    assert dict(results.reference) == {"E": 20, "F": 1, "G": -3}
    assert results.tasks == ["E", "F"]  # on G the reference is worse than the uniform policy
    assert set(results.differences.unit.dropna()) == {10, 1}
    assert [cell.name for cell in results.missing] == ["B__F__noise__seed-3"]


def test_the_report_says_what_the_tables_hold(reported):
    study, folder = reported
    study_report.report(study, folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "**1 of 36 runs are missing** (`B__F__noise__seed-3`)." in text
    assert "96 environment steps, 2 to 3 seeds each" in text
    assert f"within ±{MARGIN:.0%} of what A reaches above the uniform policy" in text
    half = 4.302653 * 10 / 3**0.5
    assert (
        f"| E | clean | A | 20.0 ({20 - half:.2f} to {20 + half:.1f}) | 3 | 2 | 0.1 | 0.3 |" in text
    )
    ends = f"{10 - half:.1f} to {10 + half:.1f}"  # of 20, 0 and 10; A's unit is 10
    row = f"| B − A | E | clean | 3, 1 equal | +10.0 ({ends}) | {10 * half:.0f} % |"
    assert f"{row} 0.45 | undecided |" in text
    ends = f"{24 - 0.9 * half:.2f} to {24 + 0.9 * half:.1f}"
    row = f"| B − A | E | noise | 3 | +24.0 ({ends}) | {9 * half:.0f} % |"
    assert f"{row} 0.22 | B higher |" in text
    assert "| B − A | G | clean | 3 | +1.00 (no interval) | – | – | no verdict |" in text
    assert "| B − A | F | noise | 2, 2 equal | 0.00 (no interval) | – | – | same run |" in text
    # By noise A loses 20 − 6 = 14 on E and 18 on G, B nothing. G has no scale.
    row = "| B − A | E | noise | 3 | +14.0 (-26.9 to 54.9) | 409 % |"
    assert f"{row} 0.45 | undecided |" in text
    p = 7 * 2 * stats.t.sf(19 * 3**0.5, 2)  # the smallest of seven; that of 18 is raised to it
    assert f"| G | noise | 3 | +19.0 (16.5 to 21.5) | – | {p:.2g} | B higher |" in text
    assert f"| G | noise | 3 | +18.0 (15.5 to 20.5) | – | {p:.2g} | B loses less |" in text
    assert "**7 intervals of differences** on single tasks, 4 of scores and 3 of what" in text
    assert "leaves 2: B higher (B − A, G, noise); B loses less (B − A, G, noise)." in text
    assert "leaves 2." in study_report.verdicts(Results(study, folder).differences, named=False)
    for figure in ("differences.png", "learning_curves.png"):
        assert f"]({figure})" in text and (folder / figure).stat().st_size > 5000


def test_a_report_needs_runs_of_its_study(reported):
    study, folder = reported
    with pytest.raises(StudyError, match="`study.py collect` writes them"):
        study_report.report(study, folder / "empty")
    text = (folder / "runs.csv").read_text()
    (folder / "runs.csv").write_text(
        text.replace("--total-timesteps 100 ", "--total-timesteps 200 ")
    )
    with pytest.raises(StudyError, match="hold a run that is not of this study"):
        study_report.report(study, folder)
