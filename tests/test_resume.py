"""Runs that are interrupted, fail, and go on."""

import functools
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import ale_py
import numpy as np
import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_baseline
import sa2c_atari
import sppo_atari
import sppo_continuous

ROOT = Path(__file__).parent.parent
pytestmark = [  # a writer whose run has failed, and render() without a frame
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*RGB-array rendering"),
]
QUICK = "--no-cuda --torch-threads 1 --eval-episodes 1"
GAMES = f"--num-envs 4 --num-steps 16 --total-timesteps 640 --env-id ALE/Breakout-v5 --checkpoint-interval 64 {QUICK}"
CONTROL = f"--num-minibatches 2 --update-epochs 1 --checkpoint-interval 128 {QUICK}"
TINY = f"sppo_continuous.py --env-id tiny:Tiny-v0 --num-steps 16 {CONTROL} --checkpoint-interval 16"


def start(folder: Path, command: str, env=(), **options) -> subprocess.Popen:
    """Starts a script, in quotes if need be, in `folder`."""
    script, *flags = shlex.split(command.removeprefix("python "))
    usual = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | usual | dict(env))
    return subprocess.Popen([sys.executable, ROOT / script, *flags], cwd=folder, **pipes | options)


def run(*args, status: int = 0, **options) -> tuple[str, str]:
    """Runs a script to its end. What it wrote: stdout and stderr."""
    process = start(*args, **options)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    return output, errors


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, iteration: int) -> None:
    """Until it is of this iteration or a later one. Whenever one looks, it is whole."""
    while not list(folder.glob("runs/*/checkpoint.pt")) or checkpoint_of(folder)["iteration"] < iteration:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def the_run(folder: Path) -> Path:
    (run,) = folder.glob("runs/*")
    return run


def checkpoint_of(folder: Path) -> dict:
    return torch.load(the_run(folder) / "checkpoint.pt", weights_only=True)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but the speed; steps grow within every tag."""
    events = EventAccumulator(str(the_run(folder)), size_guidance={"scalars": 0}).Reload()
    points = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag, series in points.items():
        steps = [step for step, _ in series]
        assert steps == sorted(set(steps)), tag
    points.pop("charts/SPS", None)
    return points


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# ------------------------------------------------------------------------------------------------------ stop and resume

INTERRUPTED = {  # the flags, and signals: each is sent when there is a checkpoint of that iteration
    "sppo_continuous": (f"--env-id CartPole-v1 --num-steps 128 --total-timesteps 8192 --anneal-lr {CONTROL}",
                        {4: signal.SIGKILL, 16: signal.SIGTERM}),
    "ppo_baseline": (f"--env-id Hopper-v5 --num-envs 2 --num-steps 64 --total-timesteps 2560 --eval-interval 512 "
                     f"--reward-noise 0.05 --advantage-noise 0.1 {CONTROL}", {4: signal.SIGINT, 12: signal.SIGKILL}),
    "sppo_atari": (f"--update-epochs 1 {GAMES}", {3: signal.SIGHUP}),
    "sa2c_atari": (f"--log-interval 3 {GAMES}", {3: signal.SIGUSR1}),
}  # fmt: skip


def run_interrupted(folder: Path, name: str) -> Path:
    """Interrupts a run and does what it says; what folder and script are called has spaces."""
    script = shutil.copy(ROOT / f"{name}.py", folder / "a script.py")
    flags, signals = INTERRUPTED[name]
    command = f'python "{script}" {flags}'
    for iteration, number in signals.items():
        process = start(folder, command)
        wait_for_checkpoint(process, folder, iteration)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors
        if number == signal.SIGKILL:
            assert process.returncode == -number
            command = f'python "{script}" --resume "{the_run(folder)}"'
        else:
            assert process.returncode == 128 + number
            explanation, command = output.splitlines()[-1].split(": ")
            assert explanation == "stopped; to go on" and command.startswith(f'python "{script}" --resume "')
    output, _ = run(folder, command)
    assert f"score at {checkpoint_of(folder)['args']['total_timesteps']} steps: " in output
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of each script, interrupted by signals and resumed until it was complete."""
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path_factory.mktemp("a folder") for _ in INTERRUPTED]
        return dict(zip(INTERRUPTED, pool.map(run_interrupted, folders, INTERRUPTED)))


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_resumed_run_has_all_its_steps_once(name, interrupted):
    saved, points = checkpoint_of(interrupted[name]), scalars(interrupted[name])
    args = types.SimpleNamespace(**{"log_interval": 1} | saved["args"])
    batch, total = args.num_envs * args.num_steps, args.total_timesteps
    assert saved["iteration"] * batch == total
    expected = [*range(args.log_interval * batch, total, args.log_interval * batch), total]
    assert [step for step, _ in points["losses/policy_loss"]] == expected
    evaluations = range(args.eval_interval, total + 1, args.eval_interval) if args.eval_interval else [total]
    assert [step for step, _ in points["eval/episodic_return"]] == [step + 1 for step in evaluations]
    first, last = points["charts/learning_rate"][0][1], points["charts/learning_rate"][-1][1]
    assert first == pytest.approx(args.learning_rate)
    assert last == pytest.approx(args.learning_rate * (batch / total if args.anneal_lr else 1))


def test_a_complete_run_is_evaluated_again_or_made_longer(interrupted):
    folder = interrupted["sppo_continuous"]
    resume = f'sppo_continuous.py --resume "runs/{the_run(folder).name}"'
    before, points = checkpoint_of(folder), scalars(folder)
    output, _ = run(folder, f"{resume} --eval-episodes 2")
    first, score = output.splitlines()
    assert "'eval_episodes': 2" in first and "gamma" not in first
    assert score.startswith("score at 8192 steps: ") and score.endswith("(2 episodes)")
    again, now = checkpoint_of(folder), scalars(folder)
    assert all(equal(again[key], before[key]) for key in ("iteration", "agent", "optimizer"))
    (old,), (new,) = points.pop("eval/episodic_return"), now.pop("eval/episodic_return")
    assert old[0] == new[0] == 8193 and points == now
    output, _ = run(folder, f"{resume} --total-timesteps 8320 --gamma 0.9")
    assert "'total_timesteps': 8320" in output and "'gamma': 0.9" in output and "(2 episodes)" in output
    assert checkpoint_of(folder)["iteration"] == 65
    assert scalars(folder)["charts/learning_rate"][-1] == (8320, pytest.approx(3e-4 / 65))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_run_at_once(number, tmp_path):
    command = TINY.replace("--num-steps 16", "--num-steps 128")
    process = start(tmp_path, command, env={"TROUBLE": "wait", "AT": "200"})
    wait_for_checkpoint(process, tmp_path, 1)
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None  # it is in the second iteration, which takes long
    process.send_signal(number)
    output, _ = process.communicate(timeout=3)
    assert process.returncode == -number and "stopped" not in output
    assert checkpoint_of(tmp_path)["iteration"] == 1


def test_an_evaluation_can_be_killed_and_stopped_and_is_made_up_for(tmp_path):
    """The run is saved before. Its evaluation would take a minute; the first step is the rehearsal's."""
    process = start(tmp_path, f"{TINY} --total-timesteps 64 --eval-episodes 80", env={"TROUBLE": "wait", "AT": "150"})
    wait_for_checkpoint(process, tmp_path, 4)
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -signal.SIGKILL and "score" not in process.communicate()[0]
    resume = f"sppo_continuous.py --resume runs/{the_run(tmp_path).name}"
    process = start(tmp_path, resume, env={"TROUBLE": "wait", "AT": "81"})
    while len(list(the_run(tmp_path).glob("events*"))) < 2:
        time.sleep(0.01)
    time.sleep(1)
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "score" not in output and "to go on" in output
    assert "eval/episodic_return" not in scalars(tmp_path)
    output, _ = run(tmp_path, resume)
    assert "score at 64 steps" in output
    points = scalars(tmp_path)
    assert [step for step, _ in points["eval/episodic_return"]] == [65]
    assert [step for step, _ in points["losses/value_loss"]] == [16, 32, 48, 64]


def test_output_that_cannot_be_written_ends_no_run(tmp_path):
    pipe = dict(stdout=subprocess.PIPE)
    ways = {  # environment, options, does something close its standard output?
        "head": ({}, pipe, True),
        "closed": ({}, dict(preexec_fn=functools.partial(os.close, 1)), False),
        "ascii": ({"PYTHONIOENCODING": "ascii"}, pipe, False),  # has no ± and no γ
        "full": ({}, dict(stdout=open("/dev/full", "w"), stderr=open("/dev/full", "w")), False),
    }
    processes = []
    for name, (env, options, leave) in ways.items():
        (tmp_path / name).mkdir()
        processes.append(start(tmp_path / name, f"{TINY} --total-timesteps 64", env=env, **options))
        if leave:
            processes[-1].stdout.close()
    for name, process in zip(ways, processes):
        errors = process.stderr.read() if process.stderr else ""
        assert process.wait(60) == 0, errors
        assert checkpoint_of(tmp_path / name)["iteration"] == 4 and "Error" not in errors
        assert name != "ascii" or "score at 64 steps: " in process.stdout.read()


def test_ctrl_c_may_end_tee_first(tmp_path):
    """`2>&1 | tee log`. What is printed after that is lost, and nothing else."""
    process = start(tmp_path, f"{TINY} --total-timesteps 640000 --eval-interval 16", stderr=subprocess.STDOUT)
    wait_for_checkpoint(process, tmp_path, 2)
    process.stdout.close()
    before = checkpoint_of(tmp_path)["iteration"]
    wait_for_checkpoint(process, tmp_path, before + 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT


def test_help_into_a_closed_pipe_is_no_error(tmp_path):
    process = start(tmp_path, "sppo_continuous.py --help")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_a_full_disk_loses_nothing(tmp_path):
    run(tmp_path, f"{TINY} --total-timesteps 64")
    before = (the_run(tmp_path) / "checkpoint.pt").read_bytes()
    longer = f"sppo_continuous.py --resume runs/{the_run(tmp_path).name} --total-timesteps"
    for kilobytes in (50, 1):  # too small for a checkpoint, and for TensorBoard
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))
        run(tmp_path, f"{longer} 640", status=1, preexec_fn=limit)
        assert (the_run(tmp_path) / "checkpoint.pt").read_bytes() == before
    run(tmp_path, f"{longer} 96")
    assert checkpoint_of(tmp_path)["iteration"] == 6
    assert [step for step, _ in scalars(tmp_path)["losses/value_loss"]] == [16, 32, 48, 64, 80, 96]


# -------------------------------------------------------------------------------------------------- within this process


GAME, ENVIRONMENT = {"env_id": "ALE/Breakout-v5"}, {"env_id": "tiny:Tiny-v0"}
KINDS = [(sppo_atari, GAME), (sa2c_atari, GAME), (ppo_baseline, GAME), (ppo_baseline, ENVIRONMENT),
         (sppo_continuous, ENVIRONMENT)]  # fmt: skip
ALL = pytest.mark.parametrize("script, env", KINDS, ids=[f"{x.__name__} {y['env_id']}" for x, y in KINDS])
CONTINUOUS = pytest.mark.parametrize("script", [ppo_baseline, sppo_continuous])


def make_args(script, env=ENVIRONMENT, **flags):
    """Four iterations, a checkpoint after each."""
    given = dict(num_envs=2, num_steps=16, total_timesteps=128, num_minibatches=2, update_epochs=2, torch_threads=1,
                 log_interval=1, cuda=False, eval_episodes=1, checkpoint_interval=1, seed=3) | env | flags  # fmt: skip
    return script.Args(**{field.name: given[field.name] for field in fields(script.Args) if field.name in given})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """For `main` called here: an empty folder to run in; no handlers and no troubles are left behind."""
    handlers = {number: signal.getsignal(number) for number in (1, 2, 10, 15)}
    monkeypatch.chdir(tmp_path)
    for name, value in (("steps", 0), ("alive", 0), ("seeds", set())):
        monkeypatch.setattr(tiny.Tiny, name, value)
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def trouble(monkeypatch, kind: str | None, at: int = 0) -> None:
    """From this step on, counted from here."""
    monkeypatch.setattr(tiny.Tiny, "steps", 0)
    monkeypatch.setenv("TROUBLE", kind)
    monkeypatch.setenv("AT", str(at))


def resume(script, folder: Path, **flags) -> None:
    for file in the_run(folder).glob("events*"):  # TensorBoard reads them in this order, here within the same second
        file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0")))
    saved = checkpoint_of(folder)
    script.main(script.Args(**saved["args"] | {"resume": str(the_run(folder))} | flags), saved)


@ALL
def test_a_resumed_run_is_the_uninterrupted_one(script, env, folder, monkeypatch):
    """To the bit, as far as episodes are over at the checkpoint and do without randomness: all draws are the same. What
    was logged after the checkpoint is logged once."""
    save, kept = script.save, []

    def watched_save(path, **state):
        save(path, **state)
        kept.append(path.read_bytes())
        assert scalars(folder).get("losses/value_loss", [(0, None)])[-1][0] == 32 * state["iteration"]  # is on disk

    monkeypatch.setattr(script, "save", watched_save)
    short = functools.partial(ale_py.vector_env.AtariVectorEnv, max_num_frames_per_episode=64, noop_max=0)
    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", short)
    noise = dict(reward_noise=0.1, advantage_noise=0.1, anneal_lr=True, anneal_clip=True, eval_interval=64)
    one = dict(num_envs=1, num_steps=32) if env == ENVIRONMENT else {}  # of several the first lags behind in statistics
    script.main(make_args(script, env, **noise, **one))
    whole, points = checkpoint_of(folder), scalars(folder)
    assert len(kept) == 4 and len(points["eval/episodic_return"]) == 2
    for content in list(kept):  # as if there had been a crash before the next one
        (the_run(folder) / "checkpoint.pt").write_bytes(content)
        resume(script, folder)
        again = checkpoint_of(folder)
        assert all(equal(again[key], whole[key]) for key in whole if key != "args")
        assert scalars(folder) == points


@CONTINUOUS
def test_statistics_go_on(script):
    args = make_args(script)
    envs = script.Environments(args, np.array([1, 2]))
    for _ in range(20):
        envs.step(np.zeros((2, 1)))
    saved = [{key: torch.tensor(x) for key, x in vars(stats).items()} for stats in envs.stats]
    again = script.Environments(args, np.array([1, 2]), saved)
    for one, other in zip(again.stats, envs.stats):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, vars(other)[name])


@ALL
def test_no_poisoned_checkpoint_is_written(script, env, folder, monkeypatch):
    """A reward of the third iteration is not a number."""
    trouble(monkeypatch, "nan", at=70)
    if env == GAME:
        step, calls = script.Games.step, []
        monkeypatch.setattr(script.Games, "step", lambda self, action: calls.append(0) or (
            step(self, action)[0] * (float("nan") if len(calls) == 40 else 1), *step(self, action)[1:]))  # fmt: skip
    with pytest.raises(FloatingPointError, match="not finite: step=64, "):
        script.main(make_args(script, env))
    saved = checkpoint_of(folder)
    assert saved["iteration"] == 2 and all(tensor.isfinite().all() for tensor in saved["agent"].values())


@ALL
def test_a_failing_write_leaves_the_old_file(script, env, folder, monkeypatch):
    path = folder / "checkpoint.pt"
    script.save(path, value=torch.ones(3))

    def fail(descriptor):
        assert next(folder.glob("*.tmp")).stat().st_size > 1000  # nothing is left in a buffer
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        script.save(path, value=torch.zeros(3))
    assert torch.load(path, weights_only=True)["value"].tolist() == [1, 1, 1]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@ALL
@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint_cannot_run_code(script, env, old_format, folder, monkeypatch):
    state = {"args": {}, "iteration": Payload()}
    torch.save(state, "checkpoint.pt", _use_new_zipfile_serialization=not old_format)
    monkeypatch.setattr(sys, "argv", ["script", "--resume", "."])
    with pytest.raises(pickle.UnpicklingError):
        script.read_flags()
    assert not Path("harm").exists()
    pickle.loads(pickle.dumps(state))
    assert Path("harm").exists()  # it would have


@ALL
def test_what_is_typed_wins(script, env, folder, monkeypatch):
    """Also where it is a default; all else is as it was."""
    stored = make_args(script, env, gamma=0.9, learning_rate=1e-3)
    script.save(folder / "checkpoint.pt", args=vars(stored), iteration=0)

    def flags(*given):
        monkeypatch.setattr(sys, "argv", ["script", "--resume", ".", *given])
        return vars(script.read_flags()[0])

    assert flags() == vars(stored) | {"resume": "."}
    assert flags("--gamma", "0.99", "--cuda") == vars(stored) | {"resume": ".", "gamma": 0.99, "cuda": True}


@ALL
def test_a_run_is_stopped_by_a_signal_and_leaves_handlers_as_they_were(script, env, folder, monkeypatch):
    def handlers():
        return [signal.getsignal(number) for number in range(1, signal.NSIG)]

    signal.signal(signal.SIGUSR1, lambda *_: None)
    before = handlers()
    script.main(make_args(script, env, total_timesteps=32))
    assert handlers() == before
    shutil.rmtree("runs")
    gae, calls = script.gae, []
    monkeypatch.setattr(script, "gae", lambda *x: calls.append(os.kill(os.getpid(), signal.SIGUSR1)) or gae(*x))
    with pytest.raises(SystemExit) as stop:
        script.main(make_args(script, env, checkpoint_interval=0))
    assert stop.value.code == 128 + signal.SIGUSR1 and handlers() == before
    assert checkpoint_of(folder)["iteration"] == 1


@ALL
def test_a_run_in_a_thread(script, env, folder):
    thread = threading.Thread(target=script.main, args=(make_args(script, env),))
    thread.start()
    thread.join()
    assert checkpoint_of(folder)["iteration"] == 4


@CONTINUOUS
def test_a_failing_evaluation_loses_nothing(script, folder, monkeypatch):
    trouble(monkeypatch, "raise", at=135)  # one step is the rehearsal's, 128 are the training's
    with pytest.raises(RuntimeError, match="exploded"):
        script.main(make_args(script, checkpoint_interval=0))
    assert checkpoint_of(folder)["iteration"] == 4
    trouble(monkeypatch, "mended")
    resume(script, folder)
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [129]


SIGNAL = functools.partial(os.kill, os.getpid(), signal.SIGUSR1)


@ALL
@pytest.mark.parametrize("event, at, iteration", [(SIGNAL, 1, 0), (SIGNAL, 5, 4), (sys.exit, 5, 4)],
                         ids=["before training", "after it", "failing"])  # fmt: skip
def test_an_evaluation_is_ended_by_a_signal_and_comes_after_the_checkpoint(
    script, env, event, at, iteration, folder, monkeypatch
):
    """The rehearsal of one step, and the final one, within this step."""
    steps = []
    for agent in [kind for name, kind in vars(script).items() if name.endswith("Agent")]:

        def watched_act(self, obs, *noise, act=agent.act):
            if len(obs) == 1:  # in training there are two environments
                steps.append(obs)
                if len(steps) == at:
                    event()
            return act(self, obs, *noise)

        monkeypatch.setattr(agent, "act", watched_act)
    with pytest.raises(SystemExit) as stop:
        script.main(make_args(script, env, checkpoint_interval=0))
    assert len(steps) == at and stop.value.code == (None if event is sys.exit else 128 + signal.SIGUSR1)
    assert checkpoint_of(folder)["iteration"] == iteration and "eval/episodic_return" not in scalars(folder)


@ALL
def test_a_video_that_cannot_be_written_shows_before_training(script, env, folder, monkeypatch):
    def fail(*args, **options):
        raise OSError("no ffmpeg")

    monkeypatch.setattr(tiny.Tiny, "render", lambda self: np.zeros((64, 64, 3), np.uint8))
    monkeypatch.setattr("imageio.get_writer", fail)
    monkeypatch.setattr(script, "update", None)  # is not called
    with pytest.raises(OSError, match="no ffmpeg"):
        script.main(make_args(script, env, capture_video=True))


@CONTINUOUS
@pytest.mark.parametrize("kind, flags", [("single", {}), ("render", {"capture_video": True})])
def test_what_an_evaluation_needs_is_tried_first(kind, flags, script, folder, monkeypatch):
    """A second environment; frames."""
    trouble(monkeypatch, kind)
    with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)):
        script.main(make_args(script, num_envs=1, **flags))
    assert tiny.Tiny.steps == 0


@CONTINUOUS
def test_an_evaluation_without_a_time_limit_ends(script, folder, monkeypatch, capsys):
    trouble(monkeypatch, "endless", at=2)
    evaluate = script.evaluate_episodes.__wrapped__
    assert evaluate.__defaults__ == (100_000,)
    monkeypatch.setattr(evaluate, "__defaults__", (50,))
    script.main(make_args(script))
    assert tiny.Tiny.steps == 1 + 128 + 50 and "score at 128 steps" in capsys.readouterr().out


@CONTINUOUS
def test_environments_with_randomness_of_their_own_can_be_repeated(script, folder, monkeypatch):
    trouble(monkeypatch, "random")
    runs = []
    for flags in ({}, {}, {"eval_interval": 32}, {"seed": 4}):
        script.main(make_args(script, **flags))
        runs.append({tag: points for tag, points in scalars(folder).items() if tag != "eval/episodic_return"})
        shutil.rmtree("runs")
    assert runs[0] == runs[1] == runs[2] != runs[3]


@ALL
def test_seeds_of_environments_fit_31_bits(script, env, folder, monkeypatch):
    """Some take no others. They are new for new episodes, the same for each evaluation. The run's may be longer."""
    seeds, name = [], "Games" if env == GAME else "Environments"
    kind = getattr(script, name)
    monkeypatch.setattr(script, name, lambda args, given, *rest: seeds.append(given) or kind(args, given, *rest))
    args = make_args(script, env, num_envs=8, total_timesteps=128, seed=2**40)
    script.main(args)
    resume(script, folder, total_timesteps=256)
    (first, second), evaluations = [x for x in seeds if len(x) == 8], [x.tolist() for x in seeds if len(x) == 1]
    evaluations += [tiny.Tiny.seeds - {None} - {*first, *second}] * (env == ENVIRONMENT)
    assert len({*first, *second}) == 16 and len(set(map(tuple, evaluations))) == 1
    assert all(0 <= seed < 2**31 for seed in (*first, *second, *evaluations[0])) and max(first) > 2**30


@ALL
def test_weights_and_biases_goes_on_with_the_same_run(script, env, folder, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: calls.append(options)))
    script.main(make_args(script, env, track=True))
    resume(script, folder)
    assert [(call["id"], call["resume"]) for call in calls] == [(the_run(folder).name, "allow")] * 2
