"""`--survival-bonus`: what flips pay on average, without their randomness; a control for studies of noise."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_baseline
import sa2c_atari
import sppo_atari

SCRIPTS = pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, ppo_baseline], ids=lambda script: script.__name__)


@SCRIPTS
def test_the_learner_is_paid_for_every_step_and_the_report_is_not(script, tmp_path, monkeypatch, capsys):
    """Compared at the first call of `gae`: same games, rewards higher by the bonus; then other losses, same scores."""
    seen, gae, runs = [], script.gae, []
    monkeypatch.setattr(script, "gae", lambda rewards, *rest: seen.append(rewards.copy()) or gae(rewards, *rest))
    monkeypatch.chdir(tmp_path)
    for bonus in (0.0, 0.125):
        args = script.Args(env_id="ALE/Breakout-v5", num_envs=2, num_steps=64, total_timesteps=256, eval_episodes=1,
                           survival_bonus=bonus, cuda=False, torch_threads=1)
        if script is ppo_baseline:
            script.fill_in(args)
        script.validate(args)
        seen.clear()
        script.main(args, script.new_run_folder(args))
        learned, clean = seen[:2]
        np.testing.assert_array_equal(learned, clean + np.float32(bonus))
        assert learned.dtype == np.float32
        (folder,) = set((tmp_path / "runs").iterdir()) - {run for run, _ in runs}
        runs.append((folder, clean))
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    losses = [EventAccumulator(str(run)).Reload().Scalars("losses/value_loss")[0].value for run, _ in runs]
    assert losses[0] != losses[1]


@SCRIPTS
@pytest.mark.parametrize("bonus", ["-0.1", "nan", "inf"])
def test_a_bonus_that_makes_no_sense_is_refused(script, bonus, tmp_path):
    command = [sys.executable, Path(script.__file__), "--env-id", "ALE/Breakout-v5", f"--survival-bonus={bonus}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and re.search("--survival-bonus must be finite", result.stderr)
