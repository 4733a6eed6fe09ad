"""Draws docs/figures/map.svg, the map of sppo_continuous.py: one iteration, what flows through it
and in which shapes. As narrow as a phone, and plain SVG text, so that it can be searched.

python docs/map.py    # writes docs/figures/map.svg
"""

import re
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sppo_continuous  # noqa: E402

FIGURE = ROOT / "docs" / "figures" / "map.svg"
WIDTH = 400  # px; 11 px are 8 pt, and no text is smaller
COLOURS = {  # Okabe and Ito's, which the colour-blind can tell apart; and what they mean
    "acts": ("#E69F00", "acts in the environment"),
    "computes": ("#0072B2", "computes, and changes nothing"),
    "learns": ("#009E73", "changes the network"),
    "looks": ("#CC79A7", "looks, and learns nothing"),
}
STYLE = """\
text { font-family: Arial, Helvetica, 'DejaVu Sans', sans-serif; font-size: 12.5px; fill: #222 }
.title { font-size: 18px; font-weight: bold }
.code, .shape { font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace }
.code { font-size: 13px; font-weight: bold }
.shape { font-size: 11px }
.equation { font-size: 14px }
.sub { font-size: 11px }
.arrow { fill: none; stroke: #555; stroke-width: 1.6 }"""
HEIGHTS = {"title": 22, "code": 18, "shape": 15, "equation": 20, "text": 17}


@dataclass
class Box:
    """A function, what it does in a few words, its equations, and boxes of what it calls."""

    kind: str  # a key of COLOURS
    name: str  # of the function, as it is in the script
    text: str
    equations: list[str] = field(default_factory=list)
    calls: list = field(default_factory=list)  # Box, or a text: what flows into the next box


def flow(args: sppo_continuous.Args) -> list:
    """The map from top to bottom: boxes, and texts that stand on the arrows between them."""
    epochs, count = args.update_epochs, args.num_minibatches
    loss = Box(
        "computes",
        "symmetric_ppo_loss",
        "SPPO's loss; to change it, start here",
        [
            "r = π / π_{old} = exp Σ_{d} (logprob − old_logprob)",
            "forward = −min(r·A, clip(r, 1−ε, 1+ε)·A)",
            "reverse = −m · A · Z · (1 − π) / π_{old}",
            "m = 1 where forward has a gradient, else 0",
            "policy loss = α · forward + β · reverse",
        ],
    )
    minibatch = Box(
        "computes",
        "minibatch_loss",
        "",
        [
            "loss = policy loss − ent_coef · entropy",
            "           + vf_coef · (value − returns)²",
        ],
        [
            Box("computes", "normalize", "", ["A ← (A − mean) / standard deviation"]),
            "obs (M, obs_dim)   action (M, D)",
            Box(
                "computes",
                "BinnedAgent.forward",
                "gives logprob (M, D); entropy and value (M,)",
            ),
            "logprob, old_logprob (M, D)   advantage (M,)",
            loss,
        ],
    )
    update = Box(
        "learns",
        "update",
        f"{epochs} epochs of {count} minibatches; Adam after each",
        [],
        [
            "obs (M, obs_dim)   action, old_logprob (M, D)\nadvantage, returns (M,)",
            Box("computes", "flip_signs", "A ← −A with the probability --advantage-noise"),
            "advantage (M,)",
            minibatch,
        ],
    )
    return [
        Box(
            "acts",
            "collect",
            "plays N steps with Environment.step",
            ["a ~ π(a | o),   log π_{old} = Σ_{d} log π_{d}(a_{d} | o)"],
        ),
        "obs (N, obs_dim)   actions, logprobs (N, D)\nrewards, values, next_values, dones (N,)",
        Box(
            "computes",
            "main",
            "adds reward noise; σ is --reward-noise",
            ["r_{t} ← r_{t} + σ · ξ_{t},   ξ_{t} ~ N(0, 1)"],
        ),
        "rewards, values, next_values, dones (N,)",
        Box(
            "computes",
            "gae",
            "V'_{t} is the value of what follows; terminated: 0",
            ["δ_{t} = r_{t} + γ V'_{t} − V_{t}", "A_{t} = δ_{t} + γλ A_{t+1}, within an episode"],
        ),
        "advantages, returns = A + V (N,)\nobs, actions, logprobs as they were",
        update,
        "",
        Box(
            "looks",
            "evaluate",
            "every --eval-interval steps, and at the end",
            ["score = mean of the raw returns (eval_episodes,)"],
        ),
    ]


def pale(colour: str) -> str:
    """A colour mixed with white, for what text stands on."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(0.12 * c + 0.88 * 255):02X}" for c in channels)


class Drawing:
    """SVG elements, and `y`, down to where the picture is full."""

    def __init__(self):
        self.elements = []
        self.y = 8.0

    def add(self, element: str) -> None:
        self.elements.append(element)

    def text(self, x: float, content: str, kind: str, anchor: str = "start") -> None:
        """A line of text; `_{…}` in it becomes a subscript."""
        self.y += HEIGHTS[kind]
        parts = []
        for i, part in enumerate(re.split(r"_\{(.*?)\}", content)):
            part = escape(part, quote=False)
            if i % 2:
                part = f'<tspan class="sub" dy="3">{part}</tspan>'
            elif i and part:
                part = f'<tspan dy="-3">{part}</tspan>'
            parts.append(part)
        place = f'x="{x:g}" y="{self.y - 4:g}" text-anchor="{anchor}" class="{kind}"'
        self.add(f'<text {place} xml:space="preserve">{"".join(parts)}</text>')

    def arrow(self, x: float, label: str) -> None:
        """Downwards at `x`, with its label beside it."""
        top = self.y
        self.y += 3
        for line in label.splitlines():
            self.text(x + 12, line, "shape")
        self.y += 9 if label else 18
        self.add(f'<path class="arrow" d="M{x:g} {top:g}V{self.y - 2:g}" marker-end="url(#head)"/>')

    def box(self, box: Box, depth: int = 0) -> None:
        """A box with what it calls in it."""
        x, width = 26 + 9 * depth, WIDTH - 34 - 18 * depth
        colour, _ = COLOURS[box.kind]
        place, top = len(self.elements), self.y
        self.y += 4
        self.text(x + 9, box.name, "code")
        if box.text:
            self.text(x + 9, box.text, "text")
        for equation in box.equations:
            self.text(x + 9, equation, "equation")
        self.y += 5
        for part in box.calls:
            if isinstance(part, str):
                self.arrow(x + 24, part)
            else:
                self.box(part, depth + 1)
        self.y += 8 if box.calls else 2
        frame = f'x="{x:g}" y="{top:g}" width="{width:g}" height="{self.y - top:g}" rx="7"'
        paint = f'fill="{pale(colour)}" stroke="{colour}" stroke-width="1.8"'
        self.elements.insert(place, f"<rect {frame} {paint}/>")


def draw(args: sppo_continuous.Args) -> str:
    """The map as SVG."""
    drawing = Drawing()
    drawing.text(8, "One iteration of sppo_continuous.py", "title")
    drawing.text(8, f"N = num_steps = {args.num_steps:,}", "text")
    size = args.num_steps // args.num_minibatches
    drawing.text(8, f"M = N / num_minibatches = {size}, a minibatch", "text")
    drawing.text(8, "D = dimensions of the action, each cut into num_bins", "text")
    drawing.y += 10
    first = drawing.y + 16
    for part in flow(args):
        if isinstance(part, str):
            drawing.arrow(50, part)
        else:
            drawing.box(part)
            if part.name == "update":
                last = drawing.y - 16
    path = f"M26 {last:g}H12V{first:g}H24"
    drawing.add(f'<path class="arrow" d="{path}" marker-end="url(#head)"/>')
    drawing.y += 8
    for colour, meaning in COLOURS.values():
        square = f'x="26" y="{drawing.y + 2:g}" width="12" height="12"'
        drawing.add(f'<rect {square} fill="{pale(colour)}" stroke="{colour}"/>')
        drawing.text(46, meaning, "text")
    drawing.text(26, "The line on the left: the next iteration acts with", "text")
    drawing.text(26, "the weights that this one has learnt.", "text")
    height = round(drawing.y + 8)
    head = '<path d="M0 0L7 3.5L0 7Z" fill="#555"/>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
            "<title>Functions, tensors and equations of sppo_continuous.py</title>",
            f"<style>\n{STYLE}\n</style>",
            '<defs><marker id="head" markerWidth="7" markerHeight="7" refX="6" refY="3.5" '
            f'markerUnits="userSpaceOnUse" orient="auto">{head}</marker></defs>',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *drawing.elements,
            "</svg>\n",
        ]
    )


def names(parts: list) -> list[str]:
    """The functions on the map."""
    boxes = [part for part in parts if isinstance(part, Box)]
    return [name for box in boxes for name in (box.name, *names(box.calls))]


if __name__ == "__main__":
    FIGURE.write_text(draw(sppo_continuous.Args()), encoding="utf-8")
