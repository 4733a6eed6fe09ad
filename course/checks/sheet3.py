"""Checks sheet 3 by autograd, and writes the script with the sheet's own reverse term."""

import inspect
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from checks import RIGHT, ROOT, SCRIPT, differs, load, patched, report, to_array

OWN_SCRIPT = ROOT / "own" / "sppo_own_term.py"
STUDY = "course/exercises/sheet3_own_reverse_term.toml"
WEIGHTS = [(0.5, 20.0, -1.0), (1.0, 1.0, -0.5), (0.0, 2.0, -2.0)]  # α, β, Z

LOSS = "def symmetric_ppo_loss("
TWO_WEIGHTS = """\
    if args.importance_weighted_reverse:
        weight = (-old_joint_logprob.clamp(min=-80)).exp() - ratio
    else:
        weight = (1 - logprob.exp()).mean(1)
"""
ONE_WEIGHT = "    weight = reverse_weight(logprob.sum(1), old_joint_logprob)\n"
LOG_IF_PLAIN = """\
    if not args.importance_weighted_reverse:
        share = old_logprob.exp().mean() / old_logprob.shape[1]
        logged["losses/mean_weight"] = args.alpha + args.beta * abs(args.Z) * share
"""
LOG_ALWAYS = """\
    own_weight = ppo_weight(old_logprob.sum(1), args.alpha, args.beta, args.Z)
    logged["losses/mean_weight"] = own_weight.mean()
"""


def make_logprobs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """log π and log π_old (400,), float64: π_old from 0.001 to 0.999 and r around 1."""
    rng = np.random.default_rng(seed)
    old_logprob = np.log(np.linspace(0.001, 0.999, 400))
    logprob = np.minimum(old_logprob + rng.normal(0, 0.3, 400), -1e-4)
    return torch.from_numpy(logprob).requires_grad_(), torch.from_numpy(old_logprob)


def autograd_slope(sheet: ModuleType, logprob, old_logprob) -> torch.Tensor:
    """dw / d log π, sample by sample. ValueError if there is none."""
    weight = sheet.reverse_weight(logprob, old_logprob)
    if not isinstance(weight, torch.Tensor) or weight.shape != logprob.shape:
        raise ValueError("w must be a tensor of the shape (batch,)")
    if not weight.requires_grad:
        raise ValueError("autograd finds no gradient of w in log π")
    (slope,) = torch.autograd.grad(weight.sum(), logprob)
    return slope


def check_weight(sheet: ModuleType) -> str:
    logprob, old_logprob = make_logprobs()
    slope = autograd_slope(sheet, logprob, old_logprob)
    r, pi = (logprob - old_logprob).exp(), logprob.exp()
    if (
        not slope.isfinite().all()
        or not sheet.reverse_weight(logprob, old_logprob).isfinite().all()
    ):
        return "w or its gradient is not finite for some π between 0.001 and 1"
    if (slope > 1e-9).any():
        return "w grows with log π somewhere: where A > 0 the action would become less likely"
    if (slope > -1e-9).all():
        return "w does not change with log π"
    if not differs(slope, -r):
        return "this has the gradient of the released term"
    if not differs(slope, -pi):
        return "this has the gradient of the plain term"
    one, other = torch.randperm(400, generator=torch.Generator().manual_seed(1)).chunk(2)
    alone = autograd_slope(sheet, logprob[one], old_logprob[one])
    return differs(alone, slope[one], "w of a sample must not depend on other samples: the slope")


def check_slope(sheet: ModuleType) -> str:
    for seed in range(3):
        logprob, old_logprob = make_logprobs(seed)
        expected = autograd_slope(sheet, logprob, old_logprob)
        with torch.no_grad():
            slope = sheet.reverse_slope(logprob, old_logprob)
        wrong = differs(slope, expected, "the slope")
        if wrong:
            return wrong
    return ""


def own_source(sheet: ModuleType) -> str:
    """The script with the sheet's functions in it."""
    functions = [inspect.getsource(x) for x in (sheet.reverse_weight, sheet.ppo_weight)]
    replacements = [
        (LOSS, "\n\n".join([*functions, LOSS])),
        (TWO_WEIGHTS, ONE_WEIGHT),
        (LOG_IF_PLAIN, LOG_ALWAYS),
    ]
    return patched(SCRIPT.read_text(encoding="utf-8"), replacements)


def policy_gradient(script: ModuleType, logprob, old_logprob, **weights) -> torch.Tensor:
    """Of the script's mean loss in log π (batch,), with A = 1 for every sample."""
    columns = [x[:, None] for x in (logprob, old_logprob)]
    args = script.Args(**weights)
    loss, _, _ = script.symmetric_ppo_loss(*columns, torch.ones_like(logprob), 0.2, args)
    (gradient,) = torch.autograd.grad(loss, logprob)
    return gradient


def check_ppo_weight(sheet: ModuleType) -> str:
    """Against the gradients of the patched script, at r = 1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sppo_own_term.py")
        path.write_text(own_source(sheet), encoding="utf-8")
        script = load(path, "sppo_own_term")
    _, old_logprob = make_logprobs()
    logprob = old_logprob.clone().requires_grad_()
    ppo = policy_gradient(script, logprob, old_logprob, alpha=1.0, beta=0.0)
    for alpha, beta, Z in WEIGHTS:
        own = policy_gradient(script, logprob, old_logprob, alpha=alpha, beta=beta, Z=Z)
        weight = script.ppo_weight(old_logprob.clone(), alpha, beta, Z)
        wrong = differs(weight, own / ppo, "the weight")
        if wrong:
            return f"{wrong} for alpha = {alpha}, beta = {beta}, Z = {Z}"
    return ""


def check_control(sheet: ModuleType) -> str:
    if sheet.CONTROL is None:
        raise NotImplementedError
    if sheet.CONTROL not in ("matched", "mean weight"):
        return f"{sheet.CONTROL!r} is none of the two"
    logprob, old_logprob = make_logprobs()
    slope = autograd_slope(sheet, logprob, old_logprob)
    ratio = to_array(
        slope / (logprob - old_logprob).exp()
    )  # reverse over forward, sample by sample
    constant = np.allclose(ratio, ratio[0], rtol=1e-6, atol=0)
    return "" if constant == (sheet.CONTROL == "matched") else "the other one"


def check(sheet: ModuleType) -> dict[str, str]:
    """Prints and returns the verdicts on a sheet."""
    exercises = {
        "reverse_weight": check_weight,
        "reverse_slope": check_slope,
        "ppo_weight": check_ppo_weight,
        "CONTROL": check_control,
    }
    return report({name: partial(run, sheet) for name, run in exercises.items()})


def main(sheet: ModuleType) -> None:
    verdicts = check(sheet)
    if [*verdicts.values()][:3] != [RIGHT] * 3:
        return
    OWN_SCRIPT.parent.mkdir(exist_ok=True)
    OWN_SCRIPT.write_text(own_source(sheet), encoding="utf-8")
    print(f"\n5. Wrote {OWN_SCRIPT.relative_to(ROOT)}. In the folder {ROOT}, run the study:\n")
    print(f"    python studies/study.py run {STUDY} --workers 2")
    print(f"    python studies/study.py collect {STUDY}")
    print(f"    python studies/study.py report {STUDY}")
