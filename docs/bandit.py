"""Where a weight on samples that depends on π can help, and where it cannot: two arms, exactly.

    python docs/bandit.py    # writes docs/figures/bandit.png

One arm has probability π ≥ ½ and one 1 − π; their mean rewards differ by Δ. With the true mean as
baseline their advantages are A = (1 − π)Δ and −πΔ. A sample's gradient in the logit is
g = w A' ∂ log π, where A' is A with noise and w the sample's weight. So, with shares s = (1 − π, π)
and mean squares q of A' (likely arm, rare arm),

    E[g] = π(1 − π) Δ Σ s w        E[g²] = π(1 − π) Σ s w² q.

A step of the best size makes progress in proportion to E[g]² / E[g²]. By Cauchy and Schwarz this is
largest for w ∝ 1/q. Where noise of one variance outweighs Δ, q is constant: equal weights are best.
"""

import matplotlib.pyplot as plt
import numpy as np
import results_figures as figures

ALPHA = 0.5
BETAS = {1: "-", 20: "--"}  # the released code's for games and control, with their lines
EXAMPLE = 0.9  # the likely arm's probability


def efficiency(pi: float, beta: float, ratio: float = 1.0) -> float:
    """Progress with the weights α + βπ, over that with equal weights.

    `ratio` is the mean squared advantage of the rare arm over that of the likely one.
    """
    share = np.array([1 - pi, pi])
    weight = ALPHA + beta * np.array([pi, 1 - pi])
    square = np.array([1, ratio])
    return (share @ weight) ** 2 * (share @ square) / (share @ (weight**2 * square))


def break_even(pi: float, beta: float) -> float:
    """The ratio at which the weights do as well as equal ones; with a larger one they do better."""
    share = np.array([1 - pi, pi])
    weight = ALPHA + beta * np.array([pi, 1 - pi])
    likely, rare = share * ((share @ weight) ** 2 - weight**2)
    return -likely / rare


def ratio_without_noise(pi: float) -> float:
    """Rewards are their means: advantages are (1 − π)Δ and −πΔ."""
    return (pi / (1 - pi)) ** 2


def draw() -> None:
    _, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.9), sharey=True)
    colour = figures.METHODS["plain form"]
    pi = np.linspace(0.5, 0.995, 100)
    ratio = np.geomspace(0.3, 120, 100)
    for beta, line in BETAS.items():
        left.plot(pi, [efficiency(x, beta) for x in pi], color=colour, lw=2.5, ls=line)
        left.plot(EXAMPLE, efficiency(EXAMPLE, beta), "o", color=colour)
        progress = [efficiency(EXAMPLE, beta, x) for x in ratio]
        right.plot(ratio, progress, color=colour, lw=2.5, ls=line)
    for ax in (left, right):
        ax.axhline(1, color=figures.METHODS["its control"], lw=2)
    left.text(0.72, 1.06, "equal weights")
    left.text(0.88, 0.7, "β = 1")
    left.text(0.7, 0.6, "β = 20")
    left.set(title="much noise, the same for both arms", xlabel="π, probability of the likely arm")
    left.set_ylabel("progress of a step")
    right.text(13, 1.35, "β = 1")
    right.text(18, 2.1, "β = 20", ha="right")
    right.set(title=f"π = {EXAMPLE}", xscale="log")
    right.set_xlabel("squared advantage, rare arm / likely arm")
    ends = {1: "1: much\nnoise", 10: "10", ratio_without_noise(EXAMPLE): "81: no\nnoise"}
    right.set_xticks([*ends], [*ends.values()])
    right.minorticks_off()
    figures.save("bandit")


if __name__ == "__main__":
    figures.use_style()
    draw()
