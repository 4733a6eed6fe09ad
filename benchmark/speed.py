"""Training speed of the scripts beside Stable-Baselines3 and sbx, in turn; prints Markdown tables.

    python benchmark/speed.py --output benchmark/README.md       # all cases, about half an hour
    python benchmark/speed.py --cases atari halfcheetah --pairs 3
    python benchmark/speed.py --against ../other                 # beside another checkout's scripts
    python benchmark/speed.py --cases atari-bf16 atari-32 --cuda
    python benchmark/speed.py --quick                            # shows that all runs, no more

Every run is a process of its own. Steps per second are those of whole iterations, without the first
fifth of a run: without loading, compiling and the final evaluation. Ours are between two points in
TensorBoard, so they include logging and checkpoints; the peers write neither. Both sides have the
same task, network, batch, optimiser settings, seed and torch threads (`reference.py` holds the
peers'). The order is turned round in every second pair, and a ratio is taken within a pair. Memory
is a process's largest resident set. `--output` writes the table of peers between two marks in a
Markdown file; the figures behind it are in `results/speed.csv`.
"""

import csv
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "speed.csv"
FIELDS = ["machine", "case", "pair", "who", "steps_per_second", "memory_mb", "busy_cores"]
BEGIN = "<!-- speed.py writes from here -->"
END = "<!-- to here -->"
OURS = "ours"
SB3 = "Stable-Baselines3"
SBX = "sbx"
AGAINST = "the other checkout"
CORES = os.cpu_count()


@dataclass
class Case:
    title: str
    script: str
    flags: str  # of the script alone
    env_id: str
    num_envs: int
    num_steps: int
    num_minibatches: int  # 1: A2C, which has none
    total_timesteps: int

    @property
    def control(self) -> bool:
        return not self.env_id.startswith("ALE/")

    @property
    def method(self) -> str:
        return "a2c" if self.script.startswith("sa2c") else "ppo"


BREAKOUT = "ALE/Breakout-v5"
CHEETAH = "HalfCheetah-v5"
GAMES = "sppo_atari.py"
CONTROL = "sppo_continuous.py"
CASES = {
    "atari": Case("Atari", GAMES, "", BREAKOUT, 8, 128, 4, 8_192),
    "atari-bf16": Case("Atari", GAMES, "--bf16", BREAKOUT, 8, 128, 4, 8_192),
    "atari-bf16-compile": Case("Atari", GAMES, "--bf16 --compile", BREAKOUT, 8, 128, 4, 8_192),
    "atari-32": Case("Atari", GAMES, "--num-envs 32 --bf16", BREAKOUT, 32, 128, 4, 32_768),
    "sa2c": Case("SA2C, Atari", "sa2c_atari.py", "", BREAKOUT, 16, 5, 1, 16_000),
    "sa2c-control": Case("SA2C, control", "sa2c_continuous.py", "", CHEETAH, 1, 16, 1, 40_000),
    "halfcheetah": Case("HalfCheetah", CONTROL, "", CHEETAH, 1, 2048, 32, 40_960),
    "halfcheetah-compile": Case("HalfCheetah", CONTROL, "--compile", CHEETAH, 1, 2048, 32, 81_920),
}


@dataclass
class Args:
    """Speed beside Stable-Baselines3, sbx and another checkout."""

    cases: tuple[Literal[*CASES], ...] = tuple(CASES)  # which; default: all
    pairs: int = 5  # runs of each contestant, in turn
    against: Path | None = None  # another checkout, whose scripts run the same cases
    peers: bool = True  # Stable-Baselines3 and, where it is installed, sbx
    sbx_python: str = sys.executable  # the Python of an environment that has sbx
    torch_threads: int = 0  # 0: one for control, one per core for games
    cuda: bool = False  # all contestants on the GPU
    output: Path | None = None  # Markdown file to write the table into
    quick: bool = False  # one pair of tiny runs; no figure is kept


def busy_cores(seconds: float) -> float:
    """Cores that others keep busy while this process sleeps; 0 where the system does not say."""

    def idle_and_all() -> tuple[int, int]:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)

    if sys.platform != "linux":
        return 0.0
    idle_before, all_before = idle_and_all()
    time.sleep(seconds)
    idle_after, all_after = idle_and_all()
    return CORES * (1 - (idle_after - idle_before) / max(all_after - all_before, 1))


def run(command: list, folder: str) -> tuple[str, float]:
    """What a process prints, and its peak memory in MB."""
    with open(Path(folder, "output"), "w+") as output, open(Path(folder, "errors"), "w+") as errors:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        errors.seek(0)
        if status:
            sys.exit(f"{' '.join(map(str, command))}:\n{errors.read()[-3000:]}")
        return output.read(), usage.ru_maxrss / 1024


def settings(case: Case, seed: int, threads: int, cuda: bool) -> list[str]:
    """The flags that both sides have. Control has no other device than the CPU."""
    flags = [
        f"--seed={seed}",
        f"--num-steps={case.num_steps}",
        f"--total-timesteps={case.total_timesteps}",
        f"--torch-threads={threads}",
    ]
    device = "--cuda" if cuda else "--no-cuda"
    return flags if case.control else [*flags, device]


def measure_script(root: Path, case: Case, *where) -> tuple[float, float]:
    """Steps per second and memory of one run of ours."""
    command = [sys.executable, root / case.script, f"--env-id={case.env_id}", *case.flags.split()]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--eval-episodes=1", *settings(case, *where)]
        _, memory = run(command, folder)
        (events,) = Path(folder, "runs").glob("*/events*")
        points = EventAccumulator(str(events)).Reload().Scalars("losses/value_loss")
    first = points[len(points) // 5]
    last = points[-1]
    return (last.step - first.step) / (last.wall_time - first.wall_time), memory


def measure_peer(python: str, library: str, case: Case, *where) -> tuple[float, float]:
    """The same of a peer."""
    env_id = re.sub("ALE/(.*)-v5", r"\1NoFrameskip-v4", case.env_id)
    command = [python, ROOT / "benchmark" / "peer.py", f"--library={library}"]
    command += [f"--method={case.method}", f"--env-id={env_id}", f"--num-envs={case.num_envs}"]
    with tempfile.TemporaryDirectory() as folder:
        command += [f"--num-minibatches={case.num_minibatches}", *settings(case, *where)]
        output, memory = run(command, folder)
    return float(output.split()[-1]), memory


def has_sbx(python: str) -> bool:
    return subprocess.run([python, "-c", "import sbx"], capture_output=True).returncode == 0


def contestants(case: Case, args: Args) -> dict:
    """A function of seed, threads and device for each that has this case."""
    found = {OURS: lambda *where: measure_script(ROOT, case, *where)}
    if args.peers:
        found[SB3] = lambda *where: measure_peer(sys.executable, "stable_baselines3", case, *where)
    if args.peers and case.control and case.method == "ppo" and has_sbx(args.sbx_python):
        found[SBX] = lambda *where: measure_peer(args.sbx_python, "sbx", case, *where)
    if args.against and (args.against / case.script).exists():
        found[AGAINST] = lambda *where: measure_script(args.against.resolve(), case, *where)
    return found


def tiny(case: Case) -> Case:
    """Small enough to try."""
    if case.method == "a2c":
        return replace(case, total_timesteps=4_800)
    num_steps = 64 if case.control else 8
    return replace(case, num_steps=num_steps, total_timesteps=10 * num_steps * case.num_envs)


def measure(name: str, args: Args, where: str) -> list[dict]:
    """All contestants of a case, in turn; a row for each run."""
    case = tiny(CASES[name]) if args.quick else CASES[name]
    threads = args.torch_threads or (1 if case.control else CORES)
    functions = contestants(case, args)
    rows = []
    for pair in range(1, args.pairs + 1):
        for who in list(functions) if pair % 2 else reversed(functions):
            busy = busy_cores(0.1 if args.quick else 1.0)
            speed, memory = functions[who](pair, threads, args.cuda)
            figures = f"{speed:.1f}", f"{memory:.0f}", f"{busy:.2f}"
            rows.append(dict(zip(FIELDS, (where, name, str(pair), who, *figures))))
            print(name, pair, who, *figures, sep=", ", file=sys.stderr)
    return rows


def machine(cuda: bool) -> str:
    """What is measured on, and with what."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpu)
    parts = [model[1] if model else platform.processor(), f"{CORES} cores"]
    parts.append("AVX512-BF16" if " avx512_bf16" in cpu else "no AVX512-BF16")
    if cuda:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        parts.append(subprocess.check_output(query, text=True).strip())
    packages = ["torch", "numpy", "stable-baselines3", "gymnasium", "ale-py", "mujoco"]
    parts.append(f"Python {platform.python_version()}")
    return ", ".join(parts + [f"{package} {version(package)}" for package in packages])


def column(rows: list[dict], who: str, field: str) -> list[float]:
    """By pair."""
    return [float(row[field]) for row in rows if row["who"] == who]


def spread(values: list[float], digits: int) -> str:
    """Median (lowest to highest)."""
    if not values:
        return "-"
    low, middle, high = (f"{x:,.{digits}f}" for x in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


def ratios(rows: list[dict], who: str) -> list[float]:
    """Of our steps per second to theirs, in each pair."""
    pairs = zip(column(rows, OURS, "steps_per_second"), column(rows, who, "steps_per_second"))
    return [ours / theirs for ours, theirs in pairs]


def table(rows: list[dict], peers: list[str]) -> str:
    """A line for each case."""
    header = ["case", "ours, steps/s"]
    for peer in peers:
        header += [f"{peer}, steps/s", "ratio"]
    header += ["memory, MB", *(f"{peer}'s" for peer in peers)]
    lines = [header, ["---"] * len(header)]
    for name in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == name]
        cells = [f"{CASES[name].title} `{CASES[name].flags}`".removesuffix(" ``")]
        cells.append(spread(column(mine, OURS, "steps_per_second"), 0))
        for peer in peers:
            cells.append(spread(column(mine, peer, "steps_per_second"), 0))
            cells.append(spread(ratios(mine, peer), 2))
        for who in [OURS, *peers]:
            memory = column(mine, who, "memory_mb")
            cells.append(f"{median(memory):.0f}" if memory else "-")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def report(rows: list[dict], peers: list[str]) -> str:
    """A table for each machine."""
    sections = []
    for where in dict.fromkeys(row["machine"] for row in rows):
        here = [row for row in rows if row["machine"] == where]
        busy = max(float(row["busy_cores"]) for row in here)
        idle = "The machine was idle." if busy < 0.2 else f"**Others kept {busy:.1f} cores busy.**"
        pairs = max(int(row["pair"]) for row in here)
        text = f"{where}. Medians (lowest to highest) of at most {pairs} pairs. {idle}"
        there = [peer for peer in peers if any(row["who"] == peer for row in here)]
        sections.append(f"{text}\n\n{table(here, there)}")
    return "\n\n".join(sections)


def keep(rows: list[dict]) -> list[dict]:
    """Puts rows into the results, in place of those of the same cases and machine. Returns all."""
    measured = {(row["machine"], row["case"]) for row in rows}
    old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    rows = [row for row in old if (row["machine"], row["case"]) not in measured] + rows
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def write(path: Path, text: str) -> None:
    """Between the two marks."""
    page = path.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def main(args: Args) -> None:
    if args.quick:
        args.pairs = 1
    where = machine(args.cuda)
    rows = []
    kept = []
    for name in args.cases:
        rows += measure(name, args, where)
        if args.peers and not args.quick:
            kept = keep([row for row in rows if row["who"] != AGAINST])
    if args.peers:
        print(report(kept or rows, [SB3, SBX]), end="\n\n")
    if args.against:
        print(report(rows, [AGAINST]))
    if args.output:
        write(args.output, report(kept, [SB3, SBX]))


if __name__ == "__main__":
    main(tyro.cli(Args))
