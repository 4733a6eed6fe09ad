"""A comparison over many runs as one command, from a file that says which runs and why.

    python studies/study.py run smoke --workers 2     # every method × environment × condition × seed, a run each
    python studies/study.py collect smoke             # what they logged, as two tables
    python studies/study.py report smoke              # what it says: Markdown and figures

STUDY is a file, or the name of one in `studies/`; `--scale` takes a smaller version that the file describes.
A run is a subprocess of the real script in a folder of its own, `study_runs/STUDY/<run>/`, and is finished once its
`done.json` lies there. The same command continues a study that was interrupted: runs go on from their last checkpoint,
complete ones only evaluate again, those without one start anew. With `--ray` and `--slurm` the folder must be one that
all machines see; a Ray cluster's machines need the same token, or RAY_AUTH_MODE=disabled. `run --results DIR` counts as
finished what the tables of an earlier `collect` hold, so that a study begun on one machine goes on at another.

A study file is TOML; `studies/smoke.toml` is a short one:

    question, beta                 the question, and how β was fixed before the runs, in a sentence each
    steps, seeds, flags            environment steps of a run; a number or a list; flags of every run
    [environments]                 per environment: steps, and values like `beta`
    [values]                       values for all environments
    [conditions]                   noise and the like, as flags; the one without flags is the clean one
    [methods]                      script and flags; {beta} is a value of the environment, {matched} is α + β|Z|,
                                   {mean_weight[NAME]} is w̄ of the method NAME, measured in pilot runs
    [grid]                         lists; a method that mentions one of them is there once for each of its values
    [pilot]                        seeds of the pilot runs, which are no others' seeds
    reference, comparisons         the method whose clean score counts as 1; pairs of methods to compare
    [scale.NAME]                   other steps, seeds, flags, pilot, grid; a selection of the rest, by name
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime
from pathlib import Path

from study_file import ROOT, Cell, Study, StudyError, load
from study_results import adopt, collect, mean_weights, random_scores, write_atomically
from tqdm import tqdm

SCORE = re.compile(r"^score at (\d+) steps: (\S+) ", re.MULTILINE)
ATTEMPT = re.compile(r"^\[study\] (\S+) ", re.MULTILINE)  # our own lines in a run's log: when it was started, and how
RETRIES = 2  # of a run that was killed from outside: out of memory, a node going down
GUESS = {True: 150, False: 600}  # steps per second of a run, on Atari and elsewhere, before any was measured

RUNNING: set[subprocess.Popen] = set()  # the scripts of this process, to pass a signal on to
STOPPED: list[int] = []  # the signals received


def stop(number: int, _frame) -> None:
    """Passes a signal on: scripts write a checkpoint and leave. A second one makes them leave at once."""
    STOPPED.append(number)
    for process in list(RUNNING):
        process.terminate()


# ------------------------------------------------------------------------------------------------------------- one cell


def is_done(folder: Path) -> bool:
    return (folder / "done.json").exists()


def run_cell(cell: Cell, command: str, folder: Path, threads: int) -> str:
    """Runs one cell to its end. Returns "done", "stopped", or what went wrong.

    The script holds the folder's lock as long as it lives, even if the study around it is killed: no second one starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        while not STOPPED:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return "done" if is_done(folder) else run_locked(cell, command, folder, threads, lock.fileno())
            except BlockingIOError:
                time.sleep(0.5)
    return "stopped"


def run_locked(cell: Cell, command: str, folder: Path, threads: int, lock: int) -> str:
    log, begun = folder / "log.txt", folder / "command.txt"
    if not begun.exists() or begun.read_text() != command:  # what was begun with other flags is worth nothing
        log.unlink(missing_ok=True)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        write_atomically(begun, command)
    log.touch()
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | dict(PYTHONUNBUFFERED="1")
    starts, code = 0, 0
    while True:
        text = log.read_text(errors="replace")
        if starts and code == 0 and (scores := SCORE.findall(text)):  # seen to its end: its last score is the final one
            attempts = ATTEMPT.findall(text)
            seconds = log.stat().st_mtime - datetime.fromisoformat(attempts[-1]).timestamp()
            record = dict(command=command, steps=int(scores[-1][0]), score=float(scores[-1][1]),
                          seconds=round(seconds, 1), attempts=len(attempts))
            write_atomically(folder / "done.json", json.dumps(record, indent=1) + "\n")
            return "done"
        if STOPPED:
            return "stopped"
        if starts and (starts > RETRIES or code not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)):
            line = [line for line in text.splitlines() if line.strip()][-1]
            return f"exit status {code}: {line}"

        checkpoint = next((folder / "runs").glob("*/checkpoint.pt"), None)
        if checkpoint:
            flags = ["--resume", str(checkpoint.parent.relative_to(folder))]
        else:
            shutil.rmtree(folder / "runs", ignore_errors=True)
            flags = shlex.split(command)[1:]
        with log.open("a") as output:
            output.write(f"[study] {datetime.now().isoformat()} {shlex.join([cell.script, *flags])}\n")
            output.flush()
            process = subprocess.Popen(  # a session of its own: Ctrl-C reaches it through `stop` alone, and once
                [sys.executable, str(ROOT / cell.script), *flags, "--torch-threads", str(threads)], cwd=folder,
                stdout=output, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock], start_new_session=True,
            )
        RUNNING.add(process)
        if STOPPED:  # the signal came before the process was known
            process.terminate()
        code = process.wait()
        RUNNING.discard(process)
        starts += 1


def steps_so_far(cell: Cell, folder: Path) -> int:
    """Of a cell, from the last progress bar in its log."""
    if is_done(folder):
        return cell.steps
    try:
        with (folder / "log.txt").open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - 4000, 0))
            found = re.findall(r"\| (\d+)/\d+ \[", log.read().decode(errors="replace"))
    except FileNotFoundError:
        return 0
    return min(int(found[-1]), cell.steps) if found else 0


# ------------------------------------------------------------------------------------------------------------ all cells


def run(study: Study, folder: Path, args: argparse.Namespace) -> int:
    """Runs what is not finished; returns the exit status."""
    if args.cell is not None and not 0 <= args.cell < len(study.cells):
        raise StudyError(f"--cell {args.cell}: the study has the cells 0 to {len(study.cells) - 1}")
    cells = study.cells if args.cell is None else [study.cells[args.cell]]
    weights = mean_weights(study, folder)
    for cell in cells:
        done = folder / cell.name / "done.json"
        if done.exists() and json.loads(done.read_text())["command"] != cell.command(weights):
            raise StudyError(f"{done.parent} was finished with other flags than the study has now; to run it anew, "
                             f"remove it")
    if args.ray and args.cell is None:
        submit, cancel = ray_tasks(study, args)
    else:
        pool = ThreadPoolExecutor(args.workers)

        def submit(cell: Cell, command: str) -> Future:
            return pool.submit(run_cell, cell, command, folder / cell.name, args.threads)

        def cancel() -> None:
            """The pool's scripts got the signal already."""

    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which has a handler of its own
        signal.signal(number, stop)
    failures: dict[str, str] = {}
    for pilots in (True, False):  # these first: others' flags depend on them
        weights = mean_weights(study, folder)
        todo = []
        for cell in cells:
            if cell.pilot == pilots and not is_done(folder / cell.name):
                if command := cell.command(weights):
                    todo.append((cell, command))
                else:
                    failures[cell.name] = "waits for pilot runs that are not finished"
        if todo and not STOPPED:
            failures |= watch(todo, submit, cancel, folder)
    for name, reason in failures.items():
        if reason != "stopped":
            print(f"{folder / name}: {reason}", file=sys.stderr)
    print(f"{study.name}: {sum(is_done(folder / cell.name) for cell in cells)} of {len(cells)} runs finished")
    if STOPPED:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + STOPPED[0]
    return 1 if failures else 0


def watch(todo: list[tuple[Cell, str]], submit, cancel, folder: Path) -> dict[str, str]:
    """Submits cells and shows how far they are until all are over. Returns by cell what kept it from being finished."""
    start = last_line = time.time()
    steps = {cell: steps_so_far(cell, folder / cell.name) for cell, _ in todo}
    total, begin = sum(cell.steps for cell in steps), sum(steps.values())
    futures = {submit(cell, command): cell for cell, command in todo}
    pending, failures, cancelled = set(futures), {}, False
    bar = tqdm(total=total, initial=begin, unit=" steps", unit_scale=True, disable=None)  # off: no terminal
    while pending:
        over, pending = wait(pending, timeout=2, return_when=FIRST_COMPLETED)
        if STOPPED and not cancelled:
            cancel()
            cancelled = True
        for future in over:
            try:
                result = future.result()
            except BaseException as error:  # a lost node, a cancelled task
                result = "stopped" if STOPPED else (str(error) or repr(error)).splitlines()[0]
            if result != "done":
                failures[futures[future].name] = result
        bar.n = position = sum(steps_so_far(cell, folder / cell.name) for cell in steps)
        words = f"{len(todo) - len(pending)} of {len(todo)} runs over, {len(failures)} not finished"
        bar.set_postfix_str(words)
        if bar.disable and time.time() - last_line > 60:
            last_line = time.time()
            rate = (position - begin) / (last_line - start)
            print(words + (f", {(total - position) / rate / 60:.0f} min left" if rate else ""), flush=True)
    bar.close()
    return failures


def dry_run(study: Study, folder: Path, workers: int) -> None:
    """Lists the commands and estimates the time, with the median speed of finished runs where there are any."""
    measured: dict = {}
    for cell in study.cells:
        if is_done(folder / cell.name):
            record = json.loads((folder / cell.name / "done.json").read_text())
            if record["attempts"] == 1:  # else the seconds are those of the last part
                for key in ((cell.script, cell.env_id), cell.script):
                    measured.setdefault(key, []).append(record["steps"] / max(record["seconds"], 0.1))
    speeds = {key: sorted(values)[len(values) // 2] for key, values in measured.items()}
    weights, seconds, left, guessed = mean_weights(study, folder), 0.0, 0, 0
    for i, cell in enumerate(study.cells):
        done = is_done(folder / cell.name)
        flags = cell.command(weights) or f"{cell.script} {cell.flags} (after the pilots)"
        print(f"{i} {'done' if done else 'to do'} {cell.name}: {flags}")
        if not done:
            speed = speeds.get((cell.script, cell.env_id), speeds.get(cell.script))
            guess = GUESS["ALE/" in cell.env_id or "NoFrameskip" in cell.env_id]
            seconds += (cell.steps - steps_so_far(cell, folder / cell.name)) / (speed or guess)
            left, guessed = left + 1, guessed + (speed is None)
    basis = f"the speed of {guessed} of them is a guess" if guessed else "from the speed of finished runs"
    print(f"{left} of {len(study.cells)} runs to do: about {seconds / 3600 / workers:.1f} hours with {workers} at a "
          f"time ({basis})")


# --------------------------------------------------------------------------------------------------- beyond one machine


def this_command(args: argparse.Namespace) -> list[str]:
    """Runs one cell of the same study, from any folder and machine; its number is to follow."""
    study = str(Path(args.study).resolve()) if args.study.endswith(".toml") else args.study
    scale = ["--scale", args.scale] if args.scale else []
    return [sys.executable, str(Path(__file__).resolve()), "run", study, *scale, "--folder",
            str(Path(args.folder).resolve()), "--threads", str(args.threads), "--cell"]


def ray_tasks(study: Study, args: argparse.Namespace):
    """`submit` and `cancel` on a Ray cluster: a task is this program with `--cell`, on whatever machine has room."""
    try:
        import ray
    except ImportError:
        raise StudyError("--ray needs Ray: pip install ray") from None

    local = dict(address="local", num_cpus=args.workers * args.threads, include_dashboard=False)
    ray.init(**(local if args.ray == "local" else dict(address=args.ray)), log_to_driver=False)

    @ray.remote(num_cpus=args.threads, num_gpus=args.gpus, max_retries=3)
    def task(command: list[str]) -> str:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while True:  # Ray's KeyboardInterrupt does not wake what waits
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, errors = process.communicate(timeout=1)
                    break
        except BaseException:  # cancelled: it stops its script, which writes a checkpoint
            process.terminate()
            process.wait()
            raise
        return "done" if process.returncode == 0 else (errors.strip().splitlines() or ["stopped"])[-1]

    tasks, command = [], this_command(args)

    def submit(cell: Cell, _: str) -> Future:
        tasks.append(task.remote([*command, str(study.cells.index(cell))]))
        return tasks[-1].future()

    def cancel() -> None:
        for reference in tasks:
            ray.cancel(reference)

    return submit, cancel


def slurm(study: Study, args: argparse.Namespace) -> str:
    """A job-array script. A job that has to go gets SIGTERM, writes a checkpoint, and resumes when it runs again."""
    pilots, total = sum(cell.pilot for cell in study.cells), len(study.cells)
    submit = f"sbatch --array=0-{total - 1} job.sh"
    if pilots:  # the others' flags depend on them
        submit = (f"pilots=$(sbatch --parsable --array=0-{pilots - 1} job.sh)\n"
                  f"#     sbatch --dependency=afterok:$pilots --array={pilots}-{total - 1} job.sh")
    return f"""#!/bin/bash
#SBATCH --job-name={study.name}
#SBATCH --cpus-per-task={args.threads}
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%a.out
# The {total} runs of the study {study.name}, a job each. Save as job.sh, adapt the lines above, then
#     {submit}
# The same again continues what did not finish.
exec {shlex.join(this_command(args))} "$SLURM_ARRAY_TASK_ID"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "run what is not finished"), ("collect", "gather what the runs logged into tables"),
                       ("random", "play the uniform policy (collect does, too)"), ("report", "judge the tables")):
        command = commands.add_parser(name, help=text)
        command.add_argument("study", help="a .toml file, or the name of one in studies/")
        command.add_argument("--scale", help="a smaller version, by the name it has in the file")
        command.add_argument("--folder", default="study_runs", help="where the runs are (default: study_runs)")
        if name == "run":
            command.add_argument("--workers", type=int, default=1, help="runs at a time")
            command.add_argument("--threads", type=int, default=1, help="threads of a run")
            command.add_argument("--dry-run", action="store_true", help="list the commands and estimate the time")
            command.add_argument("--cell", type=int, help="only this run, by its number in --dry-run")
            command.add_argument("--ray", metavar="ADDRESS", help="hand the runs to a Ray cluster; or local")
            command.add_argument("--gpus", type=float, default=0, help="with --ray: GPUs of a run, 0.25 for a quarter")
            command.add_argument("--slurm", action="store_true", help="print a job-array script")
        usage = "folder of tables and report (default: results, in the study's own)"
        command.add_argument("--results", help="tables whose runs count as finished" if name == "run" else usage)
    args = parser.parse_args()
    if "PYTHONPATH" in os.environ:  # runs have folders of their own
        paths = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths))
    try:
        study = load(args.study, args.scale)
        folder = Path(args.folder) / study.name
        if args.command == "run":
            if args.workers < 1 or args.threads < 1:
                raise StudyError("--workers and --threads must be at least 1")
            if args.results:
                adopt(study, folder, Path(args.results))
            if args.slurm:
                return print(slurm(study, args), end="") or 0
            if args.dry_run:
                return dry_run(study, folder, args.workers) or 0
            return run(study, folder, args)
        results = Path(args.results) if args.results else folder / "results"
        if args.command == "collect":
            collect(study, folder, results)
        elif args.command == "random":
            random_scores(study, results)
        else:
            from study_report import report  # its libraries take seconds to load

            scale = f" --scale {args.scale}" if args.scale else ""
            report(study, results, f"python studies/study.py run {args.study}{scale}")
        return 0
    except StudyError as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
