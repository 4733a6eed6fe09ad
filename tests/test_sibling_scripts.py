"""Continuous control, SA2C and the baseline as a user starts them: what runs leave behind, and what is refused."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import imageio
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

SMALL = "--num-steps 256 --total-timesteps 512 --num-minibatches 4 --update-epochs 2 --eval-episodes 2"
GAMES = "--num-envs 2 --num-steps 128 --total-timesteps 512 --eval-episodes 1"
COMMANDS = {
    "pole": f"sppo_continuous.py --env-id CartPole-v1 {SMALL}",
    "pole, watched": f"sppo_continuous.py --env-id CartPole-v1 {SMALL} --eval-interval 256 --capture-video",
    "hopper": f"sppo_continuous.py --env-id Hopper-v5 --num-envs 2 {SMALL} --reward-noise 0.05 --advantage-noise 0.1",
    "sa2c": f"sa2c_atari.py --env-id ALE/Breakout-v5 {GAMES} --log-interval 1",
    "sa2c, watched": f"sa2c_atari.py --env-id ALE/Breakout-v5 {GAMES} --log-interval 1 --eval-interval 256",
    "baseline pole": f"ppo_baseline.py --env-id CartPole-v1 {SMALL}",
    "baseline hopper": f"ppo_baseline.py --env-id Hopper-v5 {SMALL} --reward-noise 0.05",
    "baseline bins": f"ppo_baseline.py --env-id Hopper-v5 --policy discretized --pg-coef 20.5 {SMALL}",
    "baseline atari": f"ppo_baseline.py --env-id BreakoutNoFrameskip-v4 {GAMES} --reward-noise 0.1",
}
ALL = pytest.mark.parametrize("name", COMMANDS)
BASELINES = pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("baseline")])

EVERYWHERE = """
    charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate eval/episodic_return
    losses/value_loss losses/policy_loss losses/forward_loss losses/entropy losses/explained_variance losses/mean_weight
    losses/grad_norm advantage/sign_flips_normalization advantage/sign_flips_noise
""".split()
PPO = ["losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac"]
TAGS = {
    "sppo_continuous": {*EVERYWHERE, *PPO, "losses/reverse_loss"},
    "sa2c_atari": {*EVERYWHERE, "losses/reverse_loss"},
    "ppo_baseline": {*EVERYWHERE, *PPO},
}


class Run(NamedTuple):
    process: subprocess.CompletedProcess
    folder: Path
    scalars: dict[str, list[tuple[int, float]]]
    flags: dict[str, str]  # the hyperparameter table


def start(folder: Path, command: str) -> subprocess.CompletedProcess:
    script, *flags = command.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / script, *flags], cwd=folder, env=environment, capture_output=True, text=True
    )


def train(folder: Path, command: str) -> Run:
    process = start(folder, f"{command} --no-cuda --torch-threads 1")
    assert process.returncode == 0, process.stderr
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (text,) = events.Tensors("hyperparameters/text_summary")
    rows = text.tensor_proto.string_val[0].decode().splitlines()[2:]
    return Run(process, run, scalars, dict(row.strip("|").split("|") for row in rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path_factory.mktemp("run") for _ in COMMANDS]
        return dict(zip(COMMANDS, pool.map(train, folders, COMMANDS.values())))


def values(run, tag):
    return np.array([value for _, value in run.scalars[tag]])


# ----------------------------------------------------------------------------------------------------------------- runs


@ALL
def test_everything_is_logged(runs, name):
    run, script = runs[name], COMMANDS[name].partition(".")[0]
    assert set(run.scalars) == TAGS[script]
    assert all(np.isfinite(values(run, tag)).all() for tag in run.scalars)
    steps = {256: [256, 512], 512: [512]}[int(run.flags["num_envs"]) * int(run.flags["num_steps"])]
    for tag in run.scalars:
        if not tag.startswith(("charts/episodic", "eval/")):
            assert [step for step, _ in run.scalars[tag]] == steps


@ALL
def test_the_policy_loss_is_made_of_its_terms(runs, name):
    run = runs[name]
    forward = values(run, "losses/forward_loss")
    if name.startswith("baseline"):
        expected, weight = float(run.flags["pg_coef"]) * forward, float(run.flags["pg_coef"])
    else:
        alpha, beta = float(run.flags["alpha"]), float(run.flags["beta"])
        expected, weight = alpha * forward + beta * values(run, "losses/reverse_loss"), alpha + beta
    np.testing.assert_allclose(values(run, "losses/policy_loss"), expected, rtol=1e-4, atol=1e-6)
    if name.startswith("sa2c"):  # of α + β|Z|π
        assert (alpha < values(run, "losses/mean_weight")).all() and (values(run, "losses/mean_weight") < weight).all()
    else:
        np.testing.assert_allclose(values(run, "losses/mean_weight"), weight, rtol=1e-6)


@ALL
def test_the_noise_is_seen_in_the_advantages(runs, name):
    flips = values(runs[name], "advantage/sign_flips_noise")
    assert ((0 < flips) & (flips < 1)).all() if "reward-noise" in COMMANDS[name] else (flips == 0).all()


@ALL
def test_the_folder_is_named_after_the_run(runs, name):
    run, script = runs[name], COMMANDS[name].partition(".")[0]
    env_id, stem, seed, started = run.folder.name.split("__")
    assert (env_id, stem, seed) == (run.flags["env_id"].replace("/", "-"), script, "1") and started.isdigit()


@ALL
def test_the_output_is_short_and_ends_with_the_score(runs, name):
    output = runs[name].process.stdout
    assert "\r" not in output and len(output.splitlines()) <= 5
    score = values(runs[name], "eval/episodic_return")[-1]
    assert f"final score at 512 steps: {score:.2f} ± " in output.splitlines()[-1]


@ALL
def test_the_model_loads_safely(runs, name):
    model = torch.load(runs[name].folder / "model.pt", weights_only=True)
    if runs[name].flags["env_id"] in ("CartPole-v1", "Hopper-v5"):
        mean, std = model["obs_stats"]["mean"], model["obs_stats"]["std"]
        assert mean.shape == std.shape == (4 if "pole" in name else 11,) and (std > 0).all()
    if "pole" in name:
        agent = sppo_continuous.BinnedAgent(4, (1, 2))
    elif name == "baseline hopper":
        agent = ppo_baseline.GaussianAgent(11, 3)
    elif name in ("hopper", "baseline bins"):
        agent = sppo_continuous.BinnedAgent(11, (3, 11))
    else:
        agent = sa2c_atari.AtariAgent(4)
    agent.load_state_dict(model["agent"])


@pytest.mark.parametrize("name", ["pole", "sa2c"])
def test_one_seed_gives_one_run_however_often_it_is_evaluated(runs, name):
    plain, watched = runs[name], runs[f"{name}, watched"]
    learning = [tag for tag in plain.scalars if tag != "charts/SPS" and not tag.startswith("eval/")]
    assert {tag: plain.scalars[tag] for tag in learning} == {tag: watched.scalars[tag] for tag in learning}
    assert [step for step, _ in watched.scalars["eval/episodic_return"]] == [256, 512]
    assert watched.scalars["eval/episodic_return"][-1:] == plain.scalars["eval/episodic_return"]


def test_sa2c_logs_means_over_the_log_interval(runs, tmp_path):
    each, both = runs["sa2c"], train(tmp_path, COMMANDS["sa2c"].replace("--log-interval 1", "--log-interval 2"))
    for tag in both.scalars:
        if tag.startswith(("losses/", "advantage/", "charts/learning_rate")):
            assert [step for step, _ in both.scalars[tag]] == [512]
            np.testing.assert_allclose(values(both, tag), values(each, tag).mean(), rtol=1e-6)


@pytest.mark.parametrize("anneal", [True, False])
@pytest.mark.parametrize("script", [sppo_atari, sppo_continuous, sa2c_atari, ppo_baseline])
def test_schedules_fall_linearly(script, anneal, tmp_path, monkeypatch):
    """Of learning rate and clip range, to 1/4 in the last of four iterations; sa2c_atari.py has no clip range."""
    seen = []

    def spy(agent, optimizer, batch, clip_coef, args, *rest, update=script.update):
        seen.append((optimizer.param_groups[0]["lr"], clip_coef))
        return update(agent, optimizer, batch, clip_coef, args, *rest)

    monkeypatch.setattr(script, "update", spy)
    monkeypatch.setattr(script, "catch_signals", lambda: [])  # pytest's own stay
    small = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=1, total_timesteps=128, eval_episodes=1,
                 checkpoint_interval=0, anneal_lr=anneal, anneal_clip=anneal, cuda=False, torch_threads=1)
    args = script.Args(env_id="ALE/Breakout-v5" if "atari" in script.__name__ else "CartPole-v1")
    for flag, value in small.items():
        if hasattr(args, flag):
            setattr(args, flag, value)
    getattr(script, "fill_in", lambda args: None)(args)
    script.main(args, tmp_path)

    assert script is sppo_continuous or not torch.backends.cudnn.allow_tf32  # convolutions in float32
    remaining = np.array([1, 3 / 4, 2 / 4, 1 / 4]) if anneal else np.ones(4)
    rates, clips = zip(*seen)
    np.testing.assert_allclose(rates, args.learning_rate * remaining)
    if script is not sa2c_atari:
        np.testing.assert_allclose(clips, args.clip_coef * remaining)


def test_the_video_plays(runs):
    """One per evaluation, of its first episode: a frame per step, in which something moves."""
    run = runs["pole, watched"]
    videos = sorted((run.folder / "videos").iterdir())
    assert [video.name for video in videos] == ["256.mp4", "512.mp4"]
    frames = np.stack([frame for frame in imageio.get_reader(videos[-1])])
    assert frames.shape[1:] == (400, 600, 3) and (frames[-1] != frames[0]).any()
    returns = values(run, "eval/episodic_return")
    assert 1 <= len(frames) <= 2 * returns[-1]  # CartPole pays 1 per step; the mean is over two episodes


@BASELINES
def test_the_baselines_defaults_are_those_of_the_environments_kind(runs, name):
    """In the first line, and in the hyperparameter table."""
    run = runs[name]
    first_line = run.process.stdout.splitlines()[0]
    kind = dict(learning_rate="0.00025", anneal_lr="True", clip_coef="0.1", anneal_clip="True", ent_coef="0.01")
    if "atari" not in name:
        kind = dict(learning_rate="0.0003", anneal_lr="False", clip_coef="0.2", anneal_clip="False", ent_coef="0.0")
    kind |= dict(num_minibatches="4", update_epochs="4" if "atari" in name else "2")
    for flag, value in kind.items():
        assert run.flags[flag] == value
        assert f" {flag} {value}," in first_line
    unset = ["target_kl", "resume", "evaluate", "wandb_entity"]
    assert [flag for flag, value in run.flags.items() if value == "None"] == unset
    rates = {"0.00025": [2.5e-4, 1.25e-4], "0.0003": [3e-4, 3e-4]}[run.flags["learning_rate"]]
    np.testing.assert_allclose(values(run, "charts/learning_rate"), rates, rtol=1e-6)


@BASELINES
def test_the_baseline_says_where_the_policy_flag_has_no_effect(runs, name):
    discrete = name in ("baseline pole", "baseline atari")
    assert ("--policy has no effect" in runs[name].process.stdout) == discrete


def test_the_gaussian_starts_with_standard_deviation_1(runs):
    """Three dimensions of ½ log 2πe; then it learns."""
    entropy = values(runs["baseline hopper"], "losses/entropy")
    assert entropy[0] == pytest.approx(1.5 * math.log(2 * math.pi * math.e), abs=0.05)
    model = torch.load(runs["baseline hopper"].folder / "model.pt", weights_only=True)
    assert (model["agent"]["log_std"] != 0).all()


# ------------------------------------------------------------------------------------------------------------- refusals


def validate(script, **settings):
    args = script.Args(**settings)
    if script is ppo_baseline:
        script.fill_in(args)
    script.validate(args)


def refusal(script, **settings) -> str:
    with pytest.raises(ValueError) as error:
        validate(script, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


class OddSpaces(gym.Env):
    """Spaces that none of the scripts takes."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


FLAT, INTEGER = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(2)
for env_name, spaces in {
    "DictObservation": (gym.spaces.Dict(position=FLAT), INTEGER),
    "TupleAction": (FLAT, gym.spaces.Tuple((FLAT, INTEGER))),
    "UnboundedAction": (FLAT, gym.spaces.Box(-INF, INF, (2,))),
    "MultiDiscreteAction": (FLAT, gym.spaces.MultiDiscrete([2, 3])),
}.items():
    gym.register(f"test/{env_name}-v0", OddSpaces, kwargs=dict(zip(("observation_space", "action_space"), spaces)))

CONTROL = pytest.mark.parametrize("script", [sppo_continuous, ppo_baseline])
SCRIPTS = pytest.mark.parametrize("script", [sppo_continuous, sa2c_atari, ppo_baseline])


@SCRIPTS
def test_the_defaults_make_sense(script):
    validate(script)


@CONTROL
@pytest.mark.parametrize(
    "env_id",
    """Ant-v5 HumanoidStandup-v5 Walker2d-v5 Hopper-v5 HalfCheetah-v5 Swimmer-v5 InvertedDoublePendulum-v5 Hopper-v4
    BipedalWalker-v3 LunarLanderContinuous-v3 CartPole-v1 Acrobot-v1""".split(),
)
def test_the_environments_they_are_for(script, env_id):
    validate(script, env_id=env_id)


@CONTROL
@pytest.mark.parametrize(
    "env_id, named",
    [
        ("hopper-v5", "did you mean Hopper-v5"),
        ("Hoper-v5", "did you mean Hopper-v5"),
        ("CartPole-v2", "did you mean CartPole-v1"),
        ("LunarLanderContinous-v3", "did you mean LunarLanderContinuous-v3"),
        ("CartPole v1", "cannot be made: Malformed environment ID"),
        ("nowhere:Nothing-v0", "cannot be made: No module named 'nowhere'"),
        ("CarRacing-v3", "has observations Box(0, 255, (96, 96, 3), uint8); this script takes flat Box ones"),
        ("Blackjack-v1", "has observations Tuple("),
        ("FrozenLake-v1", "has observations Discrete("),
        ("test/DictObservation-v0", "has observations Dict("),
        ("test/TupleAction-v0", "has actions Tuple("),
        ("test/UnboundedAction-v0", "has actions Box("),
        ("test/MultiDiscreteAction-v0", "has actions MultiDiscrete("),
    ],
)
def test_environments_they_are_not_for(script, env_id, named):
    message = refusal(script, env_id=env_id)
    assert message.startswith(f"--env-id {env_id} ") and named in message


def test_games_are_not_for_the_continuous_script():
    message = refusal(sppo_continuous, env_id="ALE/Breakout-v5")
    assert "ALE/Breakout-v5 has observations Box(0, 255" in message and "Atari games, for the scripts" in message


def test_sa2c_is_for_games():
    assert "did you mean ALE/Breakout-v5" in refusal(sa2c_atari, env_id="breakout")
    assert "CartPole-v1 is not an Atari game" in refusal(sa2c_atari, env_id="CartPole-v1")


COUNTS = [(flag, bad) for flag in "num_envs num_steps eval_episodes total_timesteps".split() for bad in (0, -1)]
EVERY = [
    *COUNTS,
    *((flag, bad) for flag in "gamma gae_lambda advantage_noise".split() for bad in (-0.1, 1.1, NAN)),
    *((flag, bad) for flag in "ent_coef vf_coef".split() for bad in (-0.1, NAN, INF)),
    *(("learning_rate", bad) for bad in (0.0, -1.0, NAN, INF)),
    *(("max_grad_norm", bad) for bad in (0.0, NAN)),
    *(("reward_noise", bad) for bad in (-0.1, NAN, INF)),
    *((flag, -1) for flag in "seed eval_interval torch_threads".split()),
]
SYMMETRIC = [*((flag, bad) for flag in ("alpha", "beta") for bad in (-0.5, NAN, INF)),
             *(("Z", bad) for bad in (0.0, 1.0, NAN, -INF))]
MINIBATCHES = [("num_minibatches", 0), ("num_minibatches", 3), ("update_epochs", 0), ("clip_coef", 0.0),
               ("clip_coef", 1.0), ("target_kl", 0.0), ("num_bins", 1)]


@pytest.mark.parametrize(
    "script, flag, bad",
    [
        *((sppo_continuous, *pair) for pair in EVERY + SYMMETRIC + MINIBATCHES),
        *((sa2c_atari, *pair) for pair in EVERY + SYMMETRIC + [("reward_noise", 1.1), ("log_interval", 0)]),
        *((ppo_baseline, *pair) for pair in EVERY + MINIBATCHES + [("pg_coef", -1.0), ("pg_coef", NAN)]),
    ],
)
def test_a_bad_value_is_named(script, flag, bad):
    message = refusal(script, **{flag: bad})
    assert f"--{flag.replace('_', '-')}" in message and str(bad) in message


def test_what_reward_noise_means_depends_on_the_environment():
    validate(ppo_baseline, env_id="Hopper-v5", reward_noise=1.5)
    assert "--reward-noise" in refusal(ppo_baseline, env_id="ALE/Breakout-v5", reward_noise=1.5)


@pytest.mark.parametrize(
    "command, named",
    [
        ("sppo_continuous.py --env-id CarRacing-v3", "flat Box"),
        ("sa2c_atari.py --Z 0", "--Z"),
        ("ppo_baseline.py --env-id ALE/Breakout-v5 --reward-noise 1.5", "--reward-noise"),
    ],
)
def test_the_scripts_say_so_in_one_line(command, named, tmp_path):
    result = start(tmp_path, command)
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"{command.split()[0]}: ") and named in result.stderr
    assert not list(tmp_path.iterdir())
