"""A small environment for tests of whole runs."""

import os
import random
import time

import gymnasium as gym
import numpy as np


class Tiny(gym.Env):
    """Episodes of 16 steps without randomness. From step AT of this process on there is TROUBLE."""

    metadata = {"render_modes": ["rgb_array"]}
    steps, alive, seeds = 0, 0, set()

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space, self.action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
        Tiny.alive += 1
        if self.trouble() == "single" and Tiny.alive > 1:
            raise RuntimeError("there can only be one")

    def trouble(self) -> str | None:
        return os.environ.get("TROUBLE") if Tiny.steps >= int(os.environ.get("AT", 0)) else None

    def observe(self):
        if self.trouble() == "random":
            return self.observation_space.sample() * np.float32(random.random() * np.random.rand())
        return np.float32([np.cos(self.t), np.sin(self.t)])

    def reset(self, seed=None, options=None):
        Tiny.seeds.add(seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        Tiny.steps += 1
        self.t += 1
        trouble, reward = self.trouble(), float(np.cos(self.t + 2 * action.sum()))
        if trouble == "raise":
            raise RuntimeError("the simulation exploded")
        elif trouble == "wait":
            time.sleep(0.05)
        elif trouble == "nan":
            reward = float("nan")
        elif trouble == "random":
            reward += self.action_space.sample().item()
        return self.observe(), reward, False, self.t >= 16 and trouble != "endless", {}

    def render(self):
        return None

    def close(self):
        Tiny.alive -= 1


gym.register("Tiny-v0", Tiny)
