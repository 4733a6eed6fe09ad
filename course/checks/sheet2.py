"""Makes, trains and shows the copies of sheet 2, and checks the answers. It holds the answers."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType

import numpy as np

from checks import ROOT, SCRIPT, patched, report

FOLDER = ROOT / "runs" / "sheet2"
FLAGS = "--env-id Pendulum-v1 --total-timesteps 40960 --update-epochs 4 --learning-rate 1e-3"
EVALUATIONS = {True: "--eval-interval 2048 --eval-episodes 10", False: ""}

# Where the copies differ from the script: (text of the script, text of the copy).
BUGS = {
    "returns": [
        (
            '        returns = advantages + rollout["values"]\n',
            '        returns = advantages + rollout["values"]\n'
            "        returns = (returns - returns.mean()) / (returns.std() + 1e-8)\n",
        ),
    ],
    "evaluation": [
        (
            "    def reset(self, seed: int | None = None) -> None:\n",
            "    def observe(self, obs: np.ndarray) -> np.ndarray:\n"
            "        self.obs_stats.update(obs)\n"
            "        return self.normalize(obs)\n\n"
            "    def reset(self, seed: int | None = None) -> None:\n",
        ),
        ("evaluate(agent, env.normalize, args,", "evaluate(agent, env.observe, args,"),
    ],
    "time limit": [
        (
            'agent.value(next_obs)[:, 0].numpy() * ~rollout["terminated"]\n',
            'agent.value(next_obs)[:, 0].numpy() * ~rollout["dones"]\n',
        ),
    ],
    "old policy": [
        (
            "    for _ in range(args.update_epochs):\n",
            "    for epoch in range(args.update_epochs):\n"
            "        if epoch == 1:\n"
            "            batch[2] = agent(batch[0], batch[1])[0].detach()\n",
        ),
    ],
}
COPIES = dict(zip("ABCD", BUGS))

CURVES = {  # what is shown of a run
    "charts/episodic_return": "return",
    "losses/value_loss": "value loss",
    "losses/explained_variance": "explained variance",
    "losses/approx_kl": "approximate KL",
    "losses/clipfrac": "fraction clipped",
    "losses/entropy": "entropy",
}


def source(name: str) -> str:
    """The text of the script, or of the copy A, B, C or D."""
    text = SCRIPT.read_text(encoding="utf-8")
    return patched(text, BUGS[COPIES[name]]) if name in COPIES else text


def train(name: str, evaluations: bool, flags: str, folder: Path) -> Path:
    """Trains the script or a copy, unless that is done. Returns the folder of the run."""
    place = folder / name / ("evaluated" if evaluations else "not evaluated")
    command = f"{flags} {EVALUATIONS[evaluations]}"
    script = folder / name / SCRIPT.name
    done = place / "done.txt"
    record = f"{command}\n{script.read_text(encoding='utf-8')}"
    if not done.exists() or done.read_text(encoding="utf-8") != record:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        with (place / "log.txt").open("w", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, script, *shlex.split(command)],
                cwd=place,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
        done.write_text(record, encoding="utf-8")
    return next(place.glob("runs/*"))


def train_all(flags: str, folder: Path, workers: int) -> dict[tuple[str, bool], Path]:
    """All runs, by (name, evaluations)."""
    for name in ["script", *COPIES]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / SCRIPT.name).write_text(source(name), encoding="utf-8")
    jobs = [(name, evaluations) for name in ["script", *COPIES] for evaluations in (True, False)]
    with ThreadPool(workers) as pool:  # each thread waits for a process
        runs = pool.imap(lambda job: train(*job, flags, folder), jobs)
        found = {}
        for job, run in zip(jobs, runs):
            print("trained", job[0], "with evaluations" if job[1] else "without", flush=True)
            found[job] = run
    return found


def read_curves(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of a run's curves, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        curves[tag] = np.array([x.step for x in points]), np.array([x.value for x in points])
    return curves


def same(one: dict, other: dict) -> bool:
    """Whether two runs are the same but for their evaluations and their speed."""
    return all(np.array_equal(one[tag], other[tag]) for tag in CURVES)


def make_table(curves: dict) -> str:
    """Means over the second half of each run with evaluations, and whether these changed it."""
    rows = [["", *CURVES.values(), "same without evaluations"]]
    for name in ["script", *COPIES]:
        run = curves[name, True]
        means = [run[tag][1][len(run[tag][1]) // 2 :].mean() for tag in CURVES]
        equal = "yes" if same(run, curves[name, False]) else "no"
        rows.append([name, *[f"{x:.3g}" for x in means], equal])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" | ".join(x.rjust(width) for x, width in zip(row, widths)) for row in rows]
    return "\n".join(["means over the second half of each run", *lines]) + "\n"


def draw(curves: dict, path: Path) -> None:
    import matplotlib  # slow

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(["script", *COPIES], ["black", "#0072B2", "#D55E00", "#009E73", "#CC79A7"]))
    _, axes = plt.subplots(3, 2, figsize=(10, 10), layout="constrained")
    for ax, (tag, title) in zip(axes.flat, CURVES.items()):
        for (name, evaluations), run in curves.items():
            steps, values = run[tag]
            if tag == "charts/episodic_return":
                values = [values[max(0, i - 9) : i + 1].mean() for i in range(len(values))]
            style = "-" if evaluations else ":"
            ax.plot(steps, values, style, color=colours[name], lw=1 + 2 * (not evaluations))
        ax.set(title=title + ", mean of 10 episodes" * (title == "return"), xlabel="steps")
    for name, colour in colours.items():
        axes[0, 1].plot([], [], color=colour, label=name)
    axes[0, 1].plot([], [], ":", color="0.5", lw=3, label="without evaluations")
    axes[0, 1].legend()
    plt.savefig(path, dpi=100)
    plt.close()


def wrong_answer(answers: dict, name: str) -> str:
    answer = answers[name]
    if answer is None:
        raise NotImplementedError
    if answer not in BUGS:
        return f"there is no bug {answer!r}; there are {', '.join(map(repr, sorted(BUGS)))}"
    return "" if answer == COPIES[name] else "another one"


def check(sheet: ModuleType) -> dict[str, str]:
    """Prints and returns the verdicts on a sheet."""
    return report(
        {f"copy {name}": lambda n=name: wrong_answer(sheet.ANSWERS, n) for name in COPIES}
    )


def main(sheet: ModuleType) -> None:
    parser = argparse.ArgumentParser(description=sheet.__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    runs = train_all(FLAGS, FOLDER, args.workers)
    curves = {job: read_curves(run) for job, run in runs.items()}
    table = make_table(curves)
    (FOLDER / "table.txt").write_text(table, encoding="utf-8")
    draw(curves, FOLDER / "curves.png")
    print(table)
    print(f"The curves are in {(FOLDER / 'curves.png').relative_to(ROOT)}.")
    check(sheet)
