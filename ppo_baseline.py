"""PPO (Schulman et al., 2017) for Atari and control: what the symmetric loss is measured against.

π is the probability of the action taken, π_old when it was taken, r = π / π_old, A the advantage:

    loss = - pg_coef · min(r·A, clip(r, 1-ε, 1+ε)·A) - ent_coef · entropy + vf_coef · value loss

On Atari, and elsewhere with `--policy discretized`, this is `sppo_atari.py` or
`sppo_continuous.py` with α = pg_coef and β = 0. So `--pg-coef` α + β|Z| has the gradient of SPPO.

One iteration:
    1. act in `num_envs` environments for `num_steps` steps         collect
    2. add noise, compute advantages A and returns A + V            add_noise, gae
    3. for each epoch, for each minibatch: step down the loss       update, minibatch_loss

    python ppo_baseline.py --env-id ALE/Breakout-v5
    python ppo_baseline.py --env-id Hopper-v5 --policy discretized --pg-coef 20.5
"""

import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "15000")  # idle threads leave the cores to the games
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads; its matrices here are small

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """PPO for Atari and control. Defaults are those of the kind of environment."""

    env_id: str = "Hopper-v5"  # a game, or an environment with `Discrete` or bounded `Box` actions
    policy: Literal["gaussian", "discretized"] = "gaussian"  # for `Box` actions
    num_bins: int = 11  # values per dimension of the discretized policy
    seed: int = 1  # seed of weights, environments, actions, minibatches and noise
    total_timesteps: int = 2_000_000  # environment steps
    num_envs: int = 1  # environments side by side
    num_steps: int = 2048  # steps in each environment per iteration
    repeat_action_probability: float = 0.0  # Atari's sticky actions
    num_minibatches: int = 32  # minibatches per epoch
    update_epochs: int = 10  # passes over each batch
    learning_rate: float = 3e-4  # step size of Adam
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # clip range
    anneal_clip: bool = False  # lower the clip range linearly to 0
    norm_adv: bool = True  # normalise the advantages of each minibatch
    pg_coef: float = 1.0  # weight of the policy loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    reward_noise: float = 0.0  # Atari: probability of 1 - reward; else std of noise on the reward
    advantage_noise: float = 0.0  # probability that an advantage changes sign, in each minibatch
    eval_interval: int = 0  # steps between evaluations; 0: only one, after training
    eval_episodes: int = 10  # episodes; on Atari with actions sampled, else the most probable ones
    checkpoint_interval: int = 20_000  # steps between checkpoints
    resume: str | None = None  # go on with the run in this folder; typed flags replace its own
    track: bool = False  # mirror the run to Weights & Biases (pip install wandb)
    cuda: bool = True  # use a GPU if there is one
    bf16: bool = False  # Atari: bfloat16 for convolutions; faster on a GPU and on CPUs that have it
    torch_threads: int = 1  # CPU threads of torch; 0: as many as torch chooses


ATARI_DEFAULTS = """--total-timesteps 5000000 --num-envs 8 --num-steps 128 --num-minibatches 4
    --update-epochs 4 --learning-rate 2.5e-4 --anneal-lr --clip-coef 0.1 --anneal-clip
    --ent-coef 0.01 --torch-threads 0"""


def is_game(env_id: str) -> bool:
    return "game" in getattr(gym.registry.get(env_id), "kwargs", {})


def validate(args: Args) -> None:
    """Raises an error for flags that would quietly train something else."""
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches or batch_size > args.total_timesteps:
        raise ValueError(
            f"--num-minibatches must divide, --total-timesteps hold {batch_size} steps"
        )
    if min(args.pg_coef, args.reward_noise) < 0 or not 0 <= args.advantage_noise <= 1:
        raise ValueError(
            "--pg-coef, --reward-noise must be at least 0, --advantage-noise in 0 to 1"
        )
    space = gym.make(args.env_id).action_space
    if not isinstance(space, gym.spaces.Discrete) and not space.is_bounded():
        raise ValueError(f"actions must have bounds: {space}")


class Games:
    """Atari games side by side, as ale-py preprocesses them: 84×84 greyscale, 4 frames stacked,
    each action held for 4 frames, up to 29 no-ops and FIRE at the start. A game that is over starts
    anew within the same step. The step after a lost life presses FIRE: some games wait for it."""

    is_game = True
    stats = {}  # pixels are not normalised

    def __init__(self, args: Args, num_envs: int, stats: dict | None = None):
        self.envs = ale_py.vector_env.AtariVectorEnv(
            gym.spec(args.env_id).kwargs["game"],
            num_envs,
            repeat_action_probability=args.repeat_action_probability,
            reward_clipping=False,  # scores are reported as they are
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        )
        actions = [action.name for action in self.envs.ale.get_action_set()]
        self.fire = actions.index("FIRE") if "FIRE" in actions else None
        self.num_actions = len(actions)
        self.must_fire = np.zeros(num_envs, dtype=bool)
        self.truncated = np.zeros(num_envs, dtype=bool)  # a game that is cut off counts as over
        self.over = np.zeros(num_envs, dtype=bool)  # games that ended with the last step
        self.score = np.zeros(num_envs)  # of each game so far, or the final one where it is over
        self.length = np.zeros(num_envs)  # in steps, likewise
        self.reset()

    def reset(self) -> None:
        seeds = np.random.randint(2**31, size=len(self.over))
        self.obs, info = self.envs.reset(seed=seeds)
        self.lives = info["lives"]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Plays actions (num_envs,). Returns the signs of the rewards, and where an episode of the
        learner ended: with a game or a life. `obs` is what to act on next."""
        self.score[self.over] = 0
        self.length[self.over] = 0
        if self.must_fire.any():
            action = np.where(self.must_fire, self.fire, action)
        self.obs, reward, terminated, truncated, info = self.envs.step(action)
        self.score += reward
        self.length += 1
        self.over = terminated | truncated
        life_lost = ~self.over & (info["lives"] < self.lives)
        self.lives = info["lives"]
        self.must_fire = life_lost & (self.fire is not None)
        return np.sign(reward).astype(np.float32), self.over | life_lost


class RunningMeanStd:
    """Mean and standard deviation of all samples so far (Welford, 1962)."""

    def __init__(self):
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0  # Σ (sample - mean)²

    def update(self, sample: np.ndarray) -> None:
        self.count += 1
        delta = sample - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (sample - self.mean)
        self.std = np.sqrt(self.squares / self.count + 1e-8)

    def state_dict(self) -> dict:
        return {name: torch.tensor(x, dtype=torch.float64) for name, x in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update({name: x.numpy() for name, x in state.items()})


class Environments:
    """Other environments side by side, with normalised observations and rewards. The policy's
    actions (num_envs, D) are numbers, or bins of which each stands for one of the values `bins`."""

    is_game = False

    def __init__(self, args: Args, num_envs: int, stats: dict | None = None):
        self.envs = [
            gym.wrappers.FlattenObservation(gym.make(args.env_id)) for _ in range(num_envs)
        ]
        self.space = self.envs[0].action_space
        self.bins = None
        if isinstance(self.space, gym.spaces.Discrete):
            self.bins = self.space.start + np.arange(self.space.n)[np.newaxis]
        elif args.policy == "discretized":
            ends = self.space.low.flatten(), self.space.high.flatten()
            self.bins = np.linspace(*ends, args.num_bins, axis=1)
        self.gamma = args.gamma
        self.learning = stats is None  # else they stay as they are
        self.stats = stats or {"obs": RunningMeanStd(), "returns": RunningMeanStd()}
        self.must_fire = np.zeros(num_envs, dtype=bool)
        self.over = np.zeros(num_envs, dtype=bool)
        self.score = np.zeros(num_envs)
        self.length = np.zeros(num_envs)
        self.discounted_return = np.zeros(num_envs)
        self.reset()

    def reset(self) -> None:
        seeds = np.random.randint(2**31, size=len(self.envs)).tolist()
        first = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds)]
        learning = self.stats["obs"].count == 0  # not when a run is resumed
        self.obs = np.stack([self.normalize(obs, learning) for obs in first])

    def normalize(self, obs: np.ndarray, learning: bool) -> np.ndarray:
        if learning:
            self.stats["obs"].update(obs)
        obs = (obs - self.stats["obs"].mean) / self.stats["obs"].std
        return obs.clip(-10, 10).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns normalised rewards, and which episodes ended. Where they were `truncated` by a
        time limit, what would have followed `last_obs` is worth V."""
        if self.bins is not None:
            action = self.bins[np.arange(len(self.bins)), action]
        action = action.reshape(-1, *self.space.shape).astype(self.space.dtype)
        if isinstance(self.space, gym.spaces.Box):
            action = action.clip(self.space.low, self.space.high)
        for total in (self.score, self.length, self.discounted_return):
            total[self.over] = 0
        rewards = np.zeros(len(self.envs), np.float32)
        self.truncated = np.zeros(len(self.envs), dtype=bool)
        self.last_obs = self.obs.copy()
        for i, env in enumerate(self.envs):
            obs, reward, terminated, truncated, _ = env.step(action[i])
            self.score[i] += reward
            self.length[i] += 1
            self.discounted_return[i] = self.gamma * self.discounted_return[i] + reward
            if self.learning:
                self.stats["returns"].update(self.discounted_return[i])
                rewards[i] = reward / self.stats["returns"].std
            self.over[i] = terminated or truncated
            self.truncated[i] = truncated and not terminated
            if self.over[i]:
                self.last_obs[i] = self.normalize(obs, learning=False)
                obs, _ = env.reset()
            self.obs[i] = self.normalize(obs, self.learning)
        return rewards.clip(-10, 10), self.over.copy()


def layer_init(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, outputs), gain),
    )


class AtariAgent(nn.Module):
    """The Nature CNN (Mnih et al., 2015), shared by policy and value."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.features = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(inplace=True),
        )
        self.policy = layer_init(nn.Linear(512, num_actions), gain=0.01)
        self.value = layer_init(nn.Linear(512, 1), gain=1.0)

    def forward(self, obs: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """Policy and values (batch,) for observations (batch, 4, 84, 84) of bytes."""
        pixels = obs.to(memory_format=torch.channels_last) / 255.0  # same shape, faster layout
        features = self.features(pixels).float()
        with torch.autocast(obs.device.type, enabled=False):  # float32 heads, also with --bf16
            return Categorical(logits=self.policy(features)), self.value(features).squeeze(1)


class ControlAgent(nn.Module):
    """Two separate networks. The policy is D independent distributions: Gaussians of learned
    standard deviations or, with `bins` (D, number), categorical ones over bins."""

    def __init__(self, obs_dim: int, space: gym.Space, bins: np.ndarray | None):
        super().__init__()
        self.bins = bins
        if bins is None:
            self.log_std = nn.Parameter(torch.zeros(space.low.size))
        self.policy = mlp(obs_dim, space.low.size if bins is None else bins.size, gain=0.01)
        self.value = mlp(obs_dim, 1, gain=1.0)

    def forward(self, obs: torch.Tensor) -> tuple[Independent, torch.Tensor]:
        """Policy and values (batch,) for observations (batch, obs_dim)."""
        outputs = self.policy(obs)
        if self.bins is None:
            policy = Normal(outputs, self.log_std.exp())
        else:
            policy = Categorical(logits=outputs.unflatten(1, self.bins.shape))
        return Independent(policy, 1), self.value(obs).squeeze(1)


def ppo_loss(logprob, old_logprob, advantage, clip_coef) -> torch.Tensor:
    """PPO's clipped loss (Schulman et al., 2017, equation 7), of inputs (batch,)."""
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantage, clipped * advantage).mean()


def gae(rewards, values, next_values, dones, gamma: float, gae_lambda: float):
    """Generalised advantage estimation (Schulman et al., 2016): A_t = δ_t + γλ A_{t+1} with
    δ_t = r_t + γ V'_t - V_t. V'_t is the value of what follows step t: 0 if that was terminal.
    No A_{t+1} crosses the end of an episode (`dones`). All: (num_steps, …)."""
    advantages = rewards + gamma * next_values - values  # δ_t, to which the loop adds γλ A_{t+1}
    for t in reversed(range(len(advantages) - 1)):  # the last one is its δ already
        advantages[t] += gamma * gae_lambda * ~dones[t] * advantages[t + 1]
    return advantages


def normalize(advantage: torch.Tensor) -> torch.Tensor:
    """Advantages (batch,) with mean 0 and deviation 1. Subtracting the mean turns some signs."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def add_noise(reward: torch.Tensor, noise: float, is_game: bool) -> torch.Tensor:
    """The released code's noise. On Atari each reward becomes 1 - reward with probability `noise`;
    elsewhere `noise` is the standard deviation of Gaussian noise on the normalised reward."""
    if is_game:
        return torch.where(torch.rand_like(reward) < noise, 1 - reward, reward)
    return reward + noise * torch.randn_like(reward)


def flip_signs(advantage: torch.Tensor, probability: float) -> torch.Tensor:
    """Each advantage changes its sign with `probability` (`adv_flip` in the released code)."""
    return torch.where(torch.rand_like(advantage) < probability, -advantage, advantage)


@torch.no_grad()
def collect(envs, agent: nn.Module, num_steps: int, device) -> tuple[dict, list]:
    """Acts with the present policy. Returns tensors (num_steps, num_envs, …) of what happened, and
    (step, return, length) of the episodes that ended."""
    rollout = defaultdict(list)
    finished = []
    for t in range(num_steps):
        obs = torch.tensor(envs.obs, device=device)
        policy, value = agent(obs)
        action = policy.sample()
        rollout["valid"].append(torch.from_numpy(~envs.must_fire).to(device))  # False: forced FIRE
        reward, done = envs.step(action.cpu().numpy())
        bootstrap = torch.zeros_like(value)
        if envs.truncated.any():  # what would have followed is worth V
            _, last_value = agent(torch.from_numpy(envs.last_obs).to(device))
            bootstrap = last_value * torch.from_numpy(envs.truncated).to(device)
        rollout["obs"].append(obs)
        rollout["actions"].append(action)
        rollout["logprobs"].append(policy.log_prob(action))
        rollout["values"].append(value)
        rollout["bootstraps"].append(bootstrap)
        rollout["rewards"].append(torch.from_numpy(reward).to(device))
        rollout["dones"].append(torch.from_numpy(done).to(device))
        finished += [(t, envs.score[i], envs.length[i]) for i in np.flatnonzero(envs.over)]
    _, next_value = agent(torch.from_numpy(envs.obs).to(device))
    rollout["next_values"] = [*rollout["values"][1:], next_value]
    rollout = {name: torch.stack(steps) for name, steps in rollout.items()}
    rollout["next_values"] *= ~rollout["dones"]  # nothing follows an end,
    rollout["next_values"] += rollout["bootstraps"]  # but what a time limit cuts off is worth V
    return rollout, finished


def minibatch_loss(agent, obs, action, old_logprob, raw_advantage, returns, clip_coef, args: Args):
    """The loss, and what is logged of it. All inputs but the observations: (batch,)."""
    advantage = normalize(raw_advantage) if args.norm_adv else raw_advantage
    with torch.autocast(obs.device.type, torch.bfloat16, enabled=args.bf16):
        policy, value = agent(obs)
    logprob = policy.log_prob(action)
    policy_loss = args.pg_coef * ppo_loss(logprob, old_logprob, advantage, clip_coef)
    value_loss = nn.functional.mse_loss(value, returns)
    entropy = policy.entropy().mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss

    ratio = (logprob - old_logprob).exp().detach()
    logged = {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (ratio - 1 - ratio.log()).mean(),  # estimates KL(π_old, π)
        "losses/clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
        "advantage/sign_flips_normalization": (advantage * raw_advantage < 0).float().mean(),
    }
    return loss, {tag: value.detach() for tag, value in logged.items()}


def update(agent, optimizer, batch, clip_coef, args: Args) -> dict:
    """Learns from a batch (obs, actions, log π_old, advantages, returns). Returns logged means."""
    parameters = list(agent.parameters())
    history = []
    for _ in range(args.update_epochs):
        inds = torch.randperm(len(batch[0]))
        minibatches = zip(*(x[inds].chunk(args.num_minibatches) for x in batch))
        for obs, action, old_logprob, advantage, returns in minibatches:
            advantage = flip_signs(advantage, args.advantage_noise)
            loss, logged = minibatch_loss(
                agent, obs, action, old_logprob, advantage, returns, clip_coef, args
            )
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            history.append(logged | {"losses/grad_norm": grad_norm})
    return {tag: torch.stack([x[tag] for x in history]).mean().item() for tag in history[0]}


@torch.no_grad()
def evaluate(agent: nn.Module, envs, args: Args, device: torch.device) -> np.ndarray:
    """Raw returns (eval_episodes,), the same seeds each time. In environments that are not games,
    actions are the most probable ones and the statistics those of training."""
    set_seeds(args.seed, "evaluation")
    scores = np.full(args.eval_episodes, np.nan)
    envs = type(envs)(args, args.eval_episodes, envs.stats)
    while np.isnan(scores).any():
        policy, _ = agent(torch.from_numpy(envs.obs).to(device))
        action = policy.sample() if envs.is_game else policy.mode
        envs.step(action.cpu().numpy())
        scores = np.where(envs.over & np.isnan(scores), envs.score, scores)
    return scores


def set_seeds(*names) -> None:
    """Seeds all generators from these names, so none is saved and evaluating disturbs nothing."""
    random.seed(" ".join(map(str, names)))
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(63))


def save_checkpoint(path: Path, args: Args, step: int, parts: dict) -> None:
    """Whenever the run is killed, `path` is a whole file: the old one or the new one."""
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state | {"args": asdict(args), "step": step}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def read_flags() -> tuple[Args, dict | None]:
    """The flags; with --resume also the checkpoint, whose flags replace those not typed."""
    args = tyro.cli(Args)
    if is_game(args.env_id):  # of a flag that comes twice the last value holds
        args = tyro.cli(Args, args=ATARI_DEFAULTS.split() + sys.argv[1:])
    checkpoint = None
    try:
        if args.resume:
            path = Path(args.resume, "checkpoint.pt")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            args = tyro.cli(Args, default=Args(**(checkpoint["args"] | {"resume": args.resume})))
        validate(args)
    except Exception as error:  # a wrong flag, or a file that is no checkpoint of this script
        print(f"{Path(__file__).name} {args.resume or ''}: {error!s:.120}", file=sys.stderr)
        sys.exit(2)
    return args, checkpoint


def start_logging(args: Args, first_step: int) -> tuple[Path, SummaryWriter]:
    """The run's folder and TensorBoard's writer in it; with --track also a run of W&B."""
    game = args.env_id.replace("/", "-").replace(":", "-")
    name = f"{game}__{Path(__file__).stem}__{args.seed}__{int(time.time() * 1000)}_{os.getpid()}"
    run = Path(args.resume or f"runs/{name}")
    if args.track:
        import wandb

        wandb.init(id=run.name, resume="allow", config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(run, purge_step=first_step)  # hides points from there on
    rows = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", first_step)
    print(run)
    return run, writer


def make(args: Args, device: torch.device) -> tuple:
    """The environments, and an agent for their kind."""
    if is_game(args.env_id):
        envs = Games(args, args.num_envs)
        return envs, AtariAgent(envs.num_actions).to(device, memory_format=torch.channels_last)
    envs = Environments(args, args.num_envs)
    return envs, ControlAgent(envs.obs.shape[1], envs.space, envs.bins).to(device)


def main(args: Args, checkpoint: dict | None = None) -> None:
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = True
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    first = checkpoint["step"] // batch_size if checkpoint else 0

    set_seeds(args.seed, "start", first)
    envs, agent = make(args, device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    parts = dict(agent=agent, optimizer=optimizer, **envs.stats)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        envs.reset()
    run, writer = start_logging(args, first_step=first * batch_size + 1)

    for iteration in tqdm(range(first, num_iterations + 1), unit=" steps", unit_scale=batch_size):
        step = iteration * batch_size  # step % interval < batch_size: at a multiple or just past it
        last = iteration == num_iterations  # one extra round: only save and evaluate
        evaluating = last or (args.eval_interval > 0 and step % args.eval_interval < batch_size)
        if evaluating or step % args.checkpoint_interval < batch_size:
            writer.flush()  # so that no curve ends before its checkpoint
            save_checkpoint(run / "checkpoint.pt", args, step, parts)
        if evaluating:
            with bf16:
                scores = evaluate(agent, envs, args, device)
            tqdm.write(f"score at {step} steps: {scores.mean():.2f} +- {scores.std():.2f}")
            # step + 1, for a run that resumes here evaluates again: it hides points after `step`.
            writer.add_scalar("eval/episodic_return", scores.mean(), step + 1)
        if last:
            break

        start_time = time.time()
        set_seeds(args.seed, "iteration", iteration)
        remaining = 1 - iteration / num_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)

        with bf16:
            rollout, finished = collect(envs, agent, args.num_steps, device)

        rewards = add_noise(rollout["rewards"], args.reward_noise, envs.is_game)
        context = (rollout["values"], rollout["next_values"], rollout["dones"])
        advantages = gae(rewards, *context, args.gamma, args.gae_lambda)
        returns = advantages + rollout["values"]

        batch = (rollout["obs"], rollout["actions"], rollout["logprobs"], advantages, returns)
        # Flattens, and drops forced FIREs: π did not choose them, and an episode ends before each.
        batch = [x[rollout["valid"]] for x in batch]
        logs = update(agent, optimizer, batch, clip_coef, args)

        logs["losses/explained_variance"] = 1 - (advantages.var() / returns.var()).item()
        logs["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        logs["charts/SPS"] = batch_size / (time.time() - start_time)
        if not np.isfinite(list(logs.values())).all():
            raise FloatingPointError(f"not finite at step {step}: {logs}")
        for tag, value in logs.items():
            writer.add_scalar(tag, value, step + batch_size)
        for t, score, length in finished:
            writer.add_scalar("charts/episodic_return", score, step + (t + 1) * args.num_envs)
            writer.add_scalar("charts/episodic_length", length, step + (t + 1) * args.num_envs)
    writer.close()


if __name__ == "__main__":
    main(*read_flags())

# What `uv run ppo_baseline.py` installs:
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "ale-py==0.12.1",
#   "mujoco==4.0.0", "box2d==2.3.10", "pygame-ce==2.5.8", "tyro==1.0.17", "tensorboard==2.21.0",
#   "tqdm==4.70.1"]
# ///
