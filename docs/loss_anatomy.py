"""Check it yourself: what the gradients of the symmetric losses are, on a real batch of a real environment.

    python docs/loss_anatomy.py --env-id CartPole-v1
    python docs/loss_anatomy.py --env-id HalfCheetah-v5 --checkpoint runs/<run>/checkpoint.pt
    python docs/loss_anatomy.py --env-id ALE/Breakout-v5

It trains for a few iterations (or loads a checkpoint of `sppo_atari.py` or `sppo_continuous.py`), plays one more batch,
and updates on it, so that the policy moves away from π_old and samples get clipped. Then it takes, in float64 and for
256 of the steps, the gradient of each symmetric loss, and prints for every layer its relative distance
‖gradient − prediction‖ / ‖prediction‖ from what docs/symmetric_loss.md predicts, and from the mean-weight control.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sppo_atari
import sppo_continuous
from ppo_baseline import ATARI_IDS, ppo_loss
from sa2c_atari import symmetric_a2c_loss


@dataclass
class Args:
    """Gradients of the symmetric losses on a real batch, against their predicted reweighting."""

    env_id: str = "CartPole-v1"  # an environment of `sppo_atari.py` or of `sppo_continuous.py`
    checkpoint: Path | None = None  # `checkpoint.pt` of a run of that script; None: train first
    iterations: int = 3  # iterations of training if there is no checkpoint
    updates: int = 1  # updates on the batch before its gradients are taken
    alpha: float = 0.5  # α
    beta: float | None = None  # β; None: the script's own default
    Z: float = -1.0  # Z
    flip: float = 0.3  # probability that an advantage changes its sign, for the expected gradient under such noise
    seed: int = 1  # seed of everything


class Trainer:
    """The script's agent, environments and functions."""

    def __init__(self, env_id: str, checkpoint: Path | None, seed: int):
        torch.manual_seed(seed)
        self.atari = env_id in ATARI_IDS
        self.script = sppo_atari if self.atari else sppo_continuous
        self.args = args = self.script.Args(env_id=env_id, seed=seed)
        self.script.validate(args)
        self.rng = np.random.default_rng(seed)
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint else {}
        seeds = self.rng.integers(2**31, size=args.num_envs)
        if self.atari:
            self.envs, dimensions = sppo_atari.Games(args, seeds), 1
            self.agent = sppo_atari.AtariAgent(self.envs.num_actions)
            self.collect = sppo_atari.collect_games
        else:
            self.envs = sppo_continuous.Environments(args, seeds, saved.get("stats", ()))
            space = self.envs.envs[0].action_space
            self.agent = sppo_continuous.BinnedAgent(self.envs.obs.shape[1], space, args.num_bins)
            self.collect, dimensions = sppo_continuous.collect_episodes, len(self.agent.actions)
        self.rollout = self.script.Rollout(args.num_steps, self.envs.obs, dimensions)
        self.optimizer = torch.optim.Adam([self.script.as_vector(self.agent)], lr=args.learning_rate, eps=1e-5)
        self.agent.load_state_dict(saved.get("agent", self.agent.state_dict()))

    def play(self) -> tuple[list[torch.Tensor], np.ndarray]:
        """A batch (obs, actions, log π_old, advantages, returns); its samples, without FIRE pressed for the learner."""
        rollout, args = self.rollout, self.args
        self.collect(self.envs, self.agent, rollout, self.rng)
        context = rollout.values, rollout.dones, rollout.next_value, args.gamma, args.gae_lambda
        advantages = self.script.gae(rollout.rewards + args.gamma * rollout.bootstraps, *context)
        arrays = (rollout.obs, rollout.actions, rollout.logprobs, advantages, advantages + rollout.values)
        samples = np.flatnonzero(rollout.valid if self.atari else np.ones_like(rollout.dones))
        return [torch.from_numpy(x).flatten(0, 1).clone() for x in arrays], samples

    def update(self, batch: list[torch.Tensor], samples: np.ndarray) -> None:
        filled = np.append(samples, self.rng.choice(samples, len(batch[0]) - len(samples)))  # as in the script
        clip_coef = torch.tensor(self.args.clip_coef)
        self.script.update(self.agent, self.optimizer, batch, filled, clip_coef, self.args, self.rng)


def gradients(loss: torch.Tensor, agent: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By layer; the value's own have none and are left out."""
    names, parameters = zip(*agent.named_parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(names, grads) if grad is not None}


def cosine(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
    x, y = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (x, y))
    return torch.nn.functional.cosine_similarity(x, y, dim=0).item()


def main(args: Args) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(args.env_id, args.checkpoint, args.seed)
    for _ in range(0 if args.checkpoint else args.iterations):
        trainer.update(*trainer.play())
    batch, samples = trainer.play()
    for _ in range(args.updates):
        trainer.update(batch, samples)

    chosen = torch.from_numpy(trainer.rng.choice(samples, 256, replace=False))
    in_float64 = (x[chosen].double() if x.is_floating_point() else x[chosen] for x in batch)
    obs, actions, old_logprob, advantages, _ = in_float64
    agent = trainer.agent.double()
    logprob, _, _ = agent(obs, actions)
    A, D = (advantages - advantages.mean()) / advantages.std(), logprob.shape[1]

    alpha, Z, clip_coef = args.alpha, args.Z, trainer.args.clip_coef
    beta = trainer.args.beta if args.beta is None else args.beta
    symmetric_ppo_loss, coefficients = trainer.script.symmetric_ppo_loss, (alpha, beta, Z)
    ratio = (logprob - old_logprob).sum(1).exp().detach()
    m = ~((A > 0) & (ratio > 1 + clip_coef) | (A < 0) & (ratio < 1 - clip_coef))

    # What the three symmetric losses are measured against: PPO's and A2C's own loss, and the predicted reweighting.
    joint_logprob = logprob.sum(1)
    old_pi, pi, joint_pi = old_logprob.exp(), logprob.detach().exp(), joint_logprob.detach().exp()
    forward_ppo = ppo_loss(logprob, old_logprob, A, clip_coef)
    forward_a2c = -(advantages * joint_logprob).mean()
    factor = alpha + beta * abs(Z)
    plain_weight = alpha + beta * abs(Z) * old_pi / D  # by action dimension; at r = 1
    a2c_weight = alpha + beta * abs(Z) * joint_pi
    if D == 1:
        predicted_plain = ppo_loss(logprob, old_logprob, A * plain_weight.squeeze(1), clip_coef)
    else:
        coefficient = (m * A).unsqueeze(1) * (alpha * ratio.unsqueeze(1) + beta * abs(Z) * pi / D)
        predicted_plain = -(coefficient * logprob).sum(1).mean()
    predicted_a2c = -(advantages * a2c_weight * joint_logprob).mean()

    released_loss, _, released_reverse = symmetric_ppo_loss(logprob, old_logprob, A, *coefficients, clip_coef)
    plain_loss, _, plain_reverse = symmetric_ppo_loss(logprob, old_logprob, A, *coefficients, clip_coef, False)
    sa2c_loss, _, sa2c_reverse = symmetric_a2c_loss(joint_logprob, advantages, *coefficients)
    mean_weights = factor, plain_weight.mean().item(), a2c_weight.mean().item()
    symmetric = [gradients(loss, agent) for loss in (released_loss, plain_loss, sa2c_loss)]
    predicted = [gradients(loss, agent) for loss in (factor * forward_ppo, predicted_plain, predicted_a2c)]
    unweighted = [gradients(loss, agent) for loss in (forward_ppo, forward_ppo, forward_a2c)]

    def row(name: str, cells) -> None:
        print(f"{name:<34}" + "".join(f"{cell:>18}" for cell in cells))

    def distance(x: torch.Tensor, y: torch.Tensor) -> str:
        return f"{((x - y).norm() / y.norm()).item():.1e}"

    def between(weight: torch.Tensor) -> str:
        return "{:.3g} to {:.3g}".format(*np.quantile(weight, (0.05, 0.95)))

    print(f"{args.env_id}: 256 steps, D = {D}, ε = {clip_coef}, {1 - m.double().mean():.0%} of them clipped (m = 0)")
    print(f"α = {alpha}, β = {beta}, Z = {Z}: α + β|Z| = {factor}\n")
    row("", ("SPPO, released", "SPPO, plain", "SA2C"))
    row("policy coefficient (5 % to 95 %)", (f"{factor}", between(plain_weight), between(a2c_weight)))
    row("mean weight", (f"{weight:.4g}" for weight in mean_weights))
    row("value of the forward term", (f"{loss.item():.3g}" for loss in (forward_ppo, forward_ppo, forward_a2c)))
    row("value of the reverse term", (f"{loss.item():.3g}" for loss in (released_reverse, plain_reverse, sa2c_reverse)))
    row("cosine with unweighted gradient", (f"{cosine(x, y):.3f}" for x, y in zip(symmetric, unweighted)))
    print("\nrelative distance from the predicted gradient")
    for name in symmetric[0]:
        row(f"  {name}", (distance(x[name], y[name]) for x, y in zip(symmetric, predicted)))
    print("\nrelative distance from the control: the unweighted gradient times the mean weight")
    for name in symmetric[0]:
        row(f"  {name}", (distance(x[name], w * y[name]) for x, y, w in zip(symmetric, unweighted, mean_weights)))

    # Independent flips, and a loss that is a mean over samples: on average (1 − q) ∇L(A) + q ∇L(−A).
    clean, flipped = unweighted[0], gradients(ppo_loss(logprob, old_logprob, -A, clip_coef), agent)
    expected = {name: (1 - args.flip) * clean[name] + args.flip * flipped[name] for name in clean}
    print(f"\nnormalised advantages change sign with probability {args.flip}: PPO's expected gradient has cosine")
    print(f"{cosine(expected, clean):.3f} with the clean one (1 as long as nothing is clipped)")


if __name__ == "__main__":
    args = tyro.cli(Args)
    try:
        main(args)
    except (ValueError, KeyError, RuntimeError, FileNotFoundError, gym.error.Error) as error:
        sys.exit(f"loss_anatomy.py: {error}")
