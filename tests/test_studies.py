"""Studies: what a file means, that runs survive what happens to them, and that the report's numbers are right."""

import csv
import json
import os
import re
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
import study_report
from scipy import stats
from study_file import STUDIES, StudyError, load
from study_report import MARGIN, Results, bootstrap, contrast, holm, iqm_contrast, spread, verdict
from study_results import collect, mean_weights, play_uniformly, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent

# A script with the scripts' command line, output, checkpoints and signals, that trains nothing.
STAND_IN = '''
import os, signal, sys, time
from pathlib import Path

class Args:
    checkpoints: bool = True
    breaks: bool = False
    dies: int = 0
    pause: float = 0
    beta: float = 0

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--resume" in flags:
    run = Path(flags["--resume"])
    total, step = map(int, (run / "checkpoint.pt").read_text().split())
    first = False
else:
    run, total, step, first = Path(f"runs/{flags['--env-id']}__stand_in__{flags['--seed']}__0"), 100, 0, True
    total = int(flags["--total-timesteps"])
    run.mkdir(parents=True)
    (run / "flags").write_text(repr(flags))
flags = eval((run / "flags").read_text())
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print("begins at", step, "process", os.getpid(), flush=True)
tries = Path("tries")
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
while step < total:
    time.sleep(float(flags.get("--pause", 0)))
    step += 10
    print(f"\\r 50%|##   | {step}/{total} [00:00<00:00, 100 steps/s]", end="", file=sys.stderr, flush=True)
    if flags.get("--checkpoints") == "True":
        (run / "new").write_text(f"{total} {step}")
        (run / "new").replace(run / "checkpoint.pt")
    if step == total // 2:
        print(f"\\rscore at {step} steps: -1.00 ± 0.00 (1 episodes)", flush=True)
        if flags.get("--breaks") == "True":
            sys.exit("it broke")
    if step == int(flags.get("--dies", 0)) and len(tries.read_text()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if stop:
        sys.exit(143)
print(f"\\rscore at {step} steps: {flags['--seed']}.00 ± 0.00 (1 episodes)", flush=True)
if int(flags.get("--dies", 0)) > total and len(tries.read_text()) == 1:
    os.kill(os.getpid(), signal.SIGKILL)
'''

STUDY = """
question = "Does it work?"
beta = "Not used."
steps = 100
seeds = 2
flags = "--pause {pause} --checkpoints True"
reference = "A"
[values]
pause = 0.01
[environments]
"E" = {}
[conditions]
"clean" = ""
[methods]
"A" = "SCRIPT"
"""


def write_study(folder: Path, text: str = STUDY, name: str = "small") -> Path:
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / f"{name}.toml").write_text(text.replace("SCRIPT", str(folder / "stand_in.py")))
    return folder / f"{name}.toml"


def command(*words) -> list[str]:
    return [sys.executable, str(ROOT / "studies/study.py"), *map(str, words)]


def call(folder: Path, *words) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), cwd=folder, capture_output=True, text=True)


def begun_at(cell: Path) -> list[int]:
    """The steps at which each start of a stand-in began."""
    return [int(step) for step in re.findall(r"begins at (\d+)", (cell / "log.txt").read_text())]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it does not happen"
        time.sleep(0.02)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------- the study file

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
    assert study.methods == ["PPO", "DSPPO", "matched", "mean", *grid] and study.families == {"weighted": grid}
    assert len({c.name for c in study.cells}) == len(study.cells) and len(cells) == 8 * 2 * 2 * 2
    assert [cell.seed for cell in cells] == [3] * 32 + [4] * 32
    weights = {("DSPPO", "CartPole-v1", "noise"): "1.234"}
    commands = {(c.method, c.env_id, c.condition, c.seed): c.command(weights) for c in cells}
    common = "--env-id CartPole-v1 --seed 3 --total-timesteps 3000 --eval-episodes 2"
    for method, expected in {
        "PPO": f"ppo_baseline.py {common} --reward-noise 0.05",
        "DSPPO": f"sppo_continuous.py {common} --alpha 0.5 --beta 2.0 --reward-noise 0.05",
        "matched": f"ppo_baseline.py {common} --pg-coef 2.5 --reward-noise 0.05",
        "mean": f"ppo_baseline.py {common} --pg-coef 1.234 --reward-noise 0.05",
        "weighted k=2 c=0.1": f"ppo_baseline.py {common} --pg-coef 2 --clip-coef 0.1 --reward-noise 0.05",
    }.items():
        assert commands[method, "CartPole-v1", "noise", 3] == expected
    assert commands["mean", "CartPole-v1", "clean", 3] is None  # its pilots are not finished
    hopper = "ppo_baseline.py --env-id Hopper-v5 --seed 4 --total-timesteps 1000 --eval-episodes 2 --pg-coef 20.5"
    assert commands["matched", "Hopper-v5", "clean", 4] == hopper


def test_a_scale_is_a_smaller_study(tmp_path):
    study = load(str(write_study(tmp_path, FULL)), "tiny")
    assert study.name == "small-tiny" and study.question == "And of one?" and study.comparisons == []
    assert [cell.command({}) for cell in study.cells] == [
        "ppo_baseline.py --env-id CartPole-v1 --seed 1 --total-timesteps 7",
        "ppo_baseline.py --env-id CartPole-v1 --seed 1 --total-timesteps 7 --pg-coef 2.5",
    ]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_that_are_here(path):
    """They load at every scale, say how β was fixed, and compare at two seeds or more."""
    assert path.read_text().startswith("# ") and "β" in path.read_text().split("\nquestion")[0]
    scales = [None, *re.findall(r"^\[scale\.(\w+)\]", path.read_text(), re.MULTILINE)]
    assert path.stem == "smoke" or len(scales) > 1
    for scale in scales:
        study = load(path.stem, scale)
        assert study.clean and study.comparisons and study.reference in study.methods
        assert len({cell.seed for cell in study.cells if not cell.pilot}) >= 2


@pytest.mark.parametrize(
    "change, message",
    [
        (("steps = 1000", ""), "it does not say: steps"),
        (("steps = 1000", "steps = 'many'"), "steps must be a positive number; they are 'many'"),
        (("steps = 3000", "steps = 0"), "steps must be a positive number"),
        (("steps = 1000", "steps = 1000\nstep = 1000"), "key: there is no 'step'; there are question, .* steps, "),
        (("seeds = [3, 4]", "seeds = [3, 3]"), "seeds must be"),
        (("seeds = [3, 4]", "seeds = [3, 101]"), r"pilot seeds must be other ones than the study's; shared: \[101\]"),
        (("seeds = [101]", ""), "pilot seeds must be"),
        (("[DSPPO]", "[SPPO]"), "mean_weight: there is no 'SPPO'"),
        (("{beta}", "{betta}"), "there is no value 'betta'"),
        (("sppo_continuous.py", "spo.py"), "there is no script 'spo.py'"),
        (("--alpha", "--alfa"), "sppo_continuous.py has no flag --alfa"),
        (("--eval-episodes 2", "--seed 2"), "--seed is set by the study"),
        (("steps = 1000", "steps = 1000\nscore = 'best'"), "score: there is no 'best'; there are last, mean"),
        (('reference = "PPO"', 'reference = "A2C"'), "reference: there is no 'A2C'; there are PPO, "),
        (('["DSPPO", "PPO"]', '["DSPPO"]'), "a comparison is a pair"),
        (('["DSPPO", "PPO"]', '["DSPPO", "A2C"]'), "comparisons: there is no 'A2C'"),
        (('"clean" = ""', '"noise " = ""\n"noise-" = ""'), "the same name"),
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
        load(str(path), "tiny" if "scale" in message or "DDPO" in message else None)
    assert "\n" not in str(error.value) and "small.toml" in str(error.value)


def test_a_bad_call_gives_one_line_and_status_2(tmp_path):
    path = write_study(tmp_path, STUDY + "[typo]\n")
    good = write_study(tmp_path, name="good")
    for words in (["run", path], ["run", "nothing"], ["run", good, "--scale", "big"], ["report", good]):
        result = call(tmp_path, *words)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith("study.py: ")


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_study_runs_and_repeats_nothing(tmp_path):
    path = write_study(tmp_path)
    assert call(tmp_path, "run", path, "--workers", 2).returncode == 0
    cells = sorted((tmp_path / "study_runs/small").iterdir())
    assert [cell.name for cell in cells] == ["A__E__clean__seed-1", "A__E__clean__seed-2"]
    for seed, cell in enumerate(cells, 1):
        record = json.loads((cell / "done.json").read_text())
        assert record["steps"] == 100 and record["score"] == seed and record["attempts"] == 1
        assert 0 < record["seconds"] < 60 and record["command"] == (cell / "command.txt").read_text()
        assert f"--seed {seed} --total-timesteps 100 --pause 0.01" in record["command"]
        files = {"command.txt", "done.json", "lock", "log.txt", "runs", "tries"}
        assert {path.name for path in cell.iterdir()} == files
    again = call(tmp_path, "run", path)
    assert again.returncode == 0 and "2 of 2 runs finished" in again.stdout
    assert all(begun_at(cell) == [0] for cell in cells)


def test_crashed_runs_are_reported_and_the_others_go_on(tmp_path):
    """With a real script that refuses its flags; the stand-in breaks in the middle, after a checkpoint."""
    text = STUDY + '"B" = "SCRIPT --breaks True"\n' + '"C" = "ppo_baseline.py"\n'
    text = text.replace('flags = "--pause {pause} --checkpoints True"', 'flags = ""').replace("seeds = 2", "seeds = 1")
    result = call(tmp_path, "run", write_study(tmp_path, text), "--workers", 3)
    folder = tmp_path / "study_runs/small"
    assert result.returncode == 1 and "1 of 3 runs finished" in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and (folder / "A__E__clean__seed-1/done.json").exists()
    assert "B__E__clean__seed-1: exit status 1: it broke" in lines[0]
    assert "C__E__clean__seed-1: exit status 2: ppo_baseline.py: a batch of 2048 steps must" in lines[1]
    assert begun_at(folder / "B__E__clean__seed-1") == [0]  # tried again only by a new `run`


@pytest.mark.parametrize(
    "checkpoints, dies, begins",
    [("True", 50, [0, 50]), ("False", 50, [0, 0]), ("True", 101, [0, 100])],  # 101: it says its score, which is lost
)
def test_a_run_that_is_killed_is_recovered(tmp_path, checkpoints, dies, begins):
    text = STUDY.replace("--checkpoints True", f"--checkpoints {checkpoints} --dies {dies}")
    text = text.replace("seeds = 2", "seeds = 1")
    assert call(tmp_path, "run", write_study(tmp_path, text)).returncode == 0
    cell = tmp_path / "study_runs/small/A__E__clean__seed-1"
    assert begun_at(cell) == begins and json.loads((cell / "done.json").read_text())["attempts"] == 2


def test_a_study_that_is_stopped_continues(tmp_path):
    """SIGTERM is passed on, nothing new is begun; the next call resumes what has a checkpoint."""
    path = write_study(tmp_path, STUDY.replace("pause = 0.01", "pause = 0.1").replace("seeds = 2", "seeds = 3"))
    first, second, third = (tmp_path / f"study_runs/small/A__E__clean__seed-{seed}" for seed in (1, 2, 3))
    study = subprocess.Popen(command("run", path, "--workers", 2), cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for(lambda: all(list(cell.glob("runs/*/checkpoint.pt")) for cell in (first, second)))
    study.send_signal(signal.SIGTERM)
    assert study.wait(20) == 143
    assert not third.exists() or not (third / "log.txt").exists()
    for cell in (first, second):
        assert not (cell / "done.json").exists() and (cell / "log.txt").read_text().count("[study]") == 1
    assert call(tmp_path, "run", path, "--workers", 3).returncode == 0
    for cell in (first, second):
        before, after = begun_at(cell)
        assert before == 0 < after < 100
    assert begun_at(third) == [0]


def test_a_study_that_is_killed_repeats_nothing(tmp_path):
    """What it left running is waited for and only evaluates again, and what was finished stays."""
    text = STUDY.replace("pause = 0.01", "pause = 0.1").replace("seeds = 2", "seeds = 4")
    path = write_study(tmp_path, text)
    cells = [tmp_path / f"study_runs/small/A__E__clean__seed-{seed}" for seed in (1, 2, 3, 4)]
    study = subprocess.Popen(command("run", path, "--workers", 1), cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(cells[1].glob("runs/*/checkpoint.pt")))
    kill(study.pid)
    study.wait()
    finished = (cells[0] / "done.json").stat().st_mtime_ns
    assert call(tmp_path, "run", path, "--workers", 4).returncode == 0
    assert (cells[0] / "done.json").stat().st_mtime_ns == finished
    assert [begun_at(cell) for cell in cells] == [[0], [0, 100], [0], [0]]
    assert json.loads((cells[1] / "done.json").read_text())["attempts"] == 2


def test_calls_share_the_work(tmp_path):
    path = write_study(tmp_path, STUDY.replace("seeds = 2", "seeds = 6").replace("pause = 0.01", "pause = 0.1"))
    calls = [subprocess.Popen(command("run", path), cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    cells = [tmp_path / f"study_runs/small/A__E__clean__seed-{seed}" for seed in range(1, 7)]
    wait_for(lambda: sum((cell / "log.txt").exists() and not (cell / "done.json").exists() for cell in cells) == 2)
    assert [process.wait() for process in calls] == [0, 0]
    assert all(begun_at(cell) == [0] for cell in cells)


def test_what_a_lost_call_was_at_is_taken_over(tmp_path):
    """As if its machine had gone down: call and script are killed. The other one resumes the run."""
    path = write_study(tmp_path, STUDY.replace("pause = 0.01", "pause = 0.2"))
    lost, other = (tmp_path / f"study_runs/small/A__E__clean__seed-{seed}" for seed in (1, 2))
    calls = []
    for cell in (lost, other):
        calls.append(subprocess.Popen(command("run", path), cwd=tmp_path, stdout=subprocess.DEVNULL))
        wait_for(lambda cell=cell: list(cell.glob("runs/*/checkpoint.pt")))
    kill(calls[0].pid)
    kill(int(re.findall(r"process (\d+)", (lost / "log.txt").read_text())[0]))
    assert calls[0].wait() == -signal.SIGKILL and calls[1].wait(60) == 0
    before, after = begun_at(lost)
    assert before == 0 < after < 100 and begun_at(other) == [0] and (lost / "done.json").exists()


def test_other_flags_are_another_run(tmp_path):
    """One that was begun with other flags starts anew; one that was finished is not thrown away silently."""
    path = write_study(tmp_path, STUDY.replace("[methods]", '[methods]\n"B" = "SCRIPT --breaks True"'))
    assert call(tmp_path, "run", path).returncode == 1
    path.write_text(path.read_text().replace("--breaks True", "--beta 1"))
    assert call(tmp_path, "run", path).returncode == 0
    broken = tmp_path / "study_runs/small/B__E__clean__seed-1"
    assert begun_at(broken) == [0] and "it broke" not in (broken / "log.txt").read_text()
    path.write_text(path.read_text().replace("--beta 1", "--beta 2"))
    result = call(tmp_path, "run", path)
    assert result.returncode == 2 and "was finished with other flags" in result.stderr


def test_dry_run_lists_the_commands_and_the_time(tmp_path):
    path = write_study(tmp_path)
    lines = call(tmp_path, "run", path, "--dry-run").stdout.splitlines()
    assert lines[0].startswith("to do A__E__clean__seed-1: ") and "--seed 1 --total-timesteps 100" in lines[0]
    assert lines[2] == "2 of 2 runs to do, 1 at a time; time: unknown yet"
    cell = tmp_path / "study_runs/small/A__E__clean__seed-1"
    cell.mkdir(parents=True)
    record = dict(command=lines[0].partition(": ")[2], steps=100, score=1, seconds=10_800, attempts=1)
    (cell / "done.json").write_text(json.dumps(record))
    lines = call(tmp_path, "run", path, "--dry-run", "--workers", 2).stdout.splitlines()
    assert lines[0].startswith("done") and lines[1].startswith("to do")
    assert lines[2] == "1 of 2 runs to do, 2 at a time; time: 1.5 hours"
    assert {path.name for path in (tmp_path / "study_runs/small").iterdir()} == {cell.name}  # nothing was begun


# -------------------------------------------------------------------------------------- the real scripts, a whole study


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`smoke`, killed in the middle and continued. Folder, and when each cell that was finished before had been so."""
    folder = tmp_path_factory.mktemp("smoke")
    study = subprocess.Popen(command("run", "smoke", "--workers", 2), cwd=folder, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list(folder.glob("study_runs/smoke/*/done.json"))) >= 2, 120)
    kill(study.pid)
    study.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("study_runs/smoke/*/done.json")}
    for words in (["run", "smoke", "--workers", 2], ["collect", "smoke"], ["report", "smoke"]):
        result = call(folder, *words)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return folder / "study_runs/smoke", before


def test_smoke_survives_and_repeats_nothing(smoke):
    folder, before = smoke
    assert all(path.stat().st_mtime_ns == at for path, at in before.items()) and len(before) < 7
    study = load("smoke")
    assert {path.parent.name for path in folder.glob("*/done.json")} == {cell.name for cell in study.cells}
    for cell in study.cells:  # `scalars` reads one run
        assert [step for step, _ in scalars(folder / cell.name)["losses/value_loss"]] == [512, 1024, 1536, 2048]


def test_smoke_measures_the_mean_weight_in_its_pilot(smoke):
    folder, _ = smoke
    study = load("smoke")
    (run,) = (folder / "pilot-DSPPO-plain__CartPole-v1__clean__seed-101/runs").iterdir()
    points = EventAccumulator(str(run)).Reload().Scalars("losses/mean_weight")
    weight = f"{np.mean([point.value for point in points]):.4g}"
    assert mean_weights(study, folder) == {("DSPPO plain", "CartPole-v1", "clean"): weight}
    done = run.parent.parent / "done.json"
    text = done.read_text()
    done.write_text(re.sub(r' "mean_weight": .*,\n', "", text))  # as it was written once
    assert mean_weights(study, folder) == {("DSPPO plain", "CartPole-v1", "clean"): weight} and text != done.read_text()
    record = json.loads((folder / "PPO-mean-weight__CartPole-v1__clean__seed-1/done.json").read_text())
    assert record["command"].endswith(f"--pg-coef {weight}") and 0.5 < float(weight) < 20.5


def test_smoke_is_collected_as_it_was_logged(smoke):
    folder, _ = smoke
    runs, evaluations = (list(csv.DictReader((folder / "results" / name).open()))
                         for name in ("runs.csv", "evaluations.csv"))
    assert len(runs) == 7 and len(evaluations) == 14 and sum(row["pilot"] == "1" for row in runs) == 1
    for row in runs:
        method = ("pilot " * int(row["pilot"]) + row["method"]).replace(" ", "-")
        cell = folder / f"{method}__CartPole-v1__clean__seed-{row['seed']}"
        (run,) = (cell / "runs").iterdir()
        events = EventAccumulator(str(run)).Reload()
        logged = [(point.step - 1, point.value) for point in events.Scalars("eval/episodic_return")]
        table = [(int(e["step"]), float(e["score"])) for e in evaluations
                 if all(e[key] == row[key] for key in ("method", "seed", "pilot"))]
        np.testing.assert_allclose(table, logged, rtol=1e-6)
        assert [step for step, _ in table] == [1024, 2048] and float(row["score"]) == table[-1][1]
        printed = re.search(r"^score at 2048 steps: (\S+)", (cell / "log.txt").read_text(), re.MULTILINE)[1]
        assert float(printed) == pytest.approx(float(row["score"]), abs=0.006)
        for name, tag in (("mean_weight", "losses/mean_weight"),
                          ("flips_normalization", "advantage/sign_flips_normalization")):
            values = [point.value for point in events.Scalars(tag)]
            assert float(row[name]) == pytest.approx(np.mean(values), rel=1e-5) and len(values) == 4
            halves = [float(e[name]) for e in evaluations if all(e[k] == row[k] for k in ("method", "seed", "pilot"))]
            np.testing.assert_allclose(halves, [np.mean(values[:2]), np.mean(values[2:])], rtol=1e-5)
        assert float(row["flips_noise"]) == 0


def test_a_score_may_be_the_mean_of_all_evaluations(smoke, tmp_path):
    folder, _ = smoke
    study = load("smoke")
    study.score = "mean"
    collect(study, folder, tmp_path)
    runs, evaluations = (pd.read_csv(tmp_path / name) for name in ("runs.csv", "evaluations.csv"))
    np.testing.assert_allclose(runs.score, evaluations.score.to_numpy().reshape(-1, 2).mean(1), rtol=1e-6)


def test_runs_under_way_have_a_curve_so_far(smoke, tmp_path):
    shutil.copytree(smoke[0], tmp_path / "smoke")
    (tmp_path / "smoke/PPO-mean-weight__CartPole-v1__clean__seed-1/done.json").unlink()
    (tmp_path / "smoke/PPO-mean-weight__CartPole-v1__clean__seed-2").rename(tmp_path / "not begun")
    collect(load("smoke"), tmp_path / "smoke", tmp_path)
    begun, whole = ((folder / "evaluations.csv").read_text() for folder in (tmp_path, smoke[0] / "results"))
    lost = "PPO mean weight,CartPole-v1,clean,2,"
    assert begun == "".join(line for line in whole.splitlines(True) if not line.startswith(lost))
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + 5 < len(begun.splitlines()) == 1 + 12
    (tmp_path / "smoke/PPO-mean-weight__CartPole-v1__clean__seed-1").rename(tmp_path / "elsewhere")
    collect(load("smoke"), tmp_path / "smoke", tmp_path)
    assert (tmp_path / "evaluations.csv").read_text() == begun


def test_smoke_is_reported(smoke):
    folder, _ = smoke
    text = (folder / "results/report.md").read_text()
    assert "6 runs: 3 methods, 1 environment, 1 condition (clean), 2 seeds each, 2,048 environment steps" in text
    assert "All of its runs are finished" in text and text.index("## Figures") < text.index("## Scores")
    assert "| uniform policy, 100 episodes | 2" in text  # about 22 steps
    for figure in re.findall(r"\]\((.*\.png)\)", text):
        assert (folder / "results" / figure).stat().st_size > 5000


def test_a_study_continues_from_its_tables(smoke, tmp_path):
    """On another machine, which has the tables of what was finished but not the runs' folders."""
    folder, _ = smoke
    names = ["runs.csv", "evaluations.csv", "random.csv"]
    tables = {name: (folder / "results" / name).read_text() for name in names}
    (tmp_path / "tables").mkdir()
    for name, text in tables.items():  # the last run is not finished yet
        (tmp_path / "tables" / name).write_text(text)
    lines = tables["runs.csv"].splitlines(keepends=True)
    (tmp_path / "tables/runs.csv").write_text("".join(lines[:-1]))
    assert call(tmp_path, "run", "smoke", "--results", "nowhere").returncode == 2
    assert call(tmp_path, "collect", "smoke", "--results", "tables").returncode == 2  # it would lose what is not here
    dry = call(tmp_path, "run", "smoke", "--results", "tables", "--dry-run").stdout.splitlines()
    assert [line.split()[0] for line in dry[:-1]] == [*["done"] * 6, "to"]
    assert call(tmp_path, "run", "smoke", "--results", "tables").returncode == 0
    assert len(list((tmp_path / "study_runs/smoke").glob("*/log.txt"))) == 1  # the one that was missing
    assert call(tmp_path, "collect", "smoke", "--results", "tables").returncode == 0
    again = {name: (tmp_path / "tables" / name).read_text() for name in names}
    seconds = re.compile(r",[\d.]+,1,ppo", re.MULTILINE)  # of the run that was repeated
    assert {name: seconds.sub("", text) for name, text in again.items()} == {
        name: seconds.sub("", text) for name, text in tables.items()
    }
    assert again["runs.csv"].splitlines()[:-1] == tables["runs.csv"].splitlines()[:-1]


def test_a_real_script_is_resumed(tmp_path, monkeypatch):
    """In an environment of one's own, from a module in this folder that needs one from a folder in PYTHONPATH."""
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("PYTHONPATH", "modules")
    (tmp_path / "modules/limits.py").write_text("LIMIT = 500\n")
    (tmp_path / "mine.py").write_text(
        "import gymnasium\nimport limits\n"
        'gymnasium.register("Pole-v0", "gymnasium.envs.classic_control:CartPoleEnv", None, limits.LIMIT)\n'
    )
    text = (STUDIES / "smoke.toml").read_text().split("[pilot]")[0].replace("seeds = 2", "seeds = 1")
    text = "\n".join(line for line in text.splitlines() if not re.match('"(DSPPO|PPO mean)|comparisons', line))
    text = text.replace("--eval-interval 1024", "--checkpoint-interval 512").replace("steps = 2048", "steps = 10240")
    path = tmp_path / "resumed.toml"
    path.write_text(text.replace("CartPole-v1", "mine:Pole-v0"))
    study = subprocess.Popen(command("run", path), cwd=tmp_path, stdout=subprocess.DEVNULL)
    folder = tmp_path / "study_runs/resumed"
    wait_for(lambda: list(folder.glob("*/runs/*/checkpoint.pt")))
    study.send_signal(signal.SIGTERM)
    assert study.wait(60) == 143 and not list(folder.glob("*/done.json"))
    assert call(tmp_path, "run", path).returncode == 0
    (cell,) = load(str(path)).cells
    record = json.loads((folder / cell.name / "done.json").read_text())
    assert record["attempts"] == 2 and record["steps"] == 10240
    steps = [step for step, _ in scalars(folder / cell.name)["losses/value_loss"]]
    assert steps == list(range(512, 10241, 512))


def test_all_points_are_read(tmp_path):
    """TensorBoard's own reader keeps 10,000 of them, drawn at random."""
    with SummaryWriter(tmp_path / "runs/one") as writer:
        for step in range(10_500):
            writer.add_scalar("a", step, step)
    assert scalars(tmp_path)["a"] == [(step, step) for step in range(10_500)]


class Endless(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


def test_the_uniform_policy_ends_what_does_not_end_by_itself():
    gym.register("Endless-v0", Endless)
    assert play_uniformly("Endless-v0", 2) == [100_000] * 2


# ----------------------------------------------------------------------------------------------------------- statistics


def series(*values: float, seeds=range(1, 100)) -> pd.Series:
    return pd.Series(values, seeds[: len(values)], dtype=float)


def test_a_difference_is_students_of_the_seeds_that_both_have():
    x, y = series(3, 5, 10, 7), series(1, 2, 2, 9, seeds=[1, 2, 3, 9])
    expected = stats.ttest_rel([3, 5, 10], [1, 2, 2])
    np.testing.assert_allclose(contrast((1, x), (-1, y)), (13 / 3, *expected.confidence_interval(), expected.pvalue))
    assert contrast((1, y), (-1, x)) == pytest.approx([-13 / 3, *[-end for end in expected.confidence_interval()][::-1],
                                                       expected.pvalue])  # fmt: skip


def test_the_mean_of_one_sample_is_students():
    value, low, high, _ = contrast((1, series(1, 2, 6)))
    assert (value, (high - low) / 2) == (3, pytest.approx(4.302653 * (7 / 3) ** 0.5))


def test_a_difference_of_differences_is_taken_within_seeds():
    x = series(1, 2, 3)
    value, low, high, _ = contrast((1, x + 10), (-1, x + 4), (-1, 2 * x), (1, x + 1))
    assert (value, (high - low) / 2) == (5, pytest.approx(4.302653 / 3**0.5))


def test_without_variance_there_is_no_interval():
    one, same, other = series(1), series(5, 5, 5), series(6, 6, 6)
    np.testing.assert_equal(contrast((1, one), (-1, same)), (-4, np.nan, np.nan, np.nan))
    np.testing.assert_equal(contrast((1, same), (-1, other)), (-1, np.nan, np.nan, np.nan))
    assert contrast((1, same), (-1, same)) == (0, 0, 0, 1)
    assert np.isnan(contrast((1, series())))[:3].all()
    assert verdict((-1, np.nan, np.nan), "a", "b", "higher") == "no verdict"


def test_verdicts():
    words = "a", "b", "higher"
    estimates = (2, 1, 3), (-2, -3, -1), (1, -1, 3), (1, 0, 2)
    assert [verdict(estimate, *words) for estimate in estimates] == ["a higher", "b higher", "tie", "tie"]
    assert [verdict(estimate, *words, 3) for estimate in estimates] == ["a higher", "b higher", "tie", "tie"]
    assert [verdict(estimate, *words, 2) for estimate in estimates] == ["a higher", "b higher", "undecided", "tie"]


def test_holms_correction():
    """Smallest p times 4, the next times 3, …, never falling, at most 1."""
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, 0.6])), [1, 1])
    assert len(holm(np.zeros(0))) == 0


def test_interquartile_means():
    scores = np.array([[1.0, 9.0], [2.0, 3.0], [4.0, 100.0], [-50.0, 5.0]])
    assert iqm_contrast(1)(scores) == (2 + 3 + 4 + 5) / 4
    assert iqm_contrast(1, -1)(scores, scores + 1) == -1


def test_the_bootstrap_keeps_tasks_apart_and_methods_independent():
    """Seeds that agree within a task give no interval, however different the tasks are."""
    scores = np.tile([0.0, 10.0, 30.0, 100.0], (5, 1))
    assert bootstrap(iqm_contrast(1), scores) == (20, 20, 20)
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (30, 1)), rng.normal(0, 1, (30, 1))
    first = bootstrap(iqm_contrast(1, -1), x, y)
    assert first == bootstrap(iqm_contrast(1, -1), x, y)
    # A method against itself: two independent samples, not a difference that is always 0.
    value, low, high = bootstrap(iqm_contrast(1, -1), x, x)
    assert value == 0 and 0.3 < high < 1.5 and low == pytest.approx(-high, abs=0.15)
    # Against a bootstrap written out.
    draws = [stats.trim_mean(z[rng.integers(30, size=(4000, 30)), 0], 0.25, axis=1) for z in (x, y)]
    np.testing.assert_allclose(first[1:], np.percentile(draws[0] - draws[1], (2.5, 97.5)), atol=0.1)


def test_the_spread_over_settings_is_within_seeds():
    np.testing.assert_allclose(spread(pd.DataFrame([[0.0, 5, 10], [102, 112, 122]])), [5, 10])


def test_rank_correlations():
    x = np.arange(8.0)
    y = [0.0, 2, 1, 3, 5, 4, 6, 70]  # two neighbours exchanged twice: 1 − 6·4 / (8·63)
    runs = pd.DataFrame(dict(share=x, score=y, seed=x))
    rho, low, high = study_report.rank_correlation(runs, "share")
    assert rho == pytest.approx(1 - 24 / 504) and 0.7 < low < rho < high <= 1
    few, flat = runs.assign(seed=x % 4), runs.assign(share=0)
    assert all(np.isnan(study_report.rank_correlation(x, "share")).all() for x in (few, flat))
    # Ten copies of the runs, of the same seeds, say nothing new; as many independent ones do.
    rng = np.random.default_rng(0)
    once = pd.DataFrame(dict(share=rng.normal(size=20), score=rng.normal(size=20), seed=range(20)))
    copies = pd.concat([once] * 10)
    widths = [np.ptp(study_report.rank_correlation(x, "share")[1:])
              for x in (once, copies, copies.assign(seed=range(200)))]
    assert widths[1] == pytest.approx(widths[0], rel=0.01) and widths[2] < widths[0] / 2


def test_intervals_contain_the_truth_as_often_as_they_say():
    """Of methods that do not differ, on five seeds, whose scores go together, where three runs in ten fail."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        x, y = rng.normal(0.8, 0.2, (2, 5)) + rng.normal(0, 0.3, 5)
        x, y = (np.where(rng.random(5) < 0.3, rng.normal(0.1, 0.05, 5), z) for z in (x, y))
        _, low, high, p = contrast((1, series(*x)), (-1, series(*y)))
        hits += low <= 0 <= high
        assert (p > 0.05) == (low <= 0 <= high)
    assert 0.93 < hits / 1000 < 0.985


# ----------------------------------------------------------------------------------------------------------- the report

CASES = STUDY + '"B" = "SCRIPT"\n'
for change in (
    ('"E" = {}', '"E" = {}\n"F" = {}\n"G" = {}'),
    ('"clean" = ""', '"clean" = ""\n"noise" = "--beta 1"'),
    ('reference = "A"', 'reference = "A"\ncomparisons = [["B", "A"]]'),
    ("seeds = 2", "seeds = 3"),
):
    CASES = CASES.replace(*change)
SCORES = {  # by method, environment and condition, of seeds 1, 2, 3
    ("A", "E", "clean"): (10, 20, 30), ("B", "E", "clean"): (30, 20, 40),
    ("A", "E", "noise"): (5, 6, 7), ("B", "E", "noise"): (20, 30, 40),
    ("A", "F", "clean"): (0, 1, 2), ("B", "F", "clean"): (2, 4, 3),
    ("A", "F", "noise"): (0, 0, 0), ("B", "F", "noise"): (1, 2),
    ("A", "G", "clean"): (-2, -3, -4), ("B", "G", "clean"): (-1, -2, -3),
    ("A", "G", "noise"): (-20, -21, -22), ("B", "G", "noise"): (-1, -3, -2),
}  # fmt: skip
RANDOM = dict(E=10, F=0, G=-1)


@pytest.fixture
def reported(tmp_path):
    """Study and folder of tables that were filled in by hand; one run is missing."""
    study = load(str(write_study(tmp_path, CASES)))
    folder = tmp_path / "results"
    folder.mkdir()
    runs = ["method,environment,condition,seed,pilot,steps,score,mean_weight,flips_noise,flips_normalization,command"]
    points = ["method,environment,condition,seed,pilot,step,score"]
    for (method, env_id, condition), scores in SCORES.items():
        for seed, score in enumerate(scores, 1):
            key = f"{method},{env_id},{condition},{seed},0"
            runs.append(f"{key},96,{score},{seed},0.1,{0.3 + seed / 100},x.py --total-timesteps 100 --seed {seed}")
            points += [f"{key},48,{score / 2}", f"{key},96,{score}"]
    (folder / "runs.csv").write_text("\n".join(runs) + "\n")
    (folder / "evaluations.csv").write_text("\n".join(points) + "\n")
    random = [f"{env_id},100,{score},1" for env_id, score in RANDOM.items()]
    (folder / "random.csv").write_text("\n".join(["environment,episodes,mean,std", *random]) + "\n")
    return study, folder


def test_scores_are_normalised_by_the_studys_own_clean_reference(reported):
    results = Results(*reported)
    assert dict(results.reference) == dict(E=20, F=1, G=-3)
    assert results.tasks == ["E", "F"]  # on G the reference is worse than the uniform policy
    np.testing.assert_allclose(results.normalized("A", "clean"), [[0, 0], [1, 1], [2, 2]])
    np.testing.assert_allclose(results.normalized("B", "noise"), [[1, 1], [2, 2]])  # seeds finished on both
    assert [cell.name for cell in results.missing] == ["B__F__noise__seed-3"]


def test_the_report_says_what_the_tables_hold(reported, monkeypatch):
    study, folder = reported
    monkeypatch.setattr(study_report, "REPS", 500)
    study_report.report(study, folder, "study.py run small")
    text = (folder / "report.md").read_text()
    assert "**1 of 36 runs are missing** (`B__F__noise__seed-3`). `study.py run small` completes them." in text
    assert "2 to 3 seeds each, 96 environment steps" in text
    assert "**Not in the aggregates**: G" in text
    assert f"within ±{MARGIN:.0%} of what A reaches above the uniform policy" in text
    half = 4.302653 * 10 / 3**0.5
    assert f"| A | 20.0 ({20 - half:.2f} to {20 + half:.1f}), n = 3 |" in text
    half = 4.302653 * 10 / 3**0.5  # of 20, 0 and 10; A is 10 above the uniform policy
    ends = f"{10 - half:.1f} to {10 + half:.1f}"
    assert f"| B − A | E | clean | 3 | +10.0 ({ends}) | {10 * half:.0f} % | 0.61 | undecided |" in text
    ends = f"{24 - 0.9 * half:.2f} to {24 + 0.9 * half:.1f}"
    assert f"| B − A | E | noise | 3 | +24.0 ({ends}) | {9 * half:.0f} % | 0.22 | B higher |" in text
    assert "| B − A | F | clean | 3 | +2.00 (-0.48 to 4.48) | 248 % |" in text
    assert "| B − A | G | clean | 3 | +1.00 (no interval) | – | nan | no verdict |" in text  # 1 for every seed
    # By noise A loses 20 − 6 = 14 on E and 18 on G, B nothing. G has no scale: A is not better than the uniform policy.
    assert "| B − A | E | noise | 3 | +14.0 (-26.9 to 54.9) | 409 % | 0.61 | undecided |" in text
    p = 7 * 2 * stats.t.sf(19 * 3**0.5, 2)  # the smallest one of seven; that of 18 is raised to it
    assert f"| B − A | G | noise | 3 | +19.0 (16.5 to 21.5) | – | {p:.2g} | B higher |" in text
    assert f"| B − A | G | noise | 3 | +18.0 (15.5 to 20.5) | – | {p:.2g} | B loses less |" in text
    assert "**7 intervals of differences** on single tasks, 5 of scores and 2 of what noise costs: 0 ties, 4" in text
    assert "leaves 2: B higher (B − A, G, noise); B loses less (B − A, G, noise)." in text
    assert "leaves 2." in study_report.verdicts(Results(study, folder).differences, named=False)
    # IQMs: A clean 0 0 1 1 2 2 → 1; B clean 1 2 2 3 3 4 → the middle four, 2.5.
    assert re.search(r"\| clean \| A \| 3 \| 1.00 \(", text) and re.search(r"\| clean \| B \| 3 \| 2.50 \(", text)
    assert re.search(r"\| B − A \| clean \| 3, 3 \| score \| \+1.50 \(", text)
    assert "| E | clean | 6 | 0.100 | 0.320 |" in text
    assert "| A | 2, 2 | 2, 2 | 2, 2 |\n| B | 2, 2 | 2, 1.5 | 2, 2 |" in text  # mean weights
    for figure in re.findall(r"\]\((.*\.png)\)", text):
        assert (folder / figure).exists()
    assert all(f"{name}.png" in text for name in ("differences", "learning_curves", "sign_flips"))


def test_a_report_of_one_seed_has_curves_and_no_intervals(reported):
    study, folder = reported
    lines = (folder / "runs.csv").read_text().splitlines()
    (folder / "runs.csv").write_text("\n".join(line for line in lines if line[0] == "m" or ",3,0,96," in line) + "\n")
    study_report.report(study, folder, "")
    results = Results(study, folder)
    assert results.tasks and set(results.evaluations.seed) == {3}  # those of runs under way are not in the curves
    text = (folder / "report.md").read_text()
    assert "learning_curves.png" in text and "differences.png" not in text
    assert "| B − A | E | clean | 1 |" in text


def test_a_report_refuses_runs_of_another_study(reported):
    study, folder = reported
    with pytest.raises(StudyError, match="`study.py collect` makes it"):
        study_report.report(study, folder / "empty", "")
    text = (folder / "runs.csv").read_text()
    (folder / "runs.csv").write_text(text.replace("--total-timesteps 100 ", "--total-timesteps 200 "))
    with pytest.raises(StudyError, match="holds a run that is not of this study"):
        study_report.report(study, folder, "")


def test_a_grid_is_reported_as_a_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(study_report, "REPS", 200)
    text = STUDY.replace('"A" = "SCRIPT"', '"A" = "SCRIPT"\n"B" = "SCRIPT --beta {k}"\n"C" = "SCRIPT --beta {k}"')
    text = text.replace('reference = "A"', 'reference = "A"\ncomparisons = [["B", "C"]]') + "[grid]\nk = [1, 2, 3]\n"
    study = load(str(write_study(tmp_path, text)))
    scores = {"A": (1, 1)}
    for k in (1, 2, 3):
        scores |= {f"B k={k}": (10 * k, 11 * k), f"C k={k}": (5, 7)}
    lines = ["method,environment,condition,seed,pilot,steps,score,mean_weight,flips_noise,flips_normalization,command"]
    lines += [f"{method},E,clean,{seed},0,96,{score},{1 + seed},0,0.3,x --total-timesteps 100 "
              for method, pair in scores.items() for seed, score in enumerate(pair, 1)]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    (tmp_path / "evaluations.csv").write_text("method,environment,condition,seed,pilot,step,score\n")
    (tmp_path / "random.csv").write_text("environment,episodes,mean,std\nE,100,0,1\n")
    study_report.report(study, tmp_path, "")
    text = (tmp_path / "report.md").read_text()
    assert "| B | E | clean | 3 × 2 | 21.0 | 10.5 | 31.5 | 10.5 | 0.14 |" in text  # χ² = 4
    assert "| C | E | clean | 3 × 2 | 6.00 | 6.00 | 6.00 | 0.00 | – |" in text
    assert "| B − C | E | clean | +10.5 (4.15 to 16.9) | B higher |" in text
