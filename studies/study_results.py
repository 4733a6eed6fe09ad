"""What the runs of a study logged, as tables: `runs.csv`, `evaluations.csv`, `random.csv`, and `pilots.json`, w̄."""

import csv
import json
import logging
import math
import os
import shutil
import sys
from pathlib import Path

from study_file import ROOT, Cell, Study, StudyError

TAGS = dict(mean_weight="losses/mean_weight", flips_noise="advantage/sign_flips_noise",
            flips_normalization="advantage/sign_flips_normalization")


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all, whatever happens when."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All points of a cell's TensorBoard files, (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes seconds

    logging.getLogger("tensorboard").setLevel("ERROR")  # it warns of resumed runs
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mean_weights(study: Study, folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """w̄ by (environment, condition) and method: the mean over all points of all pilot runs, once these are finished.

    Kept in `pilots.json`; what stands there is not computed again, since finished runs rest on it.
    """
    path = folder / "pilots.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    known = {(row["environment"], row["condition"], row["method"]) for row in rows}
    groups: dict[tuple, list] = {}
    for cell in study.cells:
        if cell.pilot:
            groups.setdefault((cell.env_id, cell.condition, cell.method), []).append(cell)
    for key, cells in groups.items():
        if key not in known and all((folder / cell.name / "done.json").exists() for cell in cells):
            runs = [scalars(folder / cell.name)["losses/mean_weight"] for cell in cells]
            weight = mean([mean([value for _, value in points]) for points in runs])
            rows.append(dict(zip(("environment", "condition", "method"), key), mean_weight=f"{weight:.4g}",
                             seeds=[cell.seed for cell in cells]))
    if len(rows) > len(known):
        write_atomically(path, json.dumps(rows, indent=1) + "\n")
    weights: dict = {}
    for row in rows:
        weights.setdefault((row["environment"], row["condition"]), {})[row["method"]] = row["mean_weight"]
    return weights


def read_table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def key_of(cell: Cell) -> dict:
    """The columns by which the rows of a run are known, as in a table."""
    key = dict(method=cell.method, environment=cell.env_id, condition=cell.condition, seed=cell.seed)
    return {name: str(value) for name, value in (key | dict(pilot=int(cell.pilot))).items()}


def adopt(study: Study, folder: Path, results: Path) -> None:
    """Counts as finished what tables hold: runs of another machine, whose folders are not here."""
    if not (results / "runs.csv").exists():
        raise StudyError(f"{results} holds no runs.csv")
    rows = {tuple(row[name] for name in key_of(study.cells[0])): row for row in read_table(results / "runs.csv")}
    for cell in study.cells:
        row, done = rows.get(tuple(key_of(cell).values())), folder / cell.name / "done.json"
        if row and not done.exists():
            done.parent.mkdir(parents=True, exist_ok=True)
            record = dict(command=row["command"], steps=int(row["steps"]), score=float(row["score"]),
                          seconds=float(row["seconds"]), attempts=int(row["attempts"]))
            write_atomically(done, json.dumps(record, indent=1) + "\n")
    if (results / "pilots.json").exists() and not (folder / "pilots.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(results / "pilots.json", folder / "pilots.json")


def collect(study: Study, folder: Path, results: Path) -> None:
    """Writes `runs.csv`, a row per finished run, and `evaluations.csv`, a row per evaluation of each.

    Sign flips and mean weights are means over a run's points, and over those since the evaluation before. Rows of
    finished runs whose folders are not here stay."""
    runs, evaluations = [], []
    kept = [read_table(results / name) for name in ("runs.csv", "evaluations.csv")]
    for cell in study.cells:
        if not (folder / cell.name / "done.json").exists():
            continue
        record, key = json.loads((folder / cell.name / "done.json").read_text()), key_of(cell)
        if not (folder / cell.name / "runs").exists():
            for table, old in zip((runs, evaluations), kept):
                table += [row for row in old if key.items() <= row.items()]
            continue
        points = scalars(folder / cell.name)
        before = 0
        for logged_at, score in points["eval/episodic_return"]:
            step = logged_at - 1  # scripts log an evaluation a step later
            since = {name: mean([value for at, value in points[tag] if before < at <= step])
                     for name, tag in TAGS.items()}
            evaluations.append(key | dict(step=step, score=score) | since)
            before = step
        whole = {name: mean([value for _, value in points[tag]]) for name, tag in TAGS.items()}
        runs.append(key | dict(steps=step, score=score) | whole
                    | dict(seconds=record["seconds"], attempts=record["attempts"], command=record["command"]))
    results.mkdir(parents=True, exist_ok=True)
    write_table(results / "runs.csv", runs)
    write_table(results / "evaluations.csv", evaluations)
    if (folder / "pilots.json").exists():
        shutil.copy(folder / "pilots.json", results)
    random_scores(study, results)
    print(f"{len(runs)} of {len(study.cells)} runs and {len(evaluations)} evaluations in {results}")


def write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["method"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def random_scores(study: Study, results: Path) -> None:
    """Adds to `random.csv` the environments whose uniform policy was not played yet, 100 episodes each."""
    path = results / "random.csv"
    rows = read_table(path)
    results.mkdir(parents=True, exist_ok=True)
    for env_id in study.environments:
        if all(row["environment"] != env_id for row in rows):
            returns = play_uniformly(env_id, 100)
            std = mean([(value - mean(returns)) ** 2 for value in returns]) ** 0.5
            rows.append(dict(environment=env_id, episodes=len(returns), mean=mean(returns), std=std))
            write_table(path, rows)


def play_uniformly(env_id: str, episodes: int, max_steps: int = 100_000) -> list[float]:
    """Raw returns of the policy that draws every action uniformly; always the same episodes. `max_steps` of each count,
    as in the scripts' own evaluation; an Atari game ends by itself."""
    import numpy as np

    sys.path.insert(0, str(ROOT))
    import ppo_baseline

    args = ppo_baseline.Args(env_id)
    if env_id in ppo_baseline.ATARI_IDS:  # games side by side; the first one of each counts
        rng, scores = np.random.default_rng(0), np.full(episodes, np.nan)
        games = ppo_baseline.Games(args, rng.integers(2**31, size=episodes))
        while np.isnan(scores).any():
            games.step(rng.integers(games.num_actions, size=(episodes, 1)))
            scores = np.where(games.over & np.isnan(scores), games.score, scores)
        return scores.tolist()
    env, returns = ppo_baseline.make_env(args), [0.0] * episodes
    env.action_space.seed(0)
    for episode in range(episodes):
        env.reset(seed=0 if episode == 0 else None)
        for _ in range(max_steps):
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += np.asarray(reward).item()
            if terminated or truncated:
                break
    env.close()
    return returns
