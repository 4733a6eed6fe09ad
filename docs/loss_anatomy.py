"""Check it yourself: the gradients of the symmetric losses, on a real batch of a real environment.

    python docs/loss_anatomy.py --env-id CartPole-v1
    python docs/loss_anatomy.py --env-id HalfCheetah-v5 --checkpoint runs/<run>/checkpoint.pt
    python docs/loss_anatomy.py --env-id ALE/Breakout-v5 --iterations 8 --updates 5

`sppo_atari.py` or `sppo_continuous.py` trains for a few iterations, or goes on from a checkpoint.
The batch after that is the one that is looked at: the script updates on it, so that the policy
moves away from π_old and samples get clipped. Then the gradient of each symmetric loss is taken, in
float64 and for 256 of the steps. For every layer its relative distance
‖gradient − prediction‖ / ‖prediction‖ is printed, from what docs/symmetric_loss.md predicts, and
from the mean-weight control.
"""

import contextlib
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.distributions import Categorical

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sppo_atari
import sppo_continuous
from sa2c_continuous import symmetric_a2c_loss

Gradients = dict[str, torch.Tensor]  # by layer


@dataclass
class Args:
    """Gradients of the symmetric losses on a real batch, against their predicted reweighting."""

    env_id: str = "CartPole-v1"  # an environment of `sppo_atari.py` or of `sppo_continuous.py`
    checkpoint: Path | None = None  # `checkpoint.pt` of a run of that script; None: train first
    iterations: int = 3  # iterations of training if there is no checkpoint
    updates: int = 1  # updates on the batch before its gradients are taken
    alpha: float = 0.5  # weight of the forward term
    beta: float | None = None  # weight of the reverse term; None: the script's own default
    Z: float = -1.0  # stands in for log 0
    flip: float = 0.3  # probability of a changed sign, for the expected gradient under such noise
    seed: int = 1  # seed of everything


class Seen(Exception):
    """Leaves the script's `main`, with the agent and the batch."""


def agent_and_batch(script, args: Args) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """The script's own `main` plays and learns; from its last batch `updates` times. The batch is
    (obs, actions, log π_old, advantages, returns)."""
    checkpoint = None
    iterations = args.iterations
    flags = script.Args(env_id=args.env_id, seed=args.seed, torch_threads=1)
    if args.checkpoint:
        checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        flags = script.Args(**checkpoint["args"])
        iterations = 0
    flags = replace(flags, resume=None, eval_interval=0, total_timesteps=10**9)  # anneals nothing
    if args.env_id.startswith("ALE/"):
        flags = replace(flags, cuda=False)
    script.validate(flags)
    update = script.update
    seen = []

    def update_and_look(agent, optimizer, batch, *rest):
        seen.append(batch)
        last = len(seen) > iterations
        for _ in range(args.updates if last else 1):
            stats = update(agent, optimizer, batch, *rest)
        if last:
            raise Seen(agent, batch)
        return stats

    script.update = update_and_look
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(sys.stderr):
            try:
                script.main(flags, checkpoint)
            except Seen as end:
                return end.args


def log_probabilities(agent, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Of the actions, in float64: (batch, D), a column for each action dimension."""
    if isinstance(agent, sppo_atari.AtariAgent):
        features = agent.features(obs.double() / 255)
        return Categorical(logits=agent.policy(features)).log_prob(actions).unsqueeze(1)
    return agent(obs, actions)[0]


@dataclass
class Sample:
    """Steps of the batch, in float64. `logprob`, `old_logprob`: (batch, D); the rest: (batch,)."""

    logprob: torch.Tensor
    old_logprob: torch.Tensor
    raw_advantage: torch.Tensor
    clip_coef: float

    def __post_init__(self):
        self.D = self.logprob.shape[1]
        self.ratio = (self.logprob - self.old_logprob).sum(1).exp()
        self.pi = self.logprob.detach().exp()
        self.old_pi = self.old_logprob.exp()
        self.A = (self.raw_advantage - self.raw_advantage.mean()) / self.raw_advantage.std()
        too_likely = (self.A > 0) & (self.ratio > 1 + self.clip_coef)
        too_unlikely = (self.A < 0) & (self.ratio < 1 - self.clip_coef)
        self.m = ~(too_likely | too_unlikely)  # where PPO's objective has a gradient

    def ppo_loss(self, advantage: torch.Tensor) -> torch.Tensor:
        clipped = self.ratio.clamp(1 - self.clip_coef, 1 + self.clip_coef)
        return -torch.min(self.ratio * advantage, clipped * advantage).mean()


@dataclass
class Compared:
    """A symmetric loss beside what is said of it."""

    name: str
    weight: torch.Tensor  # the predicted factors on the forward term's policy gradient
    forward: torch.Tensor  # PPO's or A2C's own loss
    reverse: torch.Tensor  # the reverse term
    loss: torch.Tensor
    predicted: torch.Tensor  # a loss with the predicted gradient

    @property
    def coefficient(self) -> str:
        """5 % and 95 % of the weights."""
        if self.weight.dim() == 0:
            return f"{self.weight.item()}"
        return "{:.3g} to {:.3g}".format(*np.quantile(self.weight, (0.05, 0.95)))


def released_sppo(script, sample: Sample, args: Args) -> Compared:
    forward = sample.ppo_loss(sample.A)
    factor = torch.tensor(args.alpha + args.beta * abs(args.Z), dtype=torch.float64)
    loss, reverse = script_loss(script, sample, args, importance_weighted=True)
    return Compared("SPPO, released", factor, forward, reverse, loss, factor * forward)


def plain_sppo(script, sample: Sample, args: Args) -> Compared:
    """Its weights are those at r = 1, by action dimension."""
    size = args.beta * abs(args.Z) / sample.D
    weight = args.alpha + size * sample.old_pi
    if sample.D == 1:
        predicted = sample.ppo_loss(sample.A * weight.squeeze(1))
    else:
        coefficient = args.alpha * sample.ratio.detach().unsqueeze(1) + size * sample.pi
        masked_advantage = (sample.m * sample.A).unsqueeze(1)
        predicted = -(masked_advantage * coefficient * sample.logprob).sum(1).mean()
    loss, reverse = script_loss(script, sample, args, importance_weighted=False)
    return Compared("SPPO, plain", weight, sample.ppo_loss(sample.A), reverse, loss, predicted)


def sa2c(sample: Sample, args: Args) -> Compared:
    """For a game, which has D = 1, this is the loss of `sa2c_atari.py`, too."""
    advantage = sample.raw_advantage.unsqueeze(1)
    weight = args.alpha + args.beta * abs(args.Z) * sample.pi / sample.D
    predicted = -(advantage * weight * sample.logprob).sum(1).mean()
    loss, forward, reverse = symmetric_a2c_loss(sample.logprob, sample.raw_advantage, args)
    return Compared("SA2C", weight, forward, reverse, loss, predicted)


def script_loss(script, sample: Sample, args: Args, importance_weighted: bool):
    """The script's own loss, and its reverse term."""
    logprobs = (sample.logprob, sample.old_logprob)
    if script is sppo_atari:
        logprobs = (x.squeeze(1) for x in logprobs)
    coefficients = dict(alpha=args.alpha, beta=args.beta, Z=args.Z)
    flags = script.Args(**coefficients, importance_weighted_reverse=importance_weighted)
    loss, _, reverse = script.symmetric_ppo_loss(*logprobs, sample.A, sample.clip_coef, flags)
    return loss, reverse


def gradients(loss: torch.Tensor, agent: torch.nn.Module) -> Gradients:
    """By layer; the value's own have none and are left out."""
    names, parameters = zip(*agent.named_parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(names, grads) if grad is not None}


def cosine(x: Gradients, y: Gradients) -> float:
    x, y = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (x, y))
    return torch.nn.functional.cosine_similarity(x, y, dim=0).item()


def distance(x: torch.Tensor, y: torch.Tensor) -> str:
    return f"{((x - y).norm() / y.norm()).item():.1e}"


def print_row(name: str, cells) -> None:
    print(f"{name:<34}" + "".join(f"{cell:>18}" for cell in cells))


def print_tables(losses: list[Compared], agent: torch.nn.Module) -> None:
    """A column for each loss."""
    found = [gradients(x.loss, agent) for x in losses]
    predicted = [gradients(x.predicted, agent) for x in losses]
    unweighted = [gradients(x.forward, agent) for x in losses]
    mean_weights = [x.weight.mean().item() for x in losses]
    cosines = map(cosine, found, unweighted)

    print_row("", (x.name for x in losses))
    print_row("policy coefficient (5 % to 95 %)", (x.coefficient for x in losses))
    print_row("mean weight", (f"{weight:.4g}" for weight in mean_weights))
    print_row("value of the forward term", (f"{x.forward.item():.3g}" for x in losses))
    print_row("value of the reverse term", (f"{x.reverse.item():.3g}" for x in losses))
    print_row("cosine with unweighted gradient", (f"{x:.3f}" for x in cosines))
    print("\nrelative distance from the predicted gradient")
    for name in found[0]:
        print_row(f"  {name}", (distance(x[name], y[name]) for x, y in zip(found, predicted)))
    print("\nrelative distance from the control: the unweighted gradient times the mean weight")
    for name in found[0]:
        controls = (weight * y[name] for weight, y in zip(mean_weights, unweighted))
        print_row(f"  {name}", (distance(x[name], y) for x, y in zip(found, controls)))


def print_noise(sample: Sample, agent: torch.nn.Module, flip: float) -> None:
    """Independent flips, and a loss that is a mean over samples: (1 - q) ∇L(A) + q ∇L(-A)."""
    clean = gradients(sample.ppo_loss(sample.A), agent)
    flipped = gradients(sample.ppo_loss(-sample.A), agent)
    expected = {name: (1 - flip) * clean[name] + flip * flipped[name] for name in clean}
    print(f"\nnormalised advantages change sign with probability {flip}: ", end="")
    print("PPO's expected gradient has cosine")
    print(f"{cosine(expected, clean):.3f} with the clean one (1 as long as nothing is clipped)")


def main(args: Args) -> None:
    game = args.env_id.startswith("ALE/")
    script = sppo_atari if game else sppo_continuous
    if args.beta is None:
        args.beta = script.Args.beta
    agent, batch = agent_and_batch(script, args)
    agent = agent.double()
    rng = np.random.default_rng(args.seed)
    rows = torch.from_numpy(rng.choice(len(batch[0]), 256, replace=False))
    in_float64 = (x.double() if x.is_floating_point() else x for x in batch)
    obs, actions, old_logprob, advantage, _ = (x[rows] for x in in_float64)
    logprob = log_probabilities(agent, obs, actions)
    sample = Sample(logprob, old_logprob.view_as(logprob), advantage, script.Args.clip_coef)

    clipped = 1 - sample.m.double().mean()
    factor = args.alpha + args.beta * abs(args.Z)
    where = f"{args.env_id}: 256 steps, D = {sample.D}, clip range {sample.clip_coef}"
    print(f"{where}, {clipped:.0%} of them clipped (m = 0)")
    print(f"alpha = {args.alpha}, beta = {args.beta}, Z = {args.Z}: alpha + beta |Z| = {factor}\n")
    losses = [
        released_sppo(script, sample, args),
        plain_sppo(script, sample, args),
        sa2c(sample, args),
    ]
    print_tables(losses, agent)
    print_noise(sample, agent, args.flip)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, KeyError, RuntimeError, FileNotFoundError, gym.error.Error) as error:
        sys.exit(f"loss_anatomy.py: {error}")
