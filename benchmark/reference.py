"""Scores of Stable-Baselines3 and of the uniform policy: what our scripts are measured against.

    python benchmark/reference.py ppo Hopper-v5 1 299008               # PPO with VecNormalize
    python benchmark/reference.py a2c BoxingNoFrameskip-v4 1 200000    # A2C, usual Atari wrappers
    python benchmark/reference.py uniform Hopper-v5 1 0 --episodes 100

Each call trains one seed with the settings our scripts have by default, plays `--episodes` episodes
(raw return; the most probable action in continuous control, sampled actions on Atari) and appends
one line to `benchmark/results/reference.csv`. A line that is already there is not computed again.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from score import append, read
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize, VecTransposeImage

RESULTS = Path(__file__).parent / "results" / "reference.csv"
FIELDS = ["method", "env_id", "seed", "steps", "episodes", "mean", "std", "train_seconds"]
ATARI_PPO = dict(
    n_steps=128,
    batch_size=256,
    n_epochs=4,
    learning_rate=lambda left: 2.5e-4 * left,
    clip_range=lambda left: 0.1 * left,
    ent_coef=0.01,
    vf_coef=0.5,
)
ATARI_A2C = dict(
    policy_kwargs=dict(optimizer_class=RMSpropTFLike, optimizer_kwargs=dict(eps=1e-5)),
    ent_coef=0.01,
    vf_coef=0.25,
)
WHOLE_GAMES = dict(terminal_on_life_loss=False, clip_reward=False)
ALGORITHMS = dict(ppo=PPO, a2c=A2C)


def make_model(algorithm, env_id: str, seed: int, num_envs: int | None = None, **changes):
    """The learner, untrained, with the settings our scripts have by default, and `changes` to them.
    `algorithm`: Stable-Baselines3's PPO or A2C, or a class with the same interface."""
    changes = dict(device="cpu", seed=seed) | changes
    if "NoFrameskip" in env_id:
        num_envs = num_envs or (16 if algorithm is A2C else 8)
        envs = VecFrameStack(make_atari_env(env_id, num_envs, seed=seed), 4)
        settings = ATARI_A2C if algorithm is A2C else ATARI_PPO
        return algorithm("CnnPolicy", envs, **(settings | changes))
    envs = VecNormalize(make_vec_env(env_id, num_envs or 1, seed=seed), gamma=0.99)
    return algorithm("MlpPolicy", envs, **changes)  # the class's defaults are the settings


def play_uniform(env_id: str, seed: int, episodes: int) -> list[float]:
    """Returns of the policy that draws every action uniformly."""
    if "NoFrameskip" in env_id:
        env = make_atari_env(env_id, 1, seed=seed, wrapper_kwargs=WHOLE_GAMES).envs[0]
    else:
        env = gym.make(env_id)
    env.action_space.seed(seed)
    returns = []
    for episode in range(episodes):
        env.reset(seed=seed if episode == 0 else None)
        total = 0.0
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total += float(reward)
            done = terminated or truncated
        returns.append(total)
    return returns


@dataclass
class Args:
    """Trains a peer, or plays at random, and records the score."""

    method: tyro.conf.Positional[Literal["ppo", "a2c", "uniform"]]
    env_id: tyro.conf.Positional[str]
    seed: tyro.conf.Positional[int]
    steps: tyro.conf.Positional[int]
    episodes: int = 20  # of the evaluation
    torch_threads: int = 1


def train_and_play(args: Args) -> tuple[list[float], float]:
    """Returns of the trained policy's evaluation episodes, and the seconds that training took."""
    model = make_model(ALGORITHMS[args.method], args.env_id, args.seed)
    start = time.time()
    model.learn(args.steps)
    seconds = time.time() - start
    seed = 10_000 + args.seed
    if "NoFrameskip" in args.env_id:
        # Whole games, raw score: the wrappers' lost life and clipped reward are for training only.
        envs = make_atari_env(args.env_id, 1, seed=seed, wrapper_kwargs=WHOLE_GAMES)
        envs = VecTransposeImage(VecFrameStack(envs, 4))
    else:
        envs = make_vec_env(args.env_id, 1, seed=seed)
        envs = VecNormalize(envs, training=False, norm_reward=False)
        envs.obs_rms = model.env.obs_rms
    deterministic = "NoFrameskip" not in args.env_id
    returns, _ = evaluate_policy(
        model, envs, args.episodes, deterministic, return_episode_rewards=True
    )
    return returns, seconds


def main(args: Args) -> None:
    torch.set_num_threads(args.torch_threads)
    gym.register_envs(ale_py)
    key = list(map(str, [args.method, args.env_id, args.seed, args.steps, args.episodes]))
    if any(list(row.values())[:5] == key for row in read(RESULTS)):
        return print("already there:", *key)
    if args.method == "uniform":
        returns = play_uniform(args.env_id, args.seed, args.episodes)
        seconds = 0.0
    else:
        returns, seconds = train_and_play(args)
    row = [*key, f"{np.mean(returns):.2f}", f"{np.std(returns):.2f}", f"{seconds:.0f}"]
    append(RESULTS, FIELDS, [row])
    print(*row)


if __name__ == "__main__":
    main(tyro.cli(Args))
