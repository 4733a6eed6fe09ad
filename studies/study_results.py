"""What the runs of a study logged, as tables: `runs.csv`, `evaluations.csv` and `random.csv`."""

import os
import sys
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
from study_file import KEY, Study, StudyError
from study_run import checkpoint_of, finished, write_whole

TAGS = {
    "mean_weight": "losses/mean_weight",
    "flips_noise": "advantage/sign_flips_noise",
    "flips_normalization": "advantage/sign_flips_normalization",
}
COLUMNS = {
    "evaluations": [*KEY, "step", "score"],
    "runs": [*KEY, "steps", "score", *TAGS, "command"],
    "random": ["environment", "episodes", "mean", "std"],
}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All points of a run's TensorBoard files, (step, value) by tag. A resumed run has several
    files; from the first step of one on, it counts instead of those that begin earlier."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow

    parts = []
    for path in checkpoint_of(folder).parent.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        steps = [point.step for points in tags.values() for point in points]
        if steps:
            parts.append((min(steps), max(steps), tags))
    merged = {}
    for first, _, tags in sorted(parts, key=lambda part: part[:2]):  # names go by clocks
        for tag in merged:
            merged[tag] = [(step, value) for step, value in merged[tag] if step < first]
        for tag, points in tags.items():
            merged.setdefault(tag, []).extend((point.step, point.value) for point in points)
    return merged


def means(points: dict[str, list[tuple[int, float]]]) -> dict[str, float]:
    logged = {name: [value for _, value in points.get(tag, [])] for name, tag in TAGS.items()}
    return {name: np.mean(values) if values else np.nan for name, values in logged.items()}


def read_table(results: Path, name: str) -> list[dict]:
    """Its rows as they are written, all text."""
    path = results / f"{name}.csv"
    if not path.exists():
        return []
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    return table[COLUMNS[name]].to_dict("records")


def write_table(results: Path, name: str, rows: list[dict]) -> None:
    rows = [{k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    text = pd.DataFrame(rows, columns=COLUMNS[name]).to_csv(index=False, lineterminator="\n")
    write_whole(results / f"{name}.csv", text.encode())


def key_of(row: dict) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def commands(study: Study, folder: Path, rows: list[dict]) -> dict[tuple, str | None]:
    """The commands of a study's cells, by key; None where pilots are not finished. Raises
    StudyError where a row of a table, or a run in its folder, has another command."""
    table = {key_of(row): row for row in rows}
    pilots = defaultdict(list)  # their mean weights, by method, environment and condition
    for cell in [cell for cell in study.cells if cell.pilot]:
        weight = np.nan
        if cell.key in table:
            weight = float(table[cell.key]["mean_weight"])
        elif finished(folder / cell.name):
            weight = float(f"{means(scalars(folder / cell.name))['mean_weight']:.7g}")
        pilots[cell.key[:3]].append(weight)
    weights = {case: f"{np.mean(x):.4g}" for case, x in pilots.items() if np.isfinite(x).all()}
    asked = {cell.key: cell.command(weights) for cell in study.cells}
    for key, row in table.items():
        if row["command"] != asked.get(key):
            raise StudyError(f"the tables hold a run that is not of this study: {row['command']}")
    for cell in study.cells:
        place = folder / cell.name
        if asked[cell.key] and (finished(place) or checkpoint_of(place)):  # else worth nothing
            if (place / "command.txt").read_text(encoding="utf-8") != asked[cell.key]:
                raise StudyError(f"{place} has other flags than the study; remove it to run anew")
    return asked


def run_row(folder: Path, points: dict, score: str) -> dict:
    """Of a finished run, as far as its files tell it."""
    record = finished(folder)
    steps, values = zip(*points.get("eval/episodic_return", [(1, np.nan)]))
    if record["steps"] != steps[-1] - 1:
        steps = f"{record['steps']:,} steps, its event files of {steps[-1] - 1:,}"
        raise StudyError(f"{folder}: done.json tells of {steps}")
    row = {"steps": steps[-1] - 1, "score": values[-1] if score == "last" else np.mean(values)}
    return row | means(points) | {"command": record["command"]}


def collect(study: Study, folder: Path, results: Path) -> None:
    """Adds to the tables a row for each finished run, and one for each evaluation, of runs under
    way, too. Rows of runs whose folders are not here stay."""
    tables = {name: read_table(results, name) for name in ("evaluations", "runs")}
    commands(study, folder, tables["runs"])
    for cell in study.cells:
        place = folder / cell.name
        if checkpoint_of(place):
            points = scalars(place)
            key = dict(zip(KEY, cell.key))
            for name, rows in tables.items():
                tables[name] = [row for row in rows if key_of(row) != cell.key]
            for step, score in points.get("eval/episodic_return", []):  # logged a step later
                tables["evaluations"].append(key | {"step": step - 1, "score": score})
            if finished(place):
                tables["runs"].append(key | run_row(place, points, study.score))
    order = {cell.key: i for i, cell in enumerate(study.cells)}
    for name, rows in tables.items():  # in this order: each run has its evaluations
        known = [row for row in rows if key_of(row) in order]
        write_table(results, name, sorted(known, key=lambda row: order[key_of(row)]))
    random_scores(study, results)
    counts = f"{len(tables['runs'])} of {len(study.cells)} runs"
    print(f"{counts} and {len(tables['evaluations'])} evaluations in {results}")


def random_scores(study: Study, results: Path) -> None:
    """Adds the environments whose uniform policy was not played yet, 100 episodes each."""
    rows = read_table(results, "random")
    for env_id in study.environments:
        if all(row["environment"] != env_id for row in rows):
            returns = play_uniformly(env_id, 100)
            numbers = {"mean": np.mean(returns), "std": np.std(returns)}
            rows.append({"environment": env_id, "episodes": 100} | numbers)
    write_table(results, "random", rows)


def play_uniformly(env_id: str, episodes: int) -> list[float]:
    """Raw returns of the uniform policy; always the same episodes, of 100,000 steps at most."""
    sys.path.append(os.getcwd())  # for environments of one's own
    options = {}
    if env_id.startswith("ALE/"):
        import ale_py  # noqa: F401  (registers games)

        options = {"frameskip": 4, "repeat_action_probability": 0}
    env = gym.make(env_id, **options)
    env.action_space.seed(0)
    env.reset(seed=0)
    returns = []
    for _ in range(episodes):
        score = 0.0
        for _ in range(100_000):
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            score += np.asarray(reward).item()
            if terminated or truncated:
                break
        returns.append(score)
        env.reset()
    return returns
