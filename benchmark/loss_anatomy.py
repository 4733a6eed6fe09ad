"""Check it yourself: what the gradients of the symmetric losses are, on a real batch of a real environment.

    python benchmark/loss_anatomy.py --env-id CartPole-v1
    python benchmark/loss_anatomy.py --env-id HalfCheetah-v5 --checkpoint runs/<run>/model.pt
    python benchmark/loss_anatomy.py --env-id ALE/Breakout-v5

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
from ppo_baseline import is_atari, ppo_loss
from sa2c_atari import symmetric_a2c_loss


@dataclass
class Args:
    """Gradients of the symmetric losses on a real batch, against their predicted reweighting."""

    env_id: str = "CartPole-v1"
    """an environment of `sppo_atari.py` or of `sppo_continuous.py`"""
    checkpoint: Path | None = None
    """`model.pt` of a run of that script; None: train first"""
    iterations: int = 3
    """iterations of training if there is no checkpoint"""
    updates: int = 1
    """updates on the batch before its gradients are taken"""
    alpha: float = 0.5
    """α"""
    beta: float | None = None
    """β; None: the script's own default"""
    Z: float = -1.0
    """Z"""
    flip: float = 0.3
    """probability that an advantage changes its sign, for the expected gradient under such noise"""
    seed: int = 1
    """seed of everything"""


class Trainer:
    """The script's agent, environments and functions."""

    def __init__(self, env_id: str, checkpoint: Path | None, seed: int):
        torch.manual_seed(seed)
        self.atari = is_atari(env_id)
        self.script = sppo_atari if self.atari else sppo_continuous
        self.args = self.script.Args(env_id=env_id, seed=seed)
        self.script.validate(self.args)
        self.rng, self.actions_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        model = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint else {}
        device, sequence = torch.device("cpu"), np.random.SeedSequence(seed)
        num_steps, num_envs = self.args.num_steps, self.args.num_envs
        if self.atari:
            self.envs = (sppo_atari.Games(env_id, sppo_atari.game_seeds(sequence, num_envs), 0.0),)
            self.agent = sppo_atari.AtariAgent(self.envs[0].num_actions)
            self.rollout = sppo_atari.Rollout(num_steps, num_envs, device)
            self.actions_rng, parameters = torch.Generator().manual_seed(seed), self.agent.parameters()
        else:
            envs = sppo_continuous.Environments(env_id, sequence.generate_state(num_envs), self.args.gamma)
            if model:  # the statistics that the policy was trained with, as if of a million observations
                stats, count = envs.obs_stats, 10**6
                stats.count, stats.mean = count, model["obs_stats"]["mean"].numpy()
                stats.sum_of_squares = count * model["obs_stats"]["std"].numpy() ** 2
                envs.obs[:] = [envs.normalize(env.reset()[0]) for env in envs.envs]
            to_action = sppo_continuous.BinnedActions(envs.action_space, self.args.num_bins)
            self.envs = envs, to_action
            self.agent = sppo_continuous.BinnedAgent(envs.obs.shape[1], to_action.values.shape)
            sizes = num_steps, num_envs, envs.obs.shape[1], len(to_action.values)
            self.rollout = sppo_continuous.Rollout(*sizes)
            parameters = [sppo_continuous.as_vector(self.agent)]
        if model:
            self.agent.load_state_dict(model["agent"])
        self.optimizer = torch.optim.Adam(parameters, lr=self.args.learning_rate, eps=1e-5)

    def play(self):
        rollout, args = self.rollout, self.args
        self.script.collect(*self.envs, self.agent, rollout, self.actions_rng)
        rewards, values = rollout.rewards + args.gamma * rollout.bootstraps, rollout.values.numpy()
        context = values, rollout.dones, rollout.next_value.numpy(), args.gamma, args.gae_lambda
        advantages = self.script.gae(rewards, *context)
        fields = [rollout.obs, rollout.actions, rollout.logprobs, advantages, advantages + values]
        if self.atari:
            fields.append(rollout.valid.astype(np.float32))
        return self.script.Batch(*(torch.as_tensor(field).flatten(0, 1).clone() for field in fields))

    def update(self, batch) -> None:
        self.script.update(self.agent, self.optimizer, batch, self.args.clip_coef, self.args, self.rng)


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
        trainer.update(trainer.play())
    batch = trainer.play()
    for _ in range(args.updates):
        trainer.update(batch)

    # One minibatch in float64; on Atari without the steps where FIRE was pressed for the learner.
    usable = np.flatnonzero(batch.weight.numpy()) if trainer.atari else np.arange(len(batch.obs))
    chosen = torch.from_numpy(trainer.rng.choice(usable, 256, replace=False))
    mb = type(batch)(*(x[chosen].double() if x.is_floating_point() else x[chosen] for x in batch))
    agent = trainer.agent.double()
    logprob, _, _ = agent(mb.obs, mb.actions)
    old_logprob, D = mb.logprobs, logprob.shape[1]
    A = (mb.advantages - mb.advantages.mean()) / mb.advantages.std()

    alpha, Z, clip_coef = args.alpha, args.Z, trainer.args.clip_coef
    beta = trainer.args.beta if args.beta is None else args.beta
    symmetric_ppo_loss, coefficients = trainer.script.symmetric_ppo_loss, (alpha, beta, Z)
    ratio = (logprob - old_logprob).sum(1).exp().detach()
    m = ~((A > 0) & (ratio > 1 + clip_coef) | (A < 0) & (ratio < 1 - clip_coef))

    # What the three symmetric losses are measured against: PPO's and A2C's own loss, and the predicted reweighting.
    joint_logprob = logprob.sum(1)
    old_pi, pi, joint_pi = old_logprob.exp(), logprob.detach().exp(), joint_logprob.detach().exp()
    forward_ppo = ppo_loss(logprob, old_logprob, A, clip_coef)
    forward_a2c = -(mb.advantages * joint_logprob).mean()
    factor = alpha + beta * abs(Z)
    plain_weight = alpha + beta * abs(Z) * old_pi / D  # by action dimension; at r = 1
    a2c_weight = alpha + beta * abs(Z) * joint_pi
    if D == 1:
        predicted_plain = ppo_loss(logprob, old_logprob, A * plain_weight.squeeze(1), clip_coef)
    else:
        coefficient = (m * A).unsqueeze(1) * (alpha * ratio.unsqueeze(1) + beta * abs(Z) * pi / D)
        predicted_plain = -(coefficient * logprob).sum(1).mean()
    predicted_a2c = -(mb.advantages * a2c_weight * joint_logprob).mean()

    released_loss, _, released_reverse = symmetric_ppo_loss(logprob, old_logprob, A, *coefficients, clip_coef)
    plain_loss, _, plain_reverse = symmetric_ppo_loss(logprob, old_logprob, A, *coefficients, clip_coef, False)
    sa2c_loss, _, sa2c_reverse = symmetric_a2c_loss(joint_logprob, mb.advantages, *coefficients)
    mean_weights = [
        trainer.script.mean_weight(old_logprob, *coefficients, True),
        trainer.script.mean_weight(old_logprob, *coefficients, False),
        a2c_weight.mean().item(),
    ]
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
