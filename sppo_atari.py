"""SPPO on Atari: PPO with the symmetric loss of Byun and Perrault (ICML 2025, arXiv 2405.17618).

π is the probability of the action taken, π_old when it was taken, r = π / π_old, A the advantage:

    forward = -min(r·A, clip(r, 1-ε, 1+ε)·A)    PPO's clipped objective
    reverse = -m · A · Z · (1 - π) / π_old      m is 1 where `forward` has a gradient, else 0
    loss = α · forward + β · reverse - ent_coef · entropy + vf_coef · value loss

Cross-entropy is -Σ_b p(b) log π(b), where p is 1 for the action taken, else 0. Reverse
cross-entropy is -Σ_b π(b) log p(b): as log 1 is 0 and Z < 0 replaces log 0, it is -Z · (1 - π). A
symmetric loss adds both, each times A. As PPO puts r in place of log π and clips it, the reverse
term is divided by π_old and masked by m. The paper means it to help against noisy rewards.

α = 1, β = 0 is PPO. As ∇π = π ∇log π, the gradient of `forward` is -m · A · r · ∇log π and that
of `reverse` |Z| times as large. So SPPO is PPO with a policy loss α + β|Z| times as large beside
the other losses, which the paper does not say: `--alpha 1.5 --beta 0` trains like the defaults.
Without 1/π_old the factor is α + β|Z|π_old, which differs from sample to sample.

One iteration:
    1. play `num_envs` games for `num_steps` steps                  collect
    2. add reward noise, compute advantages A and returns A + V     flip_rewards, gae
    3. for each epoch, for each minibatch: step down the loss       update, minibatch_loss

Left out: a clipped value loss (the released code has none either); the value of games that are cut
off after half an hour (they count as over); saving games (a resumed run starts new ones).

    python sppo_atari.py --env-id ALE/Breakout-v5 --reward-noise 0.1
"""

import contextlib
import ctypes
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "15000")  # idle threads sleep early

import ale_py
import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """SPPO on Atari. Defaults are the settings of the paper's released code."""

    env_id: str = "ALE/Breakout-v5"  # the game; frame skip is 4, sticky actions have a flag
    seed: int = 1  # seed of weights, games, actions, minibatches and noise
    total_timesteps: int = 5_000_000  # environment steps, each of 4 frames
    num_envs: int = 8  # games played side by side
    num_steps: int = 128  # steps in each game per iteration
    repeat_action_probability: float = 0.0  # sticky actions: probability of the last action again
    # PPO
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over each batch
    learning_rate: float = 2.5e-4  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.1  # clip range
    anneal_clip: bool = True  # lower the clip range linearly to 0
    norm_adv: bool = True  # normalise the advantages of each minibatch
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    # the symmetric loss
    alpha: float = 0.5  # weight of the forward (PPO) term
    beta: float = 1.0  # weight of the reverse term; the paper tunes it for each game
    Z: float = -1.0  # stands in for log 0, negative; it matters only through beta * Z
    importance_weighted_reverse: bool = True  # divide the reverse term by the old probability
    # noise that the learner sees; reported scores are clean
    reward_noise: float = 0.0  # probability that a reward -1, 0 or 1 becomes 2, 1 or 0
    advantage_noise: float = 0.0  # probability that an advantage changes sign, in each minibatch
    # the run
    eval_interval: int = 0  # steps between evaluations; 0: only one, after training
    eval_episodes: int = 10  # full games in an evaluation, actions sampled
    checkpoint_interval: int = 20_000  # steps between checkpoints
    resume: str | None = None  # go on with the run in this folder; typed flags replace its own
    capture_video: bool = False  # save a video of each evaluation's first game
    track: bool = False  # mirror the run to Weights & Biases (pip install wandb)
    cuda: bool = True  # use a GPU if there is one
    bf16: bool = False  # bfloat16 but for the heads; faster on a GPU and on CPUs that have it
    compile: bool = False  # compile the loss, which takes half a minute
    torch_threads: int = 0  # CPU threads of torch; 0: as many as torch chooses


def validate(args: Args) -> None:
    """Raises ValueError for flags that would quietly train something else."""
    batch_size = args.num_envs * args.num_steps
    if "game" not in gym.spec(args.env_id).kwargs:
        raise ValueError(f"--env-id {args.env_id} is not an Atari game")
    if batch_size % args.num_minibatches or batch_size > args.total_timesteps:
        raise ValueError(f"--num-minibatches must divide {batch_size}, --total-timesteps hold it")
    if args.Z >= 0 or min(args.alpha, args.beta) < 0:
        raise ValueError("--Z must be negative, --alpha and --beta must not")
    if not all(0 <= noise <= 1 for noise in (args.reward_noise, args.advantage_noise)):
        raise ValueError("--reward-noise and --advantage-noise are probabilities, 0 to 1")


class Games:
    """Atari games side by side, as ale-py preprocesses them: 84×84 greyscale, 4 frames stacked,
    each action held for 4 frames, up to 29 no-ops and FIRE at the start. A game that is over starts
    anew within the same step. The step after a lost life presses FIRE: some games wait for it."""

    def __init__(self, args: Args, num_envs: int):
        self.envs = ale_py.vector_env.AtariVectorEnv(
            gym.spec(args.env_id).kwargs["game"],
            num_envs,
            repeat_action_probability=args.repeat_action_probability,
            reward_clipping=False,  # scores are reported as they are
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,  # new game's obs, old one's reward
        )
        self.actions = [action.name for action in self.envs.ale.get_action_set()]
        self.fire = self.actions.index("FIRE") if "FIRE" in self.actions else None
        self.obs, info = self.envs.reset(seed=np.random.randint(2**31, size=num_envs))
        self.lives = info["lives"]
        self.must_fire = np.zeros(num_envs, dtype=bool)  # in the next step, whatever is chosen
        self.over = np.zeros(num_envs, dtype=bool)  # games that ended with the last step
        self.score = np.zeros(num_envs)  # of each game so far, or the final one where it is over
        self.length = np.zeros(num_envs)  # in steps, likewise

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
        self.lives = info["lives"]  # already of the new game, where one is over
        self.must_fire = life_lost & (self.fire is not None)
        return np.sign(reward).astype(np.float32), self.over | life_lost


def layer_init(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


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


def symmetric_ppo_loss(logprob, old_logprob, advantage, clip_coef, args: Args):
    """α · forward + β · reverse, and the two terms, of inputs (batch,). As in the paper's
    released code. Without 1/π_old, which is our variant, it weighs samples as SA2C does."""
    ratio = (logprob - old_logprob).exp()
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage
    forward_loss = -torch.min(unclipped, clipped).mean()

    mask = unclipped <= clipped  # m: `min` takes r·A; inside the clip range both are equal
    weight = 1 - logprob.exp()
    if args.importance_weighted_reverse:
        weight = weight / old_logprob.exp()
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


def flip_rewards(reward: torch.Tensor, probability: float) -> torch.Tensor:
    """Each reward becomes 1 - reward with `probability`: 0 and 1 change places, -1 becomes 2 (the
    released code's formula). On average: (1 - 2p) · reward + p."""
    return torch.where(torch.rand_like(reward) < probability, 1 - reward, reward)


def flip_signs(advantage: torch.Tensor, probability: float) -> torch.Tensor:
    """Each advantage changes its sign with `probability` (`adv_flip` in the released code)."""
    return torch.where(torch.rand_like(advantage) < probability, -advantage, advantage)


@torch.no_grad()
def collect(games: Games, agent: AtariAgent, num_steps: int, device) -> tuple[dict, list]:
    """Plays π. Returns tensors (num_steps, num_envs, …); (step, score, length) of ended games."""
    rollout = defaultdict(list)
    finished = []
    for t in range(num_steps):
        obs = torch.from_numpy(games.obs).to(device)  # shares memory; each step has its own array
        policy, value = agent(obs)
        action = policy.sample()
        rollout["valid"].append(torch.from_numpy(~games.must_fire).to(device))  # False: forced FIRE
        reward, done = games.step(action.cpu().numpy())
        rollout["obs"].append(obs)
        rollout["actions"].append(action)
        rollout["logprobs"].append(policy.log_prob(action))
        rollout["values"].append(value)
        rollout["rewards"].append(torch.from_numpy(reward).to(device))
        rollout["dones"].append(torch.from_numpy(done).to(device))
        finished += [(t, games.score[i], games.length[i]) for i in np.flatnonzero(games.over)]
    _, next_value = agent(torch.from_numpy(games.obs).to(device))
    rollout["next_values"] = [*rollout["values"][1:], next_value]
    rollout = {name: torch.stack(steps) for name, steps in rollout.items()}
    rollout["next_values"] *= ~rollout["dones"]  # nothing follows an end
    return rollout, finished


def minibatch_loss(agent, obs, action, old_logprob, raw_advantage, returns, clip_coef, args: Args):
    """The loss, and what is logged. `raw_advantage` is not normalised. All but `obs`: (batch,)."""
    advantage = normalize(raw_advantage) if args.norm_adv else raw_advantage
    with torch.autocast(obs.device.type, torch.bfloat16, enabled=args.bf16):
        policy, value = agent(obs)
    logprob = policy.log_prob(action)
    loss_terms = symmetric_ppo_loss(logprob, old_logprob, advantage, clip_coef, args)
    policy_loss, forward_loss, reverse_loss = loss_terms
    value_loss = nn.functional.mse_loss(value, returns)  # not halved, unlike CleanRL's
    entropy = policy.entropy().mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss

    ratio = (logprob - old_logprob).exp().detach()
    logged = {
        "losses/policy_loss": policy_loss,
        "losses/forward_loss": forward_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (ratio - 1 - ratio.log()).mean(),  # estimates KL(π_old, π)
        "losses/clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
        "advantage/sign_flips_normalization": (advantage * raw_advantage < 0).float().mean(),
    }
    if not args.importance_weighted_reverse:  # the mean of α + β|Z|π_old
        logged["losses/mean_weight"] = args.alpha - args.beta * args.Z * old_logprob.exp().mean()
    return loss, {tag: value.detach() for tag, value in logged.items()}


def update(agent, optimizer, batch, clip_coef, args: Args, loss_function=minibatch_loss) -> dict:
    """Learns from a batch (obs, actions, log π_old, advantages, returns). Returns logged means."""
    parameters = list(agent.parameters())
    history = []
    for _ in range(args.update_epochs):
        inds = torch.randperm(len(batch[0]))  # forced FIREs are gone: the last chunk may be smaller
        minibatches = zip(*(x[inds].chunk(args.num_minibatches) for x in batch))
        for obs, action, old_logprob, advantage, returns in minibatches:
            advantage = flip_signs(advantage, args.advantage_noise)
            loss, logged = loss_function(
                agent, obs, action, old_logprob, advantage, returns, clip_coef, args
            )
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            history.append(logged | {"losses/grad_norm": grad_norm})
    return {tag: torch.stack([x[tag] for x in history]).mean().item() for tag in history[0]}


@torch.no_grad()
def evaluate(agent: AtariAgent, args: Args, device: torch.device, video: Path) -> np.ndarray:
    """Raw scores (eval_episodes,) of full games, actions sampled, with the same seeds each time."""
    set_seeds(args.seed, "evaluation")
    games = Games(args, args.eval_episodes)
    scores = np.full(args.eval_episodes, np.nan)
    frames = []
    while np.isnan(scores).any():
        if args.capture_video and np.isnan(scores[0]):
            frames.append(games.obs[0, -1].repeat(4, axis=0).repeat(4, axis=1))  # 4 × as large
        policy, _ = agent(torch.from_numpy(games.obs).to(device))
        games.step(policy.sample().cpu().numpy())
        scores = np.where(games.over & np.isnan(scores), games.score, scores)
    if frames:
        imageio.mimsave(video, frames, fps=15)
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


def spare_the_machine() -> None:
    """Nothing to do with learning, skip it: speed where cores are few. Freed memory stays with the
    process, and threads do not take cores from each other. Results are the same without it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: large arrays come from the heap, too
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: it keeps what is freed
        with contextlib.suppress(OSError):  # some sandboxes refuse
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # wait for your turn


def main(args: Args, checkpoint: dict | None = None) -> None:
    spare_the_machine()
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = True
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    first = checkpoint["step"] // batch_size if checkpoint else 0

    set_seeds(args.seed, "start", first)  # a resumed run starts games of its own
    games = Games(args, args.num_envs)
    agent = AtariAgent(len(games.actions)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    loss_function = torch.compile(minibatch_loss) if args.compile else minibatch_loss
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    parts = dict(agent=agent, optimizer=optimizer)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
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
                scores = evaluate(agent, args, device, run / f"{step}.mp4")
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
        clip_coef = torch.tensor(clip_coef, device=device)  # --compile compiles a new float anew

        with bf16:
            rollout, finished = collect(games, agent, args.num_steps, device)

        rewards = flip_rewards(rollout["rewards"], args.reward_noise)
        context = (rollout["values"], rollout["next_values"], rollout["dones"])
        advantages = gae(rewards, *context, args.gamma, args.gae_lambda)
        returns = advantages + rollout["values"]

        batch = (rollout["obs"], rollout["actions"], rollout["logprobs"], advantages, returns)
        # Flattens, and drops forced FIREs: π did not choose them, and an episode ends before each.
        batch = [x[rollout["valid"]] for x in batch]
        logs = update(agent, optimizer, batch, clip_coef, args, loss_function)

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

# What `uv run sppo_atari.py` installs:
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "ale-py==0.12.1",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "imageio[ffmpeg]==2.38.1"]
# ///
