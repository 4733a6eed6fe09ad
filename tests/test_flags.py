"""What would quietly train something else is refused: one line on stderr, status 2, nothing left behind."""

import runpy
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import ppo_baseline
import sa2c_atari
import sppo_atari
import sppo_continuous

ROOT = Path(__file__).parent.parent


class OddSpaces(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


FLAT, LARGEST = gym.spaces.Box(-1, 1, (3,)), np.finfo(np.float32).max
for env_name, spaces in {
    "Unbounded": (FLAT, gym.spaces.Box(-np.inf, np.inf, (2,))),
    "HalfBounded": (FLAT, gym.spaces.Box(np.float32([0, 0]), np.float32([1, np.inf]))),
    "Largest": (FLAT, gym.spaces.Box(-LARGEST, LARGEST, (2,))),
    "Integers": (FLAT, gym.spaces.Box(0, 5, (2,), np.int64)),
    "MultiDiscrete": (FLAT, gym.spaces.MultiDiscrete([2, 3])),
    "Tuple": (FLAT, gym.spaces.Tuple((FLAT, FLAT))),
    "DictOfFlat": (gym.spaces.Dict(position=FLAT, speed=FLAT), FLAT),
}.items():
    gym.register(f"test/{env_name}-v0", OddSpaces, kwargs=dict(zip(("observation_space", "action_space"), spaces)))

GAMES, TASKS, PPO = "sppo_atari sa2c_atari", "sppo_continuous ppo_baseline", "sppo_atari sppo_continuous ppo_baseline"
SYMMETRIC, EVERY = f"{GAMES} sppo_continuous", f"{GAMES} {TASKS}"
REFUSED = [  # scripts, flags, what the line says
    (EVERY, "--env-id hopper-v5", "Did you mean: `Hopper`?"),
    (f"{GAMES} ppo_baseline", "--env-id ALE/Breakot-v5", "Did you mean: `Breakout`?"),
    (GAMES, "--env-id CartPole-v1", "--env-id CartPole-v1 is not an Atari game"),
    ("sppo_continuous", "--env-id ALE/Breakout-v5", "ALE"),
    (TASKS, "--env-id CarRacing-v3", "--env-id CarRacing-v3 shows images"),
    *((TASKS, f"--env-id test/{name}-v0", "is not Discrete or of finite, real bounds")
      for name in "Unbounded HalfBounded Largest Integers MultiDiscrete Tuple".split()),
    (EVERY, "--total-timesteps 79", "--total-timesteps"),
    (GAMES, "--num-steps 1", "steps"),
    (PPO, "--num-steps 128 --num-minibatches 3", "--num-minibatches"),
    (PPO, "--num-envs 1 --num-steps 4 --num-minibatches 4", "--num-minibatches"),  # one sample cannot be normalised
    *((SYMMETRIC, flag, flag[:3]) for flag in ("--Z=0", "--Z=1", "--Z=nan", "--alpha=-0.5", "--beta=-0.5")),
    *((EVERY, f"--advantage-noise={p}", "noise") for p in (-0.1, 1.1, np.nan)),
    *((GAMES, f"--{flag}={p}", f"--{flag}") for flag in ("reward-noise", "repeat-action-probability")
      for p in (-0.1, 1.1, np.nan)),
    (TASKS, "--reward-noise=-0.1", "--reward-noise"),
    ("ppo_baseline", "--env-id ALE/Breakout-v5 --reward-noise=1.1", "--reward-noise"),
    ("ppo_baseline", "--env-id ALE/Breakout-v5 --repeat-action-probability=1.1", "sticky actions"),
    ("ppo_baseline", "--pg-coef=-0.5", "--pg-coef"),
    (EVERY, "--resume .", "checkpoint.pt"),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, named", [(x, *case) for names, *case in REFUSED for x in names.split()])
def test_it_is_refused_in_one_line(script, flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", None)  # what is not refused fails, and soon
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    output, error = capsys.readouterr()
    assert end.value.code == 2 and output == "" and len(error.splitlines()) == 1
    assert error.startswith(f"{script}.py: ") and named in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", EVERY.split())
def test_it_is_refused_in_one_line_by_a_process(script, tmp_path):
    command = [sys.executable, ROOT / f"{script}.py", "--total-timesteps", "5"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"{script}.py: ") and "--total-timesteps" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


CONTROL_TASKS = """Ant-v5 HumanoidStandup-v5 Walker2d-v5 Hopper-v5 HalfCheetah-v5 Swimmer-v5 InvertedDoublePendulum-v5
    Hopper-v4 BipedalWalker-v3 LunarLanderContinuous-v3 CartPole-v1 Acrobot-v1 Blackjack-v1 FrozenLake-v1
    test/DictOfFlat-v0""".split()


@pytest.mark.parametrize(
    "script, settings",
    [
        *((script, dict(env_id=env_id)) for script in (sppo_continuous, ppo_baseline) for env_id in CONTROL_TASKS),
        *((script, dict(env_id=env_id)) for script in (sppo_atari, sa2c_atari) for env_id in
          ("ALE/Breakout-v5", "MsPacmanNoFrameskip-v4")),
        (sppo_atari, dict(total_timesteps=1024)),  # exactly one batch
        (sppo_continuous, dict(num_minibatches=2048, norm_adv=False)),
        (sppo_atari, dict(alpha=0, beta=0, reward_noise=1, advantage_noise=1, repeat_action_probability=1)),
        (sppo_continuous, dict(reward_noise=1.5)),
        (ppo_baseline, dict(reward_noise=1.5)),
        (ppo_baseline, dict(env_id="ALE/Breakout-v5", **ppo_baseline.ATARI_DEFAULTS)),
    ],
)  # fmt: skip
def test_what_makes_sense_is_not_refused(script, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a log
    script.validate(script.Args(**settings))
