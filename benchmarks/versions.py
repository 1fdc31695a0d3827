"""Compile kernels with the Triton versions that we promise to run with, each installed aside.

python -m benchmarks.versions CASES.json ANSWERS.json    with the Triton that is imported
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton

from benchmarks.compiled import Case, Compiled, compile_case
from segdeformer.kernels.tiles import Tile
from segdeformer.kernels.tuning.resources import Resources

VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")  # of Triton, oldest first


class Report(NamedTuple):
    """What one Triton version made of some cases."""

    version: str
    compiled: list[Compiled]
    errors: dict[Case, str]  # of those that do not compile


def compile_here(cases: Iterable[Case]) -> Report:
    """Every case that applies, on all cores, with the Triton that is imported."""
    report = Report(triton.__version__, [], {})
    unique = list(dict.fromkeys(cases))
    with ProcessPoolExecutor() as pool:  # breaks, and does not wait for ever, when a compiler crashes
        for case, result in zip(unique, pool.map(compile_case, unique), strict=True):
            if isinstance(result, Compiled):
                report.compiled.append(result)
            elif result != "does not apply":
                report.errors[case] = result
    return report


def compile_with(version: str, cases: Iterable[Case], folder: Path) -> Report:
    """The same with another version: in a process that imports it from `folder`, fetched where it is missing.

    Compiled code is cached in `folder` too.
    """
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache" / version)}
    if version != triton.__version__:
        wheel = folder / version
        if not (wheel / "triton").is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(wheel)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
        paths = [str(wheel), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "cases.json", Path(scratch) / "answers.json"
        asked.write_text(json.dumps(list(cases)))
        subprocess.run(
            [sys.executable, "-m", "benchmarks.versions", asked, answered],
            cwd=Path(__file__).parent.parent,
            env=environment,
            check=True,
        )
        found, compiled, errors = json.loads(answered.read_text())
    assert found == version, f"asked for Triton {version}, got {found}"
    return Report(
        version,
        [Compiled(_case(case), Resources(*resources)) for case, resources in compiled],
        {_case(case): reason for case, reason in errors},
    )


def _case(fields: list[Any]) -> Case:
    *case, tile, even = fields
    return Case(*case, Tile(*tile), even)


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:])
    made = compile_here(_case(fields) for fields in json.loads(asked.read_text()))
    answered.write_text(json.dumps([made.version, made.compiled, list(made.errors.items())]))
