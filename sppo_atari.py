"""SPPO on Atari: PPO with the symmetric loss of Byun and Perrault (ICML 2025, arXiv 2405.17618).

With π the probability of the action taken, π_old the same when it was taken, r = π / π_old and A the advantage:

    forward = −min(r·A, clip(r, 1−ε, 1+ε)·A)    PPO's clipped objective
    reverse = −m · A · Z · (1 − π) / π_old      after reverse cross-entropy; Z < 0 stands for log 0,
                                                m is 1 where the clipped objective has a gradient, else 0
    loss = α · forward + β · reverse − ent_coef · entropy + vf_coef · value loss

With α = 1, β = 0 this is PPO. The gradient of `reverse` is |Z| times that of `forward`: `--alpha` α + β|Z| `--beta 0`
is the same but for rounding, the matched control. (For the plain reverse term take the logged `losses/mean_weight`
instead of α + β|Z|.) Each iteration of `main`

    plays num_envs games for num_steps steps                                       collect_games
    adds noise, if asked for, and computes advantages A by GAE, returns = A + V    flip_rewards, gae
    in each epoch, for each minibatch, normalises A and steps down the loss        update, normalize, gradient

Left out: a clipped value loss, as in the released code; games in a checkpoint, since ale-py cannot save them.

    python sppo_atari.py --env-id ALE/Breakout-v5 --reward-noise 0.1
    python sppo_atari.py --resume runs/<run>
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
    losses/old_approx_kl losses/approx_kl losses/clipfrac advantage/sign_flips_normalization""".split()

@dataclass
class Args:
    """SPPO on Atari. Defaults are the settings of the paper's released code."""

    env_id: str = "ALE/Breakout-v5"  # the game; of the id only that counts: frame skip, stickiness are set here
    seed: int = 1  # seed of the run: weights, games, actions, minibatches, noise
    total_timesteps: int = 5_000_000  # environment steps, each of 4 frames; the last incomplete batch is left out
    num_envs: int = 8  # games played side by side
    num_steps: int = 128  # steps in each game per iteration
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over each batch
    learning_rate: float = 2.5e-4  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount factor γ
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    clip_coef: float = 0.1  # clip range ε
    anneal_clip: bool = True  # lower the clip range linearly to 0
    norm_adv: bool = True  # normalise the advantages of each minibatch
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    alpha: float = 0.5  # α, weight of the forward (PPO) term
    beta: float = 1.0  # β, weight of the reverse term; the released code's example for one game, not tuned
    Z: float = -1.0  # Z < 0, the stand-in for log 0; only β·Z matters
    importance_weighted_reverse: bool = True  # divide the reverse term by π_old; --no-…: the plain reverse term
    reward_noise: float = 0.0  # probability that the learner sees 1 − reward; reported scores stay clean
    survival_bonus: float = 0.0  # added to every reward the learner sees; p: what --reward-noise p pays on average
    advantage_noise: float = 0.0  # probability that a sample's advantage changes sign, redrawn in every epoch
    repeat_action_probability: float = 0.0  # sticky actions: probability that a game repeats the last action
    eval_interval: int = 0  # steps between evaluations; 0: only after the last update (the final score)
    eval_episodes: int = 10  # full games in an evaluation, actions sampled
    checkpoint_interval: int = 100_000  # steps between checkpoints; others: at evaluations, the end, after a signal
    resume: str | None = None  # continue the run in this folder with its flags and what is typed; new episodes begin
    capture_video: bool = False  # save a video of each evaluation's first game, as the agent sees it
    track: bool = False  # mirror the run to Weights & Biases (pip install wandb)
    cuda: bool = True  # use a GPU if there is one
    compile: bool = False  # compile the loss and its gradient: faster on a GPU, after half a minute
    bf16: bool = False  # compute convolutions and the hidden layer in bfloat16: faster where CPU or GPU has it
    torch_threads: int = 0  # CPU threads of torch; 0: one per core, at most 8

def validate(args: Args) -> None:
    """Raises ValueError for what would quietly train something else; other mistakes fail by themselves and say why."""
    batch_size, minibatch_size = args.num_envs * args.num_steps, args.num_envs * args.num_steps / args.num_minibatches
    if "game" not in gym.spec(args.env_id).kwargs:
        raise ValueError(f"--env-id {args.env_id} is not an Atari game")
    if minibatch_size % 1 or min(args.num_steps, minibatch_size) < 2 or batch_size > args.total_timesteps:
        raise ValueError(f"a batch of {batch_size} steps must divide by --num-minibatches and fit --total-timesteps")
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

def symmetric_ppo_loss(logprob, old_logprob, advantage, alpha, beta, Z, clip_coef, importance_weighted=True):
    """The symmetric PPO loss α · forward + β · reverse, as above, and its two terms, each the mean over the batch. Not
    `importance_weighted`: reverse = −m · A · Z · (1/D) · Σ_d (1 − π_d), plain reverse cross-entropy.

    `logprob`, `old_logprob`: (batch, D), log-probabilities of the action taken, a column per action dimension; r, π
    and π_old are joint, the product over dimensions. `advantage`: (batch,). Source: the paper's SPPO loss; the mask m
    and the division by π_old are in the released code. The plain form over several dimensions is ours."""
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

def gradient(agent, obs, action, old_logprob, advantage, returns, clip_coef, args: Args):
    """Gradient of the loss of a minibatch, clipped, in one vector; the losses that are logged; log π (batch, D)."""
    logprob, entropy, value = agent(obs, action)
    weighting = (args.alpha, args.beta, args.Z, clip_coef, args.importance_weighted_reverse)
    policy_loss, forward_loss, reverse_loss = symmetric_ppo_loss(logprob, old_logprob, advantage, *weighting)
    value_loss, entropy = nn.functional.mse_loss(value, returns), entropy.mean()
    loss = policy_loss - (args.ent_coef * entropy if args.ent_coef else 0) + args.vf_coef * value_loss
    grad = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(agent.parameters()))])
    losses = torch.stack((policy_loss, forward_loss, reverse_loss, value_loss, entropy, norm := grad.norm())).detach()
    return grad * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), losses, logprob.detach()

def update(agent, optimizer, batch, samples, clip_coef, args: Args, rng, gradient=gradient) -> dict[str, float]:
    """Steps on the loss of the rows `samples` of a batch: obs, actions, log π_old, advantages, returns; means."""
    (parameters,), losses, means = optimizer.param_groups[0]["params"], [], []
    for _ in range(args.update_epochs):
        b_inds = torch.from_numpy(rng.permutation(samples)).to(parameters.device)
        obs, actions, old_logprobs, advantages, returns = (x.index_select(0, b_inds) for x in batch)
        advantages = flip_signs(advantages, args.advantage_noise, rng).view(args.num_minibatches, -1)
        normalized, new_logprobs = normalize(advantages) if args.norm_adv else advantages, []
        epoch = (obs, actions, old_logprobs, normalized.flatten(), returns)
        for minibatch in zip(*(x.chunk(args.num_minibatches) for x in epoch)):
            parameters.grad, logged, logprob = gradient(agent, *minibatch, clip_coef, args)
            optimizer.step()
            losses.append(logged)
            new_logprobs.append(logprob)
        ratio = (logratio := (torch.cat(new_logprobs) - old_logprobs).sum(1)).exp()
        clipped, flipped = (ratio - 1).abs() > clip_coef, normalized.sign() != advantages.sign()
        means.append(torch.stack([x.float().mean() for x in (-logratio, ratio - 1 - logratio, clipped, flipped)]))
    return dict(zip(TAGS, torch.cat((torch.stack(losses).mean(0), torch.stack(means).mean(0))).tolist()))

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
    torch._dynamo.config.trace_autograd_ops = True  # lets --compile see the backward pass, too
    step_gradient = torch.compile(gradient, fullgraph=True) if args.compile else gradient
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX, and M_TRIM_THRESHOLD below: freed memory is kept, since getting
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # it anew was a quarter of an update
        with contextlib.suppress(OSError):  # a thread that wakes waits for a core instead of taking another's
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

    # Random streams follow from seed, iteration and a number: a resumed run draws the same, but begins new episodes.
    envs = Games(args, np.random.default_rng([args.seed, done, 3]).integers(2**31, size=args.num_envs))
    agent = AtariAgent(envs.num_actions, args.bf16).to(device)
    optimizer = torch.optim.Adam([parameters := as_vector(agent)], lr=args.learning_rate, eps=1e-5, fused=True)
    rollout = Rollout(args.num_steps, envs.obs, action_dims=1)
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
        clip_coef = torch.tensor(args.clip_coef * (remaining if args.anneal_clip else 1), device=device)
        act_rng, minibatch_rng, noise_rng = (np.random.default_rng([args.seed, iteration, i]) for i in range(3))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):  # casts weights once, not every step
            collect_games(envs, agent, rollout, act_rng)

        rewards = flip_rewards(rollout.rewards, args.reward_noise, noise_rng) + args.survival_bonus
        bootstraps, valid = args.gamma * rollout.bootstraps, rollout.valid
        context = (rollout.values, rollout.dones, rollout.next_value, args.gamma, args.gae_lambda)
        advantages, clean_advantages = (gae(x + bootstraps, *context) for x in (rewards, rollout.rewards))
        returns = advantages + rollout.values

        samples = np.flatnonzero(valid)  # FIRE rows are left out; others, drawn at random, take their places
        samples = np.append(samples, minibatch_rng.choice(samples, batch_size - len(samples)))
        arrays = (rollout.obs, rollout.actions, rollout.logprobs, advantages, returns)
        batch = [torch.from_numpy(x).to(device).flatten(0, 1) for x in arrays]
        stats = update(agent, optimizer, batch, samples, clip_coef, args, minibatch_rng, step_gradient)

        share = 1 if args.importance_weighted_reverse else np.exp(rollout.logprobs[valid]).mean()
        stats["losses/mean_weight"] = args.alpha + args.beta * abs(args.Z) * share  # mean factor on PPO's gradient
        stats["losses/explained_variance"] = 1 - advantages[valid].var() / (returns[valid].var() + 1e-8)
        stats["advantage/sign_flips_noise"] = (np.sign(advantages) != np.sign(clean_advantages))[valid].mean()
        stats["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        stats["charts/SPS"] = batch_size / (time.time() - start_time)
        if not np.isfinite([*stats.values(), parameters.norm().item()]).all():
            raise FloatingPointError(f"not finite: {step=}, {rollout.obs.mean()=}, {rollout.rewards.mean()=}, {stats}")
        for tag, value in stats.items():
            writer.add_scalar(tag, value, step + batch_size)
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
