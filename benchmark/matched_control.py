"""Released SPPO beside its matched control, PPO with its policy loss times α + β|Z|: how far apart
does rounding drive them?

    python benchmark/matched_control.py         # writes results/matched_control.csv, and the figure
    python benchmark/matched_control.py plot    # draws docs/figures/matched_control.png again

`sppo_continuous.py` trains both on Hopper-v5 with one seed, so that they draw the same random
numbers. After each iteration the distance ‖θ − θ'‖ / ‖θ'‖ between SPPO's parameters θ and the
control's θ' is taken, and the first action that differs is named.
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
import sppo_continuous  # noqa: E402

ITERATIONS = 20
TABLE = ROOT / "benchmark" / "results" / "matched_control.csv"
FIGURE = ROOT / "docs" / "figures" / "matched_control.png"
FIELDS = ["alpha", "beta", "Z", "iteration", "relative_gap", "first_different_step"]
RUN = dict(env_id="Hopper-v5", total_timesteps=ITERATIONS * 2048, eval_episodes=1, torch_threads=1)


def learn(args) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters after, and actions in, each iteration of the script's `main`."""
    parameters = []
    actions = []
    update = sppo_continuous.update

    def update_and_note(agent, optimizer, batch, *rest):
        stats = update(agent, optimizer, batch, *rest)
        parameters.append(parameters_to_vector(agent.parameters()).detach().clone())
        actions.append(batch[1].clone())
        return stats

    sppo_continuous.update = update_and_note
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sppo_continuous.main(args)
    sppo_continuous.update = update
    return parameters, actions


def compare(alpha: float, beta: float, Z: float) -> list[dict]:
    """A row for each iteration."""
    symmetric = sppo_continuous.Args(alpha=alpha, beta=beta, Z=Z, **RUN)
    control = sppo_continuous.Args(alpha=alpha + beta * abs(Z), beta=0.0, **RUN)
    our_parameters, our_actions = learn(symmetric)
    their_parameters, their_actions = learn(control)

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
    label = "α = {alpha}, β = {beta}: first other action at step {first_different_step}"
    iterations = [int(row["iteration"]) for row in rows]
    gaps = [float(row["relative_gap"]) for row in rows]
    axes.plot(iterations, gaps, color="black", label=label.format(**rows[-1]))
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
        rows = compare(0.5, 20.0, -1.0)
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with TABLE.open(newline="", encoding="utf-8") as file:
        plot(list(csv.DictReader(file)))


if __name__ == "__main__":
    main()
