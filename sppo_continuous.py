"""SPPO for continuous control: PPO with the symmetric loss of Byun and Perrault (ICML 2025, arXiv 2405.17618).

Action dimensions are cut into `num_bins` values, so that actions have probabilities (the paper's DSPPO). With π that of
the action taken, the product over dimensions, π_old the same when it was taken, r = π / π_old and A the advantage:

    forward = −min(r·A, clip(r, 1−ε, 1+ε)·A)    PPO's clipped objective
    reverse = −m · A · Z · (1 − π) / π_old      after reverse cross-entropy; Z < 0 stands for log 0,
                                                m is 1 where the clipped objective has a gradient, else 0
    loss = α · forward + β · reverse − ent_coef · entropy + vf_coef · value loss

With α = 1, β = 0 this is PPO. The gradient of `reverse` is |Z| times that of `forward`: `--alpha` α + β|Z| `--beta 0`
is the same but for rounding, the matched control. Each iteration of `main`

    acts in num_envs environments for num_steps steps                              collect_episodes
    adds noise, if asked for, and computes advantages A by GAE, returns = A + V    add_noise, gae
    in each epoch, for each minibatch, normalises A and steps down the loss        update, normalize, gradient

    python sppo_continuous.py --env-id Hopper-v5 --total-timesteps 1000000
    python sppo_continuous.py --resume runs/<run>
"""

import contextlib
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, for matrices as small as these

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
    """SPPO for continuous control with discretised actions. Defaults are those of the paper's released code."""

    env_id: str = "Hopper-v5"  # the environment; observations become flat, actions are `Discrete` or a bounded `Box`
    seed: int = 1  # seed of the run: weights, environments, actions, minibatches, noise
    total_timesteps: int = 2_000_000  # environment steps; the last incomplete batch is left out
    num_envs: int = 1  # environments stepped side by side
    num_steps: int = 2048  # steps in each environment per iteration
    num_minibatches: int = 32  # minibatches per epoch
    update_epochs: int = 10  # passes over each batch
    learning_rate: float = 3e-4  # step size of Adam
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount factor γ
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    clip_coef: float = 0.2  # clip range ε
    anneal_clip: bool = False  # lower the clip range linearly to 0
    norm_adv: bool = True  # normalise the advantages of each minibatch
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    num_bins: int = 11  # values per dimension of a `Box` action space, evenly spaced, ends included
    alpha: float = 0.5  # α, weight of the forward (PPO) term
    beta: float = 20.0  # β, weight of the reverse term; the released code's example for one task (Ant), not tuned
    Z: float = -1.0  # Z < 0, the stand-in for log 0; only β·Z matters
    importance_weighted_reverse: bool = True  # divide the reverse term by π_old; --no-…: the plain reverse term
    reward_noise: float = 0.0  # std of Gaussian noise on the normalised reward; reported returns stay clean
    advantage_noise: float = 0.0  # probability that a sample's advantage changes sign, redrawn in every epoch
    eval_interval: int = 0  # steps between evaluations; 0: only after the last update (the final score)
    eval_episodes: int = 10  # episodes in an evaluation, with the most probable actions; at most 100,000 steps each
    checkpoint_interval: int = 100_000  # steps between checkpoints; others: at evaluations, the end, after a signal
    resume: str | None = None  # continue the run in this folder with its flags and what is typed; new episodes begin
    capture_video: bool = False  # save a video of each evaluation's first episode
    track: bool = False  # mirror the run to Weights & Biases (pip install wandb)
    cuda: bool = True  # use a GPU if there is one
    compile: bool = False  # compile the loss and its gradient: faster after half a minute; needs a C++ compiler
    torch_threads: int = 1  # CPU threads of torch; more only slow down networks as small as these

def validate(args: Args) -> None:
    """Raises ValueError for what would quietly train something else; other mistakes fail by themselves and say why."""
    batch_size, minibatch_size = args.num_envs * args.num_steps, args.num_envs * args.num_steps / args.num_minibatches
    if minibatch_size % 1 or args.norm_adv and minibatch_size < 2 or batch_size > args.total_timesteps:
        raise ValueError(f"a batch of {batch_size} steps must divide by --num-minibatches and fit --total-timesteps")
    if not args.Z < 0 <= min(args.alpha, args.beta, args.reward_noise) or not 0 <= args.advantage_noise <= 1:
        raise ValueError("--Z must be < 0, --alpha, --beta, --reward-noise must be ≥ 0, --advantage-noise in [0, 1]")
    env = make_env(args)
    space, obs_dims = env.action_space, len(env.unwrapped.observation_space.shape or ())
    env.close()
    box = isinstance(space, gym.spaces.Box) and space.dtype.kind == "f" and (space.low > -1e30) & (space.high < 1e30)
    if obs_dims > 2 or not (isinstance(space, gym.spaces.Discrete) or np.all(box)):
        raise ValueError(f"--env-id {args.env_id} shows images, or {space} is not Discrete or of finite, real bounds")

def make_env(args: Args, **options) -> gym.Env:
    """The environment; observations that are no vector become one."""
    env = gym.make(args.env_id, **options)
    gym.spaces.Tuple((env.action_space, env.observation_space)).seed(args.seed)
    return env if len(env.observation_space.shape or ()) == 1 else gym.wrappers.FlattenObservation(env)

class RunningMeanStd:
    """Mean and standard deviation of all samples so far (Welford, 1962)."""

    def __init__(self, shape: tuple[int, ...] = ()):
        self.count, self.mean, self.squares = 0, np.zeros(shape), np.zeros(shape)

    def update(self, sample: np.ndarray) -> None:
        self.count += 1
        delta = sample - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (sample - self.mean)  # Σ (sample − mean)²
        self.std = np.sqrt(self.squares / self.count + 1e-8)

class Environments:
    """Environments side by side, with running normalisation of observations and rewards; one that ends starts anew
    within the same step. `obs` (num_envs, obs_dim), normalised, is what to act on next. Of the last step, with an entry
    per environment: `score` (raw return) and `length` of the episode so far, or of the whole one where it is `over`."""

    def __init__(self, args: Args, seeds: np.ndarray, stats=()):
        self.envs, self.gamma = [make_env(args) for _ in seeds], args.gamma
        shape = self.envs[0].observation_space.shape
        self.obs_stats, self.return_stats = self.stats = RunningMeanStd(shape), RunningMeanStd()
        for own, saved in zip(self.stats, stats):
            vars(own).update({name: x.numpy() for name, x in saved.items()})
        self.obs = np.stack([self.normalize(env.reset(seed=int(x))[0], not stats) for env, x in zip(self.envs, seeds)])
        self.over = np.zeros(len(seeds), dtype=bool)
        self.score, self.length, self.discounted_return = self.totals = np.zeros((3, len(seeds)))

    def normalize(self, obs: np.ndarray, learn: bool = False) -> np.ndarray:
        if learn:
            self.obs_stats.update(obs)
        return ((obs - self.obs_stats.mean) / self.obs_stats.std).clip(-10, 10).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Normalised reward; terminated; truncated by a time limit; where either is true, the last observation."""
        self.totals[:, self.over] = 0  # after a truncation, too
        (terminated, truncated), reward = np.zeros((2, len(self.envs)), dtype=bool), np.zeros(len(self.envs))
        final_obs = np.empty_like(self.obs)
        for i, env in enumerate(self.envs):
            obs, raw_reward, terminated[i], truncated[i], _ = env.step(action[i])
            raw_reward = np.asarray(raw_reward).item()  # some give an array with one number
            self.score[i] += raw_reward
            self.discounted_return[i] = self.gamma * self.discounted_return[i] + raw_reward
            self.return_stats.update(self.discounted_return[i])
            reward[i] = max(min(raw_reward / self.return_stats.std, 10), -10)  # in this order a NaN stays one
            if terminated[i] or truncated[i]:
                final_obs[i] = self.normalize(obs)  # only valued, not acted on: no statistics of it
                obs, _ = env.reset()
            self.obs[i] = self.normalize(obs, learn=True)
        self.length += 1
        self.over = terminated | truncated
        return reward, terminated, truncated, final_obs

def layer_init(layer: nn.Module, std: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer

def mlp(inputs: int, outputs: int, std: float) -> nn.Sequential:
    hidden = (layer_init(nn.Linear(inputs, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh())
    return nn.Sequential(*hidden, layer_init(nn.Linear(64, outputs), std))

def in_numpy(network: nn.Sequential):
    """An `mlp` as a function of arrays (num_envs, obs_dim): for a few rows several times as fast as torch's calls."""
    W1, b1, W2, b2, W3, b3 = (parameter.numpy(force=True).T for parameter in network.parameters())
    return lambda obs: np.tanh(np.tanh(obs @ W1 + b1) @ W2 + b2) @ W3 + b3

class BinnedAgent(nn.Module):
    """Policy and value, two separate networks. Observations: (batch, obs_dim). The policy is D independent categorical
    distributions over bins, one per action dimension. `actions` (D, num_bins) is what the bins stand for: evenly spaced
    values, ends included; or the actions of a `Discrete` space, which is one dimension."""

    def __init__(self, obs_dim: int, space: gym.Space, num_bins: int):
        super().__init__()
        if isinstance(space, gym.spaces.Discrete):
            self.actions = space.start + np.arange(space.n)[np.newaxis]
        else:
            self.actions = np.linspace(space.low.flatten(), space.high.flatten(), num_bins, axis=1, dtype=space.dtype)
        self.dimensions, self.action_shape = np.arange(len(self.actions)), space.shape
        self.policy = mlp(obs_dim, self.actions.size, std=0.01).append(nn.Unflatten(1, self.actions.shape))
        self.value = mlp(obs_dim, 1, std=1.0).append(nn.Flatten(0))

    def noise(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        return rng.gumbel(size=(*shape, *self.actions.shape))  # the largest of logits + noise is a sample of the policy

    def act(self, logits: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
        """Bins (num_envs, D) from `in_numpy(agent.policy)(obs)`; without noise the most probable ones."""
        return (logits.reshape(-1, *self.actions.shape) + noise).argmax(-1)

    def to_env(self, bins: np.ndarray) -> np.ndarray:
        return self.actions[self.dimensions, bins].reshape(len(bins), *self.action_shape)

    def forward(self, obs: torch.Tensor, bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of these bins, by dimension (batch, D), entropies (batch,), values (batch,)."""
        logprobs = self.policy(obs).movedim(2, 0).log_softmax(0)  # over so few bins much faster if they come first
        logprob = logprobs.gather(0, bins.unsqueeze(0)).squeeze(0)
        return logprob, -(logprobs.exp() * logprobs).sum((0, 2)), self.value(obs)

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

def add_noise(reward: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    """Adds Gaussian noise with mean 0 and this standard deviation to (normalised) rewards."""
    return reward + std * rng.standard_normal(reward.shape, dtype=reward.dtype)

def flip_signs(advantage: torch.Tensor, probability: float, rng: np.random.Generator) -> torch.Tensor:
    """Each advantage (batch,) changes its sign with `probability` (`adv_flip` in the released code)."""
    return advantage * torch.from_numpy(np.where(rng.random(len(advantage)) < probability, -1, 1)).to(advantage)

class Rollout:
    """The steps of one iteration; arrays of shape (num_steps, num_envs, …)."""

    def __init__(self, num_steps: int, obs: np.ndarray, action_dims: int, action_dtype: type = np.int64):
        shape = (num_steps, len(obs))
        self.obs = np.zeros((num_steps, *obs.shape), obs.dtype)
        self.actions = np.zeros((*shape, action_dims), action_dtype)
        self.rewards, self.bootstraps = np.zeros((2, *shape), np.float32)  # bootstraps: V(final obs) where truncated
        self.dones = np.zeros(shape, bool)
        self.finished = []  # (step, mean return, mean length) of the episodes that ended, one entry per step

@torch.inference_mode()
def collect_episodes(envs: Environments, agent: nn.Module, rollout: Rollout, rng: np.random.Generator) -> None:
    """Plays the policy and overwrites `rollout` with what happened."""
    policy, value, noise = in_numpy(agent.policy), in_numpy(agent.value), agent.noise(rollout.dones.shape, rng)
    rollout.finished, rollout.bootstraps[:] = [], 0
    for t in range(len(rollout.obs)):
        rollout.obs[t] = envs.obs
        rollout.actions[t] = action = agent.act(policy(envs.obs), noise[t])
        rollout.rewards[t], terminated, truncated, final_obs = envs.step(agent.to_env(action))
        rollout.dones[t] = envs.over
        if envs.over.any():
            cut = truncated & ~terminated
            rollout.bootstraps[t, cut] = value(final_obs[cut])[:, 0]
            rollout.finished.append((t, envs.score[envs.over].mean(), envs.length[envs.over].mean()))
    device, shape = next(agent.parameters()).device, rollout.dones.shape
    obs, actions = (torch.from_numpy(x).to(device).flatten(0, 1) for x in (rollout.obs, rollout.actions))
    logprobs, _, values = (x.numpy(force=True) for x in agent(obs, actions))  # all at once: faster than step by step
    rollout.logprobs, rollout.values = logprobs.reshape(*shape, -1), values.reshape(shape)  # log π_old, V
    rollout.next_value = value(envs.obs)[:, 0]

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
def evaluate_episodes(agent, envs, args: Args, stop: list, video: Path, max_steps: float = 100_000) -> np.ndarray:
    """Raw returns (eval_episodes,), most probable actions, the frozen statistics of `envs`, same seeds every time."""
    env = make_env(args, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    policy, returns = in_numpy(agent.policy), np.zeros(args.eval_episodes)
    with imageio.get_writer(video, fps=30) if args.capture_video else contextlib.nullcontext() as writer:
        for episode, seed in enumerate(np.random.default_rng([args.seed, 0, 4]).integers(2**31, size=len(returns))):
            (obs, _), over, length = env.reset(seed=int(seed)), False, 0
            while not over and not stop and length < max_steps:
                if args.capture_video and episode == 0:
                    writer.append_data(env.render())
                action = agent.act(policy(envs.normalize(obs)[np.newaxis]))
                obs, reward, terminated, truncated, _ = env.step(agent.to_env(action)[0])
                over, length = terminated or truncated, length + 1
                returns[episode] += np.asarray(reward).item()
    env.close()
    return returns

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
    torch.set_num_threads(args.torch_threads or min(torch.get_num_threads(), 8))
    torch._dynamo.config.trace_autograd_ops = True  # lets --compile see the backward pass, too
    step_gradient = torch.compile(gradient, fullgraph=True) if args.compile else gradient
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(args.seed % 2**32)
    # Random streams follow from seed, iteration and a number: a resumed run draws the same, but begins new episodes.
    seeds = np.random.default_rng([args.seed, done, 3]).integers(2**31, size=args.num_envs)
    envs = Environments(args, seeds, saved.get("stats", ()))
    agent = BinnedAgent(envs.obs.shape[1], envs.envs[0].action_space, args.num_bins).to(device)
    optimizer = torch.optim.Adam([parameters := as_vector(agent)], lr=args.learning_rate, eps=1e-5, fused=True)
    rollout = Rollout(args.num_steps, envs.obs, action_dims=len(agent.actions))
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
    evaluate_episodes(agent, envs, args, stop, run / "0.mp4", max_steps=1)  # a trial: what it lacks shows now
    progress = tqdm(range(done, num_iterations + 1), initial=done, total=num_iterations, unit=" steps",
                    unit_scale=batch_size, mininterval=0.1 if sys.stderr.isatty() else 30)  # fmt: skip
    for iteration in progress:
        step, last = iteration * batch_size, iteration == num_iterations
        evaluation_due = last or 0 < args.eval_interval <= step and step % args.eval_interval < batch_size
        checkpoint_due = 0 < args.checkpoint_interval <= step and step % args.checkpoint_interval < batch_size
        if saving := evaluation_due or checkpoint_due or bool(stop):
            writer.flush()  # a checkpoint's curves are on disk before it is
            save(run / "checkpoint.pt", args=asdict(args), iteration=iteration, agent=agent.state_dict(),
                 optimizer=optimizer.state_dict(),
                 stats=[{key: torch.tensor(x) for key, x in vars(stats).items()} for stats in envs.stats])  # fmt: skip
        if evaluation_due and not stop:
            scores = evaluate_episodes(agent, envs, args, stop, run / f"{step}.mp4")
            if not stop:  # logged at step + 1: a resumed run evaluates again and drops this
                writer.add_scalar("eval/episodic_return", scores.mean(), step + 1)
                tqdm.write(f"score at {step} steps: {scores.mean():.2f} ± {scores.std():.2f} ({len(scores)} episodes)")
        if last or saving and stop:
            break

        start_time, remaining = time.time(), 1 - iteration / num_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
        clip_coef = torch.tensor(args.clip_coef * (remaining if args.anneal_clip else 1), device=device)
        act_rng, minibatch_rng, noise_rng = (np.random.default_rng([args.seed, iteration, i]) for i in range(3))
        random.seed(f"{args.seed} {iteration}")  # for environments that draw from global generators
        np.random.seed([args.seed % 2**32, iteration])
        collect_episodes(envs, agent, rollout, act_rng)
        bootstraps, noisy = args.gamma * rollout.bootstraps, add_noise(rollout.rewards, args.reward_noise, noise_rng)
        context = (rollout.values, rollout.dones, rollout.next_value, args.gamma, args.gae_lambda)
        advantages, clean_advantages = (gae(x + bootstraps, *context) for x in (noisy, rollout.rewards))
        returns = advantages + rollout.values
        arrays = (rollout.obs, rollout.actions, rollout.logprobs, advantages, returns)
        batch = [torch.from_numpy(x).to(device).flatten(0, 1) for x in arrays]
        stats = update(agent, optimizer, batch, np.arange(batch_size), clip_coef, args, minibatch_rng, step_gradient)
        share = 1 if args.importance_weighted_reverse else np.exp(rollout.logprobs).mean() / rollout.logprobs.shape[2]
        stats["losses/mean_weight"] = args.alpha + args.beta * abs(args.Z) * share  # mean factor on PPO's gradient
        stats["losses/explained_variance"] = 1 - advantages.var() / (returns.var() + 1e-8)
        stats["advantage/sign_flips_noise"] = (np.sign(advantages) != np.sign(clean_advantages)).mean()
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
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "mujoco==4.0.0", "box2d==2.3.10",
#   "pygame-ce==2.5.8", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "imageio[ffmpeg]==2.38.1"]
# ///
