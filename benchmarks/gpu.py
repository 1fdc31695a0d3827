"""Everything that this project wants to know from a GPU, in commands of less than nine minutes each.

    python -m benchmarks.gpu [--minutes 8.5] [--out FOLDER] [--only PHASE] [--interpret]

Phases in the order of their worth: checks against float64 of what the decoder runs, its tiles and the
comparisons for `auto`, the rows of the goals, the whole decoder, the upsampled logits; then breadth: other
dtypes and sizes, FlexAttention, batches, the kernels' tests. Each has a share of the time; what is left goes
on when the same command is given again, on the same machine best right away: Triton keeps what it compiled.
Nothing but torch, triton and numpy is needed.

All kernels run in processes that a `Crew` watches. One that crashes, breaks or hangs costs the case, tile or
contender that it had in hand, which is named; everything else is measured. FOLDER/GPU/DATE.json and .md are
written as it goes. Exit code 0: all checks have run and are right; 1: one failed; 2: no GPU; 3: not all have
run, or a phase broke.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import attention, checks, decoder, tuning, upsampling
from benchmarks.machine import RESULTS, Machine, this_machine
from benchmarks.phases import Session, seconds_left
from benchmarks.records import Records, open_records
from benchmarks.report import checks_line, goals_lines

ROOT = Path(__file__).resolve().parents[1]
RIGHT, WRONG, INCOMPLETE = 0, 1, 3  # 2: no GPU, from `this_machine`
LEAST_S = 5
KERNEL_TESTS = "tests/test_triton_*.py"


class Phase(NamedTuple):
    """A part of the run; share: of the time that is left, against those after it."""

    name: str
    share: float
    run: Callable[[Session], int]  # how much of it is left for another run


def phases(machine: Machine) -> list[Phase]:
    """All of them, the most valuable first."""
    first, further = checks.check_groups(machine)
    found = [
        Phase("checks", 0.20, partial(checks.run, wanted=first)),
        Phase("tuning", 0.45, tuning.run),
        Phase("rows", 0.20, partial(attention.run, wanted=attention.first_rows(machine))),
        Phase("decoder", 0.05, decoder.run),
        Phase("upsampling", 0.05, partial(upsampling.run, wanted=upsampling.first_rows(machine))),
        Phase("further checks", 0.40, partial(checks.run, wanted=further)),
        Phase("further upsampling", 0.10, partial(upsampling.run, wanted=upsampling.further_rows(machine))),
        Phase("further rows", 0.40, partial(attention.run, wanted=attention.further_rows(machine))),
    ]
    if not machine.is_rehearsal and importlib.util.find_spec("pytest"):
        found.append(Phase("tests", 0.10, kernel_tests))
    return found


def kernel_tests(session: Session) -> int:
    """The attention kernels' tests, on the GPU; they count as one more check."""
    if checks.right(session.records.section("checks").get(KERNEL_TESTS)):
        return 0
    paths = sorted(str(path) for path in ROOT.glob(KERNEL_TESTS))
    command = [sys.executable, "-m", "pytest", "-q", "-x", *paths]
    try:
        finished = subprocess.run(
            command,
            cwd=ROOT,
            timeout=seconds_left(session),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return 1
    told = finished.stdout
    print(told, flush=True)
    failures = [] if finished.returncode == 0 else [" ".join(told.split())[-300:]]
    session.records.add("checks", KERNEL_TESTS, {"num_cases": 1, "failures": failures})
    return 0


def run_phases(
    wanted: Sequence[Phase], records: Records, machine: Machine, deadline: float
) -> dict[str, str]:
    """How each ended; one that breaks does not keep the others from running."""
    endings = {}
    for place, phase in enumerate(wanted):
        left = deadline - time.monotonic()
        if left < LEAST_S:
            endings[phase.name] = "not begun"
            continue
        seconds = left * phase.share / sum(p.share for p in wanted[place:])
        print(f"\n== {phase.name}: up to {seconds:.0f} s", flush=True)
        try:
            num_left = phase.run(Session(records, machine, time.monotonic() + seconds))
        except Exception as error:  # whatever it is, it is printed, and the next phase has its turn
            traceback.print_exc()
            endings[phase.name] = f"broke ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            continue
        endings[phase.name] = f"{num_left} left" if num_left else "done"
    return endings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after about so long")
    parser.add_argument("--out", type=Path, help="folder for GPU/DATE.json and .md")
    parser.add_argument("--only", metavar="PHASE", help="this phase alone, such as checks")
    parser.add_argument("--interpret", action="store_true", help="rehearse on a CPU, tiny, without a GPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    machine = this_machine()
    wanted = phases(machine)
    if arguments.only is not None:
        names = [phase.name for phase in wanted]
        if arguments.only not in names:
            parser.error(
                f"--only {arguments.only}: there is no such phase; expected one of {', '.join(names)}"
            )
        wanted = [phase for phase in wanted if phase.name == arguments.only]
    out: Path = arguments.out or (Path(tempfile.mkdtemp()) if arguments.interpret else RESULTS)
    if arguments.interpret and out.resolve() == RESULTS:
        parser.error("--interpret measures nothing: give it an --out of its own")
    records = open_records(out.resolve(), machine)
    groups = [group.name for part in checks.check_groups(machine) for group in part]
    records.table["num_check_groups"] = len(groups)
    try:
        endings = run_phases(wanted, records, machine, deadline)
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C; run the same command again to go on")
    sys.exit(summary(records, endings, groups, rehearsal=machine.is_rehearsal))


def summary(records: Records, endings: dict[str, str], groups: Sequence[str], *, rehearsal: bool) -> int:
    """Print what came out, shortest last; the exit code of the whole run. groups: what must be right."""
    entries = records.section("checks")
    for name, entry in entries.items():
        for failure in entry["failures"]:
            print(f"FAILED {name}: {failure}")
    print(f"\n{records.path}", f"{records.path.with_suffix('.md')}", sep="\n")
    print(", ".join(f"{name}: {ending}" for name, ending in endings.items()))
    print(f"checks: {checks_line(records.table)}")
    if rehearsal:
        print("a rehearsal on a CPU: no number is a measurement")
    print(*goals_lines(records.table), sep="\n")
    if any(not checks.right(entry) for entry in entries.values()):
        return WRONG
    broke = any(ending.startswith("broke") for ending in endings.values())
    return INCOMPLETE if broke or any(name not in entries for name in groups) else RIGHT


if __name__ == "__main__":
    main()
