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
"""SPPO for continuous control: PPO with the symmetric loss of Byun and Perrault (ICML 2025, arXiv 2405.17618).

Every action dimension is cut into `num_bins` values, so that actions have probabilities (the paper's DSPPO). With π the
probability of the action taken, the product over its dimensions, π_old the same when it was taken, r = π / π_old and A
the advantage:

    forward = −min(r·A, clip(r, 1−ε, 1+ε)·A)    PPO's clipped objective
    reverse = −m · A · Z · (1 − π) / π_old      after reverse cross-entropy; Z < 0 stands for log 0,
                                                m is 1 where the clipped objective has a gradient, else 0
    policy loss = α · forward + β · reverse
    loss = policy loss − ent_coef · entropy + vf_coef · value loss

The algorithm, as `main` runs it:

    for each iteration
        act in num_envs environments for num_steps steps          collect
        add noise to the normalised rewards (only if asked for)   add_noise
        advantages A by GAE, returns = A + values                 gae
        for each epoch, for each minibatch                        update
            normalise A, take a gradient step on the loss         gradient, symmetric_ppo_loss
    play episodes with the most probable actions                  evaluate_episodes

    python sppo_continuous.py --env-id Hopper-v5 --total-timesteps 1000000
    python sppo_continuous.py --env-id CartPole-v1 --total-timesteps 200000
    python sppo_continuous.py --resume runs/<run>
"""

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
from typing import NamedTuple

import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """SPPO for continuous control with discretised actions. Defaults are the settings of the paper's released code."""

    env_id: str = "Hopper-v5"
    """the environment: flat observations, `Box` or `Discrete` actions"""
    seed: int = 1
    """seed of the run: weights, environments, actions, minibatches, noise"""
    total_timesteps: int = 2_000_000
    """environment steps; the last incomplete batch is left out"""
    num_envs: int = 1
    """environments stepped side by side"""
    num_steps: int = 2048
    """steps in each environment per iteration"""
    num_minibatches: int = 32
    """minibatches per epoch"""
    update_epochs: int = 10
    """passes over each batch"""
    learning_rate: float = 3e-4
    """step size of Adam"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    gamma: float = 0.99
    """discount factor γ"""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation"""
    clip_coef: float = 0.2
    """clip range ε"""
    anneal_clip: bool = False
    """lower the clip range linearly to 0"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """end an iteration's updates after an epoch whose mean approximate KL exceeds this"""
    num_bins: int = 11
    """values per dimension of a `Box` action space, evenly spaced, ends included"""

    alpha: float = 0.5
    """α, weight of the forward (PPO) term"""
    beta: float = 20.0
    """β, weight of the reverse term; the released code's example for one task (Ant), not a tuned value"""
    Z: float = -1.0
    """Z < 0, the stand-in for log 0; only β·Z matters"""
    importance_weighted_reverse: bool = True
    """divide the reverse term by π_old, as the released code does; --no-…: the plain reverse term"""
    reward_noise: float = 0.0
    """standard deviation of Gaussian noise on the normalised reward; reported returns stay clean"""
    advantage_noise: float = 0.0
    """probability that a sample's advantage changes sign, redrawn for every minibatch"""

    eval_interval: int = 0
    """steps between evaluations; 0: only after the last update (the final score)"""
    eval_episodes: int = 10
    """episodes in an evaluation, with the most probable actions"""
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
    compile: bool = False
    """compile the loss and its gradient: faster after half a minute, other rounding; needs a C++ compiler"""
    torch_threads: int = 1
    """CPU threads of torch; more only slow down networks as small as these; 0: one per core, at most 8"""
    track: bool = False
    """mirror the run to Weights & Biases"""
    wandb_project_name: str = "symmetric-rl"
    """project at Weights & Biases"""
    wandb_entity: str | None = None
    """team at Weights & Biases"""


def validate(args: Args) -> None:
    """Raises ValueError, with one line to print, if a run with `args` makes no sense."""
    check_environment(args.env_id, args.capture_video)
    rules = [
        ("num_envs num_steps num_minibatches update_epochs eval_episodes", lambda x: x >= 1, "at least 1"),
        ("num_bins", lambda x: x >= 2, "at least 2"),
        ("gamma gae_lambda advantage_noise", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("alpha beta ent_coef vf_coef reward_noise", lambda x: 0 <= x < math.inf, "finite and ≥ 0"),
        ("seed eval_interval checkpoint_interval torch_threads", lambda x: x >= 0, "≥ 0"),
        ("learning_rate", lambda x: 0 < x < math.inf, "finite and positive"),
        ("clip_coef", lambda x: 0 < x < 1, "between 0 and 1"),
        ("max_grad_norm target_kl", lambda x: x is None or x > 0, "positive"),
        ("Z", lambda x: -math.inf < x < 0, "finite and negative: it stands for log 0"),
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


# --------------------------------------------------------------------------------------------------- losses, advantages


def symmetric_ppo_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    alpha: float,
    beta: float,
    Z: float,
    clip_coef: float,
    importance_weighted: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The symmetric PPO loss α · forward + β · reverse, and its two terms, each the mean over the batch.

        forward = −min(r·A, clip(r, 1−ε, 1+ε)·A)
        reverse = −m · A · Z · (1 − π) / π_old                   importance_weighted: the released code's form
        reverse = −m · A · Z · (1/D) · Σ_d (1 − π_d)             otherwise: plain reverse cross-entropy

    `logprob`, `old_logprob`: (batch, D), log-probabilities of the action taken, a column per action dimension; r, π
    and π_old are joint, the product over dimensions. `advantage`: (batch,). Source: the paper's SPPO loss; the mask m
    and the division by π_old are in the released code. The plain form over several dimensions is ours.
    """
    joint_logprob, old_joint_logprob = logprob.sum(1), old_logprob.sum(1)
    ratio = (joint_logprob - old_joint_logprob).exp()
    objective, clipped_objective = ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage
    forward_loss = -torch.min(objective, clipped_objective).mean()
    mask = objective <= clipped_objective  # where the minimum is the unclipped one, which has a gradient
    if importance_weighted:
        # (1 − π) / π_old = 1 / π_old − r. The first part has no gradient; capped, it does not overflow float32.
        reverse_weight = (-old_joint_logprob.clamp(min=-80)).exp() - ratio
    else:
        reverse_weight = (1 - logprob.exp()).mean(1)
    reverse_loss = -(mask * advantage * Z * reverse_weight).mean()
    return alpha * forward_loss + beta * reverse_loss, forward_loss, reverse_loss


def mean_weight(
    old_logprob: torch.Tensor, alpha: float, beta: float, Z: float, importance_weighted: bool = True
) -> float:
    """w̄, the mean factor by which the symmetric loss multiplies PPO's policy gradient. `old_logprob`: (batch, D).

    It is α + β|Z| for every sample with the importance-weighted reverse term, and α + β|Z| · mean_d(π_d) / D without.
    """
    share = 1.0 if importance_weighted else old_logprob.exp().mean().item() / old_logprob.shape[1]
    return alpha + beta * abs(Z) * share


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

    obs: torch.Tensor  # (batch, obs_dim)
    actions: torch.Tensor  # (batch, D), the value chosen in each dimension
    logprobs: torch.Tensor  # (batch, D), log π_old
    advantages: torch.Tensor
    returns: torch.Tensor


class Rollout:
    """`num_steps` steps of `num_envs` environments; arrays of shape (num_steps, num_envs, …)."""

    def __init__(self, num_steps: int, num_envs: int, obs_dim: int, action_dims: int):
        shape = (num_steps, num_envs)
        self.obs = torch.zeros((*shape, obs_dim))
        self.actions = torch.zeros((*shape, action_dims), dtype=torch.long)
        self.logprobs = torch.zeros((*shape, action_dims))
        self.values = torch.zeros(shape)
        self.next_value = torch.zeros(num_envs)  # of the observation after the last step
        self.rewards = np.zeros(shape, dtype=np.float32)  # normalised
        self.dones = np.zeros(shape, dtype=bool)
        self.bootstraps = np.zeros(shape, dtype=np.float32)  # V(final observation) where truncated, else 0
        self.finished = []  # (step, mean return, mean length) of the episodes that ended, one entry per step


@torch.inference_mode()
def collect(envs: Environments, to_action, agent: BinnedAgent, rollout: Rollout, rng: np.random.Generator) -> None:
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


def gradient(agent: nn.Module, mb: Batch, clip_coef: float, args: Args) -> tuple[torch.Tensor, ...]:
    """Gradient of the loss of one minibatch, clipped, as one vector; what is logged of the losses; log π (batch, D)."""
    logprob, entropy, value = agent(mb.obs, mb.actions)
    coefficients = (args.alpha, args.beta, args.Z, clip_coef, args.importance_weighted_reverse)
    policy_loss, forward_loss, reverse_loss = symmetric_ppo_loss(logprob, mb.logprobs, mb.advantages, *coefficients)
    value_loss = nn.functional.mse_loss(value, mb.returns)
    entropy = entropy.mean()
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef:  # otherwise its gradient need not be computed
        loss = loss - args.ent_coef * entropy
    grads = torch.autograd.grad(loss, list(agent.parameters()))
    grad = torch.cat([part.flatten() for part in grads])
    norm = grad.norm()
    logged = torch.stack((policy_loss, forward_loss, reverse_loss, value_loss, entropy, norm)).detach()
    return grad * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), logged, logprob.detach()


def update(
    agent: nn.Module, optimizer, batch: Batch, clip_coef: float, args: Args, rng: np.random.Generator, gradient=gradient
) -> dict:
    """Gradient steps on the loss of one batch. Returns the means over all of them of what is logged, by tag."""
    (parameters,) = optimizer.param_groups[0]["params"]  # in one vector
    losses, samples = [], []  # read only at the end: .item() in the loop would wait for the GPU
    # A number would be part of what is compiled, which would be compiled anew whenever it changes.
    clip = torch.tensor(clip_coef, dtype=torch.float64, device=batch.obs.device) if args.compile else clip_coef
    for _ in range(args.update_epochs):
        b_inds = torch.from_numpy(rng.permutation(len(batch.obs))).to(batch.obs.device)
        shuffled = Batch(*(field.index_select(0, b_inds) for field in batch))
        advantage = flip_signs(shuffled.advantages, args.advantage_noise, rng)
        normalized = advantage.view(args.num_minibatches, -1)
        if args.norm_adv:
            centred = normalized - normalized.mean(1, keepdim=True)
            normalized = centred / (normalized.std(1, keepdim=True) + 1e-8)
        normalized = normalized.flatten()
        minibatches = (field.chunk(args.num_minibatches) for field in shuffled._replace(advantages=normalized))
        logprobs = []
        for mb in map(Batch._make, zip(*minibatches)):
            parameters.grad, logged, logprob = gradient(agent, mb, clip, args)
            optimizer.step()
            losses.append(logged)
            logprobs.append(logprob)
        samples.append(torch.stack(((torch.cat(logprobs) - shuffled.logprobs).sum(1), advantage, normalized)))
        if args.target_kl is not None:
            logratio = samples[-1][0]
            if (logratio.exp() - 1 - logratio).mean() > args.target_kl:
                break
    policy_loss, forward_loss, reverse_loss, value_loss, entropy, grad_norm = torch.stack(losses).mean(0).tolist()
    logratio, advantage, normalized = torch.cat(samples, 1)
    return {
        "losses/policy_loss": policy_loss,
        "losses/forward_loss": forward_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/grad_norm": grad_norm,
        "losses/old_approx_kl": -logratio.mean().item(),
        "losses/approx_kl": (logratio.exp() - 1 - logratio).mean().item(),
        "losses/clipfrac": ((logratio.exp() - 1).abs() > clip_coef).float().mean().item(),
        "advantage/sign_flips_normalization": (normalized.sign() != advantage.sign()).float().mean().item(),
    }


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
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_num_threads(args.torch_threads or min(torch.get_num_threads(), 8))
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
    actions_rng, minibatch_rng, noise_rng = map(np.random.default_rng, (actions_seed, minibatch_seed, noise_seed))

    envs = Environments(args.env_id, envs_seed.generate_state(args.num_envs), args.gamma)
    to_action = BinnedActions(envs.action_space, args.num_bins)
    agent = BinnedAgent(envs.obs.shape[1], to_action.values.shape).to(device)
    optimizer = torch.optim.Adam([as_vector(agent)], lr=args.learning_rate, eps=1e-5, fused=True)
    rollout = Rollout(args.num_steps, args.num_envs, envs.obs.shape[1], len(to_action.values))
    generators = [actions_rng, minibatch_rng, noise_rng, torch.default_generator, *torch.cuda.default_generators]
    recent_returns = deque(saved.get("recent_returns", []), maxlen=100)

    if args.evaluate:
        agent.load_state_dict(saved["agent"])
        envs.obs_stats.restore(saved["obs_stats"])
        video = run / "videos" / "evaluation.mp4" if args.capture_video else None
        returns = evaluate_episodes(agent, envs, to_action, args, eval_seed, video)
        print(f"score at {step} steps: {returns.mean():.2f} ± {returns.std():.2f} ({len(returns)} episodes)")
        return
    if args.resume:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
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
    print(f"{run} on {device}" + (f", from step {step}" if args.resume else ""), flush=True)
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

        collect(envs, to_action, agent, rollout, actions_rng)

        rewards = add_noise(rollout.rewards, args.reward_noise, noise_rng)
        values, bootstrap = rollout.values.numpy(), args.gamma * rollout.bootstraps
        context = (values, rollout.dones, rollout.next_value.numpy(), args.gamma, args.gae_lambda)
        advantages = gae(rewards + bootstrap, *context)
        clean_advantages = gae(rollout.rewards + bootstrap, *context)
        returns = advantages + values

        tensors = (torch.from_numpy(x) for x in (advantages, returns))
        steps = (rollout.obs, rollout.actions, rollout.logprobs, *tensors)
        batch = Batch(*(x.flatten(0, 1).to(device) for x in steps))
        stats = update(agent, optimizer, batch, clip_coef, args, minibatch_rng, compiled_gradient)
        check_finite(stats, agent, iteration)

        stats["losses/explained_variance"] = 1 - (returns - values).var() / (returns.var() + 1e-8)
        weighting = (args.alpha, args.beta, args.Z, args.importance_weighted_reverse)
        stats["losses/mean_weight"] = mean_weight(batch.logprobs, *weighting)
        stats["advantage/sign_flips_noise"] = (np.sign(advantages) != np.sign(clean_advantages)).mean()
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
            model = {"step": global_step, "agent": agent.state_dict(), "obs_stats": envs.obs_stats.state()}
            save(run / "model.pt", args, **model)
            video = run / "videos" / f"{global_step}.mp4" if args.capture_video else None
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
                envs=envs.state(),
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
