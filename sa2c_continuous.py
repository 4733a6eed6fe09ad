"""SA2C for control: A2C with the symmetric loss of Byun and Perrault (ICML 2025).

Actions are discretised: each dimension is cut into `num_bins` values (the paper's DSA2C). π is the
probability of the action taken, the product over dimensions, A the advantage:

    forward = -A · log π             A2C's loss, a cross-entropy weighted by A
    reverse = -A · Z · (1 - π)       reverse cross-entropy; Z < 0 stands in for log 0
    loss = α · forward + β · reverse - ent_coef · entropy + vf_coef · value loss

α = 1 and β = 0 is A2C. The gradient is that of A2C with every advantage multiplied by α + β|Z|π:
confident actions count more. A fair control is A2C with the mean of that weight, `--alpha` w
`--beta 0`, where w is the mean of the logged `losses/mean_weight`. Over D > 1 dimensions the joint
π is almost 0, and so would be the reverse term. There 1 - π is the mean of 1 - π_d over the
dimensions d; that choice is ours, and the weight of dimension d is then α + β|Z|π_d / D.

One iteration:
    1. act for `num_steps` steps                                    collect
    2. add reward noise, compute advantages A and returns A + V     gae
    3. take one step down the loss                                  update

    python sa2c_continuous.py --env-id CartPole-v1 --total-timesteps 200000
    python sa2c_continuous.py --resume runs/<run>
"""

import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads; its matrices here are small

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
    """SA2C with discretised actions. Defaults are those of Stable-Baselines3, but `num_steps`."""

    env_id: str = "Hopper-v5"  # observations become flat; actions are `Discrete` or a bounded `Box`
    seed: int = 1  # seed of weights, environments, actions and noise
    total_timesteps: int = 1_000_000  # environment steps
    num_steps: int = 16  # steps per iteration
    num_bins: int = 11  # values per dimension of a `Box`, evenly spaced, ends included
    # A2C
    learning_rate: float = 7e-4  # step size of RMSprop
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 1.0  # lambda of generalised advantage estimation
    norm_adv: bool = False  # normalise the advantages of each batch
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    # the symmetric loss
    alpha: float = 0.5  # weight of the forward (A2C) term
    beta: float = 1.0  # weight of the reverse term; not tuned
    Z: float = -1.0  # stands in for log 0, negative; it matters only through beta * Z
    # noise that the learner sees; reported returns are clean
    reward_noise: float = 0.0  # standard deviation of Gaussian noise on the normalised reward
    advantage_noise: float = 0.0  # probability that an advantage changes sign
    # the run
    log_interval: int = 25  # iterations between two points of the losses in TensorBoard
    eval_interval: int = 0  # steps between evaluations; 0: only one, after training
    eval_episodes: int = 10  # episodes in an evaluation, with the most probable actions
    checkpoint_interval: int = 20_000  # steps between checkpoints
    resume: str | None = None  # go on with the run in this folder; typed flags replace its own
    capture_video: bool = False  # save a video of each evaluation's first episode
    track: bool = False  # mirror the run to Weights & Biases (pip install wandb)
    torch_threads: int = 1  # CPU threads of torch; more only slow down networks as small as these


def validate(args: Args) -> None:
    """Raises an error for flags that would quietly train something else."""
    if args.num_steps > args.total_timesteps:
        raise ValueError("--total-timesteps must be at least --num-steps")
    if args.Z >= 0 or min(args.alpha, args.beta) < 0 or not 0 <= args.advantage_noise <= 1:
        raise ValueError("--Z must be < 0, --alpha and --beta >= 0, --advantage-noise in 0 to 1")
    env = make_env(args.env_id)
    known = isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.is_bounded()
    if not known or not isinstance(env.observation_space, gym.spaces.Box):
        raise ValueError(f"cannot use {env.action_space}, {env.observation_space}")


def make_env(env_id: str, **options) -> gym.Env:
    return gym.wrappers.FlattenObservation(gym.make(env_id, **options))


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


class Environment:
    """An environment with normalised observations and rewards. `obs` (obs_dim,) is what to act on
    next; `score` and `length` are the raw return and the steps of the episode so far."""

    def __init__(self, env: gym.Env, gamma: float):
        self.env = env
        self.gamma = gamma
        self.obs_stats, self.return_stats = RunningMeanStd(), RunningMeanStd()

    def normalize(self, obs: np.ndarray) -> np.ndarray:
        obs = (obs - self.obs_stats.mean) / self.obs_stats.std
        return obs.clip(-10, 10).astype(np.float32)

    def reset(self, seed: int | None = None) -> None:
        obs, _ = self.env.reset(seed=seed)
        if seed is None or self.obs_stats.count == 0:  # else scoring a run again would differ
            self.obs_stats.update(obs)
        self.obs = self.normalize(obs)
        self.score, self.length = 0.0, 0
        self.discounted_return = 0.0

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Returns the normalised reward, not yet clipped, and if it is terminated or truncated."""
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.score += reward
        self.length += 1
        self.discounted_return = self.gamma * self.discounted_return + reward
        self.return_stats.update(self.discounted_return)
        if not (terminated or truncated):  # nobody acts on a last one, it is only valued
            self.obs_stats.update(obs)
        self.obs = self.normalize(obs)
        return reward / self.return_stats.std, terminated, truncated


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


def in_numpy(network: nn.Sequential):
    """An `mlp` as a function of arrays: for a few rows several times as fast as torch."""
    W1, b1, W2, b2, W3, b3 = (x.numpy(force=True).T for x in network.parameters())
    return lambda obs: np.tanh(np.tanh(obs @ W1 + b1) @ W2 + b2) @ W3 + b3


class BinnedAgent(nn.Module):
    """Policy and value, two separate networks. The policy is a categorical distribution over bins
    for each of D action dimensions. A `Discrete` space is one dimension, its actions are bins."""

    def __init__(self, obs_space: gym.Space, space: gym.Space, num_bins: int):
        super().__init__()
        if isinstance(space, gym.spaces.Discrete):
            self.bins = space.start + np.arange(space.n)[np.newaxis]
        else:
            self.bins = np.linspace(space.low.flatten(), space.high.flatten(), num_bins, axis=1)
        self.space = space
        self.policy = mlp(obs_space.shape[0], self.bins.size, gain=0.01)
        self.value = mlp(obs_space.shape[0], 1, gain=1.0)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """What the environment gets for bins (D,)."""
        action = self.bins[np.arange(len(self.bins)), action]
        return action.reshape(self.space.shape).astype(self.space.dtype)[()]  # Discrete: a scalar

    def forward(self, obs: torch.Tensor, action: torch.Tensor):
        """Log-probabilities of these bins (batch, D); entropies and values (batch,)."""
        logits = self.policy(obs).view(-1, *self.bins.shape)
        logprobs = logits.movedim(2, 0).log_softmax(0)  # (bins, batch, D), which is faster
        logprob = logprobs.gather(0, action.unsqueeze(0)).squeeze(0)
        entropy = -(logprobs.exp() * logprobs).sum((0, 2))
        return logprob, entropy, self.value(obs).squeeze(1)


def symmetric_a2c_loss(logprob, advantage, args: Args):
    """α · forward + β · reverse, and the two terms. `logprob`: (batch, D), a column for each action
    dimension; `advantage`: (batch,). Source: the paper; the mean over D > 1 dimensions is ours."""
    forward_loss = -(advantage * logprob.sum(1)).mean()
    reverse_loss = -(advantage * args.Z * (1 - logprob.exp()).mean(1)).mean()
    return args.alpha * forward_loss + args.beta * reverse_loss, forward_loss, reverse_loss


class RMSpropTF(torch.optim.Optimizer):
    """RMSprop as TensorFlow had it, which A2C's settings were tuned with:

        v ← ρv + (1 - ρ)g²
        p ← p - lr · g / √(v + ε)

    torch.optim.RMSprop has √v + ε, and v = 0 at first. Here v is 1 at first, which makes the first
    steps smaller."""

    def __init__(self, params, lr: float, decay: float = 0.99, eps: float = 1e-5):
        super().__init__(params, dict(lr=lr, decay=decay, eps=eps))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["square_avg"] = torch.ones_like(p)
                v = self.state[p]["square_avg"]
                v.mul_(group["decay"]).addcmul_(p.grad, p.grad, value=1 - group["decay"])
                p.addcdiv_(p.grad, (v + group["eps"]).sqrt(), value=-group["lr"])


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


def flip_signs(advantage: torch.Tensor, probability: float) -> torch.Tensor:
    """Each advantage changes its sign with `probability` (`adv_flip` in the released code)."""
    return torch.where(torch.rand_like(advantage) < probability, -advantage, advantage)


@torch.no_grad()
def collect(env: Environment, agent: BinnedAgent, num_steps: int) -> tuple[dict, list]:
    """Acts with π. Returns arrays (num_steps, …), and (step, return, length) of ended episodes."""
    policy = in_numpy(agent.policy)
    gumbel = np.random.gumbel(size=(num_steps, agent.bins.size))  # argmax(logits + it) samples π
    rollout = defaultdict(list)
    finished = []
    for t in range(num_steps):
        rollout["obs"].append(env.obs)
        action = (policy(env.obs) + gumbel[t]).reshape(agent.bins.shape).argmax(1)
        reward, terminated, truncated = env.step(agent.to_env(action))
        rollout["next_obs"].append(env.obs)
        rollout["actions"].append(action)
        rollout["rewards"].append(np.float32(reward))
        rollout["terminated"].append(terminated)
        rollout["dones"].append(terminated or truncated)
        if terminated or truncated:
            finished.append((t, env.score, env.length))
            env.reset()
    rollout = {name: np.array(steps) for name, steps in rollout.items()}
    obs, next_obs = torch.from_numpy(rollout["obs"]), torch.from_numpy(rollout["next_obs"])
    _, _, values = agent(obs, torch.from_numpy(rollout["actions"]))
    rollout["values"] = values.numpy()
    rollout["next_values"] = agent.value(next_obs)[:, 0].numpy() * ~rollout["terminated"]
    return rollout, finished


def update(agent: BinnedAgent, optimizer, batch: list, args: Args) -> dict:
    """One step down the loss of a batch (obs, actions, advantages, returns). Returns logs."""
    obs, action, raw_advantage, returns = batch
    raw_advantage = flip_signs(raw_advantage, args.advantage_noise)
    advantage = normalize(raw_advantage) if args.norm_adv else raw_advantage
    logprob, entropy, value = agent(obs, action)
    policy_loss, forward_loss, reverse_loss = symmetric_a2c_loss(logprob, advantage, args)
    value_loss = nn.functional.mse_loss(value, returns)
    entropy = entropy.mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss

    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    if not grad_norm.isfinite():
        raise FloatingPointError(f"the gradient is not finite: {policy_loss=}, {value_loss=}")
    optimizer.step()

    share = logprob.exp().mean() / logprob.shape[1]
    logged = {
        "losses/policy_loss": policy_loss,
        "losses/forward_loss": forward_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/grad_norm": grad_norm,
        "losses/mean_weight": args.alpha + args.beta * abs(args.Z) * share,
        "advantage/sign_flips_normalization": (advantage * raw_advantage < 0).float().mean(),
    }
    return {tag: value.detach() for tag, value in logged.items()}


@torch.no_grad()
def evaluate(agent: BinnedAgent, normalize_obs, args: Args, video: Path) -> np.ndarray:
    """Raw returns (eval_episodes,) with the most probable actions, the same seeds each time."""
    set_seeds(args.seed, "evaluation")
    env = make_env(args.env_id, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    policy = in_numpy(agent.policy)
    returns = np.zeros(args.eval_episodes)
    frames = []
    for episode, seed in enumerate(np.random.randint(2**31, size=len(returns)).tolist()):
        obs, _ = env.reset(seed=seed)
        over = False
        while not over:
            if args.capture_video and episode == 0:
                frames.append(env.render())
            action = policy(normalize_obs(obs)).reshape(agent.bins.shape).argmax(1)
            obs, reward, terminated, truncated, _ = env.step(agent.to_env(action))
            returns[episode] += reward
            over = terminated or truncated
    if frames:
        imageio.mimsave(video, frames, fps=30)
    return returns


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


def main(args: Args, checkpoint: dict | None = None) -> None:
    torch.set_num_threads(args.torch_threads)
    num_iterations = args.total_timesteps // args.num_steps
    first = checkpoint["step"] // args.num_steps if checkpoint else 0

    set_seeds(args.seed, "start", first)
    env = Environment(make_env(args.env_id), args.gamma)
    agent = BinnedAgent(env.env.observation_space, env.env.action_space, args.num_bins)
    optimizer = RMSpropTF(agent.parameters(), lr=args.learning_rate)
    parts = dict(agent=agent, optimizer=optimizer, obs=env.obs_stats, returns=env.return_stats)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        optimizer.param_groups[0]["lr"] = args.learning_rate  # not the saved one
    env.reset(seed=np.random.randint(2**31))  # a resumed run starts a new episode
    run, writer = start_logging(args, first_step=first * args.num_steps + 1)

    for iteration in tqdm(range(first, num_iterations + 1), unit_scale=args.num_steps):
        step = iteration * args.num_steps  # step % n < num_steps: at, or just past, a multiple of n
        last = iteration == num_iterations  # one extra round: only save and evaluate
        evaluating = last or (args.eval_interval > 0 and step % args.eval_interval < args.num_steps)
        if evaluating or step % args.checkpoint_interval < args.num_steps:
            writer.flush()  # so that no curve ends before its checkpoint
            save_checkpoint(run / "checkpoint.pt", args, step, parts)
        if evaluating:
            scores = evaluate(agent, env.normalize, args, run / f"{step}.mp4")
            tqdm.write(f"score at {step} steps: {scores.mean():.2f} +- {scores.std():.2f}")
            # step + 1, for a run that resumes here evaluates again: it hides points after `step`.
            writer.add_scalar("eval/episodic_return", scores.mean(), step + 1)
        if last:
            break

        start_time = time.time()
        set_seeds(args.seed, "iteration", iteration)
        rollout, finished = collect(env, agent, args.num_steps)

        rewards = rollout["rewards"].clip(-10, 10)
        noise = args.reward_noise * np.random.standard_normal(len(rewards)).astype(np.float32)
        context = (rollout["values"], rollout["next_values"], rollout["dones"])
        advantages = gae(rewards + noise, *context, args.gamma, args.gae_lambda)
        clean_advantages = gae(rewards, *context, args.gamma, args.gae_lambda)
        returns = advantages + rollout["values"]

        batch = (rollout["obs"], rollout["actions"], advantages, returns)
        logs = update(agent, optimizer, [torch.from_numpy(x) for x in batch], args)

        if iteration % args.log_interval == 0:
            logs["losses/explained_variance"] = 1 - advantages.var() / returns.var()
            logs["advantage/sign_flips_noise"] = (advantages * clean_advantages < 0).mean()
            logs["charts/SPS"] = args.num_steps / (time.time() - start_time)
            for tag, value in logs.items():
                writer.add_scalar(tag, value, step + args.num_steps)
        for t, score, length in finished:
            writer.add_scalar("charts/episodic_return", score, step + t + 1)
            writer.add_scalar("charts/episodic_length", length, step + t + 1)
    writer.close()


if __name__ == "__main__":
    main(*read_flags())

# What `uv run sa2c_continuous.py` installs:
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "mujoco==4.0.0",
#   "box2d==2.3.10", "pygame-ce==2.5.8", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1",
#   "imageio[ffmpeg]==2.38.1"]
# ///
