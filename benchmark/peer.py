"""One run of a peer, in a process of its own, for `speed.py`: prints its steps per second.

Whole iterations are timed, from one rollout's start to the next, without the first fifth.
"""

import importlib
import time
from dataclasses import dataclass

import ale_py
import gymnasium as gym
import reference
import torch
import tyro
from stable_baselines3.common.callbacks import BaseCallback


@dataclass
class Args:
    """Trains with Stable-Baselines3 or sbx."""

    library: str  # the module: stable_baselines3 or sbx
    method: str  # ppo or a2c
    env_id: str  # as Stable-Baselines3 has it, so BreakoutNoFrameskip-v4
    num_envs: int
    num_steps: int
    num_minibatches: int
    total_timesteps: int
    seed: int
    torch_threads: int
    cuda: bool = False


class Clock(BaseCallback):
    """Notes when each iteration begins."""

    def __init__(self):
        super().__init__()
        self.points = []

    def _on_rollout_start(self) -> None:
        self.points.append((self.num_timesteps, time.time()))

    def _on_step(self) -> bool:
        return True


def main(args: Args) -> None:
    gym.register_envs(ale_py)
    torch.set_num_threads(args.torch_threads)
    settings = dict(n_steps=args.num_steps, device="cuda" if args.cuda else "cpu")
    if args.method == "ppo":
        settings["batch_size"] = args.num_envs * args.num_steps // args.num_minibatches
    algorithm = getattr(importlib.import_module(args.library), args.method.upper())
    model = reference.make_model(algorithm, args.env_id, args.seed, args.num_envs, **settings)
    clock = Clock()
    model.learn(args.total_timesteps, callback=clock)
    first_step, first_time = clock.points[len(clock.points) // 5]
    last_step, last_time = clock.points[-1]
    print((last_step - first_step) / (last_time - first_time))


if __name__ == "__main__":
    main(tyro.cli(Args))
