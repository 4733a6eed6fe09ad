"""Study files: what they may say, and the runs that follow. docs/studies.md explains the format."""

import functools
import itertools
import re
import shlex
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from study_run import ROOT

STUDIES = ROOT / "studies"
KEY = ["method", "environment", "condition", "seed", "pilot"]  # columns that name a run in a table
RESERVED = "--env-id --seed --total-timesteps --torch-threads --resume".split()


class StudyError(Exception):
    """Something is wrong with a study file or a call; its text is the one line to print."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    method: str
    env_id: str
    condition: str
    seed: int
    pilot: bool
    template: str  # its command; may hold {mean_weight[...]}, known once the pilots are finished

    @property
    def key(self) -> tuple[str, ...]:
        """KEY, as it stands in tables."""
        return self.method, self.env_id, self.condition, str(self.seed), str(int(self.pilot))

    @property
    def name(self) -> str:
        """The name of its folder, in ASCII."""
        parts = ("pilot " * self.pilot + self.method, *self.key[1:3], f"seed {self.seed}")
        return "__".join(re.sub(r"[^\w.=-]+", "-", part, flags=re.ASCII) for part in parts)

    def command(self, mean_weights: dict) -> str | None:
        """Script and flags; None if they need a mean weight that is not known yet."""
        here = {k[0]: w for k, w in mean_weights.items() if k[1:] == (self.env_id, self.condition)}
        try:
            return " ".join(self.template.format(mean_weight=here).split())
        except KeyError:
            return None


@dataclass
class Study:
    """What a study file says, key by key, and what follows from it."""

    name: str  # of the file, and the scale
    question: str
    beta: str  # how beta was fixed
    steps: int
    seeds: int | list[int]
    environments: dict
    conditions: dict
    methods: dict  # once it is built: also those that the grid makes of one
    reference: str
    comparisons: list = field(default_factory=list)
    power: str = ""  # how many seeds it needs, and how that is known
    flags: str = ""
    values: dict = field(default_factory=dict)
    grid: dict = field(default_factory=dict)
    pilot: dict = field(default_factory=dict)
    scale: dict = field(default_factory=dict)
    score: str = "last"  # what counts of a run's evaluations: the last one, or their mean
    cells: list[Cell] = field(init=False)  # pilots first
    families: dict = field(init=False)  # methods that the grid expands, with their expansions
    clean: str | None = field(init=False)  # the condition without flags


def load(source: str, scale: str | None = None) -> Study:
    """Reads a study file, checks it and expands it into its cells."""
    path = Path(source) if source.endswith(".toml") else STUDIES / f"{source}.toml"
    try:
        return build(tomllib.loads(path.read_text(encoding="utf-8")), path.stem, scale)
    except (StudyError, OSError, ValueError, TypeError, AttributeError) as error:
        raise StudyError(f"{path.name}: {error}") from None  # a key or a type that is wrong


def build(table: dict, name: str, scale: str | None) -> Study:
    """The study that a file's table describes."""
    study = Study(name, **table)
    every = study.methods
    known = {k: v for m in every for k, v in {m: 0, **expand(m, every[m], study.grid)}.items()}
    choose(known, [study.reference, *itertools.chain(*study.comparisons)], "methods")
    choose({"last": 0, "mean": 0}, [study.score], "score")
    if any(len(set(pair)) != 2 for pair in study.comparisons):
        raise StudyError("a comparison is a pair of methods")
    if scale:
        study = at_scale(study, scale)
    seeds = as_seeds(study.seeds)
    groups = {method: expand(method, text, study.grid) for method, text in study.methods.items()}
    study.families = {method: list(group) for method, group in groups.items() if len(group) > 1}
    study.methods = {key: text for group in groups.values() for key, text in group.items()}
    present = {*study.methods, *study.families}
    study.comparisons = [pair for pair in study.comparisons if set(pair) <= present]
    unnoised = [label for label, flags in study.conditions.items() if not flags.strip()]
    study.clean = unnoised[0] if unnoised else None

    piloted = re.findall(r"{mean_weight\[(.*?)\]}", " ".join(study.methods.values()))
    pilots = choose(every, list(dict.fromkeys(piloted)), "mean_weight")
    pilot_seeds = as_seeds(study.pilot.get("seeds", [])) if pilots else []
    if set(pilot_seeds) & set(seeds):
        raise StudyError("pilot seeds must be other ones than the study's")
    # Seeds outermost: a study stopped early has some seeds of everything, not all of something.
    study.cells = make_cells(study, pilots, pilot_seeds, pilot=True)
    study.cells += make_cells(study, study.methods, seeds, pilot=False)
    if len({cell.name for cell in study.cells}) < len(study.cells):
        raise StudyError("two methods, environments or conditions have one name as a folder")
    return study


def at_scale(study: Study, scale: str) -> Study:
    """The study with what one of its scales puts in the place of its own."""
    change = choose(study.scale, [scale], "scale")[scale]
    chosen = {}
    for key in ("environments", "conditions", "methods"):
        chosen[key] = choose(getattr(study, key), change.get(key), key)
    for key in ("grid", "pilot"):
        chosen[key] = getattr(study, key) | change.get(key, {})
    if "steps" in change:  # they hold in every environment
        own = chosen["environments"].items()
        chosen["environments"] = {env_id: x | {"steps": change["steps"]} for env_id, x in own}
    return replace(study, **change | chosen, name=f"{study.name}-{scale}")


def make_cells(study: Study, methods: dict, seeds: list[int], pilot: bool) -> list[Cell]:
    """Every method in every environment under every condition with every seed."""
    cells = []
    lists = (seeds, methods, study.environments, study.conditions)
    for seed, method, env_id, condition in itertools.product(*lists):
        values = {"Z": -1.0, "steps": study.steps} | study.values | study.environments[env_id]
        if "alpha" in values and "beta" in values:
            values["matched"] = f"{values['alpha'] + values['beta'] * abs(values['Z']):g}"
        steps = values["steps"]
        if not isinstance(steps, int) or steps < 1:
            raise StudyError(f"steps must be a positive number; they are {steps!r}")
        later = re.sub(r"({mean_weight\[.*?\]})", r"{\1}", methods[method])  # after the pilots
        script, _, flags = later.partition(" ")
        try:
            flags = f"{study.flags} {flags} {study.conditions[condition]}".format(**values)
        except (KeyError, ValueError, IndexError) as error:
            raise StudyError(f"method {method!r} on {env_id}: there is no value {error}") from None
        if set(RESERVED) & set(shlex.split(flags)):
            raise StudyError(f"method {method!r}: the study itself sets {', '.join(RESERVED)}")
        run = f"{script} --env-id {env_id} --seed {seed} --total-timesteps {steps} {flags}"
        cells.append(Cell(method, env_id, condition, seed, pilot, run))
    return cells


def expand(name: str, template: str, grid: dict[str, list]) -> dict[str, str]:
    """A method for each combination of the grid's values that it mentions; else itself alone."""
    axes = [axis for axis in grid if f"{{{axis}}}" in template]
    methods = {}
    for values in itertools.product(*(grid[axis] for axis in axes)):
        text, label = template, name
        for axis, value in zip(axes, values):
            text = text.replace(f"{{{axis}}}", str(value))
            label += f" {axis}={value}"
        methods[label] = text
    return methods


def choose(table: dict, names: list[str] | None, what: str) -> dict:
    """The rows of a table that are named; all without names."""
    for name in names or []:
        if name not in table:
            raise StudyError(
                f"{what}: there is no {name!r}; there are {', '.join(table) or 'none'}"
            )
    return {name: table[name] for name in (table if names is None else names)}


def as_seeds(seeds: int | list[int]) -> list[int]:
    listed = list(range(1, seeds + 1)) if isinstance(seeds, int) else seeds
    whole = all(isinstance(seed, int) and seed >= 0 for seed in listed)
    if not listed or not whole or len(set(listed)) < len(listed):
        raise StudyError(f"seeds must be a number or a list of different ones, not {seeds!r}")
    return listed


@functools.cache
def flags_of(script: str) -> set[str]:
    if not (ROOT / script).is_file():
        raise StudyError(f"there is no script {script!r}")
    source = (ROOT / script).read_text(encoding="utf-8")
    names = re.findall(r"^    (\w+): ", source, re.MULTILINE)  # among them those of `Args`
    return {f"--{prefix}{name.replace('_', '-')}" for name in names for prefix in ("", "no-")}


def check_flags(study: Study) -> None:
    """Raises StudyError unless all scripts have their flags: before the first run, not late."""
    for cell in study.cells:
        script, *words = shlex.split(cell.template)
        unknown = {x for x in words if x.startswith("--")} - flags_of(script) - set(RESERVED)
        if unknown:
            raise StudyError(f"{script} has no flag {' '.join(sorted(unknown))}")
