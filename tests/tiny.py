"""Small environments for tests of whole runs, as a user registers them: --env-id tiny:Tiny-v0."""

import gymnasium as gym
import numpy as np

LENGTH = 16  # steps of an episode


class Tiny(gym.Env):
    """Episodes of LENGTH steps without randomness. After `good_steps` of all environments of this
    process together, rewards are not numbers."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    steps = 0

    def __init__(self, good_steps=float("inf"), render_mode=None):
        self.good_steps = good_steps
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        self.t = 0
        return np.float32([1, 0]), {}

    def step(self, action):
        Tiny.steps += 1
        self.t += 1
        reward = np.cos(self.t + 2 * action.sum())
        if Tiny.steps > self.good_steps:
            reward = np.float64("nan")
        return np.float32([np.cos(self.t), np.sin(self.t)]), reward, False, self.t >= LENGTH, {}

    def render(self):
        return np.full((64, 64, 3), 10 * self.t, np.uint8)


class Unusual(gym.Env):
    """Spaces of any shape; a reward of 1 for each action that the action space has. It draws from
    NumPy's global random numbers."""

    def __init__(self, observation_space, action_space):
        self.observation_space = observation_space
        self.action_space = action_space

    def observe(self):
        self.observation_space.seed(np.random.randint(1000))
        return self.observation_space.sample()

    def reset(self, seed=None, options=None):
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        reward = float(self.action_space.contains(action))
        return self.observe(), reward, False, self.t >= LENGTH, {}


FLAT = gym.spaces.Box(-1, 1, (3,))
DICT = gym.spaces.Dict(place=gym.spaces.Discrete(3), speed=gym.spaces.Box(-1, 1, (2, 3)))
UNUSUAL = {  # observations, actions, length of a flat observation
    "Matrix": (gym.spaces.Box(-5, 5, (2, 3)), gym.spaces.Box(-2, 3, (2, 2)), 6),
    "Dict": (DICT, gym.spaces.Discrete(3), 9),
    "Number": (gym.spaces.Discrete(5), gym.spaces.Discrete(4, start=-2), 5),
    "Flat": (FLAT, gym.spaces.Box(-1, 1, (1,), np.float64), 3),
}
for name, (observations, actions, _) in UNUSUAL.items():
    spaces = dict(observation_space=observations, action_space=actions)
    gym.register(f"{name}-v0", Unusual, kwargs=spaces)
gym.register("Tiny-v0", Tiny)
gym.register("Diverging-v0", Tiny, kwargs=dict(good_steps=70))
