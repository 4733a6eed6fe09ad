"""SPPO for continuous control: PPO with the symmetric loss of Byun and Perrault (ICML 2025).

Actions are discretised: each dimension is cut into `num_bins` values. π is the probability of the
action taken, the product over dimensions, π_old when it was taken, r = π / π_old, A the advantage:

    forward = -min(r·A, clip(r, 1-ε, 1+ε)·A)    PPO's clipped objective
    reverse = -m · A · Z · (1 - π) / π_old      m is 1 where `forward` has a gradient, else 0
    loss = α · forward + β · reverse - ent_coef · entropy + vf_coef · value loss

Cross-entropy is -Σ_b p(b) log π(b), where p is 1 for the action taken, else 0. Reverse
cross-entropy is -Σ_b π(b) log p(b): as log 1 is 0 and Z < 0 replaces log 0, it is -Z · (1 - π).

α = 1, β = 0 is PPO. As (1 - π) / π_old = 1/π_old - r, the gradient of `reverse` is |Z| times that
of `forward`: SPPO has PPO's policy gradient times α + β|Z|, and `--alpha 20.5 --beta 0` trains the
same (not in the paper). Adam cancels such a factor, but gradients are clipped before, together.

One iteration:
    1. act for `num_steps` steps                                    collect
    2. add reward noise, compute advantages A and returns A + V     gae
    3. for each epoch, for each minibatch: step down the loss       update, minibatch_loss

    python sppo_continuous.py --env-id Hopper-v5 --total-timesteps 1000000
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
    """SPPO with discretised actions. Defaults are the settings of the paper's released code."""

    env_id: str = "Hopper-v5"  # observations become flat; actions are `Discrete` or a bounded `Box`
    seed: int = 1  # seed of weights, environments, actions, minibatches and noise
    total_timesteps: int = 2_000_000  # environment steps
    num_steps: int = 2048  # steps per iteration
    num_bins: int = 11  # values per dimension of a `Box`, evenly spaced, ends included
    num_minibatches: int = 32  # minibatches per epoch
    update_epochs: int = 10  # passes over each batch
    learning_rate: float = 3e-4  # step size of Adam
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # clip range
    norm_adv: bool = True  # normalise the advantages of each minibatch
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    # the symmetric loss
    alpha: float = 0.5  # weight of the forward (PPO) term
    beta: float = 20.0  # weight of the reverse term; the released code's example for one task
    Z: float = -1.0  # stands in for log 0, negative; it matters only through beta * Z
    importance_weighted_reverse: bool = True  # divide the reverse term by the old probability
    # noise that the learner sees; reported returns are clean
    reward_noise: float = 0.0  # standard deviation of Gaussian noise on the normalised reward
    advantage_noise: float = 0.0  # probability that an advantage changes sign, in each minibatch
    eval_interval: int = 0  # steps between evaluations; 0: only one, after training
    eval_episodes: int = 10  # episodes in an evaluation, with the most probable actions
    checkpoint_interval: int = 20_000  # steps between checkpoints
    resume: str | None = None  # go on with the run in this folder; typed flags replace its own
    capture_video: bool = False  # save a video of each evaluation's first episode
    track: bool = False  # mirror the run to Weights & Biases (pip install wandb)
    compile: bool = False  # compile the loss, which takes half a minute
    torch_threads: int = 1  # CPU threads of torch; more only slow down networks as small as these


def validate(args: Args) -> None:
    """Raises an error for flags that would quietly train something else."""
    if args.num_steps % args.num_minibatches or args.num_steps > args.total_timesteps:
        raise ValueError("--num-minibatches must divide --num-steps, --total-timesteps hold them")
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


def symmetric_ppo_loss(logprob, old_logprob, advantage, clip_coef, args: Args):
    """α · forward + β · reverse, and the two terms. `logprob`, `old_logprob`: (batch, D), a column
    for each action dimension; `advantage`: (batch,). Source: the paper's released code. In our
    variant, without 1/π_old, 1 - π is mean_d(1 - π_d), for over many dimensions π is almost 0."""
    old_joint_logprob = old_logprob.sum(1)
    ratio = (logprob.sum(1) - old_joint_logprob).exp()
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage
    forward_loss = -torch.min(unclipped, clipped).mean()

    mask = unclipped <= clipped  # m: `min` takes r·A; inside the clip range both are equal
    if args.importance_weighted_reverse:
        weight = (-old_joint_logprob.clamp(min=-80)).exp() - ratio  # 1/π_old - r, kept finite
    else:
        weight = (1 - logprob.exp()).mean(1)
    reverse_loss = -(mask * advantage * args.Z * weight).mean()
    return args.alpha * forward_loss + args.beta * reverse_loss, forward_loss, reverse_loss


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
    gumbel = np.random.gumbel(size=(num_steps, agent.bins.size))  # Gumbel-max: argmax samples π
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
    logprobs, _, values = agent(obs, torch.from_numpy(rollout["actions"]))
    rollout["logprobs"], rollout["values"] = logprobs.numpy(), values.numpy()
    rollout["next_values"] = agent.value(next_obs)[:, 0].numpy() * ~rollout["terminated"]
    return rollout, finished


def minibatch_loss(agent, obs, action, old_logprob, raw_advantage, returns, args: Args):
    """The loss, and what is logged of it. Shapes as for `symmetric_ppo_loss`."""
    advantage = normalize(raw_advantage) if args.norm_adv else raw_advantage
    logprob, entropy, value = agent(obs, action)
    loss_terms = symmetric_ppo_loss(logprob, old_logprob, advantage, args.clip_coef, args)
    policy_loss, forward_loss, reverse_loss = loss_terms
    value_loss = nn.functional.mse_loss(value, returns)  # not halved, unlike CleanRL's
    loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss
    ratio = (logprob - old_logprob).sum(1).exp().detach()
    logged = {
        "losses/policy_loss": policy_loss,
        "losses/forward_loss": forward_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy.mean(),
        "losses/approx_kl": (ratio - 1 - ratio.log()).mean(),  # estimates KL(π_old, π)
        "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        "advantage/sign_flips_normalization": (advantage * raw_advantage < 0).float().mean(),
    }
    if not args.importance_weighted_reverse:  # PPO's mean factor, α + β|Z|π_d / D at r = 1
        share = old_logprob.exp().mean() / old_logprob.shape[1]
        logged["losses/mean_weight"] = args.alpha + args.beta * abs(args.Z) * share
    return loss, {tag: value.detach() for tag, value in logged.items()}


def update(agent, optimizer, batch: tuple, args: Args, loss_function=minibatch_loss) -> dict:
    """Learns from a batch (obs, actions, log π_old, advantages, returns). Returns logged means."""
    history = []
    for _ in range(args.update_epochs):
        inds = torch.randperm(len(batch[0]))  # a minibatch is a part of each array of `batch`
        minibatches = zip(*(x[inds].chunk(args.num_minibatches) for x in batch))
        for obs, action, old_logprob, advantage, returns in minibatches:
            advantage = flip_signs(advantage, args.advantage_noise)
            loss, logged = loss_function(agent, obs, action, old_logprob, advantage, returns, args)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            history.append(logged | {"losses/grad_norm": grad_norm})
    return {tag: torch.stack([x[tag] for x in history]).mean().item() for tag in history[0]}


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
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    loss_function = torch.compile(minibatch_loss) if args.compile else minibatch_loss
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

        batch = (rollout["obs"], rollout["actions"], rollout["logprobs"], advantages, returns)
        logs = update(agent, optimizer, [torch.from_numpy(x) for x in batch], args, loss_function)

        logs["losses/explained_variance"] = 1 - advantages.var() / returns.var()
        logs["advantage/sign_flips_noise"] = (advantages * clean_advantages < 0).mean()
        logs["charts/SPS"] = args.num_steps / (time.time() - start_time)
        if not np.isfinite(list(logs.values())).all():
            raise FloatingPointError(f"not finite at step {step}: {logs}")
        for tag, value in logs.items():
            writer.add_scalar(tag, value, step + args.num_steps)
        for t, score, length in finished:
            writer.add_scalar("charts/episodic_return", score, step + t + 1)
            writer.add_scalar("charts/episodic_length", length, step + t + 1)
    writer.close()


if __name__ == "__main__":
    main(*read_flags())

# What `uv run sppo_continuous.py` installs:
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "mujoco==4.0.0",
#   "box2d==2.3.10", "pygame-ce==2.5.8", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1",
#   "imageio[ffmpeg]==2.38.1"]
# ///
