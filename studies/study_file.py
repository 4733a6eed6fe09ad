"""Study files: what they may say, and the runs that follow from it. `docs/studies.md` explains the format."""

import itertools
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

STUDIES = Path(__file__).resolve().parent
ROOT = STUDIES.parent
KEY = ["method", "environment", "condition", "seed", "pilot"]  # the columns by which tables know a run


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
    def key(self) -> tuple[str, ...]:
        """KEY, as it stands in tables."""
        return self.method, self.env_id, self.condition, str(self.seed), str(int(self.pilot))

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = ("pilot " * self.pilot + self.method, self.env_id, self.condition, f"seed {self.seed}")
        return "__".join(re.sub(r"[^\w.=-]+", "-", part) for part in parts)

    def command(self, mean_weights: dict) -> str | None:
        """Script and flags; None if a mean weight that they need is not known yet."""
        try:
            here = {method: x for (method, *at), x in mean_weights.items() if at == [self.env_id, self.condition]}
            flags = self.flags.format(mean_weight=here)
        except KeyError:
            return None
        run = f"--env-id {self.env_id} --seed {self.seed} --total-timesteps {self.steps}"
        return " ".join(f"{self.script} {run} {flags}".split())


@dataclass
class Study:
    name: str  # of the file, and the scale
    question: str
    beta: str  # how β was fixed
    power: str  # how many seeds it needs, and how that is known
    cells: list[Cell]  # pilots first
    methods: list[str]
    environments: list[str]
    conditions: list[str]
    clean: str | None  # the condition without flags
    reference: str
    comparisons: list[list[str]]
    families: dict[str, list[str]]  # methods that a grid was expanded from, with what they were expanded to
    score: str  # what counts of a run's evaluations: the `last` one, or the `mean` of all


NEEDED = "question beta steps seeds environments conditions methods reference".split()
SCALED = "question steps seeds flags pilot grid environments conditions methods".split()
ALLOWED = [*NEEDED, *"power flags comparisons values grid pilot scale score".split()]
RESERVED = "--env-id --seed --total-timesteps --torch-threads --resume".split()


def load(source: str, scale: str | None = None) -> Study:
    """Reads a study file, checks it and expands it into its cells."""
    path = Path(source) if source.endswith(".toml") else STUDIES / f"{source}.toml"
    try:
        return build(tomllib.loads(path.read_text()), path.stem, scale)
    except (StudyError, OSError, ValueError, TypeError, AttributeError) as error:  # of values of another type
        raise StudyError(f"{path.name}: {error}") from None


def build(table: dict, name: str, scale: str | None) -> Study:
    if missing := [key for key in NEEDED if not table.get(key)]:
        raise StudyError(f"it does not say: {', '.join(missing)}")
    scales = table.get("scale", {})
    chosen = choose(scales, [scale], "scale")[scale] if scale else {}
    for keys, allowed in ((table, ALLOWED), (chosen, SCALED)):
        choose(dict.fromkeys(allowed), list(keys), "key")
    names = "environments", "conditions", "methods"
    environments, conditions, templates = (choose(table[key], chosen.get(key), key) for key in names)
    grid, pilot = (table.get(key, {}) | chosen.get(key, {}) for key in ("grid", "pilot"))
    expanded = {method: expand(method, template, grid) for method, template in templates.items()}
    methods = {key: text for members in expanded.values() for key, text in members.items()}
    seeds = as_seeds(chosen.get("seeds", table["seeds"]), "seeds")

    def cells_of(method: str, template: str, seeds: list[int], pilot: bool) -> list[Cell]:
        script, _, rest = re.sub(r"({mean_weight\[.*?\]})", r"{\1}", template).partition(" ")  # known after the pilots
        cells = []
        for env_id, own in environments.items():
            values = {"Z": -1.0} | table.get("values", {}) | own
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

    pilots = list(dict.fromkeys(re.findall(r"{mean_weight\[(.*?)\]}", " ".join(methods.values()))))
    pilot_seeds = as_seeds(pilot.get("seeds", []), "pilot seeds") if pilots else []
    if shared := set(pilot_seeds) & set(seeds):
        raise StudyError(f"pilot seeds must be other ones than the study's; shared: {sorted(shared)}")
    pilot_methods = choose(table["methods"], pilots, "mean_weight")
    cells = [cell for method, text in pilot_methods.items() for cell in cells_of(method, text, pilot_seeds, True)]
    # Seeds outermost: a study stopped early has some seeds of everything instead of all seeds of something.
    main = [cell for method, template in methods.items() for cell in cells_of(method, template, seeds, False)]
    cells += sorted(main, key=lambda cell: seeds.index(cell.seed))
    if len({cell.name for cell in cells}) < len(cells):
        raise StudyError("two methods, environments or conditions have the same name once it names a folder")

    comparisons = table.get("comparisons", [])
    known = {key: None for method, text in table["methods"].items() for key in (method, *expand(method, text, grid))}
    choose(known, [table["reference"]], "reference")
    for pair in comparisons:
        if len(choose(known, pair, "comparisons")) != 2:
            raise StudyError(f"a comparison is a pair of methods; this is none: {pair}")
    families = {family: list(members) for family, members in expanded.items() if len(members) > 1}
    return Study(
        name=name + (f"-{scale}" if scale else ""), question=chosen.get("question", table["question"]),
        beta=table["beta"], power=table.get("power", ""), cells=cells,
        methods=list(methods), environments=list(environments), conditions=list(conditions),
        clean=next((label for label, flags in conditions.items() if not flags.strip()), None),
        reference=table["reference"], comparisons=[pair for pair in comparisons if set(pair) <= {*methods, *families}],
        families=families, score=[*choose({"last": 0, "mean": 0}, [table.get("score", "last")], "score")][0],
    )


def expand(name: str, template: str, grid: dict[str, list]) -> dict[str, str]:
    """A method for every combination of the grid's values that its template mentions; itself if it mentions none."""
    axes, methods = [axis for axis in grid if f"{{{axis}}}" in template], {}
    for values in itertools.product(*(grid[axis] for axis in axes)):
        text = template
        for axis, value in zip(axes, values):
            text = text.replace(f"{{{axis}}}", str(value))
        methods[" ".join([name, *(f"{axis}={value}" for axis, value in zip(axes, values))])] = text
    return methods


def choose(table: dict, names: list[str] | None, what: str) -> dict:
    """The rows of a table that are named; all without names."""
    for name in names or []:
        if name not in table:
            raise StudyError(f"{what}: there is no {name!r}; there are {', '.join(table) or 'none'}")
    return {name: table[name] for name in (table if names is None else names)}


def as_seeds(seeds: int | list[int], what: str) -> list[int]:
    listed = list(range(1, seeds + 1)) if isinstance(seeds, int) else seeds
    if not listed or not all(isinstance(seed, int) and seed >= 0 for seed in listed) or len(set(listed)) < len(listed):
        raise StudyError(f"{what} must be a number of seeds or a list of different ones; it is {seeds!r}")
    return listed


def check_flags(script: str, flags: str, where: str) -> None:
    """Raises StudyError unless the script has these flags: a slip shall not wait for its turn to be found."""
    if not (ROOT / script).is_file():
        raise StudyError(f"{where}: there is no script {script!r}")
    known = set(re.findall(r"^    (\w+): ", (ROOT / script).read_text(), re.MULTILINE))  # among them those of `Args`
    for word in shlex.split(flags):
        if word in RESERVED:
            raise StudyError(f"{where}: {word} is set by the study")
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and not {name, name.removeprefix("no_")} & known:
            raise StudyError(f"{where}: {script} has no flag {word}")
