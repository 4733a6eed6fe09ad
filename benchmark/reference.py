"""Scores of Stable-Baselines3 and of the uniform policy: what our scripts are measured against.

    python benchmark/reference.py ppo Hopper-v5 1 299008             # PPO, VecNormalize on observations and rewards
    python benchmark/reference.py a2c BoxingNoFrameskip-v4 1 200000  # A2C behind the usual Atari wrappers
    python benchmark/reference.py uniform Hopper-v5 1 0 --episodes 100

Each call trains one seed with the settings our scripts have by default, plays `--episodes` episodes (raw return;
the most probable action in continuous control, sampled actions on Atari) and appends one line to
`benchmark/results/reference.csv`. A line that is already there is not computed again.
"""

import argparse
import csv
import time
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import torch
from score import append
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

RESULTS = Path(__file__).parent / "results" / "reference.csv"
FIELDS = ["method", "env_id", "seed", "steps", "episodes", "mean", "std", "train_seconds"]
ATARI_PPO = dict(n_steps=128, batch_size=256, n_epochs=4, learning_rate=lambda left: 2.5e-4 * left,
                 clip_range=lambda left: 0.1 * left, ent_coef=0.01, vf_coef=0.5)  # fmt: skip
ATARI_A2C = dict(policy_kwargs=dict(optimizer_class=RMSpropTFLike, optimizer_kwargs=dict(eps=1e-5)),
                 ent_coef=0.01, vf_coef=0.25)  # fmt: skip


def make_model(
    method: str, env_id: str, seed: int, num_envs: int | None = None, algorithm=PPO, subprocesses=False, **changes
):
    """The learner, untrained, with the settings our scripts have by default, and `changes` to them."""
    options = dict(seed=seed)
    if subprocesses:  # forked, or they would not know the Atari games
        options.update(vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="fork"))
    if "NoFrameskip" in env_id:
        a2c = method == "a2c"
        envs = VecFrameStack(make_atari_env(env_id, num_envs or (16 if a2c else 8), **options), 4)
        algorithm, settings = (A2C, ATARI_A2C) if a2c else (algorithm, ATARI_PPO)
        return algorithm("CnnPolicy", envs, seed=seed, **(dict(device="cpu") | settings | changes))
    envs = VecNormalize(make_vec_env(env_id, num_envs or 1, **options), gamma=0.99)
    return algorithm("MlpPolicy", envs, seed=seed, **(dict(device="cpu") | changes))  # its defaults are the settings


def train_and_play(method: str, env_id: str, seed: int, steps: int, episodes: int) -> tuple[list[float], float]:
    """Returns of the trained policy's evaluation episodes, and the seconds that training took."""
    model = make_model(method, env_id, seed)
    if "NoFrameskip" in env_id:
        # Whole games, raw score: the wrappers' lost life and clipped reward are for training only.
        wrappers = dict(terminal_on_life_loss=False, clip_reward=False)
        eval_envs = make_atari_env(env_id, 1, seed=10_000 + seed, wrapper_kwargs=wrappers)
        eval_envs = VecTransposeImage(VecFrameStack(eval_envs, 4))
    else:
        eval_envs = VecNormalize(make_vec_env(env_id, 1, seed=10_000 + seed), training=False, norm_reward=False)
    start = time.time()
    model.learn(steps)
    seconds = time.time() - start
    if isinstance(eval_envs, VecNormalize):
        eval_envs.obs_rms = model.env.obs_rms
    deterministic = "NoFrameskip" not in env_id
    returns, _ = evaluate_policy(model, eval_envs, episodes, deterministic, return_episode_rewards=True)
    return returns, seconds


def play_uniform(env_id: str, seed: int, episodes: int) -> list[float]:
    """Returns of the policy that draws every action uniformly."""
    if "NoFrameskip" in env_id:
        wrappers = dict(terminal_on_life_loss=False, clip_reward=False)
        env = make_atari_env(env_id, 1, seed=seed, wrapper_kwargs=wrappers).envs[0]
    else:
        env = gym.make(env_id)
    env.action_space.seed(seed)
    returns = []
    for episode in range(episodes):
        env.reset(seed=seed if episode == 0 else None)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["ppo", "a2c", "uniform"])
    parser.add_argument("env_id")
    parser.add_argument("seed", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--torch-threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.torch_threads)
    gym.register_envs(ale_py)
    key = [args.method, args.env_id, str(args.seed), str(args.steps), str(args.episodes)]
    if RESULTS.exists() and any(list(row.values())[:5] == key for row in csv.DictReader(RESULTS.open())):
        return print("already there:", *key)
    if args.method == "uniform":
        returns, seconds = play_uniform(args.env_id, args.seed, args.episodes), 0.0
    else:
        returns, seconds = train_and_play(args.method, args.env_id, args.seed, args.steps, args.episodes)
    row = [*key, f"{np.mean(returns):.2f}", f"{np.std(returns):.2f}", f"{seconds:.0f}"]
    append(RESULTS, FIELDS, [row])
    print(*row)


if __name__ == "__main__":
    main()
