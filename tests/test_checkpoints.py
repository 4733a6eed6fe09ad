"""Runs that are interrupted, go on, and fail clearly."""

import ctypes
import io
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_baseline
import sa2c_atari
import sppo_atari
import sppo_continuous

ROOT = Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")
QUICK = "--no-cuda --torch-threads 1 --eval-episodes 1 --checkpoint-interval 128"
POLE = f"sppo_continuous.py --env-id CartPole-v1 --num-steps 128 --num-minibatches 2 --update-epochs 1 {QUICK}"
HOPPER = f"ppo_baseline.py --env-id Hopper-v5 --num-envs 2 --num-steps 64 --num-minibatches 2 {QUICK}"
GAMES = f"--num-envs 4 --num-steps 16 --total-timesteps 640 --env-id ALE/Breakout-v5 {QUICK} --checkpoint-interval 64"

# An environment that makes trouble at step AT: TROUBLE is `raise`, `wait`, or a reward.
TROUBLE = """
import os, time
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Trouble(CartPoleEnv):
    steps = 0

    def step(self, action):
        obs, reward, *rest = super().step(action)
        Trouble.steps += 1
        if Trouble.steps >= int(os.environ["AT"]):
            if os.environ["TROUBLE"] == "raise":
                raise RuntimeError("the simulation exploded\\nand this is its second line")
            elif os.environ["TROUBLE"] == "wait":
                time.sleep(0.05)
            else:
                reward = float(os.environ["TROUBLE"])
        return obs, reward, *rest

gym.register("Trouble-v0", Trouble, max_episode_steps=500)
"""


def start(folder: Path, command: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """Starts a script in `folder`; `RUN` stands for the folder of the one run there."""
    if "RUN" in command:
        command = command.replace("RUN", f"runs/{the_run(folder).name}")
    script, *flags = command.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)} | (env or {})
    command = [sys.executable, ROOT / script, *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes, **options)


def run(*args, status: int = 0, **options) -> tuple[str, str]:
    """Runs a script to its end. What it wrote: stdout and stderr."""
    process = start(*args, **options)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    return output, errors


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Until it is of this step or a later one. Whenever one looks, it is whole."""
    while not (found := list(folder.glob("runs/*/checkpoint.pt"))) or read(found[0])["step"] < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def one_line(errors: str, *words: str) -> None:
    assert len(errors.splitlines()) == 1 and "Traceback" not in errors, errors
    assert all(word in errors for word in words), errors


def the_run(folder: Path) -> Path:
    (run,) = folder.glob("runs/*")
    return run


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def checkpoint_of(folder: Path) -> dict:
    return read(the_run(folder) / "checkpoint.pt")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but the speed; steps grow within every tag."""
    events = EventAccumulator(str(the_run(folder)), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    points = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {"text": [(point.step, None) for point in events.Tensors("hyperparameters/text_summary")]}
    for tag, series in (points | texts).items():
        steps = [step for step, _ in series]
        assert steps == sorted(set(steps)), tag
    del points["charts/SPS"]
    return points


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# ------------------------------------------------------------------------------------------------------ stop and resume

INTERRUPTED = {  # the flags, and signals: each is sent when there is a checkpoint of that step
    "pole": (f"{POLE} --total-timesteps 4096 --anneal-lr --anneal-clip", {512: signal.SIGKILL, 2048: signal.SIGTERM}),
    "hopper": (f"{HOPPER} --total-timesteps 2560 --eval-interval 512 --reward-noise 0.05 --advantage-noise 0.1",
               {512: signal.SIGINT, 1536: signal.SIGKILL}),
    "sppo": (f"sppo_atari.py {GAMES} --update-epochs 1", {192: signal.SIGTERM}),
    "sa2c": (f"sa2c_atari.py {GAMES} --log-interval 3", {192: signal.SIGKILL}),
}  # fmt: skip


def run_interrupted(folder: Path, name: str) -> Path:
    flags, signals = INTERRUPTED[name]
    script = flags.split()[0]
    for step, number in signals.items():
        process = start(folder, flags)
        wait_for_checkpoint(process, folder, step)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert errors == ""
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            step, last = checkpoint_of(folder)["step"], output.splitlines()[-1]
            assert process.returncode == 128 + number
            assert f"stopped at {step} steps" in last and last.endswith(f"--resume runs/{the_run(folder).name}")
        flags = f"{script} --resume RUN"
    run(folder, flags)
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of each kind, interrupted by signals and resumed until it was complete."""
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path_factory.mktemp("interrupted") for _ in INTERRUPTED]
        return dict(zip(INTERRUPTED, pool.map(run_interrupted, folders, INTERRUPTED)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same runs without interruption and without checkpoints, where they should be the same."""
    folders = {name: tmp_path_factory.mktemp("whole") for name in ("pole", "hopper")}
    with ThreadPoolExecutor(2) as pool:
        commands = [INTERRUPTED[name][0] + " --checkpoint-interval 0" for name in folders]
        outputs = dict(zip(folders, pool.map(run, folders.values(), commands)))
    return {name: (folder, outputs[name][0]) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["pole", "hopper"])
def test_a_resumed_run_is_the_uninterrupted_one(name, whole, interrupted):
    """To the bit, and checkpoints change nothing: the whole run wrote none."""
    one, other = whole[name][0], interrupted[name]
    first, second = (read(the_run(folder) / "model.pt") for folder in (one, other))
    assert first.pop("args") | {"checkpoint_interval": 128} == second.pop("args")
    assert equal(first, second)
    assert scalars(one) == scalars(other)
    assert not (the_run(one) / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_resumed_run_has_all_its_steps_once(name, interrupted):
    folder, flags = interrupted[name], INTERRUPTED[name][0]
    saved, points = checkpoint_of(folder), scalars(folder)
    total, interval = saved["args"]["total_timesteps"], saved["args"].get("log_interval", 1)
    batch = saved["args"]["num_envs"] * saved["args"]["num_steps"]
    assert saved["step"] == saved["iteration"] * batch == total and saved["args"]["resume"] is None
    expected = [*range(interval * batch, total, interval * batch), total]
    assert [step for step, _ in points["losses/policy_loss"]] == expected
    assert points["eval/episodic_return"][-1][0] == total
    rate, (_, first), (_, last) = saved["args"]["learning_rate"], *points["charts/learning_rate"][:: len(expected) - 1]
    annealed = "anneal" in flags or name == "sppo"
    assert first == pytest.approx(rate) and last == pytest.approx(rate * batch / total if annealed else rate)
    assert 0 < saved["seconds"] < 60


def test_a_complete_run_can_only_be_made_longer(interrupted):
    folder = interrupted["pole"]
    before = (the_run(folder) / "checkpoint.pt").read_bytes()
    output, _ = run(folder, "sppo_continuous.py --resume RUN")
    assert len(output.splitlines()) == 1 and "is complete, 4096 steps" in output
    assert (the_run(folder) / "checkpoint.pt").read_bytes() == before
    output, _ = run(folder, "sppo_continuous.py --resume RUN --total-timesteps 4400 --eval-episodes 2")
    assert "from step 4096" in output and "final score at 4352 steps" in output and "(2 episodes)" in output
    saved = checkpoint_of(folder)
    assert (saved["step"], saved["iteration"], saved["args"]["total_timesteps"]) == (4352, 34, 4400)
    assert scalars(folder)["charts/learning_rate"][-1][1] == pytest.approx(3e-4 / 34)


@pytest.mark.parametrize("name", ["hopper", "sppo"])
def test_the_model_can_be_played(name, interrupted):
    """The same episodes as the final evaluation; nothing is written but a video."""
    folder, script = interrupted[name], INTERRUPTED[name][0].split()[0]
    files = {file: file.read_bytes() for file in the_run(folder).rglob("*") if file.is_file()}
    video = "--capture-video" if name == "sppo" else ""
    output, _ = run(folder, f"{script} --evaluate RUN {video}")
    score = scalars(folder)["eval/episodic_return"][-1][1]
    assert len(output.splitlines()) == 1
    assert output.startswith(f"score at {checkpoint_of(folder)['step']} steps: {score:.2f} ± 0.00 (1 ")
    new = {file for file in the_run(folder).rglob("*") if file.is_file()} - files.keys()
    assert [file.name for file in new] == (["evaluation.mp4"] if video else [])
    assert all(file.read_bytes() == content for file, content in files.items())


def test_two_runs_of_one_second_do_not_share_a_folder(tmp_path):
    processes = [start(tmp_path, f"{POLE} --total-timesteps 128") for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("runs/*/model.pt"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_run_at_once(number, tmp_path):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    command = POLE.replace("CartPole-v1", "trouble:Trouble-v0") + " --total-timesteps 12800"
    process = start(tmp_path, command, env={"TROUBLE": "wait", "AT": "300"})
    wait_for_checkpoint(process, tmp_path, 256)
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None  # it is in the third iteration, which takes long
    process.send_signal(number)
    output, errors = process.communicate(timeout=3)
    assert process.returncode == -number and errors == "" and "stopped" not in output
    assert checkpoint_of(tmp_path)["step"] == 256


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "trouble, words",
    [
        ("raise", ("RuntimeError: the simulation exploded", "traceback.txt")),
        ("nan", ("infinite or NaN in iteration 3", "value_loss")),
    ],
)
def test_a_failure_is_one_line_that_names_the_checkpoint(trouble, words, tmp_path):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    command = POLE.replace("CartPole-v1", "trouble:Trouble-v0") + " --total-timesteps 12800"
    _, errors = run(tmp_path, command, status=1, env={"TROUBLE": trouble, "AT": "300"})
    one_line(errors, "sppo_continuous.py: ", *words, "step 256", "--resume runs/trouble:")
    saved = checkpoint_of(tmp_path)
    assert saved["step"] == 256 and all(tensor.isfinite().all() for tensor in saved["agent"].values())
    assert "Traceback" in (the_run(tmp_path) / "traceback.txt").read_text()
    run(tmp_path, "sppo_continuous.py --resume RUN", env={"TROUBLE": trouble, "AT": "1000000"})  # mended meanwhile
    assert [step for step, _ in scalars(tmp_path)["losses/value_loss"]] == list(range(128, 12801, 128))
    assert checkpoint_of(tmp_path)["step"] == 12800


def test_a_failure_before_the_first_checkpoint_says_so(tmp_path):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    command = POLE.replace("CartPole-v1", "trouble:Trouble-v0")
    _, errors = run(tmp_path, command, status=1, env={"TROUBLE": "raise", "AT": "100"})
    one_line(errors, "the simulation exploded", "there is no runs/", "checkpoint.pt")


SCRIPTS = {
    sppo_atari: dict(env_id="ALE/Breakout-v5", num_envs=2, num_steps=16, total_timesteps=64),
    sa2c_atari: dict(env_id="ALE/Breakout-v5", num_envs=2, num_steps=16, total_timesteps=64),
    ppo_baseline: dict(env_id="ALE/Breakout-v5", num_envs=2, num_steps=16, total_timesteps=64),
    sppo_continuous: dict(env_id="CartPole-v1", num_steps=32, num_minibatches=2, total_timesteps=64),
}
ALL = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """For `main` called here: an empty folder to run in, and no handlers left behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_args(script, **flags):
    args = script.Args(**SCRIPTS[script] | dict(cuda=False, eval_episodes=1, checkpoint_interval=1, seed=3) | flags)
    if script is ppo_baseline:
        script.fill_in(args)
    return args


@ALL
@pytest.mark.parametrize("quantity", ["policy_loss", "forward_loss", "value_loss", "entropy", "grad_norm", "parameter"])
def test_what_is_not_finite_is_noticed(script, quantity):
    agent = torch.nn.Linear(2, 1)
    stats = {f"losses/{name}": 1.0 for name in "policy_loss forward_loss value_loss entropy grad_norm".split()}
    script.check_finite(stats, agent, 7)
    for bad in (NAN, INF):
        if quantity == "parameter":
            agent.bias.data[:] = bad
        with pytest.raises(FloatingPointError) as error:
            script.check_finite(stats | {f"losses/{quantity}": bad}, agent, 7)
        assert "iteration 7" in str(error.value) and str(error.value).endswith(quantity.replace("parameter", "bias"))


@ALL
def test_no_poisoned_checkpoint_is_written(script, in_process, monkeypatch):
    """The second update breaks a weight; the checkpoint stays that of the first."""
    update, calls = script.update, []

    def poison(agent, *args):
        stats = update(agent, *args)
        calls.append(stats)
        if len(calls) == 2:
            next(agent.parameters()).data[0] = NAN
        return stats

    monkeypatch.setattr(script, "update", poison)
    with pytest.raises(FloatingPointError, match="iteration 2: .*weight"):
        script.main(make_args(script))
    assert checkpoint_of(in_process)["step"] == 32
    assert not (the_run(in_process) / "model.pt").exists()


def file_limit(kilobytes: int):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))


@pytest.mark.parametrize("kilobytes", [100, 1])  # too small for a checkpoint, and for TensorBoard
def test_a_full_disk_loses_nothing(kilobytes, interrupted, tmp_path):
    source = the_run(interrupted["hopper"])
    folder = tmp_path / "runs" / source.name
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(before := (source / "checkpoint.pt").read_bytes())
    longer = "ppo_baseline.py --resume RUN --total-timesteps 25600"
    _, errors = run(tmp_path, longer, status=1, preexec_fn=file_limit(kilobytes))
    one_line(errors, "ppo_baseline.py: OSError", "File too large", "step 2560", "--resume")
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob("*.tmp"))
    if kilobytes == 100:
        run(tmp_path, longer.replace("25600", "2688"))
        assert read(folder / "checkpoint.pt")["step"] == 2688


@ALL
def test_a_failing_write_leaves_the_old_file(script, tmp_path, monkeypatch):
    path, args = tmp_path / "checkpoint.pt", make_args(script)
    script.save(path, args, step=1, value=torch.ones(3))

    def fail(descriptor):
        assert next(tmp_path.glob("*.tmp")).stat().st_size > 1000  # nothing is left in a buffer
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        script.save(path, args, step=2, value=torch.zeros(3))
    assert list(tmp_path.iterdir()) == [path]
    saved = script.load(path)
    assert saved["step"] == 1 and saved["value"].tolist() == [1, 1, 1] and saved["script"] == script.__name__


def obey_permissions():
    """Takes away root's right to write everywhere, from the next exec on."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    run_folder = tmp_path / "runs" / "CartPole-v1__sppo_continuous__1__1"
    run_folder.mkdir(parents=True)
    sppo_continuous.save(run_folder / "checkpoint.pt", make_args(sppo_continuous), step=32, iteration=1)
    run_folder.chmod(0o555)
    (tmp_path / "runs").chmod(0o555)
    for command in (POLE, "sppo_continuous.py --resume RUN"):
        output, errors = run(tmp_path, command, status=2, preexec_fn=obey_permissions)
        one_line(errors, "sppo_continuous.py: ", "runs/")
        assert output == ""


# --------------------------------------------------------------------------------------------- files that are not right


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in memory: of CartPole, at step 64."""
    path = tmp_path_factory.mktemp("file") / "checkpoint.pt"
    state = dict(step=64, iteration=2, agent={"weight": torch.randn(40, 50)}, random=[random.getstate()])
    sppo_continuous.save(path, make_args(sppo_continuous), **state)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(share, checkpoint, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoint[: int(share * len(checkpoint))])
    with pytest.raises(ValueError, match="checkpoint.pt is damaged"):
        sppo_continuous.load(path)


def test_a_flipped_bit_is_noticed(checkpoint, tmp_path):
    """Wherever it is: either the file is refused, or the bit is one that means nothing (padding)."""
    path, rng, refused = tmp_path / "checkpoint.pt", np.random.default_rng(0), 0
    path.write_bytes(checkpoint)
    whole = sppo_continuous.load(path)
    for position in rng.integers(len(checkpoint), size=300):
        damaged = bytearray(checkpoint)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert equal(sppo_continuous.load(path), whole)
        except ValueError as error:
            assert "is damaged" in str(error)
            refused += 1
    assert refused > 200


class Payload:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint_cannot_run_code(old_format, in_process):
    state = {"script": "sppo_continuous", "args": {}, "step": Payload()}
    torch.save(state, "torch.pt", _use_new_zipfile_serialization=not old_format)
    Path("pickle.pt").write_bytes(pickle.dumps(state))
    for name in ("torch.pt", "pickle.pt"):
        with pytest.raises(ValueError, match="is damaged, or no file of this script"):
            sppo_continuous.load(Path(name))
    assert not Path("harm").exists()
    pickle.loads(pickle.dumps(state))
    assert Path("harm").exists()  # it would have


@pytest.mark.parametrize("content", [{}, torch.zeros(3), {"script": "sppo_continuous"}, {"agent": {}}, None])
def test_something_else_is_no_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="no file of this script"):
        sppo_continuous.load(tmp_path / "checkpoint.pt")


def refused_flags(script, monkeypatch, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *flags])
    with pytest.raises(ValueError) as error:
        script.read_flags()
    assert "\n" not in str(error.value)
    return str(error.value)


@ALL
def test_a_run_is_continued_with_its_own_flags(script, in_process, monkeypatch):
    stored = make_args(script, gamma=0.9, learning_rate=1e-3)
    script.save(Path("checkpoint.pt"), stored, step=32, iteration=1)
    script.save(Path("model.pt"), stored, step=32)

    def flags(*given):
        monkeypatch.setattr(sys, "argv", ["script", *given])
        return vars(script.read_flags())

    resumed = vars(stored) | {"resume": "."}
    assert flags("--resume", ".") == resumed
    same = ("--gamma", "0.9", "--learning-rate", "1e-3", "--num-steps", str(stored.num_steps))
    assert flags("--resume", ".", *same) == resumed
    new = dict(total_timesteps=640, eval_interval=5, eval_episodes=2, checkpoint_interval=9, torch_threads=2)
    given = [word for name, value in new.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    switched = dict(capture_video=True, track=True, cuda=True)
    assert flags("--resume", ".", *given, "--capture-video", "--track", "--cuda") == resumed | new | switched
    played = vars(stored) | dict(evaluate=".", eval_episodes=4, capture_video=True, cuda=True, torch_threads=2)
    play = ("--eval-episodes", "4", "--capture-video", "--cuda", "--torch-threads", "2")
    assert flags("--evaluate", ".", *play) == played

    for name, value, has in (
        ("--gamma", "0.99", "0.9"),  # a flag's default is a change, too
        ("--env-id", "ALE/Pong-v5", stored.env_id),
        ("--seed", "1", "3"),
        ("--num-envs", "7", stored.num_envs),
        ("--wandb-entity", "us", "None"),
    ):
        for kind in ("--resume", "--evaluate"):
            assert refused_flags(script, monkeypatch, kind, ".", name, value).startswith(name)
        assert str(has) in refused_flags(script, monkeypatch, "--resume", ".", name, value)
    assert "only grow: the run has 64" in refused_flags(script, monkeypatch, "--resume", ".", "--total-timesteps", "32")
    assert "--eval-interval" in refused_flags(script, monkeypatch, "--evaluate", ".", "--eval-interval", "7")
    assert "together" in refused_flags(script, monkeypatch, "--resume", ".", "--evaluate", ".")
    assert "there is no" in refused_flags(script, monkeypatch, "--resume", "nowhere")
    for other in set(SCRIPTS) - {script}:
        assert f"belongs to {script.__name__}.py" in refused_flags(other, monkeypatch, "--resume", ".")


@pytest.mark.parametrize("content", [b"PK nonsense", None])
def test_a_bad_checkpoint_is_one_line(content, checkpoint, tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    if content is None:  # whole, but of a version with other flags
        args = vars(make_args(sppo_continuous)) | {"unheard_of": 1}
        torch.save({"script": "sppo_continuous", "args": args, "step": 1}, folder / "checkpoint.pt")
    else:
        (folder / "checkpoint.pt").write_bytes(content)
    output, errors = run(tmp_path, "sppo_continuous.py --resume RUN", status=2)
    one_line(errors, "sppo_continuous.py: ", "unheard_of" if content is None else "checkpoint.pt is damaged")
    assert output == "" and os.listdir(folder) == ["checkpoint.pt"]


# -------------------------------------------------------------------------------------------------- what is in the file

EXACT = """
    Ant-v5 Ant-v4 HumanoidStandup-v5 Walker2d-v5 Hopper-v5 Hopper-v4 HalfCheetah-v5 Swimmer-v5 InvertedDoublePendulum-v5
    Humanoid-v5 Reacher-v4 Pusher-v5 CartPole-v1 Acrobot-v1 Pendulum-v1 MountainCar-v0 MountainCarContinuous-v0
""".split()


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", EXACT)
def test_environments_go_on_to_the_bit(env_id):
    """Across ends of episodes, from a moment within an episode; once per script, whose text is the same."""
    one, other = (sppo_continuous.Environments(env_id, np.array(seeds), 0.99) for seeds in ([1, 2], [8, 9]))
    actions = one.action_space
    actions.seed(0)
    for _ in range(37):
        one.step([actions.sample(), actions.sample()])
    other.restore(through_a_file(one.state()))
    np.testing.assert_array_equal(one.obs, other.obs)
    for _ in range(250):
        action = [actions.sample(), actions.sample()]
        *first, first_final = one.step(action)
        *second, second_final = other.step(action)
        for x, y in zip((*first, one.obs, one.score, one.length), (*second, other.obs, other.score, other.length)):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(first_final[one.over], second_final[one.over])
    assert one.envs[0]._elapsed_steps == other.envs[0]._elapsed_steps
    assert equal(one.state(), other.state())


def test_the_time_limit_goes_on_counting():
    one, other = (sppo_continuous.Environments("Pendulum-v1", np.array([seed]), 0.99) for seed in (1, 2))
    for _ in range(150):
        one.step([np.zeros(1, np.float32)])
    other.restore(through_a_file(one.state()))
    truncated = [other.step([np.zeros(1, np.float32)])[2].item() for _ in range(50)]
    assert truncated == [False] * 49 + [True] and other.length.item() == 200


class Forgetful(gym.Wrapper):
    """What it remembers, a checkpoint does not know."""


def test_an_episode_that_cannot_be_saved_starts_anew():
    gym.register("Wrapped-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=500,
                 additional_wrappers=(Forgetful.wrapper_spec(),))  # fmt: skip
    for env_id in ("LunarLander-v3", "Wrapped-v0"):
        one, other = (sppo_continuous.Environments(env_id, np.array([seed]), 0.99) for seed in (1, 2))
        for _ in range(20):
            one.step([0])
        state = through_a_file(one.state())
        assert state["episodes"] == [None]
        other.restore(state)
        assert one.obs_stats.count == 21 + one.over.sum() and other.obs_stats.count == one.obs_stats.count + 1
        assert other.return_stats.count == 20 and equal(other.return_stats.state(), one.return_stats.state())
        assert other.score == other.length == other.discounted_return == 0 and not np.array_equal(one.obs, other.obs)
        other.step([0])
        assert other.length == 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("script, name", [(sppo_atari, "Games"), (sa2c_atari, "Games"), (ppo_baseline, "Games"),
                                          (sppo_continuous, "Environments")])  # fmt: skip
def test_a_resumed_run_does_not_play_the_first_episodes_again(script, name, in_process, monkeypatch):
    seen = []

    def watch(env_id, seeds, *rest):
        seen.append(tuple(seeds.tolist()))
        raise Stop

    monkeypatch.setattr(script, name, watch)
    for done in (0, 1, 2, 2):
        args = make_args(script)
        if done:
            script.save(in_process / "checkpoint.pt", args, step=32 * done, iteration=done)
            args.resume = "."
        with pytest.raises(Stop):
            script.main(args, in_process)
    fresh, first, second, again = seen
    assert second == again and not set(fresh) & set(first) and not set(first) & set(second)


def test_random_states_are_restored():
    def make():
        return [torch.Generator().manual_seed(1), np.random.default_rng(2), torch.default_generator]

    def draw(generators):
        own, numpy, _ = generators
        return [torch.rand(1, generator=own).item(), numpy.random(), torch.rand(1).item(), random.random()]

    one, other = make(), make()
    draw(one)
    state = through_a_file({"random": sppo_continuous.random_state(one)})["random"]
    expected = draw(one)
    sppo_continuous.restore_random(state, other)
    assert draw(other) == expected
    state[1] = state[1][:16]  # of another kind of device
    sppo_continuous.restore_random(state, other)
    assert draw(other)[1:] == expected[1:]


def test_weights_and_biases_goes_on_with_the_same_run(in_process, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(id=options["id"] or "made-up")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    args = make_args(sppo_continuous, track=True)
    sppo_continuous.main(args)
    args.resume, args.total_timesteps = str(the_run(in_process)), 128
    sppo_continuous.main(args, the_run(in_process))
    assert [(call["id"], call["resume"]) for call in calls] == [(None, "allow"), ("made-up", "allow")]
    assert calls[0]["name"] == calls[1]["name"] == the_run(in_process).name


def test_two_processes_do_not_train_in_the_same_folder(interrupted, tmp_path):
    folder = shutil.copytree(interrupted["pole"], tmp_path / "copy")
    held = sppo_continuous.lock(the_run(folder))
    _, errors = run(folder, f"{POLE.split()[0]} --resume RUN", status=2)
    one_line(errors, "another process is at work on runs/")
    held.close()
    sppo_continuous.lock(the_run(folder)).close()


def test_a_crash_long_after_a_checkpoint_doubles_no_point(in_process, tmp_path, monkeypatch):
    """The curves are on disk before the checkpoint is; what was logged after it is logged once, by the resumed run."""
    save, kept = sppo_continuous.save, []

    def watched_save(path, args, **state):
        save(path, args, **state)
        if path.name == "checkpoint.pt":
            kept.append(path.read_bytes())
            assert scalars(tmp_path)["losses/policy_loss"][-1][0] == state["step"]

    monkeypatch.setattr(sppo_continuous, "save", watched_save)
    flags = dict(env_id="CartPole-v1", num_steps=128, num_minibatches=2, update_epochs=1, total_timesteps=512)
    args = sppo_continuous.Args(**flags, checkpoint_interval=256, eval_episodes=1, cuda=False)
    sppo_continuous.main(args, sppo_continuous.new_run_folder(args))
    whole = scalars(tmp_path)
    assert len(kept) == 2
    (the_run(tmp_path) / "checkpoint.pt").write_bytes(kept[0])  # as if the crash had come just before the last one
    args.resume = str(the_run(tmp_path))
    sppo_continuous.main(args, the_run(tmp_path))
    assert scalars(tmp_path) == whole
