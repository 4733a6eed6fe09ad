"""What the runs of a study logged, as tables: `runs.csv`, `evaluations.csv` and `random.csv`."""

import os
import sys
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
from study_file import KEY, SCORES, Study, StudyError
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
    files; where two hold a step, that which begins later counts. Their names go by clocks."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow

    parts = []
    for path in folder.glob("runs/*/events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        steps = [point.step for points in tags.values() for point in points]
        if steps:
            parts.append((min(steps), max(steps), tags))
    merged = defaultdict(dict)
    for *_, tags in sorted(parts, key=lambda part: part[:2]):
        for tag, points in tags.items():
            merged[tag].update({point.step: point.value for point in points})
    return {tag: sorted(points.items()) for tag, points in merged.items()}


def logged(points: dict[str, list[tuple[int, float]]]) -> dict[str, float]:
    """The mean of all that a run logged under each of TAGS."""
    values = {name: [value for _, value in points.get(tag, [])] for name, tag in TAGS.items()}
    return {name: np.mean(x) if x else np.nan for name, x in values.items()}


def read_table(results: Path, name: str) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Its rows as they are written, by what they have of KEY; none if there is no such table."""
    path = results / f"{name}.csv"
    rows = defaultdict(list)
    if path.exists():
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        for row in table[COLUMNS[name]].to_dict("records"):
            rows[tuple(row[column] for column in KEY if column in row)].append(row)
    return rows


def write_table(results: Path, name: str, rows: list[dict]) -> None:
    rows = [{k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    text = pd.DataFrame(rows, columns=COLUMNS[name]).to_csv(index=False, lineterminator="\n")
    write_whole(results / f"{name}.csv", text.encode())


def commands(study: Study, folder: Path, rows: dict) -> dict[tuple, str | None]:
    """The commands of a study's cells, by key; None where pilots are not finished. Raises
    StudyError where a row of a table, or a run in its folder, has another command."""
    pilots = defaultdict(list)  # their mean weights, by method, environment and condition
    for cell in [cell for cell in study.cells if cell.pilot]:
        weight = np.nan
        if cell.key in rows:
            weight = float(rows[cell.key][0]["mean_weight"])
        elif finished(folder / cell.name):
            weight = float(f"{logged(scalars(folder / cell.name))['mean_weight']:.7g}")
        pilots[cell.key[:3]].append(weight)
    weights = {case: f"{np.mean(x):.4g}" for case, x in pilots.items() if np.isfinite(x).all()}
    asked = {cell.key: cell.command(weights) for cell in study.cells}
    for key, (row,) in rows.items():
        if row["command"] != asked.get(key):
            raise StudyError(f"the tables hold a run that is not of this study: {row['command']}")
    for cell in study.cells:
        place = folder / cell.name
        if asked[cell.key] and (finished(place) or checkpoint_of(place)):  # else worth nothing
            if (place / "command.txt").read_text(encoding="utf-8") != asked[cell.key]:
                raise StudyError(f"{place} has other flags than the study; remove it to run anew")
    return asked


def collect(study: Study, folder: Path, results: Path) -> None:
    """Writes the tables of all finished runs. Rows of those whose folders are not here stay."""
    evaluations, runs, random = (read_table(results, name) for name in COLUMNS)
    commands(study, folder, runs)
    for cell in study.cells:
        place = folder / cell.name
        if finished(place):
            key = dict(zip(KEY, cell.key))
            run, curve = rows_of(place, study.score)
            evaluations[cell.key] = [key | {"step": step, "score": x} for step, x in curve]
            runs[cell.key] = [key | run]
    for env_id in study.environments:
        if (env_id,) not in random:
            returns = play_uniformly(env_id, 100)
            row = {"environment": env_id, "episodes": 100}
            random[env_id,] = [row | {"mean": np.mean(returns), "std": np.std(returns)}]
    order = [cell.key for cell in study.cells]
    write_table(results, "evaluations", [row for key in order for row in evaluations[key]])
    write_table(results, "runs", [row for key in order for row in runs[key]])  # has its evaluations
    write_table(results, "random", [row for rows in random.values() for row in rows])
    print(f"{sum(map(len, runs.values()))} of {len(order)} runs in {results}")


def rows_of(folder: Path, score: str) -> tuple[dict, list[tuple[int, float]]]:
    """What the tables say of a finished run: its row, and (step, score) of its evaluations.
    StudyError: its event files end before it did."""
    record = finished(folder)
    points = scalars(folder)
    curve = [(step - 1, x) for step, x in points.get("eval/episodic_return", [(1, np.nan)])]
    if record["steps"] != curve[-1][0]:
        steps = f"{record['steps']:,} steps, its event files of {curve[-1][0]:,}"
        raise StudyError(f"{folder}: done.json tells of {steps}")
    score = np.mean([x for _, x in curve[SCORES[score]]])
    run = {"steps": record["steps"], "score": score, "command": record["command"]}
    return run | logged(points), curve


def play_uniformly(env_id: str, episodes: int) -> list[float]:
    """Raw returns of the uniform policy; always the same episodes."""
    sys.path.append(os.getcwd())  # for environments of one's own
    options = {}
    if env_id.startswith("ALE/"):
        import ale_py  # noqa: F401  (registers games)

        options = {"frameskip": 4, "repeat_action_probability": 0}
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(env_id, **options), episodes)
    env.action_space.seed(0)
    env.reset(seed=0)
    while env.episode_count < episodes:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return list(env.return_queue)
