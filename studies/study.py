"""A comparison over many runs as one command, from a file that says which runs and why.

    python studies/study.py run smoke --workers 2     # each method, environment, condition and seed
    python studies/study.py collect smoke             # what they logged, as tables
    python studies/study.py report smoke              # what they say: Markdown and a figure

A run is the real script in a folder of its own, study_runs/STUDY/RUN/, and is finished once its
done.json lies there. However a study ends, its scripts end with it, and the same command goes on.
"""

import argparse
import sys
from pathlib import Path

from study_file import Cell, Study, StudyError, load
from study_results import collect, commands, read_table
from study_run import finished, run_here, run_on_ray
from tqdm import tqdm


def run(study: Study, folder: Path, args: argparse.Namespace) -> int:
    """Runs what is not finished; returns the exit status."""
    rows = read_table(args.results, "runs") if args.results else {}
    if args.results and not rows:
        raise StudyError(f"{args.results} holds no runs")

    def done(cell: Cell) -> bool:
        return cell.key in rows or finished(folder / cell.name) is not None

    for pilots in (True, False):  # these first: others' flags depend on them
        asked = commands(study, folder, rows)
        cells = [cell for cell in study.cells if cell.pilot == pilots and not done(cell)]
        jobs = {cell.name: asked[cell.key] for cell in cells if asked[cell.key]}
        if args.dry_run:
            for cell in cells:
                print(f"to do {cell.name}: {asked[cell.key] or 'its flags wait for pilots'}")
        if args.dry_run or not jobs:
            continue
        if args.ray:
            results = run_on_ray(jobs, folder, args.ray, args.threads, args.gpus_per_run)
        else:
            results = run_here(jobs, folder, args.workers, args.threads)
        for name, wrong in tqdm(results, "pilots" * pilots, len(jobs), unit=" runs", smoothing=0):
            if wrong:
                tqdm.write(f"{folder / name}: {wrong}", file=sys.stderr)
    count = sum(map(done, study.cells))
    print(f"{study.name}: {count} of {len(study.cells)} runs finished")
    return int(count < len(study.cells) and not args.dry_run)


def read_flags() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("command", choices=["run", "collect", "report"])
    add("study", help="a .toml file, or the name of one in studies/")
    add("--scale", help="a smaller version, by the name it has in the file")
    add("--folder", type=Path, default="study_runs", help="where the runs are")
    add("--results", type=Path, help="folder of the tables: run counts its rows as finished")
    add("--workers", type=int, default=1, help="runs at a time, on this machine")
    add("--threads", type=int, default=1, help="CPU threads of a run")
    add("--ray", metavar="ADDRESS", help="run on the Ray cluster there: auto, local, HOST:PORT")
    add("--gpus-per-run", type=float, default=0, help="with --ray: a run's share of a GPU")
    add("--dry-run", action="store_true", help="list the commands of run")
    args = parser.parse_args()
    if min(args.workers, args.threads) < 1 or args.gpus_per_run < 0:
        raise StudyError("--workers and --threads must be at least 1, --gpus-per-run 0")
    return args


def main() -> int:
    args = read_flags()
    study = load(args.study, args.scale)
    folder = args.folder / study.name
    results = args.results or folder / "results"
    if args.command == "run":
        return run(study, folder, args)
    if args.command == "collect":
        collect(study, folder, results)
    else:
        from study_report import report  # its libraries take seconds to load

        report(study, results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (StudyError, OSError) as error:  # a full disk, say: tables and pages are as they were
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, StudyError) else 1)
