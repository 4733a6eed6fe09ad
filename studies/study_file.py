"""Study files: what they may say, and the runs that follow. docs/studies.md explains the format."""

import re
import shlex
import tomllib
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path

from study_run import ROOT

STUDIES = ROOT / "studies"
KEY = ["method", "environment", "condition", "seed", "pilot"]  # columns that name a run in a table
SCORES = {"last": slice(-1, None), "last three": slice(-3, None), "mean": slice(None)}
RESERVED = ["--env-id", "--seed", "--total-timesteps", "--torch-threads", "--resume"]
MEAN_WEIGHT = r"{mean_weight\[(.*?)\]}"


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
        method = f"pilot {self.method}" if self.pilot else self.method
        parts = (method, self.env_id, self.condition, f"seed {self.seed}")
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
    methods: dict
    reference: str
    comparisons: list = field(default_factory=list)
    power: str = ""  # how many seeds it needs, and how that is known
    flags: str = ""
    values: dict = field(default_factory=dict)
    pilot: dict = field(default_factory=dict)
    score: str = "last"  # which of its evaluations make a run's score, one of SCORES
    cells: list[Cell] = field(init=False)  # pilots first

    @property
    def clean(self) -> str | None:
        """The condition without flags."""
        return next((x for x, flags in self.conditions.items() if not flags.strip()), None)


def load(source: str, scale: str | None = None) -> Study:
    """Reads a study file, checks it and expands it into its cells."""
    path = Path(source) if source.endswith(".toml") else STUDIES / f"{source}.toml"
    try:
        return build(tomllib.loads(path.read_text(encoding="utf-8")), path.stem, scale)
    except (StudyError, OSError, ValueError, TypeError, AttributeError) as error:
        raise StudyError(f"{path.name}: {error}") from None  # a key or a type that is wrong


def build(table: dict, name: str, scale: str | None) -> Study:
    """The study that a file's table describes; a scale's keys replace the others."""
    scales = table.pop("scale", {})
    if scale:
        check_names([scale], scales, "scale")
        table = table | scales[scale]
        name = f"{name}-{scale}"
    study = Study(name, **table)
    pilots = re.findall(MEAN_WEIGHT, " ".join(study.methods.values()))
    check_names([study.score], SCORES, "score")
    check_names([study.reference, *pilots, *chain(*study.comparisons)], study.methods, "methods")
    if any(len(set(pair)) != 2 for pair in study.comparisons):
        raise StudyError("a comparison is a pair of methods")

    seeds = as_seeds(study.seeds)
    pilot_seeds = as_seeds(study.pilot.get("seeds", [])) if pilots else []
    if set(pilot_seeds) & set(seeds):
        raise StudyError("pilot seeds must be other ones than the study's")
    study.cells = make_cells(study, dict.fromkeys(pilots), pilot_seeds, pilot=True)
    study.cells += make_cells(study, study.methods, seeds, pilot=False)
    if len({cell.name for cell in study.cells}) < len(study.cells):
        raise StudyError("two methods, environments, conditions or seeds have one name as a folder")
    return study


def make_cells(study: Study, methods: dict, seeds: list[int], pilot: bool) -> list[Cell]:
    """Every method in every environment under every condition with every seed. Seeds outermost: a
    study that is stopped early has some seeds of everything, not all seeds of something."""
    cells = []
    lists = (seeds, methods, study.environments, study.conditions)
    for seed, method, env_id, condition in product(*lists):
        values = {"steps": study.steps} | study.values | study.environments[env_id]
        later = re.sub(f"({MEAN_WEIGHT})", r"{\1}", study.methods[method])  # after the pilots
        script, _, flags = later.partition(" ")
        try:
            flags = f"{study.flags} {flags} {study.conditions[condition]}".format(**values)
        except (KeyError, ValueError, IndexError) as error:
            raise StudyError(f"method {method!r} on {env_id}: there is no value {error}") from None
        if set(RESERVED) & set(shlex.split(flags)):
            raise StudyError(f"method {method!r}: the study itself sets {', '.join(RESERVED)}")
        length = f"--total-timesteps {values['steps']}"
        run = f"{script} --env-id {env_id} --seed {seed} {length} {flags}"
        cells.append(Cell(method, env_id, condition, seed, pilot, run))
    return cells


def check_names(names: list[str], known, what: str) -> None:
    for name in names:
        if name not in known:
            raise StudyError(f"{what}: there is no {name!r} among {', '.join(known)}")


def as_seeds(seeds: int | list[int]) -> list[int]:
    listed = list(range(1, seeds + 1)) if isinstance(seeds, int) else seeds
    if not listed:
        raise StudyError("there are no seeds, of the study or of its pilots")
    return listed
