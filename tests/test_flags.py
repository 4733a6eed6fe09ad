"""What would quietly train something else is refused: one line on stderr, status 2."""

import itertools
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import ppo_baseline
import sa2c_atari
import sa2c_continuous
import sppo_atari
import sppo_continuous

ROOT = Path(__file__).parent.parent
GAMES = [sppo_atari, sa2c_atari]
CONTROL = [sppo_continuous, sa2c_continuous]
SYMMETRIC = [*GAMES, *CONTROL]
SCRIPTS = [*SYMMETRIC, ppo_baseline]
PPO = [sppo_atari, sppo_continuous, ppo_baseline]


class OddSpaces(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space = observation_space
        self.action_space = action_space


FLAT = gym.spaces.Box(-1, 1, (3,))
SPACES = {
    "Unbounded": (FLAT, gym.spaces.Box(-np.inf, np.inf, (2,))),
    "HalfBounded": (FLAT, gym.spaces.Box(np.float32([0, 0]), np.float32([1, np.inf]))),
    "DictOfFlat": (gym.spaces.Dict(position=FLAT, speed=FLAT), FLAT),
}
for name, (observation_space, action_space) in SPACES.items():
    kwargs = dict(observation_space=observation_space, action_space=action_space)
    gym.register(f"test/{name}-v0", OddSpaces, kwargs=kwargs)

REFUSED = [  # scripts, flags, what the line says
    (SCRIPTS, "--env-id hopper-v5", "Did you mean: `Hopper`?"),
    ([*GAMES, ppo_baseline], "--env-id ALE/Breakot-v5", "Did you mean: `Breakout`?"),
    (GAMES, "--env-id CartPole-v1", "--env-id CartPole-v1 is not an Atari game"),
    (CONTROL, "--env-id test/Unbounded-v0", "cannot use Box"),
    ([ppo_baseline], "--env-id test/Unbounded-v0", "actions must have bounds"),
    (CONTROL, "--env-id test/HalfBounded-v0", "cannot use Box"),
    ([ppo_baseline], "--env-id test/HalfBounded-v0", "actions must have bounds"),
    (SCRIPTS, "--total-timesteps 5", "--total-timesteps"),
    (PPO, "--num-steps 128 --num-minibatches 3", "--num-minibatches"),
    (SYMMETRIC, "--Z=0", "--Z"),
    (SYMMETRIC, "--Z=1", "--Z"),
    (SYMMETRIC, "--alpha=-0.5", "--alpha"),
    (SYMMETRIC, "--beta=-0.5", "--beta"),
    (SCRIPTS, "--advantage-noise=-0.1", "--advantage-noise"),
    (SCRIPTS, "--advantage-noise=1.1", "--advantage-noise"),
    (GAMES, "--reward-noise=-0.1", "--reward-noise"),
    (GAMES, "--reward-noise=1.1", "--reward-noise"),
    ([ppo_baseline], "--reward-noise=-0.1", "--reward-noise"),
    ([ppo_baseline], "--pg-coef=-0.5", "--pg-coef"),
    (SCRIPTS, "--resume .", "checkpoint.pt"),
]
CASES = [(script, *case) for scripts, *case in REFUSED for script in scripts]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function of a script and flags. Returns the line with which it refuses them."""
    monkeypatch.chdir(tmp_path)

    def read(script, *flags):
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
        with pytest.raises(SystemExit) as end:
            script.read_flags()
        output, error = capsys.readouterr()
        assert end.value.code == 2 and output == ""
        assert len(error.splitlines()) == 1 and error.startswith(f"{script.__name__}.py ")
        return error

    return read


@pytest.mark.parametrize("script, flags, named", CASES)
def test_it_is_refused_in_one_line(script, flags, named, refused):
    assert named in refused(script, *flags.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_that_is_cut_or_anothers_is_refused(script, tmp_path, refused):
    path = tmp_path / "checkpoint.pt"
    for other in SCRIPTS:
        if other is not script:
            other.save_checkpoint(path, other.Args(), 0, {})
            assert "unexpected keyword" in refused(script, "--resume", str(tmp_path))
    script.save_checkpoint(path, script.Args(), 0, {})
    path.write_bytes(path.read_bytes()[:-100])
    assert str(tmp_path) in refused(script, "--resume", str(tmp_path))
    path.write_text("nonsense")
    assert str(tmp_path) in refused(script, "--resume", str(tmp_path))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_has_its_own_flags_unless_they_are_typed(script, tmp_path, monkeypatch):
    args = script.Args(gamma=0.9, seed=7)
    script.save_checkpoint(tmp_path / "checkpoint.pt", args, 3, {})
    flags = ["--resume", str(tmp_path), "--seed", "8"]
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
    resumed, checkpoint = script.read_flags()
    assert (resumed.gamma, resumed.seed, checkpoint["step"]) == (0.9, 8, 3)


def test_it_is_refused_by_a_process(tmp_path):
    """And nothing is left behind."""
    command = [sys.executable, ROOT / "sa2c_continuous.py", "--total-timesteps", "5"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("sa2c_continuous.py ") and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_that_cannot_be_read_is_refused(script, monkeypatch, capsys):
    for flags in (["--gamma", "much"], ["--no-such-flag", "1"]):
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
        with pytest.raises(SystemExit) as end:
            script.read_flags()
        output, error = capsys.readouterr()
        assert end.value.code == 2 and output == "" and flags[0] in error


TASKS = ["Hopper-v5", "Hopper-v4", "LunarLanderContinuous-v3", "CartPole-v1", "Blackjack-v1"]
TASKS += ["FrozenLake-v1", "test/DictOfFlat-v0"]
SENSIBLE = [
    *itertools.product([*CONTROL, ppo_baseline], [dict(env_id=env_id) for env_id in TASKS]),
    *itertools.product(GAMES, [dict(env_id="MsPacmanNoFrameskip-v4")]),
    (sppo_atari, dict(total_timesteps=1024)),  # exactly one batch
    (sppo_atari, dict(alpha=0, beta=0, reward_noise=1, advantage_noise=1)),
    (sppo_continuous, dict(num_minibatches=2048, norm_adv=False)),
    (sppo_continuous, dict(reward_noise=1.5)),
    (ppo_baseline, dict(env_id="ALE/Breakout-v5", num_envs=8)),
]


@pytest.mark.parametrize("script, flags", SENSIBLE)
def test_what_makes_sense_is_not_refused(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a log
    script.validate(script.Args(**flags))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_are_not_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__file__])
    assert script.read_flags() == (script.Args(), None)


def test_the_baseline_has_the_defaults_of_games(monkeypatch):
    """All settings that it shares with `sppo_atari.py`."""
    monkeypatch.setattr(sys, "argv", ["ppo_baseline.py", "--env-id", "ALE/Breakout-v5"])
    args, _ = ppo_baseline.read_flags()
    for name, value in vars(sppo_atari.Args()).items():
        assert getattr(args, name, value) == value, name
