"""SPPO as a class of Stable-Baselines3: PPO with the symmetric loss of `sppo_continuous.py`.

`SPPO` takes all that SB3's `PPO` takes, and α, β, Z. Callbacks, wrappers, `save` and `load` are
SB3's. With α = 1 and β = 0 it trains exactly as `PPO` does. Actions must have probabilities, so a
`Box` of actions needs the wrapper `Bins`. Left out: a clipped value loss and `target_kl`.

    python engines/sb3_sppo.py --env-id CartPole-v1 --total-timesteps 50000
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the script is
from sppo_continuous import symmetric_ppo_loss


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # the environment; a `Box` of actions is cut into bins
    seed: int = 1  # seed of weights, environments, actions and minibatches
    total_timesteps: int = 50_000  # environment steps; the last batch is played to its end
    alpha: float = 0.5  # weight of the forward (PPO) term
    beta: float = 20.0  # weight of the reverse term


class Bins(gym.ActionWrapper):
    """Cuts each dimension of a bounded `Box` into evenly spaced actions, ends included."""

    def __init__(self, env: gym.Env, num_bins: int = 11):
        super().__init__(env)
        self.box = env.action_space
        self.values = np.linspace(self.box.low.ravel(), self.box.high.ravel(), num_bins)
        self.action_space = gym.spaces.MultiDiscrete([num_bins] * self.box.low.size)

    def action(self, bins: np.ndarray) -> np.ndarray:
        """The action in the `Box` for the bins (D,) of its D dimensions."""
        action = self.values[bins, np.arange(len(bins))]
        return action.reshape(self.box.shape).astype(self.box.dtype)


class SPPO(PPO):
    """PPO with the policy loss α · forward + β · reverse."""

    def __init__(
        self, *args, alpha=0.5, beta=20.0, Z=-1.0, importance_weighted_reverse=True, **kwargs
    ):
        self.alpha = alpha
        self.beta = beta
        self.Z = Z
        self.importance_weighted_reverse = importance_weighted_reverse
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        """Raises ValueError for what SPPO does not do. `load` comes by here, too."""
        super()._setup_model()
        if isinstance(self.action_space, gym.spaces.Box):
            raise ValueError("SPPO needs discrete actions: wrap the environment in Bins")
        if not self.importance_weighted_reverse and self.action_space.shape:
            raise ValueError("the plain reverse term needs actions of one dimension")
        if self.clip_range_vf is not None or self.target_kl is not None:
            raise ValueError("SPPO has no clip_range_vf and no target_kl")

    def minibatch_loss(self, minibatch) -> torch.Tensor:
        """The loss of a minibatch of SB3's rollout buffer, whose terms are logged."""
        obs, actions, _, old_logprob, advantage, returns = minibatch[:6]
        if not self.action_space.shape:  # actions of one dimension
            actions = actions.long().flatten()
        value, logprob, entropy = self.policy.evaluate_actions(obs, actions)
        if self.normalize_advantage:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        joint = (logprob.unsqueeze(1), old_logprob.unsqueeze(1))  # (batch, 1), one column for all
        clip_range = self.clip_range(self._current_progress_remaining)
        loss_terms = symmetric_ppo_loss(*joint, advantage, clip_range, self)  # self: its α, β, Z
        policy_loss, forward_loss, reverse_loss = loss_terms
        value_loss = torch.nn.functional.mse_loss(value.flatten(), returns)
        self.logger.record_mean("train/policy_gradient_loss", policy_loss.item())
        self.logger.record_mean("train/forward_loss", forward_loss.item())
        self.logger.record_mean("train/reverse_loss", reverse_loss.item())
        self.logger.record_mean("train/value_loss", value_loss.item())
        self.logger.record_mean("train/entropy_loss", -entropy.mean().item())
        return policy_loss - self.ent_coef * entropy.mean() + self.vf_coef * value_loss

    def train(self) -> None:
        """Learns from the rollout. In `PPO.train` the loss cannot be exchanged."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(self.n_epochs):
            for minibatch in self.rollout_buffer.get(self.batch_size):
                loss = self.minibatch_loss(minibatch)
                self.policy.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()


def main(args: Args) -> None:
    box = isinstance(gym.make(args.env_id).action_space, gym.spaces.Box)
    env = make_vec_env(args.env_id, seed=args.seed, wrapper_class=Bins if box else None)
    env = VecNormalize(env)
    model = SPPO("MlpPolicy", env, alpha=args.alpha, beta=args.beta, seed=args.seed, device="cpu")
    model.learn(args.total_timesteps)

    env.training = False  # from here on the statistics are frozen and rewards are raw
    env.norm_reward = False
    mean, std = evaluate_policy(model, env, n_eval_episodes=10)
    print(f"score at {model.num_timesteps} steps: {mean:.2f} +- {std:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
