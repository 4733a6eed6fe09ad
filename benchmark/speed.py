"""Speed of our scripts beside their peers', in one run on one machine; prints Markdown.

    python benchmark/speed.py                                # everything; about an hour on an idle machine
    python benchmark/speed.py --cases atari a2c --modes train split --repetitions 5 --torch-threads 1 2
    python benchmark/speed.py --output benchmark/README.md   # puts the tables there, between two marker comments
    python benchmark/speed.py --before ../old                # another checkout's scripts, too, by its own measure.py
    python benchmark/speed.py --quick                        # tiny sizes: shows that all runs; figures mean nothing

Each measurement is a process of its own (`measure.py`), so that memory, threads and caches are too. Contestants take
turns, in reverse order every second repetition; a ratio is taken within a repetition. Both sides have the same task,
network, batch settings, seed and number of torch threads; `make_model` in reference.py holds the peers' settings.

    train        whole iterations of the script's own `main` (of the peer's `learn`), from one rollout's start to the
                 next. Ours writes TensorBoard files, the peer logs nowhere: that favours the peer
    rollouts     the same without the update: acting, environment, advantages, logging
    update       the update alone, again and again on one rollout
    environment  the environment alone with random actions, and the bare one without statistics or wrappers
    split        where an iteration of ours spends its time. Only here are there timers within an iteration
"""

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from measure import BARE, SB3, SBX, SUBPROCESSES

# The fastest documented flags of each script, by kind of case; where there are none, only the default is measured.
FASTEST = {
    ("sppo_atari", "atari"): ["--bf16"],
    ("ppo_baseline", "atari"): ["--bf16"],
    ("sa2c_atari", "atari"): ["--bf16"],
    ("sppo_continuous", "control"): ["--compile"],
    ("ppo_baseline", "control"): ["--compile"],
    ("sppo_atari", "gpu"): ["--bf16", "--compile"],
    ("ppo_baseline", "gpu"): ["--bf16", "--compile"],
}


class Case(NamedTuple):
    title: str
    kind: str
    env_id: str
    num_envs: int
    num_steps: int
    num_minibatches: int
    scripts: list[str]  # with the flags that choose the algorithm
    peers: list[str]
    modes: str
    total_timesteps: int = 5_000_000  # for the schedules; nobody gets that far


ATARI = ["sppo_atari", "ppo_baseline"]
CONTROL = ["sppo_continuous", "ppo_baseline", "ppo_baseline --policy discretized"]
CASES = {
    "atari": Case("Atari, 8 × 128", "atari", "ALE/Breakout-v5", 8, 128, 4, ATARI, [SB3, SUBPROCESSES],
                  "train rollouts update environment split"),
    "a2c": Case("A2C on Atari, 16 × 5", "atari", "ALE/Breakout-v5", 16, 5, 1, ["sa2c_atari"], [SB3],
                "train update split"),
    "halfcheetah": Case("HalfCheetah-v5, 1 × 2048", "control", "HalfCheetah-v5", 1, 2048, 32, CONTROL, [SB3, SBX],
                        "train update environment split"),
    "hopper": Case("Hopper-v5, 1 × 2048", "control", "Hopper-v5", 1, 2048, 32, CONTROL, [SB3, SBX],
                   "train environment split"),
    "gpu-8": Case("Atari on a GPU, 8 × 128", "gpu", "ALE/Breakout-v5", 8, 128, 4, ATARI, [SB3],
                  "train environment split"),
    "gpu-32": Case("Atari on a GPU, 32 × 128", "gpu", "ALE/Breakout-v5", 32, 128, 4, ATARI, [SB3],
                   "train environment split"),
}  # fmt: skip
TARGETS = [  # what, case, mode, measured column, targets by default and with the fastest flags
    ("Atari, 8 × 128, CPU with AVX512-BF16", "atari", "train", "ratio", "≥ 1.9 ×", "≥ 2.9 ×"),
    ("Atari, CPU, acting and environment only", "atari", "rollouts", "ratio", "≥ 2 ×", ""),
    ("HalfCheetah-v5, 1 × 2048, CPU", "halfcheetah", "train", "ratio", "≥ 3 ×", "≥ 5 ×"),
    ("SA2C on Atari, 16 × 5, CPU", "a2c", "train", "ratio", "≥ 1.9 ×", "≥ 2.5 ×"),
    ("peak resident memory, Atari, 8 × 128", "atari", "train", "memory", "≤ 1 ×", ""),
    ("Atari on a GPU, 8 × 128, steps/s", "gpu-8", "train", "speed", "", "> 6,800"),
    ("Atari on a GPU, 32 × 128, steps/s", "gpu-32", "train", "speed", "", "> 10,000"),
]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "speed.csv"
BEFORE = "before: "  # precedes the names of another checkout's scripts
BEGIN, END = "<!-- speed.py writes from here -->", "<!-- to here -->"
CORES = len(os.sched_getaffinity(0))
PARTS = ["acting", "environment", "advantages", "update", "logging", "rest"]
KEY = ["machine", "case", "mode", "threads"]
FIELDS = [*KEY, "commit", "busy_cores", "contestant", "flags", "repetition",
          "steps_per_second", "memory_mb", "workers_mb", *PARTS, "note"]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- measuring


def machine(sbx_python: str) -> str:
    """What is measured on, and with what."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", cpu)
    yes_no = [f"{flag.replace('_', '-').upper()} {'yes' if f' {flag} ' in cpu else 'no'}"
              for flag in ("avx512f", "avx512_bf16", "amx_bf16")]  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    hardware = [name[1] if name else platform.processor(), f"{CORES} cores", *yes_no, f"{memory:.0f} GiB",
                *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])]  # fmt: skip
    packages = ["torch", "numpy", "stable-baselines3", "gymnasium", "ale-py", "mujoco"]
    code = "from importlib.metadata import version as v; print('sbx-rl', v('sbx-rl') + ', jax', v('jax'))"
    sbx = subprocess.run([sbx_python, "-c", code], capture_output=True, text=True).stdout.strip()
    software = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    return ", ".join(hardware) + "; " + ", ".join([*software, sbx or "sbx not installed"])


def busy_cores(seconds: float) -> float:
    """Cores that others keep busy while this process sleeps."""

    def ticks():  # of all cores: user, nice, system, idle, waiting for a disk, …
        return [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]

    before = ticks()
    time.sleep(seconds)
    spent = [after - before for after, before in zip(ticks(), before)]
    return os.cpu_count() * (1 - (spent[3] + spent[4]) / max(sum(spent), 1))


def run(job: dict, python: str, root: Path = ROOT) -> dict:
    """Does the job in a process of its own; what goes wrong there is a note in the result."""
    threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:  # where the script leaves its runs/
        command = [python, root.resolve() / "benchmark" / "measure.py", json.dumps(job)]
        done = subprocess.run(command, cwd=folder, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    errors = [line.strip("│ \n") for line in done.stderr.splitlines() if re.search(r"\w", line)] or ["no message"]
    if "No module named" in errors[-1]:
        return dict(note=f"not installed: {errors[-1].split()[-1]}")
    if done.returncode == 2:  # by the script's validation, or by its command line
        reasons = [line for line in errors if "--" in line and "help" not in line]
        return dict(note=f"refused: {(reasons or errors)[-1]}")
    print(done.stderr, file=sys.stderr)
    return dict(note=f"failed with status {done.returncode}: {errors[-1]}")


def contestants(case: Case, mode: str) -> list[tuple[str, str, list[str]]]:
    """Name, "default", "fastest" or "", and flags of all that are measured in this mode."""
    entries = []
    for script in case.scripts[:1] if mode == "environment" else case.scripts:  # they share the environment's class
        fastest = FASTEST[script.split()[0], case.kind]
        entries += [(script, "default", [])] + ([(script, "fastest", fastest)] if fastest else [])
    for peer in case.peers if mode != "split" else []:
        if mode == "train" or peer == SB3 or peer == SUBPROCESSES and mode != "update":
            entries.append((peer, "", []))
    return entries + [(BARE, "", [])] * (mode == "environment")


def measure_all(case: Case, key: dict, args: argparse.Namespace) -> list[dict]:
    """Rows of one case in one mode: all its contestants, in turn, over several repetitions."""
    rows, entries = [], contestants(case, key["mode"])
    if args.before:
        entries += [(BEFORE + name, kind, flags) for name, kind, flags in entries if kind]
    for repetition in range(args.repetitions if key["mode"] != "split" else 1):
        for name, kind, flags in entries if repetition % 2 == 0 else entries[::-1]:
            root = args.before if name.startswith(BEFORE) else ROOT
            git = ["git", "-C", root, "describe", "--always", "--dirty"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout
            job = case._asdict() | key
            job |= dict(threads=int(key["threads"]), contestant=name.removeprefix(BEFORE), flags=flags)
            job |= dict(seed=repetition + 1, seconds=args.seconds, iterations=args.iterations, quick=args.quick)
            row = dict.fromkeys(FIELDS, "") | key | dict(contestant=name, flags=" ".join(flags) or kind)
            row |= dict(repetition=repetition + 1, commit=commit.strip())
            row |= dict(busy_cores=f"{busy_cores(0.1 if args.quick else 1):.2f}")
            result = run(job, args.sbx_python if name == SBX else sys.executable, root)
            row |= {field: x if field == "note" else f"{x:.1f}" for field, x in result.items()}
            rows.append(row)
            print(*list(key.values())[1:], label(name, row["flags"]), row["steps_per_second"] or row["note"], sep=", ",
                  file=sys.stderr)  # fmt: skip
    return rows


# -------------------------------------------------------------------------------------------------------------- tables


def label(contestant: str, flags: str) -> str:
    return f"`{contestant}{'' if flags == 'default' else ' ' + flags}`" if flags else contestant


def spread(values, digits: int = 0) -> str:
    """Median (lowest–highest)."""
    if not values:
        return "–"
    low, middle, high = (f"{x:,.{digits}f}" for x in (min(values), median(values), max(values)))
    return f"{middle} ({low}–{high})"


def column(rows: list[dict], name: str, flags: str, field: str) -> dict[str, float]:
    """A contestant's values by repetition."""
    found = [row for row in rows if (row["contestant"], row["flags"]) == (name, flags) and row[field]]
    return {row["repetition"]: float(row[field]) for row in found}


def ratios(rows: list[dict], name: str, flags: str, peer: str, field: str = "steps_per_second") -> str:
    """Ratio to the peer, over the repetitions that both have."""
    ours, theirs = column(rows, name, flags, field), column(rows, peer, "", field)
    return spread([ours[repetition] / theirs[repetition] for repetition in ours if repetition in theirs], 2)


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def speed_table(rows: list[dict], peers: list[str]) -> str:
    lines = []
    for name, flags in dict.fromkeys((row["contestant"], row["flags"]) for row in rows):
        speed, memory, workers = (column(rows, name, flags, x).values() for x in FIELDS[9:12])
        megabytes = f"{max(memory, default=0):.0f} MB" + (f" + {max(workers):.0f}" if any(workers) else "")
        note = next(row["note"] for row in rows if (row["contestant"], row["flags"]) == (name, flags))
        cells = [ratios(rows, name, flags, peer) if peer != name else "1" for peer in peers]
        lines.append([label(name, flags), note or spread(speed), *cells, megabytes if memory else "–"])
    return table(["", "steps/s", *(f"ratio to {peer}" for peer in peers), "peak memory (+ workers)"], lines)


def split_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        values = [float(row[part] or 0) for part in PARTS]
        cells = [f"{x:.0f} ({x / sum(values):.0%})" for x in [*values, sum(values)]] if any(values) else [row["note"]]
        lines.append([label(row["contestant"], row["flags"]), *cells])
    return table(["µs per step", *PARTS, "all"], lines)


def target_table(groups: dict[tuple, list[dict]]) -> str:
    """The targets, and beside each what was measured, a line per script and number of threads."""
    lines = []
    for what, case, mode, quantity, *goals in TARGETS:
        cells = {True: [], False: []}  # by default, with the fastest flags
        for (_, _, threads), rows in ((key, rows) for key, rows in groups.items() if key[:2] == (case, mode)):
            for name, flags in dict.fromkeys((row["contestant"], row["flags"]) for row in rows if row["flags"]):
                text = ratios(rows, name, flags, SB3, "memory_mb" if quantity == "memory" else "steps_per_second")
                if quantity == "speed":
                    text = spread(column(rows, name, flags, "steps_per_second").values())
                cells[flags == "default"].append(f"{text} {label(name, flags)}, threads: {threads}")
        pairs = [(goal, "<br>".join(cells[default]) if goal else "") for goal, default in zip(goals, (True, False))]
        lines.append([what, *(cell for pair in pairs for cell in pair)])
    return table(["", "target, default flags", "measured", "target, fastest flags", "measured"], lines)


def report(rows: list[dict]) -> str:
    """Everything, machine by machine."""
    sections = []
    for where in dict.fromkeys(row["machine"] for row in rows):
        here, groups = [row for row in rows if row["machine"] == where], defaultdict(list)
        for row in here:
            groups[row["case"], row["mode"], row["threads"]].append(row)
        busy, commits = max(float(row["busy_cores"]) for row in here), sorted({row["commit"] for row in here})
        warning = ": **not idle, so these figures are no evidence**" if busy > 0.2 else ""
        sections += [f"**Machine**: {where}. Code at {', '.join(commits)}. Median (lowest–highest) of the repetitions. "
                     f"Before a measurement others kept at most {busy:.1f} cores busy{warning}.",
                     f"**Targets**, ratios to {SB3} where no unit is given\n\n{target_table(groups)}"]  # fmt: skip
        for (name, mode, threads), group in groups.items():
            peers = [peer for peer in CASES[name].peers if peer in {row["contestant"] for row in group}]
            body = split_table(group) if mode == "split" else speed_table(group, peers)
            sections.append(f"**{CASES[name].title}: {mode}**, torch threads: {threads}\n\n{body}")
    return "\n\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all that the machine can run")
    parser.add_argument("--modes", nargs="+", choices=["train", "rollouts", "update", "environment", "split"])
    parser.add_argument("--repetitions", type=int, default=3, help="0: only prints what the CSV file holds")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement, after the warm-up")
    parser.add_argument("--iterations", type=int, default=3, help="at least, in each measurement")
    parser.add_argument("--torch-threads", type=int, nargs="+", help="default: control and --quick 1, else all cores")
    parser.add_argument("--sbx-python", default=sys.executable, help="the python of an environment that has sbx-rl")
    parser.add_argument("--before", type=Path, help="another checkout, whose scripts are measured beside ours")
    parser.add_argument("--csv", type=Path, help="raw measurements; default results/speed.csv, with --quick none")
    parser.add_argument("--output", type=Path, help="Markdown file to put the tables into")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repetition")
    args = parser.parse_args()
    path = args.csv or (None if args.quick else RESULTS)
    if args.quick:
        args.repetitions, args.seconds, args.iterations = 1, 0.1, 1
    where = machine(args.sbx_python)
    rows = list(csv.DictReader(path.open())) if path and path.exists() else []
    names = [name for name in CASES if CASES[name].kind != "gpu" or torch.cuda.is_available()]
    for name in args.cases or [name for name in names if not (args.quick and name == "hopper")]:  # as halfcheetah
        case = CASES[name]
        if args.quick and name != "a2c":
            case = case._replace(num_steps=64 if case.kind == "control" else 8, num_minibatches=4)
        for mode in [mode for mode in case.modes.split() if args.repetitions and mode in (args.modes or mode)]:
            for threads in args.torch_threads or [1 if case.kind == "control" or args.quick else CORES]:
                key = dict(zip(KEY, (where, name, mode, str(threads))))
                rows = [row for row in rows if any(row[field] != key[field] for field in KEY)]  # measured anew
                rows += measure_all(case, key, args)
                if path:  # after each, so that nothing is lost
                    with path.open("w", newline="") as file:
                        writer = csv.DictWriter(file, FIELDS)
                        writer.writeheader()
                        writer.writerows(rows)
    text = report(rows)
    print(text)
    if args.output:
        page = args.output.read_text() if args.output.exists() else ""
        before, _, rest = page.partition(BEGIN)
        args.output.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2] or chr(10)}")


if __name__ == "__main__":
    main()
