"""Released SPPO beside its matched control, PPO with `pg_coef` = α + β|Z|: how far apart does
rounding drive them?

    python benchmark/matched_control.py         # writes results/matched_control.csv, and the figure
    python benchmark/matched_control.py plot    # draws docs/figures/matched_control.png again

Both scripts train on Hopper-v5 with one seed. After each iteration the distance between SPPO's
parameters θ and the control's θ' is taken, ‖θ − θ'‖ / ‖θ'‖, and the first action that differs is
named.
"""

import contextlib
import csv
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.utils import parameters_to_vector

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo_baseline  # noqa: E402
import sppo_continuous  # noqa: E402

ITERATIONS = 20
TABLE = ROOT / "benchmark" / "results" / "matched_control.csv"
FIGURE = ROOT / "docs" / "figures" / "matched_control.png"
FIELDS = ["alpha", "beta", "Z", "iteration", "relative_gap", "first_different_step"]
RUN = dict(env_id="Hopper-v5", total_timesteps=ITERATIONS * 2048, eval_episodes=1, torch_threads=1)


def learn(script, args) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters after, and actions in, each iteration of the script's own `main`."""
    parameters = []
    actions = []
    update = script.update

    def update_and_note(agent, optimizer, batch, *rest):
        stats = update(agent, optimizer, batch, *rest)
        parameters.append(parameters_to_vector(agent.parameters()).detach().clone())
        actions.append(batch[1].clone())
        return stats

    script.update = update_and_note
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        script.main(args)
    script.update = update
    return parameters, actions


def compare(alpha: float, beta: float, Z: float) -> list[dict]:
    """A row for each iteration."""
    pg_coef = alpha + beta * abs(Z)
    control = ppo_baseline.Args(policy="discretized", pg_coef=pg_coef, **RUN)
    symmetric = sppo_continuous.Args(alpha=alpha, beta=beta, Z=Z, **RUN)
    our_parameters, our_actions = learn(sppo_continuous, symmetric)
    their_parameters, their_actions = learn(ppo_baseline, control)

    differs = (torch.cat(our_actions) != torch.cat(their_actions)).flatten(1).any(1)
    first = int(differs.int().argmax()) if differs.any() else None
    rows = []
    for iteration, (ours, theirs) in enumerate(zip(our_parameters, their_parameters), 1):
        gap = ((ours - theirs).norm() / theirs.norm()).item()
        seen = first is not None and first < iteration * 2048
        values = (alpha, beta, Z, iteration, f"{gap:.3e}", first if seen else "")
        rows.append(dict(zip(FIELDS, values)))
    return rows


def plot(rows: list[dict]) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.2), constrained_layout=True)
    for beta, style in (("1.0", "-"), ("20.0", "--")):
        curve = [row for row in rows if row["beta"] == beta]
        label = "α = {alpha}, β = {beta}: first other action at step {first_different_step}"
        iterations = [int(row["iteration"]) for row in curve]
        gaps = [float(row["relative_gap"]) for row in curve]
        axes.plot(iterations, gaps, style, color="black", label=label.format(**curve[-1]))
    axes.set(
        yscale="log",
        xticks=range(0, ITERATIONS + 1, 5),
        xlabel="iteration (2,048 steps each)",
        ylabel="‖θ − θ'‖ / ‖θ'‖",
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(FIGURE, dpi=200)


def main() -> None:
    if sys.argv[1:] != ["plot"]:
        rows = compare(1.0, 1.0, -1.0) + compare(0.5, 20.0, -1.0)
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with TABLE.open(newline="", encoding="utf-8") as file:
        plot(list(csv.DictReader(file)))


if __name__ == "__main__":
    main()
