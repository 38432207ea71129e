"""Run a benchmark: `python -m benchmarks --help`. What it shows and what not is in docs/benchmarks.md."""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.bulk import measure_copies
from benchmarks.fio import Timing, check_engine
from benchmarks.grow import measure_growth
from benchmarks.machine import machine, versions
from benchmarks.processes import BenchmarkError, require
from benchmarks.report import show, write
from benchmarks.results import Results
from benchmarks.stage import CHUNK_BYTES, KINDS, file_system, load_all, real_directory
from benchmarks.users import measure_users, user_programs
from benchmarks.workloads import DISK_WORKLOADS, REACHES, USER_REACHES, WORKLOADS

SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
PROJECT = Path(__file__).parent.parent


def main() -> int:
    """Parse, run, report; 0 when it ran, 1 when it could not, or was short under --check."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        results = _run(options)
    except BenchmarkError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    write(results, options.json)
    show(results)
    print(f"Written to {options.json} and {options.json.with_suffix('.svg')}.")
    return 1 if options.check and not results.all_reached() else 0


def _run(options: argparse.Namespace) -> Results:
    _check_programs(options)
    settings = {name: getattr(options, name) for name in ("size", "bulk_size", "rounds", "bulk_rounds", "kinds")}
    settings |= {"dir": f"{options.dir} ({file_system(options.dir)})", **vars(options.timing)}
    title, reaches, measure = MODES[options.mode]
    results = Results(title, machine(), versions(), settings, reaches)
    measure(results, options)
    return results


def _measure_table(results: Results, options: argparse.Namespace) -> None:
    load_all(results, options, options.dir, WORKLOADS)
    try:
        disk_dir = real_directory(options.disk_dir)
    except BenchmarkError as refusal:
        results.notes.append(f"The rows with flushes were not measured: {refusal}")
    else:
        results.settings["disk_dir"] = f"{disk_dir} ({file_system(disk_dir)})"
        load_all(results, options, disk_dir, DISK_WORKLOADS)
    if "lockstep" in options.kinds:
        measure_copies(results, options)


MODES = {
    "table": ("Lockstep and its peers", REACHES, _measure_table),
    "grow": ("Lockstep as things grow", (), measure_growth),
    "users": ("Real users", USER_REACHES, measure_users),
}


# --- options ---


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--grow", dest="mode", action="store_const", const="grow", help="cost against size")
    modes.add_argument("--users", dest="mode", action="store_const", const="users", help="databases, cold disks")
    parser.set_defaults(mode="table")
    kinds = ",".join(KINDS)
    parser.add_argument("--peers", dest="kinds", type=_kinds, default=list(KINDS), help=f"of {kinds} (default: all)")
    parser.add_argument(
        "--sectors",
        type=_sectors,
        help="encryption sectors of lockstep; each is a peer: 512, 4096 or 512,4096 (default: both; else 4096, "
        "and 512 for --users)",
    )
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where the disks live (default: /dev/shm)")
    parser.add_argument("--disk-dir", type=Path, help="for rows with flushes (default: a temporary place)")
    parser.add_argument("--size", type=_size, help="of each target (default: 512M; 128M when quick)")
    parser.add_argument("--bulk-size", type=_size, help="of what is copied whole (default: 2G; 512M when quick)")
    parser.add_argument("--rounds", type=int, help="(default: 5; 1 when quick)")
    parser.add_argument("--seconds", type=float, help="counted per cell (default: 3; 0.8 when quick)")
    parser.add_argument("--quick", action="store_true", help="a look, not a result")
    parser.add_argument("--check", action="store_true", help="exit 1 unless every reach row is measured and met")
    parser.add_argument("--json", type=Path, help="(default: docs/benchmarks/latest.json; build/ when quick)")
    return _completed(parser.parse_args())


def _completed(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the mode."""
    quick = options.quick
    options.sectors = options.sectors or {"users": [512], "grow": [4096]}.get(
        options.mode, [4096] if quick else [512, 4096]
    )
    options.size = options.size or (128 << 20 if quick else 512 << 20)
    options.bulk_size = options.bulk_size or (512 << 20 if quick else 2 << 30)
    options.rounds = options.rounds or (1 if quick else 5)
    options.bulk_rounds = min(options.rounds, 3)
    seconds = options.seconds or (0.8 if quick else 3.0)
    options.timing = Timing(ramp_s=0.5 if seconds >= 2 else 0.25, run_s=seconds)
    name = "latest.json" if options.mode == "table" else f"{options.mode}.json"
    directory = PROJECT / "build" / "benchmarks" if quick else PROJECT / "docs" / "benchmarks"
    options.json = options.json or directory / name
    return options


def _kinds(text: str) -> list[str]:
    words = text.split(",")
    if unknown := set(words) - set(KINDS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in words]


def _sectors(text: str) -> list[int]:
    words = text.split(",")
    if not set(words) <= {"512", "1024", "2048", "4096"}:
        raise argparse.ArgumentTypeError(f"{text} is no list of LUKS2 sector sizes; write 512, 4096 or 512,4096")
    return sorted({int(word) for word in words})


def _size(text: str) -> int:
    digits = text.rstrip("KMG")
    if not digits.isdigit() or len(text) - len(digits) > 1 or not int(digits):
        raise argparse.ArgumentTypeError(f"{text} is no size; write 65536K, 512M or 2G")
    size_bytes = int(digits) * SUFFIXES.get(text[len(digits) :], 1)
    if size_bytes % CHUNK_BYTES:
        raise argparse.ArgumentTypeError("the size must be whole MiB, so that every workload fits")
    return size_bytes


def _check_programs(options: argparse.Namespace) -> None:
    programs = {"fio": "fio", "findmnt": "util-linux"}
    for kind in options.kinds:
        programs |= KINDS[kind].programs
    if options.mode == "users":
        programs |= user_programs()
    require(programs)
    check_engine()


if __name__ == "__main__":
    sys.exit(main())
