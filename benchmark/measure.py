"""One measurement of `speed.py`, in a process of its own: a job as JSON in, a result as JSON out.

    python benchmark/measure.py '{"contestant": "sppo_atari", "mode": "train", …}'

Nothing is built into the scripts for this: their `main` runs as it is, with timers put around the functions it calls.
"""

import importlib
import json
import os
import re
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

SB3, SUBPROCESSES, SBX, BARE = "SB3", "SB3, SubprocVecEnv", "sbx", "bare environment"


class Enough(Exception):
    """Leaves the training loop."""


class Clock:
    """Counts iterations and their seconds: drops a warm-up, then raises Enough once there is enough of both."""

    def __init__(self, seconds: float, iterations: int, quick: bool):
        self.least_seconds, self.least_iterations, self.quick = seconds, iterations, quick
        self.count, self.seconds, self.warm, self.last, self.parts = 0, 0.0, False, None, defaultdict(float)

    def tick(self) -> None:
        """An iteration begins, so the one before has ended."""
        now = time.perf_counter()
        if self.last is not None:
            self.add(now - self.last)
        self.last = now

    def add(self, seconds: float) -> None:
        """An iteration took so long."""
        self.count += 1
        self.seconds += seconds
        if self.warm and self.count >= self.least_iterations and self.seconds >= self.least_seconds:
            raise Enough
        if not self.warm and (self.quick or self.count >= 2 and self.seconds >= 3):
            self.warm, self.count, self.seconds = True, 0, 0.0
            self.parts.clear()

    def add_part(self, name: str):
        """A function that adds seconds to this part of the iteration."""
        return lambda seconds: self.parts.__setitem__(name, self.parts[name] + seconds)


def timed(function, record, wait=lambda: None):
    """`function`, but `record` is told the seconds of each call; `wait` waits for a GPU."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        record(time.perf_counter() - start)
        return result

    return wrapper


def once(function):
    """`function`, but calls after the first do nothing and return the first one's result."""
    results = []

    def wrapper(*args, **kwargs):
        if not results:
            results.append(function(*args, **kwargs))
        return results[0]

    return wrapper


def play_at_random(space, shape: tuple[int, ...], step, clock: Clock) -> None:
    """Plays one batch of random actions, `shape` of them, again and again."""
    import numpy as np

    rng = np.random.default_rng(1)
    if hasattr(space, "n"):
        actions = rng.integers(space.n, size=shape)
    else:
        actions = rng.uniform(space.low, space.high, (*shape, *space.shape)).astype(space.dtype)
    while True:
        clock.tick()
        for action in actions:
            step(action)


def measure_script(job: dict, clock: Clock) -> None:
    """One of our scripts, from its own `main`."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    name, *flags = job["contestant"].split()
    script, mode, gpu = importlib.import_module(name), job["mode"], job["kind"] == "gpu"  # sets variables for torch
    import gymnasium as gym
    import torch

    for field in ["env_id", "seed", "num_envs", "num_steps", "num_minibatches", "total_timesteps"]:
        if field in script.Args.__dataclass_fields__:  # sa2c_atari.py has no minibatches
            flags += [f"--{field.replace('_', '-')}", str(job[field])]
    flags += ["--torch-threads", str(job["threads"]), "--cuda" if gpu else "--no-cuda", *job["flags"]]
    sys.argv[1:] = flags
    try:
        args, _ = script.read_flags()
        script.validate(args)
    except (ValueError, gym.error.Error) as error:
        print(error, file=sys.stderr)
        sys.exit(2)

    collect_name = "collect_episodes" if job["kind"] == "control" else "collect_games"
    collect, update = getattr(script, collect_name), script.update
    wait = torch.cuda.synchronize if gpu else lambda: None

    def tick_and_collect(*args, **kwargs):
        clock.tick()
        return collect(*args, **kwargs)

    def collect_at_random(envs, *_):
        shape = job["num_steps"], job["num_envs"]
        if job["kind"] == "control":
            play_at_random(envs.envs[0].action_space, shape, envs.step, clock)
        play_at_random(gym.spaces.Discrete(envs.num_actions), (*shape, 1), envs.step, clock)

    setattr(script, collect_name, tick_and_collect)
    if mode == "rollouts":
        script.update = lambda *args, **kwargs: {}
    elif mode == "update":
        setattr(script, collect_name, once(collect))
        script.update = timed(update, clock.add, wait)
    elif mode == "environment":
        setattr(script, collect_name, collect_at_random)
    elif mode == "split":
        collect = timed(collect, clock.add_part("collect"), wait)
        script.update = timed(update, clock.add_part("update"), wait)
        script.gae = timed(script.gae, clock.add_part("advantages"))
        script.SummaryWriter.add_scalar = timed(script.SummaryWriter.add_scalar, clock.add_part("logging"))
        for name in ("Games", "Environments"):
            if envs := getattr(script, name, None):
                envs.step = timed(envs.step, clock.add_part("environment"))
    script.main(args)


def measure_peer(job: dict, clock: Clock) -> None:
    """Stable-Baselines3's PPO or A2C, or sbx's PPO, from its `learn`."""
    import ale_py
    import gymnasium as gym
    import reference
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    class Ticks(BaseCallback):
        def _on_rollout_start(self) -> None:
            clock.tick()

        def _on_step(self) -> bool:
            return True

    gym.register_envs(ale_py)
    torch.set_num_threads(job["threads"])
    options = dict(num_envs=job["num_envs"], n_steps=job["num_steps"], device="cuda" if job["kind"] == "gpu" else "cpu")
    if job["case"] != "a2c":
        options["batch_size"] = job["num_envs"] * job["num_steps"] // job["num_minibatches"]
    if job["contestant"] == SBX:
        options["algorithm"] = importlib.import_module("sbx").PPO
    env_id = re.sub("ALE/(.*)-v5", r"\1NoFrameskip-v4", job["env_id"])
    method, subprocesses = "a2c" if job["case"] == "a2c" else "ppo", job["contestant"] == SUBPROCESSES
    model = reference.make_model(method, env_id, job["seed"], subprocesses=subprocesses, **options)
    if job["mode"] == "environment":
        model.env.reset()
        play_at_random(model.action_space, (job["num_steps"], job["num_envs"]), model.env.step, clock)
    elif job["mode"] == "rollouts":
        model.train = lambda: None
    elif job["mode"] == "update":
        model.collect_rollouts = once(model.collect_rollouts)
        model.train = timed(model.train, clock.add)
    model.learn(job["total_timesteps"], callback=Ticks())


def measure_bare_environment(job: dict, clock: Clock) -> None:
    """ale-py's native vector environment, or gymnasium's environment without any statistics."""
    import gymnasium as gym
    from ale_py.vector_env import AtariVectorEnv

    if job["kind"] != "control":
        game = re.sub("ALE/(.*)-v5", r"\1", job["env_id"]).lower()
        envs = AtariVectorEnv(game, job["num_envs"], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
        envs.reset(seed=job["seed"])
        play_at_random(envs.single_action_space, (job["num_steps"], job["num_envs"]), envs.step, clock)
    env = gym.make(job["env_id"])
    env.reset(seed=job["seed"])

    def step(action):
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()

    play_at_random(env.action_space, (job["num_steps"],), step, clock)


def descendants(pid: int) -> list[int]:
    """Its worker processes, and theirs."""
    children = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [process for child in map(int, children) for process in [child, *descendants(child)]]


def peak_memory(pid: int) -> float:
    """Peak resident MB of one process."""
    match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0


def main() -> None:
    job = json.loads(sys.argv[1])
    clock = Clock(job["seconds"], job["iterations"], job["quick"])
    others = {SB3: measure_peer, SUBPROCESSES: measure_peer, SBX: measure_peer, BARE: measure_bare_environment}
    try:
        others.get(job["contestant"], measure_script)(job, clock)
    except Enough:
        steps = clock.count * job["num_envs"] * job["num_steps"]
        workers = descendants(os.getpid())
        result = dict(steps_per_second=steps / clock.seconds, memory_mb=peak_memory(os.getpid()))
        result["workers_mb"] = sum(map(peak_memory, workers))  # what they share counts in each
        if job["mode"] == "split":
            parts = {name: seconds / steps * 1e6 for name, seconds in clock.parts.items()}  # µs per step
            parts["acting"] = parts.pop("collect") - parts["environment"]
            result |= parts | {"rest": clock.seconds / steps * 1e6 - sum(parts.values())}
        for pid in workers:
            os.kill(pid, signal.SIGKILL)  # they would outlive this process and keep its output open
        print("\n" + json.dumps(result), flush=True)
        os._exit(0)  # without the final evaluation, and without waiting for anybody's threads


if __name__ == "__main__":
    main()
