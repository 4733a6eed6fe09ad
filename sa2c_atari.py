"""SA2C on Atari: A2C with the symmetric loss of Byun and Perrault (ICML 2025, arXiv 2405.17618).

With π the probability of the action taken and A the advantage:

    forward = −A · log π            A2C's loss, a cross-entropy weighted by A
    reverse = −A · Z · (1 − π)      reverse cross-entropy weighted by A; Z < 0 stands for log 0
    loss = α · forward + β · reverse − ent_coef · entropy + vf_coef · value loss

With α = 1, β = 0 this is A2C. The policy gradient is A2C's with every advantage multiplied by α + β|Z|π: confident
actions count more. Its control is A2C with the mean of that weight alone, `--alpha` w̄ `--beta 0`, where w̄ is the mean
of the logged `losses/mean_weight`. Each iteration of `main`

    plays num_envs games for num_steps steps                                               collect_games
    adds noise, if asked for, and computes advantages A by GAE (λ = 1), returns = A + V    flip_rewards, gae
    takes one step down the loss                                                           update, RMSpropTF

Left out: games in a checkpoint, since ale-py cannot save them.

    python sa2c_atari.py --env-id ALE/Breakout-v5 --reward-noise 0.1
    python sa2c_atari.py --resume runs/<run>
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "15000")  # torch's idle threads soon leave the cores to the games

import ale_py
import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TAGS = """losses/policy_loss losses/forward_loss losses/reverse_loss losses/value_loss losses/entropy losses/grad_norm
    losses/mean_weight advantage/sign_flips_normalization""".split()

@dataclass
class Args:
    """SA2C on Atari. Defaults are the settings of the paper's released code."""

    env_id: str = "ALE/Breakout-v5"  # the game; of the id only that counts: frame skip, stickiness are set here
    seed: int = 1  # seed of the run: weights, games, actions, noise
    total_timesteps: int = 5_000_000  # environment steps, each of 4 frames; the last incomplete batch is left out
    num_envs: int = 16  # games played side by side
    num_steps: int = 5  # steps in each game per iteration
    learning_rate: float = 7e-4  # step size of RMSprop
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount factor γ
    gae_lambda: float = 1.0  # λ of generalised advantage estimation
    norm_adv: bool = False  # normalise the advantages of each batch
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.25  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    alpha: float = 0.5  # α, weight of the forward (A2C) term
    beta: float = 1.0  # β, weight of the reverse term; the released code's example for one game, not tuned
    Z: float = -1.0  # Z < 0, the stand-in for log 0; only β·Z matters
    reward_noise: float = 0.0  # probability that the learner sees 1 − reward; reported scores stay clean
    survival_bonus: float = 0.0  # added to every reward the learner sees; p: what --reward-noise p pays on average
    advantage_noise: float = 0.0  # probability that a sample's advantage changes sign
    repeat_action_probability: float = 0.0  # sticky actions: probability that a game repeats the last action
    log_interval: int = 25  # iterations between two points of the losses in TensorBoard, each the mean over them
    eval_interval: int = 0  # steps between evaluations; 0: only after the last update (the final score)
    eval_episodes: int = 10  # full games in an evaluation, actions sampled
    checkpoint_interval: int = 100_000  # steps between checkpoints; others: at evaluations, the end, after a signal
    resume: str | None = None  # continue the run in this folder with its flags and what is typed; new episodes begin
    capture_video: bool = False  # save a video of each evaluation's first game, as the agent sees it
    track: bool = False  # mirror the run to Weights & Biases (pip install wandb)
    cuda: bool = True  # use a GPU if there is one
    bf16: bool = False  # compute convolutions and the hidden layer in bfloat16: faster where CPU or GPU has it
    torch_threads: int = 0  # CPU threads of torch; 0: one per core, at most 8

def validate(args: Args) -> None:
    """Raises ValueError for what would quietly train something else; other mistakes fail by themselves and say why."""
    batch_size = args.num_envs * args.num_steps
    if "game" not in gym.spec(args.env_id).kwargs:
        raise ValueError(f"--env-id {args.env_id} is not an Atari game")
    if args.num_steps < 2 or batch_size > args.total_timesteps:
        raise ValueError(f"--num-steps must be at least 2, and a batch of {batch_size} steps fit --total-timesteps")
    if not args.Z < 0 <= min(args.alpha, args.beta):
        raise ValueError("--Z must be negative, --alpha and --beta must not")
    if not all(0 <= p <= 1 for p in (args.reward_noise, args.advantage_noise, args.repeat_action_probability)):
        raise ValueError("--reward-noise, --advantage-noise, --repeat-action-probability must be in [0, 1]")

class Games:
    """Games side by side, in ale-py's vector environment with the usual preprocessing: 84×84 greyscale, 4 frames
    stacked, actions held for 4 frames, FIRE and 0 to 29 no-ops at reset. After a lost life FIRE is pressed for a step,
    where the game has it: some wait for it. `obs` (num_envs, 84, 84, 4) uint8 is what to act on next. Of the last
    step, with an entry per game: `score` and `length` (in steps) of the game so far, or of the whole game where it is
    `over`; `valid`, False where FIRE was pressed for the learner: no sample."""

    def __init__(self, args: Args, seeds: np.ndarray):
        self.envs = ale_py.vector_env.AtariVectorEnv(
            gym.spec(args.env_id).kwargs["game"],
            len(seeds),
            repeat_action_probability=args.repeat_action_probability,
            reward_clipping=False,  # the raw score is what is reported
            life_loss_info=True,  # a lost life sets `terminated` and the game goes on
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,  # a finished game starts anew within the same step
        )
        self.num_actions = len(actions := self.envs.ale.get_action_set())
        self.fire = actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else None
        obs, info = self.envs.reset(seed=seeds)
        self.obs, self.frame = channels_last(obs), info["episode_frame_number"]
        self.must_fire, self.over = np.zeros((2, len(seeds)), dtype=bool)
        self.score, self.length = np.zeros((2, len(seeds)))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Sign of the reward; terminated: the game is over or a life is lost; truncated: it was cut off at 108,000
        frames; last observation of a game that was cut off, undefined elsewhere. `action`: (num_envs, 1)."""
        self.score[self.over] = self.length[self.over] = 0
        self.valid = ~self.must_fire
        action = np.where(self.must_fire, self.fire, action[:, 0]) if self.must_fire.any() else action[:, 0]
        obs, reward, terminated, truncated, info = self.envs.step(action)
        self.obs = channels_last(obs)
        self.over = info["episode_frame_number"] <= self.frame  # only a new game counts its frames from the start
        self.frame = info["episode_frame_number"]
        self.score += reward
        self.length += 1
        self.must_fire = terminated & ~self.over & (self.fire is not None)
        return np.sign(reward), terminated, truncated, channels_last(info["final_obs"]) if truncated.any() else None

def channels_last(obs: np.ndarray) -> np.ndarray:
    """(num_envs, 4, 84, 84) → (num_envs, 84, 84, 4), the order in which convolutions are fast."""
    return torch.from_numpy(obs).movedim(1, 3).contiguous().numpy()

def layer_init(layer: nn.Module, std: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer

class AtariAgent(nn.Module):
    """The Nature CNN (Mnih et al., 2015), shared by policy and value. Observations: (batch, 84, 84, 4) uint8."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16  # for convolutions and the hidden layer
        self.features = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(inplace=True), nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.policy = layer_init(nn.Linear(512, num_actions), std=0.01)
        self.value = layer_init(nn.Linear(512, 1), std=1.0)

    def logprobs_and_value(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of all actions (batch, num_actions) and values (batch,)."""
        conv, device, dtype = self.features[0], obs.device.type, self.value.weight.dtype
        pixels = obs.movedim(3, 1).to(torch.bfloat16 if self.bf16 else dtype, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            hidden = nn.functional.conv2d(pixels, conv.weight / 255, conv.bias, conv.stride)  # fewer than pixels
            features = self.features[1:](hidden).to(dtype)
        with torch.autocast(device, enabled=False):
            return self.policy(features).log_softmax(-1), self.value(features).squeeze(1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of these actions (batch, 1), one action dimension; entropies and values (batch,)."""
        logprobs, value = self.logprobs_and_value(obs)
        return logprobs.gather(1, action), -(logprobs.exp() * logprobs).sum(1), value

    def act(self, obs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sampled actions (num_envs, 1), their log-probabilities (num_envs, 1), values (num_envs,)."""
        tensor = torch.from_numpy(obs).to(self.value.weight.device)
        logprobs, value = (x.numpy(force=True) for x in self.logprobs_and_value(tensor))
        action = (logprobs + rng.gumbel(size=logprobs.shape)).argmax(1, keepdims=True)  # Gumbel-max: a sample of π
        return action, np.take_along_axis(logprobs, action, 1), value

def as_vector(network: nn.Module) -> nn.Parameter:
    """All parameters in one vector, of which they become views: clipping and a step are then a few calls in all."""
    vector = nn.Parameter(nn.utils.parameters_to_vector(network.parameters()).detach())
    nn.utils.vector_to_parameters(vector.data, network.parameters())
    return vector

def symmetric_a2c_loss(logprob, advantage, alpha, beta, Z):
    """The symmetric A2C loss α · forward + β · reverse, and its two terms, each the mean over the batch.

        forward = −A · log π
        reverse = −A · Z · (1 − π)

    `logprob`, `advantage`: (batch,); π = exp(logprob) is the probability of the action taken. Source: the paper's SA2C
    loss."""
    forward_loss = -(advantage * logprob).mean()
    reverse_loss = -(advantage * Z * (1 - logprob.exp())).mean()
    return alpha * forward_loss + beta * reverse_loss, forward_loss, reverse_loss

class RMSpropTF(torch.optim.Optimizer):
    """RMSprop as TensorFlow had it, which A2C's settings were tuned with: v ← ρv + (1 − ρ)g², p ← p − lr·g / √(v + ε).
    torch.optim.RMSprop has √v + ε, and v = 0 at first; here it is 1 at first, which makes the first steps smaller."""

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
                p.addcdiv_(p.grad, (v + group["eps"]).sqrt_(), value=-group["lr"])

def gae(rewards, values, dones, next_value, gamma: float, gae_lambda: float) -> np.ndarray:
    """Generalised advantage estimation (Schulman et al., 2016). A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t.
    `rewards`, `values`, `dones`: (num_steps, num_envs); `next_value`: (num_envs,). `dones[t]`: an episode ended with
    step t, nothing is carried over. For a truncated one the caller adds γ · V(final observation) to the last reward."""
    following_values = np.concatenate((values[1:], next_value[np.newaxis]))
    advantages = rewards + gamma * following_values * ~dones - values  # δ_t, to which the loop adds γλ A_{t+1}
    decay = np.where(dones, 0, gamma * gae_lambda).astype(values.dtype)
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages

def normalize(advantages: torch.Tensor) -> torch.Tensor:
    """Advantages (…, samples) with mean 0 and standard deviation 1 in each row."""
    return (advantages - advantages.mean(-1, keepdim=True)) / (advantages.std(-1, keepdim=True) + 1e-8)

def flip_rewards(reward: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Binary symmetric channel: each reward becomes 1 − reward with `probability`. On average (1 − 2p) · reward + p.
    Zeros become ones too, on every step; −1 becomes 2. That is the released code's formula."""
    return np.where(rng.random(reward.shape) < probability, 1 - reward, reward)

def flip_signs(advantage: torch.Tensor, probability: float, rng: np.random.Generator) -> torch.Tensor:
    """Each advantage (batch,) changes its sign with `probability` (`adv_flip` in the released code)."""
    return advantage * torch.from_numpy(np.where(rng.random(len(advantage)) < probability, -1, 1)).to(advantage)

class Rollout:
    """The steps of one iteration; arrays of shape (num_steps, num_envs, …)."""

    def __init__(self, num_steps: int, obs: np.ndarray, action_dims: int, action_dtype: type = np.int64):
        shape = (num_steps, len(obs))
        self.obs = np.zeros((num_steps, *obs.shape), obs.dtype)
        self.actions = np.zeros((*shape, action_dims), action_dtype)
        self.logprobs = np.zeros((*shape, action_dims), np.float32)  # log π_old, for PPO's ratio
        self.values, self.rewards, self.bootstraps = np.zeros((3, *shape), np.float32)  # V(final obs) where truncated
        self.dones, self.valid = np.zeros(shape, bool), np.ones(shape, bool)
        self.finished = []  # (step, mean return, mean length) of the episodes that ended, one entry per step

@torch.no_grad()
def collect_games(games: Games, agent: AtariAgent, rollout: Rollout, rng: np.random.Generator) -> None:
    """Plays the policy and overwrites `rollout` with what happened."""
    rollout.finished, rollout.bootstraps[:] = [], 0
    for t in range(len(rollout.obs)):
        rollout.obs[t] = games.obs
        rollout.actions[t], rollout.logprobs[t], rollout.values[t] = agent.act(games.obs, rng)
        rollout.rewards[t], terminated, truncated, final_obs = games.step(rollout.actions[t])
        rollout.dones[t], rollout.valid[t] = terminated | truncated, games.valid
        cut = truncated & ~terminated
        if cut.any():  # the value of the last observation, not of the next game's first
            rollout.bootstraps[t, cut] = agent.act(final_obs[cut], rng)[2]
        if games.over.any():
            rollout.finished.append((t, games.score[games.over].mean(), games.length[games.over].mean()))
    rollout.next_value = agent.act(games.obs, rng)[2]

def update(agent, optimizer, batch, samples, args: Args, rng: np.random.Generator) -> dict[str, float]:
    """A step on the loss of the rows `samples` of a batch: obs, actions, advantages, returns. What is logged."""
    (parameters,) = optimizer.param_groups[0]["params"]
    b_inds = torch.from_numpy(samples).to(parameters.device)
    obs, action, advantage, returns = (x.index_select(0, b_inds) for x in batch)
    advantage = flip_signs(advantage, args.advantage_noise, rng)
    logprob, entropy, value = agent(obs, action)
    normalized, logprob = normalize(advantage) if args.norm_adv else advantage, logprob[:, 0]
    policy_loss, forward_loss, reverse_loss = symmetric_a2c_loss(logprob, normalized, args.alpha, args.beta, args.Z)
    value_loss, entropy = nn.functional.mse_loss(value, returns), entropy.mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    grads = torch.autograd.grad(loss, list(agent.parameters()))
    parameters.grad = torch.cat([grad.flatten() for grad in grads])
    grad_norm = nn.utils.clip_grad_norm_([parameters], args.max_grad_norm)
    optimizer.step()
    weight, flipped = args.alpha + args.beta * abs(args.Z) * logprob.exp(), normalized.sign() != advantage.sign()
    losses = (policy_loss, forward_loss, reverse_loss, value_loss, entropy, grad_norm)
    return dict(zip(TAGS, torch.stack((*losses, weight.mean(), flipped.float().mean())).tolist()))

@torch.inference_mode()
def evaluate_games(agent: AtariAgent, args: Args, stop: list, video: Path, max_steps: float = np.inf) -> np.ndarray:
    """Raw scores (eval_episodes,) of full games in environments of their own, actions sampled, same seeds each time."""
    rng, scores = np.random.default_rng([args.seed, 0, 4]), np.full(args.eval_episodes, np.nan)
    games = Games(args, rng.integers(2**31, size=args.eval_episodes))
    with imageio.get_writer(video, fps=15) if args.capture_video else contextlib.nullcontext() as writer:
        while np.isnan(scores).any() and not stop and games.length.max() < max_steps:
            if args.capture_video and np.isnan(scores[0]):
                writer.append_data(games.obs[0, :, :, -1].repeat(4, 0).repeat(4, 1))
            games.step(agent.act(games.obs, rng)[0])
            scores = np.where(games.over & np.isnan(scores), games.score, scores)
    return scores

class Forgiving(contextlib.suppress, contextlib.ContextDecorator):
    """Makes a function ignore exceptions: output that cannot be written, be it `| head` or an ASCII γ, ends no run."""

def save(path: Path, **state) -> None:
    """Whatever happens meanwhile, `path` is a whole file: the old one or the new one."""
    try:
        with open(temporary := path.with_suffix(".tmp"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def read_flags() -> tuple[Args, dict]:
    """The flags and, to resume a run, its checkpoint, which cannot run code and whose flags hold unless typed anew."""
    args = tyro.cli(Args)
    saved = torch.load(Path(args.resume, "checkpoint.pt"), map_location="cpu", weights_only=True) if args.resume else {}
    return tyro.cli(Args, default=Args(**saved["args"] | {"resume": args.resume})) if saved else args, saved

def main(args: Args, saved: dict | None = None) -> None:
    saved, batch_size = saved or {}, args.num_envs * args.num_steps
    done, num_iterations = saved.get("iteration", 0), args.total_timesteps // batch_size
    device = args.cuda and torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # float32 is float32
    torch.set_num_threads(args.torch_threads or min(torch.get_num_threads(), 8))
    torch.manual_seed(args.seed)
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX, and M_TRIM_THRESHOLD below: freed memory is kept, since getting
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # it anew was a quarter of an update
        with contextlib.suppress(OSError):  # a thread that wakes waits for a core instead of taking another's
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

    # Random streams follow from seed, iteration and a number: a resumed run draws the same, but begins new episodes.
    envs = Games(args, np.random.default_rng([args.seed, done, 3]).integers(2**31, size=args.num_envs))
    agent = AtariAgent(envs.num_actions, args.bf16).to(device)
    optimizer = RMSpropTF([parameters := as_vector(agent)], lr=args.learning_rate)
    rollout, recent_stats = Rollout(args.num_steps, envs.obs, action_dims=1), []
    agent.load_state_dict(saved.get("agent", agent.state_dict()))
    optimizer.load_state_dict(saved.get("optimizer", optimizer.state_dict()))

    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    (run := Path(args.resume or f"runs/{name}")).mkdir(parents=True, exist_ok=bool(args.resume))
    if args.track:
        import wandb
        wandb.init(id=run.name, resume="allow", config=asdict(args), sync_tensorboard=True, save_code=True)
    writer = SummaryWriter(run, purge_step=done * batch_size + 1)  # drops what was logged after the checkpoint
    rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", done * batch_size + 1)
    stop, usual = [], {}  # the first signal ends the iteration and saves, a second acts as usual; 1: ignored (nohup)
    for number in [s for s in signal.Signals if s.name[3:] in "INT TERM HUP USR1".split() and signal.getsignal(s) != 1]:
        with contextlib.suppress(ValueError):  # not in the main thread
            usual[number] = signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, usual[n])))
    print(run, "on", device, {key: x for key, x in asdict(args).items() if saved and x != saved["args"][key]} or "")
    evaluate_games(agent, args, stop, run / "0.mp4", max_steps=1)  # a trial: what it lacks shows now
    progress = tqdm(range(done, num_iterations + 1), initial=done, total=num_iterations, unit=" steps",
                    unit_scale=batch_size, mininterval=0.1 if sys.stderr.isatty() else 30)  # fmt: skip

    for iteration in progress:
        step, last = iteration * batch_size, iteration == num_iterations
        evaluation_due = last or 0 < args.eval_interval <= step and step % args.eval_interval < batch_size
        checkpoint_due = 0 < args.checkpoint_interval <= step and step % args.checkpoint_interval < batch_size
        if saving := evaluation_due or checkpoint_due or bool(stop):
            writer.flush()  # a checkpoint's curves are on disk before it is
            save(run / "checkpoint.pt", args=asdict(args), iteration=iteration, agent=agent.state_dict(),
                 optimizer=optimizer.state_dict())  # fmt: skip
        if evaluation_due and not stop:
            scores = evaluate_games(agent, args, stop, run / f"{step}.mp4")
            if not stop:  # logged at step + 1: a resumed run evaluates again and drops this
                writer.add_scalar("eval/episodic_return", scores.mean(), step + 1)
                tqdm.write(f"score at {step} steps: {scores.mean():.2f} ± {scores.std():.2f} ({len(scores)} episodes)")
        if last or saving and stop:
            break

        start_time, remaining = time.time(), 1 - iteration / num_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
        act_rng, fill_rng, noise_rng = (np.random.default_rng([args.seed, iteration, i]) for i in range(3))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):  # casts weights once, not every step
            collect_games(envs, agent, rollout, act_rng)

        rewards = flip_rewards(rollout.rewards, args.reward_noise, noise_rng) + args.survival_bonus
        bootstraps, valid = args.gamma * rollout.bootstraps, rollout.valid
        context = (rollout.values, rollout.dones, rollout.next_value, args.gamma, args.gae_lambda)
        advantages, clean_advantages = (gae(x + bootstraps, *context) for x in (rewards, rollout.rewards))
        returns = advantages + rollout.values

        samples = np.flatnonzero(valid)  # FIRE rows are left out; others, drawn at random, take their places
        samples = np.append(samples, fill_rng.choice(samples, batch_size - len(samples)))
        arrays = (rollout.obs, rollout.actions, advantages, returns)
        batch = [torch.from_numpy(x).to(device).flatten(0, 1) for x in arrays]
        stats = update(agent, optimizer, batch, samples, args, noise_rng)

        stats["losses/explained_variance"] = 1 - advantages[valid].var() / (returns[valid].var() + 1e-8)
        stats["advantage/sign_flips_noise"] = (np.sign(advantages) != np.sign(clean_advantages))[valid].mean()
        stats["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        stats["charts/SPS"] = batch_size / (time.time() - start_time)
        if not np.isfinite([*stats.values(), parameters.norm().item()]).all():
            raise FloatingPointError(f"not finite: {step=}, {rollout.obs.mean()=}, {rollout.rewards.mean()=}, {stats}")
        recent_stats.append(stats)
        if (iteration + 1) % args.log_interval == 0 or iteration + 1 == num_iterations:
            for tag in stats:
                writer.add_scalar(tag, np.mean([x[tag] for x in recent_stats]), step + batch_size)
            recent_stats = []
        for t, episodic_return, length in rollout.finished:
            writer.add_scalar("charts/episodic_return", episodic_return, step + (t + 1) * args.num_envs)
            writer.add_scalar("charts/episodic_length", length, step + (t + 1) * args.num_envs)
            progress.set_postfix_str(f"return {episodic_return:.1f}", refresh=False)

    writer.close()
    for number, handler in usual.items():
        signal.signal(number, handler)
    if stop:
        print(f'stopped; to go on: python "{sys.argv[0]}" --resume "{run}"')
        sys.exit(128 + stop[0])

if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace", line_buffering=True)
        stream.write, stream.flush = (Forgiving(OSError, ValueError)(f) for f in (stream.write, stream.flush))
    try:
        args, saved = read_flags()
        validate(args)
    except (ValueError, OSError, gym.error.Error) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    main(args, saved)

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "ale-py==0.12.1", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "imageio[ffmpeg]==2.38.1"]
# ///
