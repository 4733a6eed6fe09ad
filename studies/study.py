"""A comparison over many runs as one command, from a file that says which runs and why.

    python studies/study.py run smoke --workers 2     # every method × environment × condition × seed, a run each
    python studies/study.py collect smoke             # what they logged, as two tables
    python studies/study.py report smoke              # what it says: Markdown and figures

A run is a subprocess of the real script in a folder of its own, `study_runs/STUDY/<run>/`, and is finished once its
`done.json` lies there. The same command continues a study that was interrupted: runs go on from their last checkpoint,
complete ones only evaluate again, those without one start anew. `run --results DIR` counts as finished what the tables
of an earlier `collect` hold, so that a study begun on one machine goes on at another.

The folder is also the queue: any number of these commands, on all machines that see it, share the work. Each takes runs
whose lock is free; where one of them is lost, or its machine, the others go on with its runs.
"""

import argparse
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from study_file import ROOT, Cell, Study, StudyError, load
from study_results import adopt, collect, finish, finished, mean_weights, means, scalars, write_atomically

SCORE = re.compile(r"^score at (\d+) steps: (\S+) ", re.MULTILINE)
KILLED = -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM  # from outside: out of memory, a node going down
STARTS = 3  # of a run that is killed

RUNNING: set[subprocess.Popen] = set()  # the scripts of this process, to pass a signal on to
STOPPED: list[int] = []  # the signals received


def stop(number: int, _frame) -> None:
    """Passes a signal on: scripts write a checkpoint and leave. A second one makes them leave at once."""
    STOPPED.append(number)
    for process in list(RUNNING):
        process.terminate()


def run_cell(cell: Cell, command: str, folder: Path, threads: int) -> str:
    """Runs one cell to its end. Returns "done", "taken", "stopped", or what went wrong.

    The script holds the folder's lock as long as it lives, even if the study around it is killed: no second one starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "taken"
        return "done" if finished(folder) else run_locked(cell, command, folder, threads, lock.fileno())


def run_locked(cell: Cell, command: str, folder: Path, threads: int, lock: int) -> str:
    log, begun = folder / "log.txt", folder / "command.txt"
    if not begun.exists() or begun.read_text() != command:  # what was begun with other flags is worth nothing
        log.unlink(missing_ok=True)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        write_atomically(begun, command)
    modules = os.pathsep.join(map(os.path.abspath, ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    for _ in range(STARTS):
        checkpoint = next((folder / "runs").glob("*/checkpoint.pt"), None)
        if not checkpoint:
            shutil.rmtree(folder / "runs", ignore_errors=True)
        flags = ["--resume", str(checkpoint.parent.relative_to(folder))] if checkpoint else shlex.split(command)[1:]
        start = time.time()
        with log.open("a") as output:
            output.write(f"[study] {time.ctime()} {shlex.join([cell.script, *flags])}\n")
            output.flush()
            process = subprocess.Popen(  # a session of its own: Ctrl-C reaches it through `stop` alone, and once
                [sys.executable, str(ROOT / cell.script), *flags, "--torch-threads", str(threads)], cwd=folder,
                stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock], start_new_session=True,
                env=os.environ | dict(OMP_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1", PYTHONPATH=modules),
            )
        RUNNING.add(process)
        if STOPPED:  # the signal came before the process was known
            process.terminate()
        code = process.wait()
        RUNNING.discard(process)
        text = log.read_text(errors="replace")
        if code == 0 and (scores := SCORE.findall(text)):  # seen to its end: its last score is the final one
            steps, score = scores[-1]
            pilots = dict(mean_weight=float(f"{means(scalars(folder))['mean_weight']:.7g}")) if cell.pilot else {}
            finish(folder, command=command, steps=int(steps), score=float(score), **pilots,
                   seconds=round(time.time() - start, 1), attempts=len(re.findall(r"^\[study\]", text, re.MULTILINE)))
            return "done"
        if STOPPED:
            return "stopped"
        if code not in KILLED:
            break
    return f"exit status {code}: {text.strip().splitlines()[-1]}"


def work(queue: deque, folder: Path, threads: int, over: dict[str, str]) -> None:
    """Runs cells until none is left. What is taken goes to the queue's end: another call is at it, or left its script
    behind, and may yet be lost. It is looked at again about once a second."""
    while queue and not STOPPED:
        try:
            cell, command = queue.popleft()
        except IndexError:  # another thread was faster
            return
        result = run_cell(cell, command, folder / cell.name, threads)
        if result == "taken":
            queue.append((cell, command))
            time.sleep(1 / (1 + len(queue)))
        else:
            over[cell.name] = result
            print(f"{cell.name}: {result}; {len(queue)} wait", flush=True)


def run(study: Study, folder: Path, workers: int, threads: int) -> int:
    """Runs what is not finished; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    over: dict[str, str] = {}
    for pilots in (True, False):  # these first: others' flags depend on them
        weights, queue = mean_weights(study, folder), deque()
        for cell in study.cells:
            command, record = cell.command(weights), finished(folder / cell.name)
            if record and record["command"] != command:
                raise StudyError(f"{folder / cell.name} was finished with other flags than the study has now; to run "
                                 f"it anew, remove it")
            if cell.pilot == pilots and not record:
                if command:
                    queue.append((cell, command))
                else:
                    over[cell.name] = "waits for pilot runs that are not finished"
        with ThreadPoolExecutor(workers) as pool:
            for worker in [pool.submit(work, queue, folder, threads, over) for _ in range(workers)]:
                worker.result()
    for cell in study.cells:
        if (result := over.get(cell.name, "done")) not in ("done", "stopped"):
            print(f"{folder / cell.name}: {result}", file=sys.stderr)
    done = sum(finished(folder / cell.name) is not None for cell in study.cells)
    print(f"{study.name}: {done} of {len(study.cells)} runs finished")
    if STOPPED:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + STOPPED[0]
    return int(done < len(study.cells))


def dry_run(study: Study, folder: Path, workers: int) -> None:
    """Lists the commands, and estimates the time from the finished runs."""
    weights, seconds = mean_weights(study, folder), []
    for cell in study.cells:
        if record := finished(folder / cell.name):
            seconds.append(record["seconds"])
        command = cell.command(weights) or f"{cell.script} {cell.flags} (after the pilots)"
        print(f"{'done' if record else 'to do'} {cell.name}: {command}")
    left = len(study.cells) - len(seconds)
    hours = f"{sum(seconds) / len(seconds) * left / workers / 3600:.1f} hours" if seconds else "unknown yet"
    print(f"{left} of {len(study.cells)} runs to do, {workers} at a time; time: {hours}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["run", "collect", "report"])
    add("study", help="a .toml file, or the name of one in studies/")
    add("--scale", help="a smaller version, by the name it has in the file")
    add("--folder", type=Path, default="study_runs", help="where the runs are (default: study_runs)")
    add("--results", type=Path, help="folder of the tables: run counts what they hold as finished; collect and report "
        "write there (default: results, in the study's own)")  # fmt: skip
    add("--workers", type=int, default=1, help="runs at a time")
    add("--threads", type=int, default=1, help="threads of a run")
    add("--dry-run", action="store_true", help="list the commands of run, and estimate the time")
    args = parser.parse_args()
    try:
        study = load(args.study, args.scale)
        folder = args.folder / study.name
        results = args.results or folder / "results"
        if args.command == "run":
            if args.results:
                adopt(study, folder, results)
            if not args.dry_run:
                return run(study, folder, args.workers, args.threads)
            dry_run(study, folder, args.workers)
        elif args.command == "collect":
            collect(study, folder, results)
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
