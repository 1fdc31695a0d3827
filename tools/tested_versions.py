"""Run the test suite with the oldest, the usual and the newest versions; writes docs/versions.md.

    python tools/tested_versions.py [--only oldest ...] [--keep DIR]

Each combination gets a fresh environment, in which `make test` installs and runs what the README says. Rows
of combinations that are not run stay as they are.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "versions.md"
PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy", "opencv-python-headless")
OUTCOMES = ("passed", "failed", "skipped")


INTRODUCTION = """# Tested versions

`make test` in a fresh environment of each combination, on Linux without a GPU: the Triton kernels run in \
Triton's interpreter. Written by `make versions`. What each Triton version makes of the kernels for five \
kinds of GPUs is in [benchmarks/results/aot.md](../benchmarks/results/aot.md).
"""


class Combination(NamedTuple):
    """Versions to test together."""

    name: str
    python: str
    pins: tuple[str, ...] | None  # None: whatever pip is set up to take


COMBINATIONS = (
    Combination("oldest", "python3.11", ("torch==2.11.0",)),  # brings triton 3.6
    Combination("as pip resolves", "python3.11", None),
    Combination("newest", "python3.12", ("torch==2.15.0",)),  # brings triton 3.9
)


def test(combination: Combination, folder: Path) -> str:
    """The combination's row of the table."""
    python = shutil.which(combination.python)
    if python is None:
        sys.exit(
            f"error: {combination.python} is not on the PATH; leave out `{combination.name}` with --only"
        )
    venv = folder / combination.name.replace(" ", "-")
    environment = dict(os.environ)
    if combination.pins is not None:
        constraints = folder / f"{venv.name}.txt"
        constraints.write_text("\n".join(combination.pins) + "\n")
        environment["PIP_CONSTRAINT"] = str(constraints)
    print(f"{combination.name}: make test", flush=True)
    make = ["make", f"VENV={venv}", f"PYTHON={python}", "test"]
    finished = subprocess.run(
        make,
        cwd=ROOT,
        env=environment,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    (folder / f"{venv.name}.log").write_text(finished.stdout)
    if (counts := outcomes(finished.stdout)) is None:
        sys.exit(f"error: {combination.name}: no tests ran:\n{finished.stdout[-2000:]}")
    print(f"{combination.name}: {counts}", flush=True)
    cells = [*versions(venv / "dev" / "bin" / "python"), *(str(counts[outcome]) for outcome in OUTCOMES)]
    return f"| {combination.name} | {' | '.join(cells)} | {datetime.date.today()} | {commit()} |"


def outcomes(log: str) -> dict[str, int] | None:
    """How many tests came out how, by pytest's last line; None without one."""
    lines = re.findall(r"^=*\s*((?:\d+ \w+, )*\d+ \w+) in [\d.]+s", log, re.MULTILINE)
    if not lines:
        return None
    counts = dict.fromkeys(OUTCOMES, 0)
    for number, outcome in re.findall(r"(\d+) (\w+)", lines[-1]):
        name = "failed" if outcome.startswith("error") else outcome
        counts[name] = counts.get(name, 0) + int(number)
    return counts


def versions(python: Path) -> list[str]:
    """Of Python and of the packages in an environment."""
    script = (
        "import importlib.metadata as m, platform, sys; "
        "print(platform.python_version(), *(m.version(name) for name in sys.argv[1:]))"
    )
    return subprocess.run(
        [python, "-c", script, *PACKAGES], capture_output=True, text=True, check=True
    ).stdout.split()


def commit() -> str:
    """Of the checked-out source, with a mark if it was changed."""
    git = ["git", "-C", str(ROOT)]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!docs"], check=False).returncode
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return name.stdout.strip() + (" + changes" if changed else "")


def write_table(rows: dict[str, str]) -> None:
    """Put these rows among those that are there."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    kept = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    head = ["", "Python", *PACKAGES, *OUTCOMES, "date", "commit"]
    lines = [INTRODUCTION, f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [row for c in COMBINATIONS if (row := rows.get(c.name, kept.get(c.name)))]
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [combination.name for combination in COMBINATIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--keep", type=Path, help="keep the environments and logs here; default: made each time"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for combination in COMBINATIONS:
            if combination.name in arguments.only:
                write_table({combination.name: test(combination, folder)})


if __name__ == "__main__":
    main()
