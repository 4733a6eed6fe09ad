"""Settings that make no sense: one line that names the problem, status 2, and nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from sppo_atari import Args, validate

ROOT = Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")


def test_the_defaults_make_sense():
    validate(Args())
    validate(Args(env_id="MsPacmanNoFrameskip-v4", total_timesteps=1024))  # exactly one batch


@pytest.mark.parametrize(
    "env_id, named",
    [
        ("breakout", "did you mean ALE/Breakout-v5"),
        ("ALE/Breakout-v4", "did you mean ALE/Breakout-v5"),
        ("Breakout-v4", "did you mean ALE/Breakout-v5"),
        ("ALE/breakout-v5", "did you mean ALE/Breakout-v5"),
        ("BreakoutNoFrameskip-v5", "did you mean ALE/Breakout-v5"),
        ("ALE/MsPackman-v5", "did you mean ALE/MsPacman-v5"),
        ("", "did you mean ALE/"),
        ("CartPole-v1", "is not an Atari game"),
    ],
)
def test_an_unknown_game_is_answered_with_known_ones(env_id, named):
    with pytest.raises(ValueError) as error:
        validate(Args(env_id=env_id))
    assert str(error.value).startswith(f"--env-id {env_id} is not ")
    assert named in str(error.value) and "\n" not in str(error.value)


BAD = [
    *((name, value) for name in ("reward_noise", "advantage_noise", "repeat_action_probability", "gamma", "gae_lambda")
      for value in (-0.1, 1.1, NAN)),
    *(("Z", value) for value in (0.0, 1.0, NAN, -INF)),
    *((name, value) for name in ("alpha", "beta", "ent_coef", "vf_coef") for value in (-0.5, NAN, INF)),
    *((name, value) for name in ("learning_rate", "clip_coef") for value in (0.0, -1.0, NAN, INF)),
    *((name, value) for name in ("max_grad_norm", "target_kl") for value in (0.0, -1.0, NAN)),
    *((name, value) for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_episodes")
      for value in (0, -1)),
    *((name, -1) for name in ("seed", "eval_interval", "torch_threads")),
    ("num_minibatches", 3),  # 8 × 128 does not divide by it
    ("total_timesteps", 1023),
]


@pytest.mark.parametrize("name, value", BAD)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ValueError) as error:
        validate(Args(**{name: value}))
    assert f"--{name.replace('_', '-')}" in str(error.value) and str(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_single_step_cannot_be_normalised():
    validate(Args(num_minibatches=1024, norm_adv=False))
    with pytest.raises(ValueError, match="--norm-adv"):
        validate(Args(num_minibatches=1024))


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--env-id", "breakout"], "ALE/Breakout-v5"),
        (["--reward-noise", "1.5"], "--reward-noise"),
        (["--Z", "nan", "--cuda"], "--Z"),
    ],
)
def test_the_script_says_so_in_one_line(flags, named, tmp_path):
    script = [sys.executable, ROOT / "sppo_atari.py", *flags]
    result = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("sppo_atari.py: ") and named in result.stderr
    assert not list(tmp_path.iterdir())
