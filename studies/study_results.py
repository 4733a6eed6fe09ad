"""What the runs of a study logged, as tables: `runs.csv`, `evaluations.csv` and `random.csv`."""

import itertools
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from study_file import KEY, ROOT, Study, StudyError

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


def finished(folder: Path) -> dict | None:
    """What is known of a finished run: command, steps, score, seconds, attempts; of a pilot its mean weight, too."""
    path = folder / "done.json"
    return json.loads(path.read_text()) if path.exists() else None


def finish(folder: Path, **record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "done.json", json.dumps(record, indent=1) + "\n")


def mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else np.nan


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All points of a cell's TensorBoard files, (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes seconds

    logging.getLogger("tensorboard").setLevel("ERROR")  # it warns of resumed runs
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def means(points: dict[str, list[tuple[int, float]]], after=0, until=np.inf) -> dict[str, float]:
    return {name: mean([value for at, value in points[tag] if after < at <= until]) for name, tag in TAGS.items()}


def mean_weights(study: Study, folder: Path) -> dict[tuple[str, str, str], str]:
    """w̄ by method, environment and condition: the mean of its pilot runs, once these are finished."""
    weights, pilots = {}, filter(lambda cell: cell.pilot, study.cells)
    for key, group in itertools.groupby(pilots, lambda cell: (cell.method, cell.env_id, cell.condition)):
        runs = [(folder / cell.name, finished(folder / cell.name)) for cell in group]
        if all(record for _, record in runs):
            values = [record.get("mean_weight") or means(scalars(run))["mean_weight"] for run, record in runs]
            weights[key] = f"{mean(values):.4g}"
    return weights


def read_table(path: Path) -> pd.DataFrame:
    """As it is written, all text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame(columns=KEY)


def write_table(path: Path, rows: list[dict]) -> None:
    rows = [{k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    pd.DataFrame(rows, columns=None if rows else KEY).to_csv(path, index=False)


def adopt(study: Study, folder: Path, results: Path) -> None:
    """Counts as finished what tables hold: runs of another machine, whose folders are not here."""
    rows = read_table(results / "runs.csv").set_index(KEY).to_dict("index")
    if not rows:
        raise StudyError(f"{results} holds no runs")
    kinds = dict(command=str, steps=int, score=float, mean_weight=float, seconds=float, attempts=int)
    for cell in study.cells:
        if cell.key in rows and not finished(folder / cell.name):
            finish(folder / cell.name, **{name: kind(rows[cell.key][name]) for name, kind in kinds.items()})


def collect(study: Study, folder: Path, results: Path) -> None:
    """Writes `runs.csv`, a row per finished run, and `evaluations.csv`, a row per evaluation, of runs under way, too.

    Sign flips and mean weights are means over a run's points, and over those since the evaluation before. Rows of runs
    whose folders are not here stay."""
    tables = dict(runs=[], evaluations=[])
    kept = {name: dict(list(read_table(results / f"{name}.csv").groupby(KEY))) for name in tables}
    for cell in study.cells:
        record, here = finished(folder / cell.name), any((folder / cell.name).glob("runs/*/events*"))
        if not here:
            for name in ["evaluations", *["runs"] * bool(record)]:
                tables[name] += kept[name][cell.key].to_dict("records") if cell.key in kept[name] else []
        else:
            key, points, before = dict(zip(KEY, cell.key)), scalars(folder / cell.name), 0
            for logged_at, score in points.get("eval/episodic_return", []):
                step = logged_at - 1  # scripts log an evaluation a step later
                tables["evaluations"].append(key | dict(step=step, score=score) | means(points, before, step))
                before = step
            if record:
                cost = {name: record[name] for name in ("seconds", "attempts", "command")}
                score = score if study.score == "last" else mean([value for _, value in points["eval/episodic_return"]])
                tables["runs"].append(key | dict(steps=step, score=score) | means(points) | cost)
    if len(tables["runs"]) < len(kept["runs"]):
        raise StudyError(f"{results} holds runs that are not here; `run … --results {results}` counts them as finished")
    results.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_table(results / f"{name}.csv", rows)
    random_scores(study, results)
    print(f"{len(tables['runs'])} of {len(study.cells)} runs and {len(tables['evaluations'])} evaluations in {results}")


def random_scores(study: Study, results: Path) -> None:
    """Adds to `random.csv` the environments whose uniform policy was not played yet, 100 episodes each."""
    path = results / "random.csv"
    rows = read_table(path).to_dict("records")
    for env_id in [x for x in study.environments if all(row["environment"] != x for row in rows)]:
        returns = play_uniformly(env_id, 100)
        rows.append(dict(environment=env_id, episodes=100, mean=mean(returns), std=float(np.std(returns))))
    write_table(path, rows)


def play_uniformly(env_id: str, episodes: int) -> list[float]:
    """Raw returns of the uniform policy; always the same episodes, of 100,000 steps at most, as scripts evaluate."""
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
        for _ in range(100_000):
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += np.asarray(reward).item()
            if terminated or truncated:
                break
    return returns
