# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0",
#   "numpy==2.4.6",
#   "gymnasium==1.4.0",
#   "ale-py==0.12.1",
#   "mujoco==4.0.0",
#   "box2d==2.3.10",
#   "pygame-ce==2.5.8",
#   "tyro==1.0.17",
#   "tensorboard==2.21.0",
#   "tqdm==4.70.1",
#   "imageio[ffmpeg]==2.38.1",
# ]
# ///
"""PPO (Schulman et al., 2017) for Atari and continuous control: what the symmetric loss is measured against.

With r = π / π_old for the action taken and A the advantage:

    forward = −min(r·A, clip(r, 1−ε, 1+ε)·A)
    policy loss = pg_coef · forward
    loss = policy loss − ent_coef · entropy + vf_coef · value loss

On Atari, and elsewhere with `--policy discretized`, it differs from `sppo_atari.py` and `sppo_continuous.py` in the
loss alone. The released SPPO then has exactly the gradient of PPO with `pg_coef` = α + β|Z|, its matched control. By
default continuous actions are Gaussian.

The algorithm, as `main` runs it:

    for each iteration
        act in num_envs environments for num_steps steps          collect_games, collect_episodes
        add noise to the rewards (only if asked for)              flip_rewards, add_noise
        advantages A by GAE, returns = A + values                 gae
        for each epoch, for each minibatch                        update
            normalise A, take a gradient step on the loss         normalize, gradient, ppo_loss
    play and report the raw return                                evaluate_games, evaluate_episodes

    python ppo_baseline.py --env-id ALE/Breakout-v5
    python ppo_baseline.py --env-id Hopper-v5 --total-timesteps 1000000
    python ppo_baseline.py --env-id Hopper-v5 --policy discretized --pg-coef 20.5 --reward-noise 0.05
"""

import contextlib
import copy
import ctypes
import difflib
import fcntl
import importlib.util
import io
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

# Set before torch is imported. Its OpenMP threads, when idle, then spin for less than a millisecond before they sleep:
# long enough to catch the network's next layer, short enough to leave the cores to the games.
os.environ.setdefault("GOMP_SPINCOUNT", "15000")

import ale_py
import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.nn as nn
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)


@dataclass
class Args:
    """PPO for Atari and continuous control. What is None by default depends on the kind of environment."""

    env_id: str = "Hopper-v5"
    """an Atari game (`ALE/Breakout-v5`, `BreakoutNoFrameskip-v4`), or flat observations, `Box` or `Discrete` actions"""
    policy: Literal["gaussian", "discretized"] = "gaussian"
    """for `Box` actions: a Gaussian, or `num_bins` values per dimension; no effect on Atari and `Discrete` actions"""
    num_bins: int = 11
    """values per dimension of the discretized policy, evenly spaced, ends included"""
    seed: int = 1
    """seed of the run: weights, environments, actions, minibatches, noise"""
    total_timesteps: int | None = None
    """environment steps; the last incomplete batch is left out (Atari 5,000,000, else 2,000,000)"""
    num_envs: int | None = None
    """environments stepped side by side (Atari 8, else 1)"""
    num_steps: int | None = None
    """steps in each environment per iteration (Atari 128, else 2048)"""
    num_minibatches: int | None = None
    """minibatches per epoch (Atari 4, else 32)"""
    update_epochs: int | None = None
    """passes over each batch (Atari 4, else 10)"""
    learning_rate: float | None = None
    """step size of Adam (Atari 2.5e-4, else 3e-4)"""
    anneal_lr: bool | None = None
    """lower the learning rate linearly to 0 (Atari True, else False)"""
    gamma: float = 0.99
    """discount factor γ"""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation"""
    clip_coef: float | None = None
    """clip range ε (Atari 0.1, else 0.2)"""
    anneal_clip: bool | None = None
    """lower the clip range linearly to 0 (Atari True, else False)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    pg_coef: float = 1.0
    """weight of the policy loss; α + β|Z| (with `--policy discretized`) makes the matched control of SPPO"""
    ent_coef: float | None = None
    """weight of the entropy bonus (Atari 0.01, else 0.0)"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """end an iteration's updates after an epoch whose mean approximate KL exceeds this"""

    reward_noise: float = 0.0
    """Atari: probability that the learner sees 1 − reward; else: std of Gaussian noise on the normalised reward"""
    survival_bonus: float = 0.0
    """Atari: added to every reward that the learner sees: what flips of this probability pay on average"""
    advantage_noise: float = 0.0
    """probability that a sample's advantage changes sign, redrawn for every minibatch"""
    repeat_action_probability: float = 0.0
    """Atari: sticky actions, probability that a game repeats the last action"""

    eval_interval: int = 0
    """steps between evaluations; 0: only after the last update (the final score)"""
    eval_episodes: int = 10
    """episodes in an evaluation (Atari: full games, actions sampled, else: the most probable action)"""
    checkpoint_interval: int = 100_000
    """steps between checkpoints to resume from; 0: only when SIGINT or SIGTERM ends the run"""
    resume: str | None = None
    """continue the run in this folder, `runs/<run>`, with its flags; a larger --total-timesteps makes it longer"""
    evaluate: str | None = None
    """only play --eval-episodes with the model in this folder, `runs/<run>`"""
    capture_video: bool = False
    """save a video of the first episode of each evaluation"""
    cuda: bool = True
    """use a GPU if there is one"""
    torch_deterministic: bool = True
    """ask cuDNN for reproducible results"""
    bf16: bool = False
    """Atari: compute convolutions and the hidden layer in bfloat16: faster where the CPU or GPU has it, less exact"""
    compile: bool = False
    """compile the loss and its gradient: faster after half a minute, other rounding; needs a C++ compiler"""
    torch_threads: int | None = None
    """CPU threads of torch; 0: one per core, at most 8 (Atari 0, else 1: more only slow down small networks)"""
    track: bool = False
    """mirror the run to Weights & Biases"""
    wandb_project_name: str = "symmetric-rl"
    """project at Weights & Biases"""
    wandb_entity: str | None = None
    """team at Weights & Biases"""


ATARI = dict(
    total_timesteps=5_000_000, num_envs=8, num_steps=128, num_minibatches=4, update_epochs=4, learning_rate=2.5e-4,
    anneal_lr=True, clip_coef=0.1, anneal_clip=True, ent_coef=0.01, torch_threads=0,
)
CONTROL = dict(
    total_timesteps=2_000_000, num_envs=1, num_steps=2048, num_minibatches=32, update_epochs=10, learning_rate=3e-4,
    anneal_lr=False, clip_coef=0.2, anneal_clip=False, ent_coef=0.0, torch_threads=1,
)


def is_atari(env_id: str) -> bool:
    return env_id in gym.registry and (env_id.startswith("ALE/") or env_id.endswith("NoFrameskip-v4"))


def fill_in(args: Args) -> None:
    """Gives the flags that are None the default of the environment's kind."""
    for name, value in (ATARI if is_atari(args.env_id) else CONTROL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def validate(args: Args) -> None:
    """Raises ValueError, with one line to print, if a run with `args` makes no sense."""
    atari = is_atari(args.env_id)
    if not atari:
        check_environment(args.env_id, args.capture_video)
    rules = [
        ("num_envs num_steps num_minibatches update_epochs eval_episodes", lambda x: x >= 1, "at least 1"),
        ("num_bins", lambda x: x >= 2, "at least 2"),
        ("gamma gae_lambda advantage_noise repeat_action_probability", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("pg_coef survival_bonus ent_coef vf_coef", lambda x: 0 <= x < math.inf, "finite and ≥ 0"),
        ("seed eval_interval checkpoint_interval torch_threads", lambda x: x >= 0, "≥ 0"),
        ("reward_noise", lambda x: 0 <= x <= (1 if atari else sys.float_info.max), "finite and ≥ 0, on Atari ≤ 1"),
        ("learning_rate", lambda x: 0 < x < math.inf, "finite and positive"),
        ("clip_coef", lambda x: 0 < x < 1, "between 0 and 1"),
        ("max_grad_norm target_kl", lambda x: x is None or x > 0, "positive"),
    ]
    for names, holds, words in rules:
        for name in names.split():
            if not holds(getattr(args, name)):
                raise ValueError(f"--{name.replace('_', '-')} must be {words}; it is {getattr(args, name)}")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        batch = f"{args.num_envs} × {args.num_steps} = {batch_size} steps"
        raise ValueError(f"a batch of {batch} does not divide into --num-minibatches {args.num_minibatches}")
    if args.norm_adv and batch_size == args.num_minibatches:
        raise ValueError("--norm-adv needs minibatches of at least 2 steps")
    if args.total_timesteps < batch_size:
        raise ValueError(f"--total-timesteps {args.total_timesteps} is less than one batch ({batch_size} steps)")
    if args.bf16 and not atari:
        raise ValueError("--bf16 is for Atari: networks as small as these gain nothing")
    if args.survival_bonus and not atari:
        raise ValueError("--survival-bonus is for Atari")
    cuda = args.cuda and torch.cuda.is_available()
    if args.bf16 and not (torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()):
        raise ValueError(f"--bf16 would be slower: this {'GPU has no bfloat16' if cuda else 'CPU has no AVX512-BF16'}")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        raise ValueError("--compile needs a C++ compiler: install g++, or name one in the variable CXX")
    if args.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:
        raise ValueError("--track needs Weights & Biases: pip install wandb")


def check_environment(env_id: str, video: bool) -> None:
    """Raises ValueError, with one line to print, unless the environment exists, can be rendered if a `video` is asked
    for, and has spaces that the script takes."""
    if video and sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # lets MuJoCo render without a screen; read when it is first imported
    try:
        with warnings.catch_warnings(action="ignore"):
            env = gym.make(env_id, **({"render_mode": "rgb_array"} if video else {}))
            if video:
                env.reset()
                env.render()
    except gym.error.UnregisteredEnv:
        atari = [name for name in gym.registry if name.startswith("ALE/") or name.endswith("NoFrameskip-v4")]
        others = [name for name, spec in gym.registry.items() if "/" not in name and "game" not in spec.kwargs]
        known = {name.lower(): name for name in atari + others}
        near = [known[name] for name in difflib.get_close_matches(env_id.lower(), known, n=1)]
        hint = f"did you mean {near[0]}?" if near else "Atari games, for the scripts that take them: ALE/Breakout-v5"
        raise ValueError(f"--env-id {env_id} is not known; {hint}") from None
    except Exception as error:  # whatever an environment that is not installed as it should be raises
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"--env-id {env_id} cannot be {'rendered' if video else 'made'}: {reason}") from None
    obs_space, action_space = env.observation_space, env.action_space
    env.close()
    if not (isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1):
        hint = "this script takes flat Box ones (Atari games, for the scripts that take them: ALE/Breakout-v5)"
        raise ValueError(f"--env-id {env_id} has observations {obs_space}; {hint}")
    box = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded() and action_space.dtype.kind == "f"
    if not (box or isinstance(action_space, gym.spaces.Discrete)):
        raise ValueError(f"--env-id {env_id} has actions {action_space}; this script takes Discrete or bounded Box")


# ---------------------------------------------------------------------------------------------------------- environment


def make_games(env_id: str, num_envs: int, repeat_action_probability: float, **options) -> AtariVectorEnv:
    """ale-py's native vector environment with the usual preprocessing: 84×84 greyscale, 4 frames stacked, actions held
    for 4 frames, FIRE and 0 to 29 no-ops at reset. Observations (num_envs, 4, 84, 84) uint8, rewards raw int32."""
    usual = hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER
    if usual:  # its threads inherit this policy: when they wake they wait for a core instead of taking ours
        with contextlib.suppress(OSError):  # some sandboxes refuse
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        return AtariVectorEnv(
            gym.spec(env_id).kwargs["game"],
            num_envs,
            repeat_action_probability=repeat_action_probability,
            reward_clipping=False,  # the raw score is what is reported
            life_loss_info=True,  # a lost life sets `terminated` and the game goes on
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,  # a finished game starts anew within the same step
            **options,
        )
    finally:
        if usual:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


class Games:
    """Games side by side. After a lost life FIRE is pressed for one step, where the game has it: none stands waiting.

    `obs` (num_envs, 84, 84, 4) uint8, a tensor, is what to act on next. Of the last step, with an entry per game:
    `score` and `length` (in steps) of the game so far, or of the whole game where it is `over`; the `action` played;
    `valid`, False where FIRE was pressed for the learner: no sample.
    """

    def __init__(self, env_id: str, seeds: np.ndarray, repeat_action_probability: float):
        self.envs = make_games(env_id, len(seeds), repeat_action_probability)
        actions = self.envs.ale.get_action_set()
        self.fire = actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else None
        self.num_actions = len(actions)
        obs, info = self.envs.reset(seed=seeds)
        self.obs, self.frame = channels_last(obs), info["episode_frame_number"]
        self.must_fire, self.over = np.zeros((2, len(seeds)), dtype=bool)
        self.score, self.length = np.zeros((2, len(seeds)))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor | None]:
        """Raw reward; terminated: the game is over or a life is lost; truncated: it was cut off at 108,000 frames;
        final_obs: last observation of the game where truncated, undefined elsewhere."""
        self.score[self.over] = self.length[self.over] = 0  # over with the step before
        self.valid = ~self.must_fire
        self.action = np.where(self.must_fire, self.fire, action) if self.must_fire.any() else action
        obs, reward, terminated, truncated, info = self.envs.step(self.action)
        self.obs = channels_last(obs)
        self.over = info["episode_frame_number"] <= self.frame  # only a new game counts its frames from the start
        self.frame = info["episode_frame_number"]
        self.score += reward
        self.length += 1
        if self.fire is not None:
            self.must_fire = terminated & ~self.over
        return reward, terminated, truncated, channels_last(info["final_obs"]) if truncated.any() else None


def channels_last(obs: np.ndarray) -> torch.Tensor:
    """(num_envs, 4, 84, 84) → (num_envs, 84, 84, 4), the same memory"""
    return torch.from_numpy(obs).movedim(1, 3)


def game_seeds(sequence: np.random.SeedSequence, num_envs: int) -> np.ndarray:
    """Independent seeds, one per game: seed, seed + 1, … would let runs of neighbouring seeds share games."""
    return sequence.generate_state(num_envs) >> 1  # ale-py takes 31 bits


class RunningMeanStd:
    """Mean and variance of all samples so far (Welford, 1962)."""

    def __init__(self, shape: tuple[int, ...] = ()):
        self.count, self.mean, self.sum_of_squares = 0, np.zeros(shape), np.zeros(shape)

    def update(self, sample: np.ndarray) -> None:
        self.count += 1
        delta = sample - self.mean
        self.mean = self.mean + delta / self.count
        self.sum_of_squares = self.sum_of_squares + delta * (sample - self.mean)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.sum_of_squares / max(self.count, 1) + 1e-8)

    def state(self) -> dict:
        """All of it, for a checkpoint; `std` for users of `model.pt`."""
        arrays = {"mean": self.mean, "sum_of_squares": self.sum_of_squares, "std": self.std}
        return {"count": self.count} | {name: torch.tensor(array) for name, array in arrays.items()}

    def restore(self, state: dict) -> None:
        self.count, self.mean = state["count"], state["mean"].numpy()
        self.sum_of_squares = state["sum_of_squares"].numpy()


def episode_state(env: gym.Env) -> dict | None:
    """Where `env` stands in its episode, to the bit, for gymnasium's own MuJoCo and classic control environments. None
    for the others: Box2D cannot tell, and what else an environment of a third party remembers is not known here."""
    inner = env.unwrapped
    kind = ".".join(type(inner).__module__.split(".")[:3])
    if env.spec.additional_wrappers or kind not in ("gymnasium.envs.classic_control", "gymnasium.envs.mujoco"):
        return None
    state = {"steps": getattr(env, "_elapsed_steps", None), "random": inner.np_random.bit_generator.state}
    if kind == "gymnasium.envs.classic_control":
        return state | {"state": torch.tensor(np.array(inner.state))}
    import mujoco  # not earlier: it reads MUJOCO_GL

    integration = np.empty(mujoco.mj_stateSize(inner.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(inner.model, inner.data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    # Ant, Humanoid and Reacher-v4 compute rewards from positions that MuJoCo derived one substep earlier.
    derived = {name: torch.tensor(getattr(inner.data, name)) for name in ("xpos", "xipos")}
    return state | {"integration": torch.from_numpy(integration), "derived": derived}


def restore_episode(env: gym.Env, state: dict) -> None:
    """Puts `env`, which has been reset, where `episode_state` found it."""
    inner = env.unwrapped
    env._elapsed_steps, inner.np_random.bit_generator.state = state["steps"], state["random"]
    if "state" in state:
        inner.state = state["state"].numpy()
    else:
        import mujoco

        integration = state["integration"].numpy()
        mujoco.mj_setState(inner.model, inner.data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
        for name, array in state["derived"].items():
            getattr(inner.data, name)[:] = array.numpy()


class BinnedActions:
    """The policy's choices, a bin in each of D dimensions, as actions of the environment.

    `values` (D, num_bins): for a `Box` evenly spaced from low to high, ends included; for a `Discrete` space, which is
    one dimension, its own actions.
    """

    def __init__(self, space: gym.spaces.Box | gym.spaces.Discrete, num_bins: int):
        if isinstance(space, gym.spaces.Discrete):
            self.values = space.start + np.arange(space.n)[np.newaxis]
        else:
            self.values = np.linspace(space.low.flatten(), space.high.flatten(), num_bins, axis=1, dtype=space.dtype)
        self.dimensions, self.space_shape = np.arange(len(self.values)), space.shape

    def __call__(self, bins: np.ndarray) -> np.ndarray:
        """(num_envs, D) → (num_envs, *space.shape)"""
        return self.values[self.dimensions, bins].reshape(len(bins), *self.space_shape)


class Environments:
    """Environments side by side, with running normalisation of observations and rewards; one that ends starts anew
    within the same step.

    `obs` (num_envs, obs_dim), normalised, is what to act on next. Of the last step, with an entry per environment:
    `score` (raw return) and `length` of the episode so far, or of the whole episode where it is `over`.
    """

    def __init__(self, env_id: str, seeds: np.ndarray, gamma: float):
        self.envs = [gym.make(env_id) for _ in seeds]
        self.gamma, self.action_space = gamma, self.envs[0].action_space
        self.obs_stats, self.return_stats = RunningMeanStd(self.envs[0].observation_space.shape), RunningMeanStd()
        self.obs = np.stack([self.observe(env.reset(seed=int(seed))[0]) for env, seed in zip(self.envs, seeds)])
        self.over = np.zeros(len(seeds), dtype=bool)
        self.totals = np.zeros((3, len(seeds)))
        self.score, self.length, self.discounted_return = self.totals

    def normalize(self, obs: np.ndarray) -> np.ndarray:
        """An observation with the statistics so far, clipped to ±10."""
        return ((obs - self.obs_stats.mean) / self.obs_stats.std).clip(-10, 10).astype(np.float32)

    def observe(self, obs: np.ndarray) -> np.ndarray:
        """The same, once the statistics have seen it."""
        self.obs_stats.update(obs)
        return self.normalize(obs)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Normalised reward; terminated; truncated (by a time limit); final_obs: last observation of an episode that is
        over, normalised, undefined elsewhere."""
        self.totals[:, self.over] = 0  # after a truncation, too
        (terminated, truncated), reward = np.zeros((2, len(self.envs)), dtype=bool), np.zeros(len(self.envs))
        final_obs = np.empty_like(self.obs)
        for i, env in enumerate(self.envs):
            obs, raw_reward, terminated[i], truncated[i], _ = env.step(action[i])
            self.score[i] += raw_reward
            self.discounted_return[i] = self.gamma * self.discounted_return[i] + raw_reward
            self.return_stats.update(self.discounted_return[i])
            reward[i] = max(min(raw_reward / self.return_stats.std, 10), -10)  # in this order a NaN stays one
            if terminated[i] or truncated[i]:
                final_obs[i] = self.normalize(obs)  # a value to bootstrap from, not an observation of the policy
                obs, _ = env.reset()
            self.obs[i] = self.observe(obs)
        self.length += 1
        self.over = terminated | truncated
        return reward, terminated, truncated, final_obs

    def state(self) -> dict:
        """For a checkpoint: the statistics, and episodes in flight where they can be saved."""
        names = ("obs", "over", "score", "length", "discounted_return")
        return {
            "obs_stats": self.obs_stats.state(),
            "return_stats": self.return_stats.state(),
            "episodes": [episode_state(env) for env in self.envs],
            "arrays": {name: torch.tensor(getattr(self, name)) for name in names},
        }

    def restore(self, state: dict) -> None:
        """Goes on where `state` was taken; where an episode could not be saved a new one begins."""
        self.obs_stats.restore(state["obs_stats"])
        self.return_stats.restore(state["return_stats"])
        for i, (env, episode) in enumerate(zip(self.envs, state["episodes"])):
            if episode is None:
                self.obs[i] = self.observe(env.reset()[0])
            else:
                restore_episode(env, episode)
                for name, array in state["arrays"].items():
                    getattr(self, name)[i] = array[i].numpy()


# -------------------------------------------------------------------------------------------------------------- network


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class TransposedLinear(nn.Linear):
    """nn.Linear with its weight as (inputs, outputs): twice as fast on a CPU if it is large and inputs are few."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.weight.data = self.weight.data.t().contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class AtariAgent(nn.Module):
    """The Nature CNN (Mnih et al., 2015), shared by policy and value. Observations: (batch, 84, 84, 4) uint8."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16  # for convolutions and the hidden layer
        self.features = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            layer_init(TransposedLinear(64 * 7 * 7, 512)),
            nn.ReLU(inplace=True),
        )
        self.policy = layer_init(nn.Linear(512, num_actions), std=0.01)
        self.value = layer_init(nn.Linear(512, 1), std=1.0)
        self.to(memory_format=torch.channels_last)  # convolutions on a CPU are much faster so

    def get_logprobs_and_value(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of all actions (batch, num_actions) and values (batch,)."""
        dtype = self.value.weight.dtype
        pixels = obs.movedim(3, 1).to(torch.bfloat16 if self.bf16 else dtype, memory_format=torch.channels_last)
        conv = self.features[0]
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            # The weights are divided by 255 instead of the pixels: there are fewer of them.
            hidden = nn.functional.conv2d(pixels, conv.weight / 255, conv.bias, conv.stride)
            features = self.features[1:](hidden).to(dtype)
        return self.policy(features).log_softmax(-1), self.value(features).squeeze(1)

    def act(self, obs: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples actions (batch,); their log-probabilities (batch, 1), one action dimension, and values (batch,)."""
        logprobs, value = self.get_logprobs_and_value(obs)
        action = sample(logprobs, generator)
        return action, logprobs.gather(1, action.unsqueeze(1)), value

    def get_value(self, obs: torch.Tensor) -> torch.Tensor:
        return self.get_logprobs_and_value(obs)[1]

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of these actions (batch, 1), entropies (batch,), values (batch,)."""
        logprobs, value = self.get_logprobs_and_value(obs)
        return logprobs.gather(1, action.unsqueeze(1)), -(logprobs.exp() * logprobs).sum(1), value


def mlp(inputs: int, outputs: int, std: float) -> nn.Sequential:
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, outputs), std),
    )


def in_numpy(network: nn.Sequential) -> Callable[[np.ndarray], np.ndarray]:
    """An `mlp` as a function of arrays (num_envs, obs_dim): for the few rows of a step several times as fast as torch,
    whose calls cost more than the arithmetic."""
    W1, b1, W2, b2, W3, b3 = (parameter.detach().cpu().numpy().T for parameter in network.parameters())
    return lambda obs: np.tanh(np.tanh(obs @ W1 + b1) @ W2 + b2) @ W3 + b3


def as_vector(network: nn.Module) -> nn.Parameter:
    """All parameters in one vector, of which they become parts: Adam's work is then one call, not one per tensor."""
    vector = nn.Parameter(nn.utils.parameters_to_vector(network.parameters()).detach())
    nn.utils.vector_to_parameters(vector.data, network.parameters())
    return vector


class BinnedAgent(nn.Module):
    """Policy and value, two separate networks. Observations: (batch, obs_dim). The policy is independent categorical
    distributions, one per action dimension, over the bins; `bins` is (D, num_bins)."""

    def __init__(self, obs_dim: int, bins: tuple[int, int]):
        super().__init__()
        self.policy = mlp(obs_dim, math.prod(bins), std=0.01).append(nn.Unflatten(1, bins))
        self.value = mlp(obs_dim, 1, std=1.0).append(nn.Flatten(0))
        self.bins = bins

    def noise(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Gumbel noise: the largest of logits + noise is a sample of softmax(logits)."""
        return rng.gumbel(size=(*shape, *self.bins))

    def act(self, logits: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
        """Actions (num_envs, D) from `in_numpy(agent.policy)(obs)`; without noise the most probable ones."""
        return (logits.reshape(-1, *self.bins) + noise).argmax(-1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of these actions, by dimension (batch, D), entropies (batch,), values (batch,)."""
        logprobs = self.policy(obs).movedim(2, 0).log_softmax(0)  # over so few bins much faster if they come first
        logprob = logprobs.gather(0, action.unsqueeze(0)).squeeze(0)
        return logprob, -(logprobs.exp() * logprobs).sum((0, 2)), self.value(obs)


def for_acting(agent: AtariAgent) -> AtariAgent:
    """The agent itself; with bf16 a copy whose weights are in bfloat16 already, not converted anew at every step."""
    if agent.bf16:
        half = {id(p): nn.Parameter(p.bfloat16()) for p in agent.features[1:].parameters()}
        agent = copy.deepcopy(agent, half)  # which takes what it finds there for copied already
    return agent


def sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws from softmax(logits) along the last dimension: the Gumbel-max trick, without building a distribution."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(-1)


class GaussianAgent(nn.Module):
    """Policy and value, two separate networks. Observations: (batch, obs_dim). The policy is independent Gaussians, one
    per action dimension, with a standard deviation that is learned and the same everywhere."""

    def __init__(self, obs_dim: int, action_dims: int):
        super().__init__()
        self.policy = mlp(obs_dim, action_dims, std=0.01)
        self.log_std = nn.Parameter(torch.zeros(action_dims))
        self.value = mlp(obs_dim, 1, std=1.0).append(nn.Flatten(0))

    def noise(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Gaussian noise with the policy's standard deviation."""
        return rng.standard_normal((*shape, len(self.log_std)), np.float32) * self.log_std.exp().numpy(force=True)

    def act(self, mean: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
        """Actions (num_envs, D), not clipped, from `in_numpy(agent.policy)(obs)`; without noise the most probable."""
        return mean + noise

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of these actions, by dimension (batch, D), entropies (batch,), values (batch,)."""
        deviation = (action - self.policy(obs)) / self.log_std.exp()
        logprob = -0.5 * deviation.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        entropy = (0.5 + 0.5 * math.log(2 * math.pi) + self.log_std).sum()
        return logprob, entropy.expand(len(obs)), self.value(obs)


class ClippedActions:
    """The Gaussian's draws as actions of the environment: clipped to the box."""

    def __init__(self, space: gym.spaces.Box):
        self.space = space

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """(num_envs, D) → (num_envs, *space.shape)"""
        return action.reshape(len(action), *self.space.shape).clip(self.space.low, self.space.high)


# --------------------------------------------------------------------------------------------------- losses, advantages


def ppo_loss(
    logprob: torch.Tensor, old_logprob: torch.Tensor, advantage: torch.Tensor, clip_coef: float
) -> torch.Tensor:
    """PPO's clipped loss −min(r·A, clip(r, 1−ε, 1+ε)·A), mean over the batch (Schulman et al., 2017, equation 7).

    `logprob`, `old_logprob`: (batch, D), a column per action dimension; r is the joint ratio. `advantage`: (batch,).
    """
    ratio = (logprob.sum(1) - old_logprob.sum(1)).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage).mean()


def gae(rewards, values, dones, next_value, gamma: float, gae_lambda: float) -> np.ndarray:
    """Generalised advantage estimation (Schulman et al., 2016). A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t.

    `rewards`, `values`, `dones`: (num_steps, num_envs); `next_value`: (num_envs,). `dones[t]`: an episode ended with
    step t, nothing is carried over. For a truncated one the caller adds γ · V(final observation) to the last reward.
    """
    following_values = np.concatenate((values[1:], next_value[np.newaxis]))
    advantages = rewards + gamma * following_values * ~dones - values  # δ_t, to which the loop adds γλ A_{t+1}
    decay = np.where(dones, 0, gamma * gae_lambda).astype(values.dtype)
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


def normalize(advantage: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Advantages (…, samples) with mean 0 and standard deviation 1 over the samples where `valid` is 1."""
    count = valid.sum(-1, keepdim=True)
    centred = advantage - (advantage * valid).sum(-1, keepdim=True) / count.clamp(min=1)
    std = ((centred.square() * valid).sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + 1e-8)


def flip_rewards(reward: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Binary symmetric channel: each reward becomes 1 − reward with `probability`. On average (1 − 2p) · reward + p.

    Zeros become ones too, on every step; −1 becomes 2. That is the released code's formula.
    """
    return np.where(rng.random(reward.shape) < probability, 1 - reward, reward)


def add_noise(reward: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    """Adds Gaussian noise with mean 0 and the given standard deviation to (normalised) rewards."""
    return reward + std * rng.standard_normal(reward.shape, dtype=reward.dtype)


def flip_signs(advantage: torch.Tensor, probability: float, rng: np.random.Generator) -> torch.Tensor:
    """Each advantage (batch,) changes its sign with `probability` (`adv_flip` in the released code)."""
    flipped = torch.from_numpy(rng.random(len(advantage)) < probability).to(advantage.device)
    return torch.where(flipped, -advantage, advantage)


# ------------------------------------------------------------------------------------------------------------ algorithm


class Batch(NamedTuple):
    """The steps of one iteration, as tensors of shape (batch, …)."""

    obs: torch.Tensor
    actions: torch.Tensor
    logprobs: torch.Tensor  # (batch, D), log π_old
    advantages: torch.Tensor
    returns: torch.Tensor
    weight: torch.Tensor  # 1, or 0 where FIRE was pressed for the learner; in a minibatch the mean is 1


class Rollout:
    """`num_steps` steps of `num_envs` environments; arrays of shape (num_steps, num_envs, …)."""

    def __init__(self, num_steps: int, obs: torch.Tensor, action: torch.Tensor):
        shape = (num_steps, len(obs))
        self.obs = torch.zeros((num_steps, *obs.shape), dtype=obs.dtype, device=obs.device)
        self.actions = torch.zeros((num_steps, *action.shape), dtype=action.dtype, device=obs.device)
        self.logprobs = torch.zeros((*shape, action.shape[1:].numel()), device=obs.device)
        self.values = torch.zeros(shape, device=obs.device)
        self.next_value = torch.zeros(len(obs), device=obs.device)  # of the observation after the last step
        self.rewards = np.zeros(shape, dtype=np.float32)  # Atari: the sign of the raw reward, else: normalised
        self.dones = np.zeros(shape, dtype=bool)
        self.bootstraps = np.zeros(shape, dtype=np.float32)  # V(final observation) where truncated, else 0
        self.valid = np.ones(shape, dtype=bool)  # False where FIRE was pressed for the learner
        self.finished = []  # (step, mean return, mean length) of the episodes that ended, one entry per step


@torch.inference_mode()
def collect_games(games: Games, agent: AtariAgent, rollout: Rollout, generator: torch.Generator) -> None:
    """Plays the policy and overwrites `rollout` with what happened."""
    agent, device = for_acting(agent), generator.device
    rollout.finished.clear()
    rollout.bootstraps[:] = 0
    for t, obs in enumerate(rollout.obs):
        obs[:] = games.obs
        rollout.actions[t], rollout.logprobs[t], rollout.values[t] = agent.act(obs, generator)
        reward, terminated, truncated, final_obs = games.step(rollout.actions[t].cpu().numpy())
        rollout.rewards[t] = np.sign(reward)
        rollout.dones[t] = terminated | truncated
        rollout.valid[t] = games.valid
        cut = truncated & ~terminated
        if cut.any():
            rollout.bootstraps[t, cut] = agent.get_value(final_obs[torch.from_numpy(cut)].to(device)).cpu()
        if games.over.any():
            rollout.finished.append((t, games.score[games.over].mean(), games.length[games.over].mean()))
    rollout.next_value[:] = agent.get_value(games.obs.to(device))


@torch.inference_mode()
def collect_episodes(
    envs: Environments, to_action, agent: nn.Module, rollout: Rollout, rng: np.random.Generator
) -> None:
    """Plays the policy and overwrites `rollout` with what happened."""
    policy, noise = in_numpy(agent.policy), agent.noise(rollout.dones.shape, rng)
    obs, actions = rollout.obs.numpy(), rollout.actions.numpy()  # the same memory
    rollout.finished.clear()
    rollout.bootstraps[:] = 0
    for t in range(len(obs)):
        obs[t] = envs.obs
        actions[t] = agent.act(policy(envs.obs), noise[t])
        rollout.rewards[t], terminated, truncated, final_obs = envs.step(to_action(actions[t]))
        rollout.dones[t] = envs.over
        if envs.over.any():
            cut = truncated & ~terminated
            rollout.bootstraps[t, cut] = in_numpy(agent.value)(final_obs[cut])[:, 0]
            rollout.finished.append((t, envs.score[envs.over].mean(), envs.length[envs.over].mean()))
    device = next(agent.parameters()).device
    last_obs, *steps = (x.to(device) for x in (torch.from_numpy(envs.obs), rollout.obs, rollout.actions))
    logprobs, _, values = agent(*(x.flatten(0, 1) for x in steps))  # all at once: much faster than step by step
    rollout.logprobs[:], rollout.values[:] = logprobs.view_as(rollout.logprobs), values.view_as(rollout.values)
    rollout.next_value[:] = agent.value(last_obs)


def gradient(agent: nn.Module, mb: Batch, clip_coef: float, args: Args) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Gradient of the loss of one minibatch, clipped, by parameter; what is logged of the losses; log π (batch, D)."""
    logprob, entropy, value = agent(mb.obs, mb.actions)
    forward_loss = ppo_loss(logprob, mb.logprobs, mb.advantages, clip_coef)
    policy_loss = args.pg_coef * forward_loss
    value_loss = (mb.weight * (value - mb.returns).square()).mean()
    entropy = (mb.weight * entropy).mean()
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef:  # otherwise its gradient need not be computed
        loss = loss - args.ent_coef * entropy
    grads = torch.autograd.grad(loss, list(agent.parameters()))
    if not isinstance(agent, AtariAgent):
        grads = [torch.cat([part.flatten() for part in grads])]  # `as_vector`
    norm = nn.utils.get_total_norm(grads)
    logged = torch.stack((policy_loss, forward_loss, value_loss, entropy, norm)).detach()
    scale = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    return [grad * scale for grad in grads], logged, logprob.detach()


def update(
    agent: nn.Module, optimizer, batch: Batch, clip_coef: float, args: Args, rng: np.random.Generator, gradient=gradient
) -> dict:
    """Gradient steps on the loss of one batch. Returns the means over all of them of what is logged, by tag."""
    losses, samples = [], []  # read only at the end: .item() in the loop would wait for the GPU
    # A number would be part of what is compiled, which would be compiled anew whenever it changes.
    clip = torch.tensor(clip_coef, dtype=torch.float64, device=batch.obs.device) if args.compile else clip_coef
    for _ in range(args.update_epochs):
        b_inds = torch.from_numpy(rng.permutation(len(batch.obs))).to(batch.obs.device)
        shuffled = Batch(*(field.index_select(0, b_inds) for field in batch))
        advantage = flip_signs(shuffled.advantages, args.advantage_noise, rng)
        valid = shuffled.weight.view(args.num_minibatches, -1)
        normalized = normalize(advantage.view_as(valid), valid).flatten() if args.norm_adv else advantage
        weight = (valid / valid.mean(1, keepdim=True).clamp(min=1e-8)).flatten()  # a mean is then over valid samples
        weighted = shuffled._replace(advantages=weight * normalized, weight=weight)
        logprobs = []
        for mb in map(Batch._make, zip(*(field.chunk(args.num_minibatches) for field in weighted))):
            grads, logged, logprob = gradient(agent, mb, clip, args)
            for parameter, grad in zip(optimizer.param_groups[0]["params"], grads):
                # Fused Adam walks through memory: a gradient must lie there as its parameter does.
                same = grad.stride() == parameter.stride()
                parameter.grad = grad if same else torch.empty_like(parameter).copy_(grad)
            optimizer.step()
            losses.append(logged)
            logprobs.append(logprob)
        logratio = (torch.cat(logprobs) - shuffled.logprobs).sum(1)
        samples.append(torch.stack((logratio, advantage, normalized, shuffled.weight)))
        if args.target_kl is not None and (logratio.exp() - 1 - logratio)[shuffled.weight > 0].mean() > args.target_kl:
            break
    policy_loss, forward_loss, value_loss, entropy, grad_norm = torch.stack(losses).mean(0).tolist()
    samples = torch.cat(samples, 1)
    logratio, advantage, normalized, _ = samples[:, samples[3] > 0]
    return {
        "losses/policy_loss": policy_loss,
        "losses/forward_loss": forward_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/grad_norm": grad_norm,
        "losses/old_approx_kl": -logratio.mean().item(),
        "losses/approx_kl": (logratio.exp() - 1 - logratio).mean().item(),
        "losses/clipfrac": ((logratio.exp() - 1).abs() > clip_coef).float().mean().item(),
        "advantage/sign_flips_normalization": (normalized.sign() != advantage.sign()).float().mean().item(),
    }


@torch.inference_mode()
def evaluate_games(agent: AtariAgent, args: Args, sequence: np.random.SeedSequence, video: Path | None) -> np.ndarray:
    """Raw scores (eval_episodes,) of full games, each in an environment of its own, actions sampled. The seeds, of the
    games and of the actions, are the same at every call."""
    device = agent.value.weight.device
    *seeds, actions_seed = game_seeds(sequence, args.eval_episodes + 1)
    seeds = np.array(seeds)
    games = Games(args.env_id, seeds, args.repeat_action_probability)
    generator = torch.Generator(device).manual_seed(int(actions_seed))
    if video:  # the first game a second time, in colour: same seed and same actions give the same game
        video.parent.mkdir(parents=True, exist_ok=True)
        colour = make_games(args.env_id, 1, args.repeat_action_probability, img_height=210, img_width=160, stack_num=1,
                            grayscale=False)
        frames = colour.reset(seed=seeds[:1])[0]
        writer = imageio.get_writer(video, fps=15, macro_block_size=2)
    scores = np.full(args.eval_episodes, np.nan)
    while np.isnan(scores).any():
        action, _, _ = agent.act(games.obs.to(device), generator)
        games.step(action.cpu().numpy())
        if video and np.isnan(scores[0]):
            writer.append_data(frames[0, 0])
            frames = colour.step(games.action[:1])[0]
        scores = np.where(games.over & np.isnan(scores), games.score, scores)
    if video:
        writer.close()
    return scores


@torch.inference_mode()
def evaluate_episodes(
    agent: nn.Module, envs: Environments, to_action, args: Args, sequence: np.random.SeedSequence, video: Path | None
) -> np.ndarray:
    """Raw returns (eval_episodes,) with the most probable actions and the statistics of `envs`, which do not change."""
    env = gym.make(args.env_id, **({"render_mode": "rgb_array"} if video else {}))
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        writer = imageio.get_writer(video, fps=env.metadata.get("render_fps", 30), macro_block_size=2)
    policy, returns = in_numpy(agent.policy), np.zeros(args.eval_episodes)
    for episode, seed in enumerate(sequence.generate_state(args.eval_episodes)):
        obs, _ = env.reset(seed=int(seed))
        done = False
        while not done:
            if video and episode == 0:
                writer.append_data(env.render())
            action = agent.act(policy(envs.normalize(obs)[np.newaxis]))  # without noise: the most probable one
            obs, reward, terminated, truncated, _ = env.step(to_action(action)[0])
            returns[episode] += reward
            done = terminated or truncated
    env.close()
    if video:
        writer.close()
    return returns


# ---------------------------------------------------------------------------------------------------------- the run


def read_flags() -> Args:
    """The flags; with --resume or --evaluate those of that run, of which some may be changed. Raises ValueError, with
    one line to print, if others are."""
    args = tyro.cli(Args)
    if args.resume is None and args.evaluate is None:
        return args
    if args.resume is not None and args.evaluate is not None:
        raise ValueError("--resume and --evaluate do not go together")
    machine = "cuda bf16 compile torch_threads"  # another one may need other values
    if args.resume is not None:
        free = "total_timesteps eval_interval eval_episodes capture_video track checkpoint_interval " + machine
        flags = load(Path(args.resume, "checkpoint.pt"))["args"]
        if not os.access(args.resume, os.W_OK):
            raise ValueError(f"the run's folder {args.resume} cannot be written")
    else:
        free = "eval_episodes capture_video " + machine
        flags = load(Path(args.evaluate, "model.pt"))["args"] | {"capture_video": False, "track": False}
    stored = Args(**flags | {"resume": args.resume, "evaluate": args.evaluate})
    args = tyro.cli(Args, default=stored)
    for name, value in asdict(args).items():
        if value != getattr(stored, name) and name not in free.split():
            raise ValueError(f"--{name.replace('_', '-')} cannot be changed: the run has {getattr(stored, name)}")
    if (args.total_timesteps or 0) < stored.total_timesteps:
        raise ValueError(f"--total-timesteps can only grow: the run has {stored.total_timesteps}")
    return args


def new_run_folder(args: Args) -> Path:
    """Makes `runs/<env>__<script>__<seed>__<time>`; a run that starts in the same second waits for the next."""
    Path("runs").mkdir(exist_ok=True)
    while True:
        run = Path(f"runs/{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{int(time.time())}")
        try:
            run.mkdir()
            return run
        except FileExistsError:
            time.sleep(0.1)


def lock(run: Path):
    """A file, locked until the process ends. Raises ValueError, with one line to print, if another process has it."""
    file = (run / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at work on {run}") from None
    return file


def save(path: Path, args: Args, **state) -> None:
    """Writes `state` and what it belongs to. Whatever happens meanwhile, `path` is a whole file: the old or the new."""
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    torch.save({"script": Path(__file__).stem, "args": asdict(replace(args, resume=None)), **state}, buffer)
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path) -> dict:
    """What `save` wrote; nothing in the file can run code. Raises ValueError, with one line to print, if it did not."""
    if not path.exists():
        raise ValueError(f"there is no {path}")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True)
        script, _, _ = (dict(state)[name] for name in ("script", "args", "step"))
    except Exception:  # zipfile and torch raise all kinds, depending on the byte
        damaged = True
    if damaged:
        raise ValueError(f"{path} is damaged, or no file of this script")
    if script != Path(__file__).stem:
        raise ValueError(f"{path} belongs to {script}.py")
    return state


def random_state(generators: list) -> list:
    """The states of Python's random numbers and of these generators, each torch's or NumPy's."""
    states = [g.get_state() if isinstance(g, torch.Generator) else g.bit_generator.state for g in generators]
    return [random.getstate(), *states]


def restore_random(states: list, generators: list) -> None:
    random.setstate(states[0])
    for generator, state in zip(generators, states[1:]):
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state
        elif len(state) == len(generator.get_state()):  # otherwise of another kind of device
            generator.set_state(state)


def keep_freed_memory() -> None:
    """Makes glibc keep large blocks that are freed. Else the system takes them back, and every minibatch waits for new
    ones, page by page: a quarter of its time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: all blocks are in the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes: the heap does not shrink


def catch_signals() -> list[int]:
    """A list that the first SIGINT or SIGTERM puts its number into; the second ends the process at once."""
    caught = []

    def handler(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return caught


def check_finite(stats: dict[str, float], agent: nn.Module, iteration: int) -> None:
    """Raises FloatingPointError, naming them, if losses, the gradient's norm or parameters are infinite or NaN."""
    names = ("policy_loss", "forward_loss", "value_loss", "entropy", "grad_norm")
    bad = [name for name in names if not math.isfinite(stats[f"losses/{name}"])]
    norm = nn.utils.get_total_norm([parameter.detach() for parameter in agent.parameters()])
    if not math.isfinite(norm):  # has seen every number, with one wait for the GPU; may just be very large
        bad = bad or [name for name, parameter in agent.named_parameters() if not parameter.isfinite().all()]
    if bad:
        raise FloatingPointError(f"infinite or NaN in iteration {iteration}: {', '.join(bad)}")


def explain(error: Exception, run: Path) -> str:
    """One line about what ended a run, and what it can be continued from. The traceback goes into the run's folder."""
    reason = traceback.format_exception_only(error)[0].splitlines()[0]
    try:
        (run / "traceback.txt").write_text("".join(traceback.format_exception(error)))
        reason += f" (see {run}/traceback.txt)"
    except OSError:  # a full disk
        pass
    try:
        step = load(run / "checkpoint.pt")["step"]
        reason += f"; the last checkpoint is of step {step}: python {sys.argv[0]} --resume {run}"
    except ValueError as no_checkpoint:
        reason += f"; {no_checkpoint}"
    return f"{Path(__file__).name}: {reason}"


def main(args: Args, run: Path | None = None) -> None:
    atari = is_atari(args.env_id)
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.allow_tf32 = False  # without --bf16 float32 is float32, not NVIDIA's TF32
    torch.set_num_threads(args.torch_threads or min(torch.get_num_threads(), 8))
    keep_freed_memory()
    torch._dynamo.config.trace_autograd_ops = True  # lets --compile see the backward pass, too
    compiled_gradient = torch.compile(gradient, fullgraph=True) if args.compile else gradient

    run = run or new_run_folder(args)
    saved = load(run / ("model.pt" if args.evaluate else "checkpoint.pt")) if args.resume or args.evaluate else {}
    done, step = saved.get("iteration", 0), saved.get("step", 0)

    # Separate streams, so that evaluation and reward noise disturb nothing else.
    weights_seed, envs_seed, actions_seed, minibatch_seed, noise_seed, eval_seed = np.random.SeedSequence(
        args.seed
    ).spawn(6)
    if args.resume:  # of use for what cannot be restored: the first episodes are not played again
        envs_seed, actions_seed = np.random.SeedSequence([args.seed, done]).spawn(2)
    torch.manual_seed(int(weights_seed.generate_state(1)[0]))
    minibatch_rng, noise_rng = np.random.default_rng(minibatch_seed), np.random.default_rng(noise_seed)

    if atari:
        actions_rng = torch.Generator(device).manual_seed(int(actions_seed.generate_state(1)[0]))
        envs = Games(args.env_id, game_seeds(envs_seed, args.num_envs), args.repeat_action_probability)
        agent = AtariAgent(envs.num_actions, args.bf16).to(device)
        rollout_obs, action = envs.obs.to(device), torch.zeros(args.num_envs, dtype=torch.long)
    else:
        actions_rng = np.random.default_rng(actions_seed)
        envs = Environments(args.env_id, envs_seed.generate_state(args.num_envs), args.gamma)
        if args.policy == "gaussian" and isinstance(envs.action_space, gym.spaces.Box):
            to_action = ClippedActions(envs.action_space)
            agent = GaussianAgent(envs.obs.shape[1], math.prod(envs.action_space.shape)).to(device)
            action = torch.zeros(args.num_envs, math.prod(envs.action_space.shape))
        else:
            to_action = BinnedActions(envs.action_space, args.num_bins)
            agent = BinnedAgent(envs.obs.shape[1], to_action.values.shape).to(device)
            action = torch.zeros(args.num_envs, len(to_action.values), dtype=torch.long)
        rollout_obs = torch.from_numpy(envs.obs)
    parameters = agent.parameters() if atari else [as_vector(agent)]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    rollout = Rollout(args.num_steps, rollout_obs, action)

    generators = [actions_rng, minibatch_rng, noise_rng, torch.default_generator, *torch.cuda.default_generators]
    recent_returns = deque(saved.get("recent_returns", []), maxlen=100)

    if args.evaluate:
        agent.load_state_dict(saved["agent"])
        if not atari:
            envs.obs_stats.restore(saved["obs_stats"])
        video = run / "videos" / "evaluation.mp4" if args.capture_video else None
        if atari:
            returns = evaluate_games(agent, args, eval_seed, video)
        else:
            returns = evaluate_episodes(agent, envs, to_action, args, eval_seed, video)
        print(f"score at {step} steps: {returns.mean():.2f} ± {returns.std():.2f} ({len(returns)} episodes)")
        return
    if args.resume:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        if not atari:
            envs.restore(saved["envs"])
        restore_random(saved["random"], generators)
        if done >= num_iterations:
            print(f"{run} is complete, {step} steps; a larger --total-timesteps makes it longer")
            return

    stop = catch_signals()
    wandb_id = saved.get("wandb_id")
    if args.track:
        import wandb

        wandb_run = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run.name,
                               config=asdict(args), id=wandb_id, resume="allow", sync_tensorboard=True, save_code=True)
        wandb_id = wandb_run.id
    flags = ", ".join(f"{key} {value}" for key, value in asdict(args).items())
    print(f"{run} on {device}" + (f", from step {step}" if args.resume else "") + f": {flags}", flush=True)
    if isinstance(agent, AtariAgent) or isinstance(envs.action_space, gym.spaces.Discrete):
        print("the actions are discrete: --policy has no effect")
    writer = SummaryWriter(run, purge_step=step + 1)  # drops what was logged after the checkpoint
    rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", step + 1)

    last_line = time.time()
    start_time = last_line - saved.get("seconds", 0)
    progress = tqdm(total=num_iterations * batch_size, initial=step, unit=" steps", unit_scale=True, disable=None)
    for iteration in range(done + 1, num_iterations + 1):
        remaining = 1 - (iteration - 1) / num_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)
        global_step = iteration * batch_size

        if atari:
            collect_games(envs, agent, rollout, actions_rng)
        else:
            collect_episodes(envs, to_action, agent, rollout, actions_rng)

        noisy = flip_rewards if atari else add_noise
        rewards = noisy(rollout.rewards, args.reward_noise, noise_rng) + args.survival_bonus
        values, bootstrap = rollout.values.cpu().numpy(), args.gamma * rollout.bootstraps
        context = (values, rollout.dones, rollout.next_value.cpu().numpy(), args.gamma, args.gae_lambda)
        advantages = gae(rewards + bootstrap, *context)
        clean_advantages = gae(rollout.rewards + bootstrap, *context)
        returns = advantages + values

        tensors = (torch.from_numpy(x).to(rollout.values.dtype) for x in (advantages, returns, rollout.valid))
        steps = (rollout.obs, rollout.actions, rollout.logprobs, *tensors)
        batch = Batch(*(x.flatten(0, 1).to(device) for x in steps))
        stats = update(agent, optimizer, batch, clip_coef, args, minibatch_rng, compiled_gradient)
        check_finite(stats, agent, iteration)

        valid = rollout.valid
        stats["losses/explained_variance"] = 1 - (returns - values)[valid].var() / (returns[valid].var() + 1e-8)
        stats["losses/mean_weight"] = args.pg_coef
        stats["advantage/sign_flips_noise"] = (np.sign(advantages) != np.sign(clean_advantages))[valid].mean()
        stats["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        stats["charts/SPS"] = global_step / (time.time() - start_time)
        for tag, value in stats.items():
            writer.add_scalar(tag, value, global_step)
        for t, episodic_return, length in rollout.finished:
            step = global_step - batch_size + (t + 1) * args.num_envs
            writer.add_scalar("charts/episodic_return", episodic_return, step)
            writer.add_scalar("charts/episodic_length", length, step)
            recent_returns.append(episodic_return)

        recent = f"return {np.mean(recent_returns):.1f}" if recent_returns else "no episode over yet"
        progress.set_postfix_str(recent, refresh=False)
        progress.update(batch_size)
        if progress.disable and (time.time() - last_line > 30 or iteration == num_iterations):
            last_line = time.time()
            left = (last_line - start_time) * (num_iterations / iteration - 1) / 60
            print(f"{global_step} steps, {stats['charts/SPS']:.0f} SPS, {left:.0f} min left, {recent}", flush=True)
        crossed = args.eval_interval and global_step % args.eval_interval < batch_size
        if crossed or iteration == num_iterations:
            eval_start = time.time()
            model = {"step": global_step, "agent": agent.state_dict()}
            if not atari:
                model["obs_stats"] = envs.obs_stats.state()
            save(run / "model.pt", args, **model)
            video = run / "videos" / f"{global_step}.mp4" if args.capture_video else None
            if atari:
                returns = evaluate_games(agent, args, eval_seed, video)
            else:
                returns = evaluate_episodes(agent, envs, to_action, args, eval_seed, video)
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            result = f"{returns.mean():.2f} ± {returns.std():.2f} ({len(returns)} episodes)"
            tqdm.write(f"{'final score' if iteration == num_iterations else 'score'} at {global_step} steps: {result}")
            sys.stdout.flush()
            start_time += time.time() - eval_start  # SPS is the speed of training

        crossed = args.checkpoint_interval and global_step % args.checkpoint_interval < batch_size
        stopping = bool(stop)  # asked once: a signal from here on waits for the next iteration
        if crossed or stopping or (args.checkpoint_interval and iteration == num_iterations):
            writer.flush()  # a checkpoint's curves are on disk before it is
            save(
                run / "checkpoint.pt",
                args,
                step=global_step,
                iteration=iteration,
                agent=agent.state_dict(),
                optimizer=optimizer.state_dict(),
                envs=None if atari else envs.state(),
                random=random_state(generators),
                recent_returns=[float(x) for x in recent_returns],
                seconds=time.time() - start_time,
                wandb_id=wandb_id,
            )
        if stopping:
            break
    progress.close()
    writer.close()
    if stop and iteration < num_iterations:
        print(f"stopped at {global_step} steps; to go on: python {sys.argv[0]} --resume {run}")
        sys.exit(128 + stop[0])


if __name__ == "__main__":
    try:
        args = read_flags()
        fill_in(args)
        validate(args)
        run = Path(args.resume or args.evaluate or new_run_folder(args))
        locked = None if args.evaluate else lock(run)
    except (ValueError, OSError, TypeError) as error:  # TypeError: a checkpoint whose flags are not those of `Args`
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    threading.excepthook = lambda _: None  # if TensorBoard's thread fails, the writer's next call raises that again
    try:
        main(args, run)
    except Exception as error:
        tqdm.write(explain(error, run), file=sys.stderr)
        sys.exit(1)
