"""The figures of docs/symmetric_loss.md, drawn from the gradients of the scripts' own loss functions.

    python docs/loss_figures.py    # writes docs/figures/loss_*.png
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sa2c_atari import symmetric_a2c_loss
from sppo_atari import symmetric_ppo_loss

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
plt.switch_backend("agg")
plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 160})


def pull(loss, pi: np.ndarray) -> np.ndarray:
    """|∂ loss / ∂ logit of the action taken|, of two actions, at each probability `pi` (n,). `loss`: of log π (1,)."""
    sizes = []
    for probability in torch.from_numpy(pi):
        logit = probability.logit().requires_grad_()
        logprob = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)[:1]
        sizes.append(torch.autograd.grad(loss(logprob), logit)[0].abs().item())
    return np.array(sizes)


ONE = torch.ones(1, dtype=torch.float64)


def a2c(alpha: float, beta: float):
    return lambda logprob: symmetric_a2c_loss(logprob, ONE, alpha, beta, -1.0)[0]


def ppo(alpha: float, beta: float, importance_weighted: bool):
    """At r = 1: the first update after the data were collected."""

    def loss(logprob):
        logprob, old_logprob = logprob.unsqueeze(0), logprob.detach().unsqueeze(0)
        return symmetric_ppo_loss(logprob, old_logprob, ONE, alpha, beta, -1.0, 0.2, importance_weighted)[0]

    return loss


def draw_gradients() -> None:
    pi = np.linspace(0.002, 0.998, 250)
    every = slice(6, None, 16)
    _, ax = plt.subplots(figsize=(6, 4.4), layout="constrained")
    ax.plot(pi, pull(ppo(0.5, 1.0, True), pi), color="0.45", lw=2.5)
    ax.plot(pi, pull(a2c(1.0, 0.0), pi), color="black", lw=2, ls="--")
    ax.plot(pi, pull(a2c(0.5, 1.0), pi), color="tab:blue", lw=3)
    ax.plot(pi[every], pull(ppo(0.5, 1.0, False), pi[every]), "o", color="tab:blue", mfc="white", ms=7, mew=2)
    ax.plot(pi, pull(a2c(0.0, 1.0), pi), color="tab:red", lw=2.5, ls=":")
    ax.set(xlim=(0, 1), ylim=(0, 1.55), xlabel="π, probability of the action taken")
    ax.set_ylabel("size of the gradient in its logit")
    along = dict(rotation_mode="anchor", transform_rotates_text=True)  # labels that lie on their lines
    slope = np.degrees(np.arctan(-1.5))
    ax.text(0.16, 1.29, "released SPPO: 1.5 × cross-entropy", color="0.35", rotation=slope, **along)
    ax.text(0.06, 0.965, "cross-entropy (A2C, PPO)", color="black", rotation=-45, **along)
    ax.text(0.03, 0.37, "SA2C (line), plain SPPO (circles)", color="tab:blue", fontsize=12)
    ax.text(0.3, 0.135, "reverse cross-entropy", color="tab:red")
    plt.savefig(FIGURES / "loss_gradients.png")


def draw_weights() -> None:
    pi = np.linspace(0.002, 0.99, 120)
    plain = pull(a2c(1.0, 0.0), pi)
    _, ax = plt.subplots(figsize=(6, 4.4), layout="constrained")
    styles = {0.0: ":", 0.5: "-.", 1.0: "-", 2.0: (0, (7, 2)), 4.0: (0, (3, 1.5))}
    for i, (beta, style) in enumerate(styles.items()):
        weight = pull(a2c(0.5, beta), pi) / plain
        ax.plot(pi, weight, color=plt.cm.viridis(0.68 - 0.17 * i), lw=2.5, ls=style)
        ax.text(1.01, weight[-1], f"β = {beta:g}", color=plt.cm.viridis(0.68 - 0.17 * i), va="center")
    released = pull(ppo(0.5, 1.0, True), pi) / plain
    ax.plot(pi, released, color="0.45", lw=2.5)
    ax.text(0.99, 1.57, "released, β = 1", color="0.35", ha="right", fontsize=12)
    ax.set(xlim=(0, 1.17), ylim=(0, 4.7), ylabel="weight of the sample, α = 0.5")
    ax.set_xlabel(r"π for SA2C, $π_{\mathrm{old}}$ for plain SPPO")
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.spines["bottom"].set_bounds(0, 1)
    plt.savefig(FIGURES / "loss_weights.png")


def draw_mask() -> None:
    clip_coef, old_pi = 0.2, 0.5
    r, advantage = np.meshgrid(np.linspace(0.5, 1.5, 401), np.linspace(-2, 2, 200))
    old_logprob = torch.full((r.size, 1), np.log(old_pi), dtype=torch.float64)
    A = torch.from_numpy(advantage.flatten())
    masks = []
    for importance_weighted in (True, False):
        logprob = (old_logprob + torch.from_numpy(np.log(r.reshape(-1, 1)))).requires_grad_()
        _, *terms = symmetric_ppo_loss(logprob, old_logprob, A, 1.0, 1.0, -1.0, clip_coef, importance_weighted)
        masks += [torch.autograd.grad(term, logprob, retain_graph=True)[0].view(r.shape) != 0 for term in terms]
    assert all(torch.equal(mask, masks[0]) for mask in masks)  # forward and reverse term, in both forms

    _, ax = plt.subplots(figsize=(6, 4.4), layout="constrained")
    ax.contourf(r, advantage, masks[0].numpy(), levels=[-0.5, 0.5, 1.5], colors=["0.82", "white"])
    ax.contourf(r, advantage, masks[0].numpy(), levels=[-0.5, 0.5], colors="none", hatches=["//"])
    ax.plot([1, 1], [-2, 2], color="0.6", lw=1, ls=":")
    box = dict(facecolor="white", edgecolor="none", pad=3)
    ax.text(1.35, 1, "m = 0\nalready made\nlikelier", ha="center", va="center", bbox=box)
    ax.text(0.65, -1, "m = 0\nalready made\nless likely", ha="center", va="center", bbox=box)
    ax.text(0.83, 1, "m = 1\nmakes the action\nlikelier", ha="center", va="center")
    ax.text(1.17, -1, "m = 1\nmakes the action\nless likely", ha="center", va="center")
    ax.axhline(0, color="black", lw=1)
    ax.set(xlabel=r"r = π / $π_{\mathrm{old}}$", ylabel="advantage A", xlim=(0.5, 1.5), ylim=(-2, 2))
    ax.set_xticks([0.5, 0.8, 1, 1.2, 1.5], ["0.5", "1−ε", "1", "1+ε", "1.5"])
    ax.set_yticks([-2, -1, 0, 1, 2])
    plt.savefig(FIGURES / "loss_clip_mask.png")


if __name__ == "__main__":
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw_gradients()
    draw_weights()
    draw_mask()
