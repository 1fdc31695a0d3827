"""The tuner as a section of `make gpu`.

    python -m benchmarks.tuning [--seconds 200] [--out FOLDER] [--interpret]

Tiles go where they take effect, into the user's cache, and a copy beside the results.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.machine import RESULTS, Machine, section_arguments, this_machine
from segdeformer.kernels.tune_events import describe
from segdeformer.errors import UserError
from segdeformer.kernels.tiles import user_tuned
from segdeformer.kernels.tune import FULL_SIZES, Sizes, Tried, tune


def main() -> None:
    arguments = section_arguments(__doc__)
    machine = this_machine()
    copy = arguments.out / machine.slug / "tuned.json"
    sizes = Sizes(most_pixels=64, odd=50, candidates=2) if machine.is_rehearsal else FULL_SIZES
    path = copy if machine.is_rehearsal else user_tuned() / f"{machine.slug}.json"
    _take_along(path, machine, copy)
    try:
        for event in tune(path, machine.device, seconds=arguments.seconds, copy=copy, sizes=sizes):
            if not isinstance(event, Tried) or isinstance(event.outcome, str):
                print(describe(event), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)  # to be started again: it goes on after what went wrong


def _take_along(path: Path, machine: Machine, copy: Path) -> None:
    """On a machine that was not tuned on before, start from the measurements beside earlier results."""
    earlier = [p for p in (copy, RESULTS / machine.slug / "tuned.json") if p.is_file()]
    if earlier and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(earlier[0], path)


if __name__ == "__main__":
    main()
