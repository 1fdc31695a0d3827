"""Everything that this project wants to know from a GPU, in one command of less than nine minutes.

    python -m benchmarks.gpu [--minutes 8.5] [--out FOLDER] [--interpret]

Checks every kernel against float64, tunes, races the rivals, measures the whole decoder and the upsampled
loss, runs the attention kernels' tests. Each section is a process with its own share of the time, so that a
kernel that hangs or breaks the GPU costs one section; one that breaks is started again and goes on after the
culprit. FOLDER/GPU/DATE.json and .md are written as it goes, and a second call goes on from them. Exit code
1: a check failed; 2: no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import RESULTS, this_machine
from benchmarks.records import Records, open_records
from benchmarks.report import checks_line, goals_lines

ROOT = Path(__file__).resolve().parents[1]
START_S = 8  # of a process, before its own clock runs
GRACE_S = 30  # until a section that does not stop by itself is killed
LEAST_S = 5
KERNEL_TESTS = sorted(str(path) for path in (ROOT / "tests").glob("test_triton_*.py"))
MOST_STARTS = 4


class Section(NamedTuple):
    """A part of the run; share: of the time that is left, against those after it."""

    name: str
    share: float
    command: tuple[str, ...]
    takes_options: bool = True


SECTIONS = (
    Section("checks", 0.22, ("-m", "benchmarks.checks")),
    Section("tuning", 0.31, ("-m", "benchmarks.tuning")),
    Section("kernels", 0.26, ("-m", "benchmarks.kernels")),
    Section("decoder", 0.06, ("-m", "benchmarks.decoder")),
    Section("upsampling", 0.10, ("-m", "benchmarks.upsampling")),
    Section("tests", 0.05, ("-m", "pytest", "-q", "-x", *KERNEL_TESTS), takes_options=False),
)


def run_section(section: Section, out: Path, deadline: float, *, interpret: bool) -> int | None:
    """Its exit code, None if it was killed; started again as long as it breaks and there is time."""
    code: int | None = None
    for _ in range(MOST_STARTS):
        seconds = deadline - time.monotonic() - START_S
        if seconds < LEAST_S:
            break
        command = [sys.executable, *section.command]
        if section.takes_options:
            command += ["--seconds", f"{seconds:.0f}", "--out", str(out), *(["--interpret"] * interpret)]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(seconds + START_S + (GRACE_S if section.takes_options else 0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        if code in (0, 1) or not section.takes_options:
            break
        print(f"{section.name}: {'hangs' if code is None else f'broke off with code {code}'}", flush=True)
    return code


def end(process: subprocess.Popen[bytes]) -> None:
    """End it and its workers: as Ctrl-C does, which notes no culprit, and if it hangs for good."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after about so long")
    parser.add_argument("--out", type=Path, help="folder for GPU/DATE.json and .md")
    parser.add_argument("--interpret", action="store_true", help="rehearse on a CPU, tiny, without a GPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    machine = this_machine()
    out: Path = arguments.out or (Path(tempfile.mkdtemp()) if arguments.interpret else RESULTS)
    out = out.resolve()
    codes: dict[str, int | None] = {}
    for place, section in enumerate(SECTIONS):
        if not section.takes_options and (machine.is_rehearsal or not importlib.util.find_spec("pytest")):
            continue
        left = deadline - time.monotonic()
        share = section.share / sum(s.share for s in SECTIONS[place:])
        print(f"\n== {section.name}: up to {left * share:.0f} s", flush=True)
        until = time.monotonic() + left * share
        try:
            codes[section.name] = run_section(section, out, until, interpret=arguments.interpret)
        except KeyboardInterrupt:
            sys.exit("stopped by Ctrl-C; run the same command again to go on")
    sys.exit(summary(open_records(out, machine), codes, rehearsal=machine.is_rehearsal))


def summary(records: Records, codes: dict[str, int | None], *, rehearsal: bool) -> int:
    """Print what came out, shortest last; the exit code of the whole run."""
    for name, entry in records.section("checks").items():
        for failure in entry.get("failures", []):
            print(f"FAILED {name}: {failure}")
    endings = {0: "done", 1: "failed", None: "not finished"}
    print(f"\n{records.path}", f"{records.path.with_suffix('.md')}", sep="\n")
    print(", ".join(f"{name} {endings.get(code, f'broke off ({code})')}" for name, code in codes.items()))
    print(f"checks: {checks_line(records.table)}")
    if rehearsal:
        print("a rehearsal on a CPU: no number is a measurement")
    print(*goals_lines(records.table), sep="\n")
    wrong = any(entry.get("failures") for entry in records.section("checks").values())
    return 1 if wrong or codes.get("checks") != 0 or codes.get("tests") == 1 else 0


if __name__ == "__main__":
    main()
