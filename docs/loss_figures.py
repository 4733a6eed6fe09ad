"""The figures of docs/symmetric_loss.md, from the gradients of the scripts' own loss functions.

python docs/loss_figures.py    # writes docs/figures/loss_*.png
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sa2c_atari  # noqa: E402
import sppo_atari  # noqa: E402

FIGURES = ROOT / "docs" / "figures"
ADVANTAGE = torch.ones(1, dtype=torch.float64)
CLIP_COEF = 0.2
STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 160,
}


def pull(loss, pi: np.ndarray) -> np.ndarray:
    """|∂ loss / ∂ logit of the action taken|, of two actions, at each probability `pi` (n,). `loss`
    is a function of log π (1,)."""
    sizes = []
    for probability in torch.from_numpy(pi):
        logit = probability.logit().requires_grad_()
        logprob = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)[:1]
        (gradient,) = torch.autograd.grad(loss(logprob), logit)
        sizes.append(gradient.abs().item())
    return np.array(sizes)


def a2c(alpha: float, beta: float):
    """The loss of SA2C as a function of log π."""
    args = sa2c_atari.Args(alpha=alpha, beta=beta)
    return lambda logprob: sa2c_atari.symmetric_a2c_loss(logprob, ADVANTAGE, args)[0]


def ppo(alpha: float, beta: float, importance_weighted: bool):
    """That of SPPO, at r = 1: the first update after the data were collected."""
    args = sppo_atari.Args(alpha=alpha, beta=beta, importance_weighted_reverse=importance_weighted)

    def loss(logprob):
        old_logprob = logprob.detach()
        return sppo_atari.symmetric_ppo_loss(logprob, old_logprob, ADVANTAGE, CLIP_COEF, args)[0]

    return loss


def draw_gradients() -> None:
    pi = np.linspace(0.002, 0.998, 250)
    every = slice(6, None, 16)
    plain = pull(ppo(0.5, 1.0, False), pi[every])
    _, ax = plt.subplots(figsize=(6, 4.4), layout="constrained")
    ax.plot(pi, pull(ppo(0.5, 1.0, True), pi), color="0.45", lw=2.5)
    ax.plot(pi, pull(a2c(1.0, 0.0), pi), color="black", lw=2, ls="--")
    ax.plot(pi, pull(a2c(0.5, 1.0), pi), color="tab:blue", lw=3)
    ax.plot(pi[every], plain, "o", color="tab:blue", mfc="white", ms=7, mew=2)
    ax.plot(pi, pull(a2c(0.0, 1.0), pi), color="tab:red", lw=2.5, ls=":")
    ax.set(xlim=(0, 1), ylim=(0, 1.55), xlabel="π, probability of the action taken")
    ax.set_ylabel("size of the gradient in its logit")
    along = dict(rotation_mode="anchor", transform_rotates_text=True)  # labels lie on their lines
    slope = np.degrees(np.arctan(-1.5))
    ax.text(0.16, 1.29, "released SPPO: 1.5 × cross-entropy", color="0.35", rotation=slope, **along)
    ax.text(0.06, 0.965, "cross-entropy (A2C, PPO)", color="black", rotation=-45, **along)
    ax.text(0.03, 0.37, "SA2C (line), plain SPPO (circles)", color="tab:blue", fontsize=12)
    ax.text(0.3, 0.135, "reverse cross-entropy", color="tab:red")
    plt.savefig(FIGURES / "loss_gradients.png")


def draw_weights() -> None:
    pi = np.linspace(0.002, 0.99, 120)
    unweighted = pull(a2c(1.0, 0.0), pi)
    _, ax = plt.subplots(figsize=(6, 4.4), layout="constrained")
    styles = {0.0: ":", 0.5: "-.", 1.0: "-", 2.0: (0, (7, 2)), 4.0: (0, (3, 1.5))}
    for i, (beta, style) in enumerate(styles.items()):
        weight = pull(a2c(0.5, beta), pi) / unweighted
        colour = plt.cm.viridis(0.68 - 0.17 * i)
        ax.plot(pi, weight, color=colour, lw=2.5, ls=style)
        ax.text(1.01, weight[-1], f"β = {beta:g}", color=colour, va="center")
    ax.plot(pi, pull(ppo(0.5, 1.0, True), pi) / unweighted, color="0.45", lw=2.5)
    ax.text(0.99, 1.57, "released, β = 1", color="0.35", ha="right", fontsize=12)
    ax.set(xlim=(0, 1.17), ylim=(0, 4.7), ylabel="weight of the sample, α = 0.5")
    ax.set_xlabel(r"π for SA2C, $π_{\mathrm{old}}$ for plain SPPO")
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.spines["bottom"].set_bounds(0, 1)
    plt.savefig(FIGURES / "loss_weights.png")


def mask_of_gradients(r: np.ndarray, advantage: np.ndarray) -> np.ndarray:
    """Where the forward and the reverse term have a gradient: at the same places, in both forms."""
    old_logprob = torch.full((r.size,), np.log(0.5), dtype=torch.float64)
    logprob = (old_logprob + torch.from_numpy(np.log(r.flatten()))).requires_grad_()
    A = torch.from_numpy(advantage.flatten())
    masks = []
    for importance_weighted in (True, False):
        args = sppo_atari.Args(importance_weighted_reverse=importance_weighted)
        _, *terms = sppo_atari.symmetric_ppo_loss(logprob, old_logprob, A, CLIP_COEF, args)
        for term in terms:
            (gradient,) = torch.autograd.grad(term, logprob, retain_graph=True)
            masks.append(gradient != 0)
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    return masks[0].view(r.shape).numpy()


def draw_mask() -> None:
    r, advantage = np.meshgrid(np.linspace(0.5, 1.5, 401), np.linspace(-2, 2, 200))
    mask = mask_of_gradients(r, advantage)
    _, ax = plt.subplots(figsize=(6, 4.4), layout="constrained")
    ax.contourf(r, advantage, mask, levels=[-0.5, 0.5, 1.5], colors=["0.82", "white"])
    ax.contourf(r, advantage, mask, levels=[-0.5, 0.5], colors="none", hatches=["//"])
    ax.plot([1, 1], [-2, 2], color="0.6", lw=1, ls=":")
    middle = dict(ha="center", va="center")
    box = dict(facecolor="white", edgecolor="none", pad=3)
    ax.text(1.35, 1, "m = 0\nalready made\nlikelier", bbox=box, **middle)
    ax.text(0.65, -1, "m = 0\nalready made\nless likely", bbox=box, **middle)
    ax.text(0.83, 1, "m = 1\nmakes the action\nlikelier", **middle)
    ax.text(1.17, -1, "m = 1\nmakes the action\nless likely", **middle)
    ax.axhline(0, color="black", lw=1)
    ax.set(
        xlabel=r"r = π / $π_{\mathrm{old}}$", ylabel="advantage A", xlim=(0.5, 1.5), ylim=(-2, 2)
    )
    ax.set_xticks([0.5, 0.8, 1, 1.2, 1.5], ["0.5", "1−ε", "1", "1+ε", "1.5"])
    ax.set_yticks([-2, -1, 0, 1, 2])
    plt.savefig(FIGURES / "loss_clip_mask.png")


if __name__ == "__main__":
    plt.switch_backend("agg")
    plt.rcParams.update(STYLE)
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw_gradients()
    draw_weights()
    draw_mask()
