"""Study files: what they may say, and the runs that follow from it. `study.py` explains the format."""

import ast
import difflib
import itertools
import re
import shlex
import string
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STUDIES = Path(__file__).resolve().parent
ROOT = STUDIES.parent


class StudyError(Exception):
    """Something is wrong with a study file or a call; its text is the one line to print."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    method: str
    env_id: str
    condition: str
    seed: int
    steps: int
    script: str
    flags: str  # may hold {mean_weight[…]}, known once the pilots are finished
    pilot: bool = False

    @property
    def name(self) -> str:
        parts = ("pilot " * self.pilot + self.method, self.env_id, self.condition, f"seed {self.seed}")
        return "__".join(re.sub(r"[^\w.=-]+", "-", part) for part in parts)

    def command(self, mean_weights: dict) -> str | None:
        """Script and flags; None if a mean weight that they need is not known yet."""
        try:
            flags = self.flags.format(mean_weight=mean_weights.get((self.env_id, self.condition), {}))
        except KeyError:
            return None
        run = f"--env-id {self.env_id} --seed {self.seed} --total-timesteps {self.steps}"
        return " ".join(f"{self.script} {run} {flags}".split())


@dataclass
class Study:
    name: str  # of the file, and the scale
    question: str
    beta: str  # how β was fixed
    cells: list[Cell]  # pilots first
    methods: list[str]
    environments: list[str]
    conditions: dict[str, str]  # label: flags
    seeds: list[int]
    reference: str
    comparisons: list[list[str]]
    families: dict[str, list[str]]  # methods that a grid was expanded from, with what they were expanded to

    @property
    def clean(self) -> str | None:
        """The condition without flags."""
        return next((label for label, flags in self.conditions.items() if not flags.strip()), None)


SEEDS = int | list
TYPES = dict(question=str, beta=str, steps=int, seeds=SEEDS, flags=str, reference=str, comparisons=list, values=dict,
             environments=dict, conditions=dict, methods=dict, grid=dict, pilot=dict, scale=dict)
SCALE_TYPES = dict(steps=int, seeds=SEEDS, flags=str, pilot=dict, grid=dict, environments=list, conditions=list,
                   methods=list)
NEEDED = "question beta steps seeds environments conditions methods reference".split()
RESERVED = "--env-id --seed --total-timesteps --torch-threads --resume".split()


def load(source: str, scale: str | None = None) -> Study:
    """Reads a study file, checks it and expands it into its cells."""
    path = Path(source) if source.endswith(".toml") else STUDIES / f"{source}.toml"
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.toml")))
        raise StudyError(f"there is no study {source}; there are {known}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StudyError(f"{path} cannot be read: {error}") from None
    try:
        return build(table, path.stem, scale)
    except StudyError as error:
        raise StudyError(f"{path.name}: {error}") from None


def build(table: dict, name: str, scale: str | None) -> Study:
    check_types(table, TYPES, "the file")
    if missing := [key for key in NEEDED if not table.get(key)]:
        raise StudyError(f"it does not say: {', '.join(missing)}")
    scales = table.get("scale", {})
    if scale is not None and scale not in scales:
        raise StudyError(f"there is no scale {scale!r}; there are {', '.join(scales) or 'none'}")
    chosen = scales.get(scale, {})
    check_types(chosen, SCALE_TYPES, f"scale.{scale}")
    check_types(table["environments"], dict.fromkeys(table["environments"], dict), "environments")
    for key in ("conditions", "methods"):
        check_types(table[key], dict.fromkeys(table[key], str), key)
    pilot = table.get("pilot", {}) | chosen.get("pilot", {})
    check_types(pilot, dict(seeds=SEEDS), "pilot")

    environments = choose(table["environments"], chosen.get("environments"), "environment")
    conditions = choose(table["conditions"], chosen.get("conditions"), "condition")
    templates = choose(table["methods"], chosen.get("methods"), "method")
    grid = table.get("grid", {}) | chosen.get("grid", {})
    expanded = {method: expand(method, template, grid) for method, template in templates.items()}
    methods = {key: text for members in expanded.values() for key, text in members.items()}
    seeds = as_seeds(chosen.get("seeds", table["seeds"]), "seeds")

    def cells_of(method: str, template: str, seeds: list[int], pilot: bool) -> list[Cell]:
        script, _, rest = template.partition(" ")
        cells = []
        for env_id, own in environments.items():
            values = {"Z": -1.0} | table.get("values", {}) | own | {"mean_weight": AsWritten()}
            if "alpha" in values and "beta" in values:
                values["matched"] = f"{values['alpha'] + values['beta'] * abs(values['Z']):g}"
            steps = chosen.get("steps", own.get("steps", table["steps"]))
            if not isinstance(steps, int) or steps < 1:
                raise StudyError(f"steps must be a positive number; they are {steps!r}")
            for condition, noise in conditions.items():
                try:
                    flags = f"{chosen.get('flags', table.get('flags', ''))} {rest} {noise}".format(**values)
                except (KeyError, ValueError, IndexError) as error:
                    raise StudyError(f"method {method!r} on {env_id}: there is no value {error}") from None
                check_flags(script, flags, f"method {method!r}, condition {condition!r}")
                cells += [Cell(method, env_id, condition, seed, steps, script, flags, pilot) for seed in seeds]
        return cells

    pilots = list(dict.fromkeys(of for text in methods.values() for key, of in fields(text) if key == "mean_weight"))
    pilot_seeds = as_seeds(pilot.get("seeds", []), "pilot seeds") if pilots else []
    for method in pilots:
        if method not in table["methods"]:
            raise StudyError(f"{{mean_weight[{method}]}}: there is no method {method!r}")
        if shared := set(pilot_seeds) & set(seeds):
            raise StudyError(f"pilot seeds must be other ones than the study's; shared: {sorted(shared)}")
    cells = [cell for method in pilots for cell in cells_of(method, table["methods"][method], pilot_seeds, True)]
    # Seeds outermost: a study stopped early has some seeds of everything instead of all seeds of something.
    main = [cell for method, template in methods.items() for cell in cells_of(method, template, seeds, False)]
    cells += sorted(main, key=lambda cell: seeds.index(cell.seed))
    if len({cell.name for cell in cells}) < len(cells):
        raise StudyError("two methods, environments or conditions have the same name once it names a folder")

    comparisons = table.get("comparisons", [])
    known = {key for method, template in table["methods"].items() for key in (method, *expand(method, template, grid))}
    for pair in comparisons:
        if not isinstance(pair, list) or len(pair) != 2 or not set(pair) <= known:
            raise StudyError(f"a comparison is a pair of the methods; this is none: {pair}")
    if table["reference"] not in known:
        raise StudyError(f"reference: there is no method {table['reference']!r}")
    families = {family: list(members) for family, members in expanded.items() if len(members) > 1}
    return Study(
        name=name + (f"-{scale}" if scale else ""), question=table["question"], beta=table["beta"], cells=cells,
        methods=list(methods), environments=list(environments), conditions=conditions, seeds=seeds,
        reference=table["reference"], comparisons=[pair for pair in comparisons if set(pair) <= {*methods, *families}],
        families=families,
    )


class AsWritten:
    """Formats {mean_weight[NAME]} as itself, to be filled in after the pilots."""

    def __getitem__(self, name: str) -> str:
        return f"{{mean_weight[{name}]}}"


def fields(template: str) -> list[tuple[str, str]]:
    """What stands in braces: ("beta", ""), ("mean_weight", "DSPPO")."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return [(name.split("[")[0], name.partition("[")[2].rstrip("]")) for name in names]


def expand(name: str, template: str, grid: dict[str, list]) -> dict[str, str]:
    """A method for every combination of the grid's values that its template mentions; itself if it mentions none."""
    axes = [axis for axis in grid if (axis, "") in fields(template)]
    methods = {}
    for values in itertools.product(*(grid[axis] for axis in axes)):
        text = template
        for axis, value in zip(axes, values):
            text = text.replace(f"{{{axis}}}", str(value))
        methods[" ".join([name, *(f"{axis}={value}" for axis, value in zip(axes, values))])] = text
    return methods


def choose(table: dict, chosen: list[str] | None, what: str) -> dict:
    """The rows of a table that a scale names."""
    for name in chosen or []:
        if name not in table:
            raise StudyError(f"{what} {name!r} is not in the file; there are {', '.join(table)}")
    return {name: table[name] for name in (table if chosen is None else chosen)}


def as_seeds(seeds: int | list[int], what: str) -> list[int]:
    listed = list(range(1, seeds + 1)) if isinstance(seeds, int) else seeds
    if not listed or not all(isinstance(seed, int) and seed >= 0 for seed in listed) or len(set(listed)) < len(listed):
        raise StudyError(f"{what} must be a number of seeds or a list of different ones; it is {seeds!r}")
    return listed


def check_types(table: dict, types: dict, where: str) -> None:
    for key, value in table.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            raise StudyError(f"{where} has an unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if not isinstance(value, types[key]) or isinstance(value, bool):
            words = {str: "text", int: "a number", list: "a list", dict: "a table", SEEDS: "a number or a list"}
            raise StudyError(f"{where}: {key} must be {words[types[key]]}; it is {value!r}")


@cache
def flags_of(script: str) -> set[str]:
    """The fields of a script's `Args`."""
    tree = ast.parse((ROOT / script).read_text())
    args = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"), None)
    return {node.target.id for node in getattr(args, "body", []) if isinstance(node, ast.AnnAssign)}


def check_flags(script: str, flags: str, where: str) -> None:
    """Raises StudyError unless the script has these flags: a slip shall not wait for its turn to be found."""
    if not (ROOT / script).is_file():
        raise StudyError(f"{where}: there is no script {script!r}")
    for word in shlex.split(flags):
        if word in RESERVED:
            raise StudyError(f"{where}: {word} is set by the study")
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and not {name, name.removeprefix("no_")} & flags_of(script):
            raise StudyError(f"{where}: {script} has no flag {word}")
