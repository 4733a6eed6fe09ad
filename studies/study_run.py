"""The runs of a study: real scripts, each in a folder of its own, here or on a Ray cluster.

On Ray the machines share no folder. A task fetches what there is of its run from the caller, runs
the script, and brings files back after each checkpoint. Where its machine is lost, Ray starts it
on another one, and it goes on from the last checkpoint that it brought back.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCORE = re.compile(r"^score at (\d+) steps: (\S+) ", re.MULTILINE)

# Runs a script that ends with the study: however the study ends, the pipe to the script closes.
LAUNCH = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_whole(path: Path, content: bytes) -> None:
    """Whenever the process is killed, `path` is a whole file: the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.tmp").write_bytes(content)
    os.replace(path.with_name(f"{path.name}.tmp"), path)


def finished(folder: Path) -> dict | None:
    """What is known of a finished run: command, steps and score."""
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def checkpoint_of(folder: Path) -> Path | None:
    return next(folder.glob("runs/*/checkpoint.pt"), None)


def run_script(folder: Path, script: Path, command: str, threads: int, save=lambda: None) -> str:
    """Runs a script to its end, from its checkpoint if there is one, and calls `save` after each
    checkpoint. Returns what went wrong, or an empty text."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(folder)
    flags = shlex.split(command)[1:]
    if checkpoint:
        flags = ["--resume", str(checkpoint.parent.relative_to(folder))]
    else:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        write_whole(folder / "command.txt", command.encode())
    modules = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    settings = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    settings["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, modules))
    log = folder / "log.txt"
    with log.open("a", encoding="utf-8") as output:
        print(f"\n[study] {time.ctime()} {shlex.join(flags)}", file=output, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, script, *flags, "--torch-threads", str(threads)],
            cwd=folder,
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    saved = None
    while process.poll() is None:
        time.sleep(0.2)
        checkpoint = checkpoint_of(folder)
        written = checkpoint and checkpoint.stat().st_mtime_ns
        if written != saved:
            save()
        saved = written
    text = log.read_text(encoding="utf-8", errors="replace")
    scores = SCORE.findall(text)
    if process.returncode or not scores:
        return f"exit status {process.returncode}: {text.strip().splitlines()[-1]}"
    steps, score = scores[-1]  # it was seen to its end: its last score is the final one
    record = {"command": command, "steps": int(steps), "score": float(score)}
    write_whole(folder / "done.json", json.dumps(record, indent=1).encode())
    return ""


def run_here(jobs: dict[str, str], folder: Path, workers: int, threads: int):
    """Runs commands, given by the names of their folders. Yields (name, what went wrong)."""

    def work(job: tuple[str, str]) -> tuple[str, str]:
        name, command = job
        return name, run_script(folder / name, ROOT / command.split()[0], command, threads)

    with ThreadPool(workers) as pool:  # each thread waits for a process
        yield from pool.imap_unordered(work, jobs.items())


class Folders:
    """Files of runs as bytes by name. On Ray, an actor that has those on the caller's machine."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, run: str) -> dict[str, bytes]:
        folder = self.path / run
        files = [x for x in folder.rglob("*") if x.is_file() and x.suffix != ".tmp"]
        return {x.relative_to(folder).as_posix(): x.read_bytes() for x in files}

    def write(self, run: str, files: dict[str, bytes]) -> None:
        for name in sorted(files, key="done.json".__eq__):  # last: with it the run is finished
            write_whole(self.path / run / name, files[name])


def run_away(caller, name: str, command: str, script: str, source: bytes, threads: int) -> str:
    """`run_script` on whatever machine this is, with files from the caller and back."""
    import ray

    with tempfile.TemporaryDirectory() as place:
        here = Folders(Path(place))
        here.write(name, ray.get(caller.read.remote(name)))
        here.write("", {script: source})

        def save() -> None:
            ray.get(caller.write.remote(name, here.read(name)))

        result = run_script(here.path / name, here.path / script, command, threads, save)
        save()
        return result


def run_on_ray(jobs: dict[str, str], folder: Path, address: str, threads: int, gpus: float):
    """Like `run_here`, as tasks of the Ray cluster at `address`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address, log_to_driver=False, ignore_reinit_error=True)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # machines need no checkout
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    caller = ray.remote(Folders).options(num_cpus=0, scheduling_strategy=here)
    caller = caller.remote(folder.resolve())
    options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 10}  # where a machine is lost
    if not gpus:  # otherwise every run would see all of them
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    task = ray.remote(run_away).options(**options)
    running = {}
    for name, command in jobs.items():
        script = ROOT / command.split()[0]
        source = script.read_bytes()
        running[task.remote(caller, name, command, script.name, source, threads)] = name
    while running:
        (over,), _ = ray.wait(list(running))
        try:
            result = ray.get(over)
        except ray.exceptions.RayError as error:
            result = str(error).strip().splitlines()[-1]
        yield running.pop(over), result
