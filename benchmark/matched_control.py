"""Released SPPO beside its matched control, PPO with `pg_coef` = α + β|Z|: how far apart does rounding drive them?

    python benchmark/matched_control.py         # writes results/matched_control.csv, then the figure
    python benchmark/matched_control.py plot    # draws docs/figures/matched_control.png from the table

Both scripts run on Hopper-v5 with one seed, side by side, through their own functions. After each iteration the
distance between SPPO's parameters θ and the control's θ' is taken, ‖θ − θ'‖ / ‖θ'‖, and the first action that differs
is named.
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo_baseline  # noqa: E402
import sppo_continuous  # noqa: E402

ITERATIONS = 20
TABLE = ROOT / "benchmark/results/matched_control.csv"


def learn(script, args):
    """Runs a script's algorithm on one environment; yields the parameters and the actions of each iteration."""
    torch.manual_seed(args.seed)
    envs = script.Environments(args, np.array([args.seed]))
    agent = script.BinnedAgent(envs.obs.shape[1], envs.envs[0].action_space, args.num_bins)
    parameters = script.as_vector(agent)
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=1e-5, fused=True)
    rollout, clip_coef = script.Rollout(args.num_steps, envs.obs, len(agent.actions)), torch.tensor(args.clip_coef)
    for iteration in range(ITERATIONS):
        act_rng, minibatch_rng = (np.random.default_rng([args.seed, iteration, i]) for i in range(2))
        script.collect_episodes(envs, agent, rollout, act_rng)
        rewards, context = rollout.rewards + args.gamma * rollout.bootstraps, (args.gamma, args.gae_lambda)
        advantages = script.gae(rewards, rollout.values, rollout.dones, rollout.next_value, *context)
        arrays = (rollout.obs, rollout.actions, rollout.logprobs, advantages, advantages + rollout.values)
        batch = [torch.from_numpy(x).flatten(0, 1) for x in arrays]
        script.update(agent, optimizer, batch, np.arange(args.num_steps), clip_coef, args, minibatch_rng)
        yield parameters.detach().clone(), rollout.actions.copy()


def compare() -> None:
    torch.set_num_threads(1)
    rows = []
    for alpha, beta, Z in ((1.0, 1.0, -1.0), (0.5, 20.0, -1.0)):
        control = ppo_baseline.Args(policy="discretized", pg_coef=alpha + beta * abs(Z))
        symmetric = sppo_continuous.Args(alpha=alpha, beta=beta, Z=Z)
        first = None
        pair = zip(learn(sppo_continuous, symmetric), learn(ppo_baseline, control))
        for iteration, ((ours, our_actions), (theirs, their_actions)) in enumerate(pair, 1):
            gap = ((ours - theirs).norm() / theirs.norm()).item()
            differs = (our_actions != their_actions).any((1, 2))
            if first is None and differs.any():
                first = (iteration - 1) * len(differs) + int(differs.argmax())
            rows.append((alpha, beta, Z, iteration, f"{gap:.3e}", first))
            print(*rows[-1], flush=True)
    with TABLE.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["alpha", "beta", "Z", "iteration", "relative_gap", "first_different_step"])
        writer.writerows(rows)


def plot() -> None:
    rows = list(csv.DictReader(TABLE.open()))
    figure, axes = plt.subplots(figsize=(5, 3.2), constrained_layout=True)
    for beta, style in (("1.0", "-"), ("20.0", "--")):
        curve = [row for row in rows if row["beta"] == beta]
        label = "α = {alpha}, β = {beta}: first other action at step {first_different_step}".format(**curve[-1])
        x, y = [int(row["iteration"]) for row in curve], [float(row["relative_gap"]) for row in curve]
        axes.plot(x, y, style, color="black", label=label)
    axes.set(yscale="log", xticks=range(0, ITERATIONS + 1, 5), xlabel="iteration (2,048 steps each)",
             ylabel="‖θ − θ'‖ / ‖θ'‖")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs/figures/matched_control.png", dpi=200)


if __name__ == "__main__":
    if sys.argv[1:] != ["plot"]:
        compare()
    plot()
