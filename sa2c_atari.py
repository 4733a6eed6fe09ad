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
"""SA2C on Atari: A2C with the symmetric loss of Byun and Perrault (ICML 2025, arXiv 2405.17618).

With π the probability of the action taken and A the advantage:

    forward = −A · log π                  A2C's loss, a cross-entropy weighted by A
    reverse = −A · Z · (1 − π)            reverse cross-entropy weighted by A; Z < 0 stands for log 0
    policy loss = α · forward + β · reverse
    loss = policy loss − ent_coef · entropy + vf_coef · value loss

Its policy gradient is A2C's with every advantage multiplied by α + β|Z|π: confident actions count more. With α = 1 and
β = 0 it is A2C.

The algorithm, as `main` runs it:

    for each iteration
        play num_envs games for num_steps steps                   collect
        add noise to the rewards (only if asked for)              flip_rewards
        advantages A by GAE (λ = 1), returns = A + values         gae
        one gradient step on the loss                             update, gradient, symmetric_a2c_loss, RMSpropTF
    play full games and report their raw score                    evaluate_games

    python sa2c_atari.py --env-id ALE/Breakout-v5
    python sa2c_atari.py --env-id WizardOfWorNoFrameskip-v4 --reward-noise 0.1 --seed 2
    python sa2c_atari.py --resume runs/<run>
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
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
    """SA2C on Atari. Defaults are the settings of the paper's released code."""

    env_id: str = "ALE/Breakout-v5"
    """the game; `ALE/Breakout-v5` and `BreakoutNoFrameskip-v4` mean the same"""
    seed: int = 1
    """seed of the run: weights, games, actions, noise"""
    total_timesteps: int = 5_000_000
    """environment steps, each of 4 frames; the last incomplete batch is left out"""
    num_envs: int = 16
    """games played side by side"""
    num_steps: int = 5
    """steps in each game per iteration"""
    learning_rate: float = 7e-4
    """step size of RMSprop"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    gamma: float = 0.99
    """discount factor γ"""
    gae_lambda: float = 1.0
    """λ of generalised advantage estimation"""
    norm_adv: bool = False
    """normalise the advantages of each batch"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.25
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""

    alpha: float = 0.5
    """α, weight of the forward (A2C) term"""
    beta: float = 1.0
    """β, weight of the reverse term; the released code's example for one game (WizardOfWor), not a tuned value"""
    Z: float = -1.0
    """Z < 0, the stand-in for log 0; only β·Z matters"""
    reward_noise: float = 0.0
    """probability, per step and game, that the learner sees 1 − reward; reported scores stay clean"""
    survival_bonus: float = 0.0
    """added to every reward that the learner sees: what flips of this probability pay on average"""
    advantage_noise: float = 0.0
    """probability that a sample's advantage changes sign"""
    repeat_action_probability: float = 0.0
    """sticky actions: probability that a game repeats the last action"""

    log_interval: int = 25
    """iterations between two points of the losses in TensorBoard, each the mean over them"""
    eval_interval: int = 0
    """steps between evaluations; 0: only after the last update (the final score)"""
    eval_episodes: int = 10
    """full games in an evaluation, actions sampled"""
    checkpoint_interval: int = 100_000
    """steps between checkpoints to resume from; 0: only when SIGINT or SIGTERM ends the run"""
    resume: str | None = None
    """continue the run in this folder, `runs/<run>`, with its flags; a larger --total-timesteps makes it longer"""
    evaluate: str | None = None
    """only play --eval-episodes with the model in this folder, `runs/<run>`"""
    capture_video: bool = False
    """save a video of the first game of each evaluation"""
    cuda: bool = True
    """use a GPU if there is one"""
    torch_deterministic: bool = True
    """ask cuDNN for reproducible results"""
    bf16: bool = False
    """compute convolutions and the hidden layer in bfloat16: faster where the CPU or GPU has it, less exact"""
    compile: bool = False
    """compile the loss and its gradient: faster after half a minute, other rounding; needs a C++ compiler"""
    torch_threads: int = 0
    """CPU threads of torch; 0: one per core, at most 8"""
    track: bool = False
    """mirror the run to Weights & Biases"""
    wandb_project_name: str = "symmetric-rl"
    """project at Weights & Biases"""
    wandb_entity: str | None = None
    """team at Weights & Biases"""


def validate(args: Args) -> None:
    """Raises ValueError, with one line to print, if a run with `args` makes no sense."""
    check_game(args.env_id)
    rules = [
        ("num_envs num_steps log_interval eval_episodes", lambda x: x >= 1, "at least 1"),
        ("gamma gae_lambda reward_noise advantage_noise repeat_action_probability", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("alpha beta survival_bonus ent_coef vf_coef", lambda x: 0 <= x < math.inf, "finite and ≥ 0"),
        ("seed eval_interval checkpoint_interval torch_threads", lambda x: x >= 0, "≥ 0"),
        ("learning_rate", lambda x: 0 < x < math.inf, "finite and positive"),
        ("max_grad_norm", lambda x: x > 0, "positive"),
        ("Z", lambda x: -math.inf < x < 0, "finite and negative: it stands for log 0"),
    ]
    for names, holds, words in rules:
        for name in names.split():
            if not holds(getattr(args, name)):
                raise ValueError(f"--{name.replace('_', '-')} must be {words}; it is {getattr(args, name)}")
    batch_size = args.num_envs * args.num_steps
    if batch_size == 1:
        raise ValueError("a batch needs at least 2 steps: --num-envs or --num-steps above 1")
    if args.total_timesteps < batch_size:
        raise ValueError(f"--total-timesteps {args.total_timesteps} is less than one batch ({batch_size} steps)")
    cuda = args.cuda and torch.cuda.is_available()
    if args.bf16 and not (torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()):
        raise ValueError(f"--bf16 would be slower: this {'GPU has no bfloat16' if cuda else 'CPU has no AVX512-BF16'}")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        raise ValueError("--compile needs a C++ compiler: install g++, or name one in the variable CXX")
    if args.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:
        raise ValueError("--track needs Weights & Biases: pip install wandb")


def check_game(env_id: str) -> None:
    """Raises ValueError, with one line to print, unless `env_id` is an Atari game by one of its two names."""
    names = [name for name in gym.registry if name.startswith("ALE/") or name.endswith("NoFrameskip-v4")]
    if env_id in names:
        return
    if env_id in gym.registry and "game" not in gym.spec(env_id).kwargs:
        raise ValueError(f"--env-id {env_id} is not an Atari game")
    games = {re.sub("^ale/|noframeskip|-v[0-9]+$", "", name.lower()): name for name in sorted(names, reverse=True)}
    bare = re.sub("^ale/|noframeskip|deterministic|-v[0-9]+$", "", env_id.lower())
    near = " or ".join(games[name] for name in difflib.get_close_matches(bare, games)) or "ALE/Breakout-v5"
    raise ValueError(f"--env-id {env_id} is not known here; did you mean {near}?")


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


def for_acting(agent: AtariAgent) -> AtariAgent:
    """The agent itself; with bf16 a copy whose weights are in bfloat16 already, not converted anew at every step."""
    if agent.bf16:
        half = {id(p): nn.Parameter(p.bfloat16()) for p in agent.features[1:].parameters()}
        agent = copy.deepcopy(agent, half)  # which takes what it finds there for copied already
    return agent


def sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws from softmax(logits) along the last dimension: the Gumbel-max trick, without building a distribution."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(-1)


# --------------------------------------------------------------------------------------------------- losses, advantages


def symmetric_a2c_loss(
    logprob: torch.Tensor, advantage: torch.Tensor, alpha: float, beta: float, Z: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The symmetric A2C loss α · forward + β · reverse, and its two terms, each the mean over the batch.

        forward = −A · log π
        reverse = −A · Z · (1 − π)

    `logprob`, `advantage`: (batch,); π = exp(logprob) is the probability of the action taken. Source: the paper's
    SA2C loss.
    """
    forward_loss = -(advantage * logprob).mean()
    reverse_loss = -(advantage * Z * (1 - logprob.exp())).mean()
    return alpha * forward_loss + beta * reverse_loss, forward_loss, reverse_loss


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


def flip_signs(advantage: torch.Tensor, probability: float, rng: np.random.Generator) -> torch.Tensor:
    """Each advantage (batch,) changes its sign with `probability` (`adv_flip` in the released code)."""
    flipped = torch.from_numpy(rng.random(len(advantage)) < probability).to(advantage.device)
    return torch.where(flipped, -advantage, advantage)


class RMSpropTF(torch.optim.Optimizer):
    """RMSprop as TensorFlow had it, which A2C's settings were tuned with: v ← ρv + (1 − ρ)g², p ← p − lr·g / √(v + ε).

    torch.optim.RMSprop has √v + ε, and v = 0 at first; here ε is inside the root, and v = 1 at first, which makes the
    first steps much smaller.
    """

    def __init__(self, params, lr: float, decay: float = 0.99, eps: float = 1e-5):
        super().__init__(params, dict(lr=lr, decay=decay, eps=eps))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["square_avg"] = torch.ones_like(p)
                square_avg = self.state[p]["square_avg"]
                square_avg.mul_(group["decay"]).addcmul_(p.grad, p.grad, value=1 - group["decay"])
                p.addcdiv_(p.grad, (square_avg + group["eps"]).sqrt_(), value=-group["lr"])


# ------------------------------------------------------------------------------------------------------------ algorithm


class Batch(NamedTuple):
    """The steps of one iteration, as tensors of shape (batch, …)."""

    obs: torch.Tensor  # (batch, 84, 84, 4) uint8
    actions: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    weight: torch.Tensor  # 1, or 0 where FIRE was pressed for the learner; for `gradient` the mean is 1


class Rollout:
    """`num_steps` steps of `num_envs` games; arrays of shape (num_steps, num_envs, …)."""

    def __init__(self, num_steps: int, num_envs: int, device: torch.device):
        shape = (num_steps, num_envs)
        self.obs = torch.zeros((*shape, 84, 84, 4), dtype=torch.uint8, device=device)
        self.actions = torch.zeros(shape, dtype=torch.long, device=device)
        self.values = torch.zeros(shape, device=device)
        self.next_value = torch.zeros(num_envs, device=device)  # of the observation after the last step
        self.rewards = np.zeros(shape, dtype=np.float32)  # the sign of the raw reward
        self.dones = np.zeros(shape, dtype=bool)
        self.bootstraps = np.zeros(shape, dtype=np.float32)  # V(final observation) where truncated, else 0
        self.valid = np.zeros(shape, dtype=bool)
        self.finished = []  # (step, mean score, mean length) of the games that ended, one entry per step


@torch.inference_mode()
def collect(games: Games, agent: AtariAgent, rollout: Rollout, generator: torch.Generator) -> None:
    """Plays the policy and overwrites `rollout` with what happened."""
    agent, device = for_acting(agent), generator.device
    rollout.finished.clear()
    rollout.bootstraps[:] = 0
    for t, obs in enumerate(rollout.obs):
        obs[:] = games.obs
        rollout.actions[t], _, rollout.values[t] = agent.act(obs, generator)
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


def gradient(agent: AtariAgent, batch: Batch, args: Args) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Gradient of the loss, clipped, by parameter; what is logged of the losses; log π (batch,)."""
    logprob, entropy, value = agent(batch.obs, batch.actions)
    logprob = logprob.squeeze(1)
    coefficients = (args.alpha, args.beta, args.Z)
    policy_loss, forward_loss, reverse_loss = symmetric_a2c_loss(logprob, batch.advantages, *coefficients)
    value_loss = (batch.weight * (value - batch.returns).square()).mean()
    entropy = (batch.weight * entropy).mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    grads = torch.autograd.grad(loss, list(agent.parameters()))
    norm = nn.utils.get_total_norm(grads)
    logged = torch.stack((policy_loss, forward_loss, reverse_loss, value_loss, entropy, norm)).detach()
    scale = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    return [grad * scale for grad in grads], logged, logprob.detach()


def update(
    agent: AtariAgent, optimizer, batch: Batch, args: Args, rng: np.random.Generator, gradient=gradient
) -> dict:
    """One gradient step on the loss. Returns what is logged, by tag."""
    advantage = flip_signs(batch.advantages, args.advantage_noise, rng)
    normalized = normalize(advantage, batch.weight) if args.norm_adv else advantage
    weight = batch.weight / batch.weight.mean().clamp(min=1e-8)  # so that .mean() is over the valid samples alone
    grads, losses, logprob = gradient(agent, batch._replace(advantages=weight * normalized, weight=weight), args)
    for parameter, grad in zip(agent.parameters(), grads):
        parameter.grad = grad
    optimizer.step()
    mean_weight = (weight * (args.alpha + args.beta * abs(args.Z) * logprob.exp())).mean()
    sign_flips = (weight * (normalized.sign() != advantage.sign())).mean()
    policy_loss, forward_loss, reverse_loss, value_loss, entropy, grad_norm, mean_weight, sign_flips = torch.cat(
        (losses, torch.stack((mean_weight, sign_flips)))
    ).tolist()  # one wait for the GPU
    return {
        "losses/policy_loss": policy_loss,
        "losses/forward_loss": forward_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/grad_norm": grad_norm,
        "losses/mean_weight": mean_weight,
        "advantage/sign_flips_normalization": sign_flips,
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

    # Separate streams, so that evaluation and noise disturb nothing else; the fourth is the siblings' for minibatches.
    weights_seed, games_seed, actions_seed, _, noise_seed, eval_seed = np.random.SeedSequence(
        args.seed
    ).spawn(6)
    if args.resume:  # of use for what cannot be restored: the first games are not played again
        games_seed, actions_seed = np.random.SeedSequence([args.seed, done]).spawn(2)
    torch.manual_seed(int(weights_seed.generate_state(1)[0]))
    generator = torch.Generator(device).manual_seed(int(actions_seed.generate_state(1)[0]))
    noise_rng = np.random.default_rng(noise_seed)

    games = Games(args.env_id, game_seeds(games_seed, args.num_envs), args.repeat_action_probability)
    agent = AtariAgent(games.num_actions, args.bf16).to(device)
    optimizer = RMSpropTF(agent.parameters(), lr=args.learning_rate)
    rollout = Rollout(args.num_steps, args.num_envs, device)

    generators = [generator, noise_rng, torch.default_generator, *torch.cuda.default_generators]
    recent_scores = deque(saved.get("recent_scores", []), maxlen=100)
    recent_stats = saved.get("recent_stats", [])

    if args.evaluate:
        agent.load_state_dict(saved["agent"])
        video = run / "videos" / "evaluation.mp4" if args.capture_video else None
        scores = evaluate_games(agent, args, eval_seed, video)
        print(f"score at {step} steps: {scores.mean():.2f} ± {scores.std():.2f} ({len(scores)} games)")
        return
    if args.resume:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
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
        global_step = iteration * batch_size

        collect(games, agent, rollout, generator)

        rewards = flip_rewards(rollout.rewards, args.reward_noise, noise_rng) + args.survival_bonus
        values, bootstrap = rollout.values.cpu().numpy(), args.gamma * rollout.bootstraps
        context = (values, rollout.dones, rollout.next_value.cpu().numpy(), args.gamma, args.gae_lambda)
        advantages = gae(rewards + bootstrap, *context)
        clean_advantages = gae(rollout.rewards + bootstrap, *context)
        returns = advantages + values

        tensors = (torch.from_numpy(x).to(device, rollout.values.dtype) for x in (advantages, returns, rollout.valid))
        batch = Batch(*(x.flatten(0, 1) for x in (rollout.obs, rollout.actions, *tensors)))
        stats = update(agent, optimizer, batch, args, noise_rng, compiled_gradient)
        check_finite(stats, agent, iteration)

        valid = rollout.valid
        stats["losses/explained_variance"] = 1 - (returns - values)[valid].var() / (returns[valid].var() + 1e-8)
        stats["advantage/sign_flips_noise"] = (np.sign(advantages) != np.sign(clean_advantages))[valid].mean()
        stats["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        stats["charts/SPS"] = global_step / (time.time() - start_time)
        recent_stats.append({tag: float(value) for tag, value in stats.items()})
        if iteration % args.log_interval == 0 or iteration == num_iterations:
            for tag in stats:
                writer.add_scalar(tag, np.mean([s[tag] for s in recent_stats]), global_step)
            recent_stats.clear()
        for t, score, length in rollout.finished:
            step = global_step - batch_size + (t + 1) * args.num_envs
            writer.add_scalar("charts/episodic_return", score, step)
            writer.add_scalar("charts/episodic_length", length, step)
            recent_scores.append(score)

        recent = f"return {np.mean(recent_scores):.1f}" if recent_scores else "no game over yet"
        progress.set_postfix_str(recent, refresh=False)
        progress.update(batch_size)
        if progress.disable and (time.time() - last_line > 30 or iteration == num_iterations):
            last_line = time.time()
            left = (last_line - start_time) * (num_iterations / iteration - 1) / 60
            print(f"{global_step} steps, {stats['charts/SPS']:.0f} SPS, {left:.0f} min left, {recent}", flush=True)
        crossed = args.eval_interval and global_step % args.eval_interval < batch_size
        if crossed or iteration == num_iterations:
            eval_start = time.time()
            save(run / "model.pt", args, step=global_step, agent=agent.state_dict())
            video = run / "videos" / f"{global_step}.mp4" if args.capture_video else None
            scores = evaluate_games(agent, args, eval_seed, video)
            writer.add_scalar("eval/episodic_return", scores.mean(), global_step)
            result = f"{scores.mean():.2f} ± {scores.std():.2f} ({len(scores)} games)"
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
                random=random_state(generators),
                recent_scores=[float(x) for x in recent_scores],
                recent_stats=recent_stats,
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
