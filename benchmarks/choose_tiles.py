"""Choose kernels/tuned/defaults.json: tiles for cards on which nothing was measured.

    python -m benchmarks.choose_tiles [--only sm_90 ...]    the decoder's own widths in half precision

Of each kernel's most promising candidates the one that is fastest by the model of the tuner's candidates,
from what the compilers made of it. It must fit the card and use its matrix instruction with every Triton
version that we promise; the slowest of them counts. The present tile stays where no other promises enough
more. No GPU is involved.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

from benchmarks.aot import KERNELS, main_widths, present_case
from benchmarks.compiled import NUM_PIXELS, Case, Compiled
from benchmarks.versions import VERSIONS, compile_with
from segdeformer.kernels.tiles import ARCHITECTURES, TUNED, padded_width, rows_in_lines
from segdeformer.kernels.tuning.candidates import (
    Target,
    candidate_tiles,
    estimated_resources,
    scores_per_cycle,
)

MANY_PIXELS = 65536  # of the maps with few classes
GAIN = 1.05  # that the model must promise for a new tile
PROMISE = 0.9  # of the present tile's estimate, for a candidate to be compiled at all
FINALISTS = 3  # compiled with every version; with the oldest, all candidates


def target_of(case: Case) -> Target:
    num_rows = MANY_PIXELS if max(case.width, case.value_width) <= 32 else NUM_PIXELS
    widths = padded_width(case.width), padded_width(case.value_width)
    return Target(case.kernel, widths, case.element_bytes, ARCHITECTURES[case.architecture], num_rows)


def candidates(present: Case, most: int) -> list[Case]:
    """The present tile, then those that may be as fast. The tuner tries bulk copies, and checks them."""
    target = target_of(present)
    tiles = [t for t in candidate_tiles(target, present.tile) if not t.tma]
    estimates = {t: scores_per_cycle(target, t, estimated_resources(target, t)) for t in tiles}
    best = sorted(tiles[1:], key=lambda tile: -estimates[tile])
    likely = [tile for tile in tiles[1:] if estimates[tile] >= PROMISE * estimates[present.tile]]
    # The best few in any case: the present tile may turn out not to fit.
    chosen = dict.fromkeys([present.tile, *likely[:most], *best[: most // 2]])
    return [present._replace(tile=tile) for tile in chosen]


def score(made: Compiled | None) -> float:
    """Scores in a cycle by the model; 0 for what the gate would not let pass."""
    if made is None or made.slow_products:
        return 0.0
    return scores_per_cycle(target_of(made.case), made.case.tile, made.resources)


def choose(wanted: list[Case], folder: Path, *, most: int) -> list[Case]:
    """For each case with its present tile the best one, by the version that likes it least.

    The oldest version needs most memory: it compiles all candidates, the others what is best by then.
    """
    cases = {present: candidates(present, most) for present in wanted}
    scores: dict[Case, float] = {}
    for version in VERSIONS:
        asked = [case for some in cases.values() for case in some]
        made = {row.case: row for row in compile_with(version, asked, folder).compiled}
        scores |= {case: min(scores.get(case, math.inf), score(made.get(case))) for case in asked}
        for present, some in cases.items():
            better = [case for case in some if scores[case] > GAIN * scores[present]]
            finalists = sorted(better, key=lambda case: -scores[case])[:FINALISTS]
            cases[present] = [present, *finalists]
        print(f"Triton {version}: {len(made)} of {len(asked)} compiled", flush=True)
    chosen = []
    for present, some in cases.items():
        best = some[min(1, len(some) - 1)]
        if not scores[best]:
            raise RuntimeError(f"no candidate of {present} fits with every version")
        print(f"{present}: {scores[present]:.2f} scores a cycle; taken: {best.tile}: {scores[best]:.2f}")
        chosen.append(best)
    return chosen


def write_tiles(chosen: list[Case]) -> None:
    """Put them into `defaults.json`."""
    path = TUNED / "defaults.json"
    table = json.loads(path.read_text())
    for case in chosen:
        by_width = table[case.architecture].setdefault(case.kernel, {})
        widths = "{}x{}".format(*target_of(case).widths)
        by_width.setdefault(widths, {})[str(case.element_bytes)] = case.tile
    path.write_text(rows_in_lines(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    # How many keys the kernel for few of them takes is not a matter of its own speed.
    kernels = [kernel for kernel in KERNELS if not kernel.endswith("few_keys")]
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--classes", action="store_true", help="the classes of widths, not the decoder's own")
    parser.add_argument("--bytes", type=int, choices=(2, 4), default=2, help="of an element")
    parser.add_argument("--most", type=int, default=8, help="candidates of each kernel to compile")
    parser.add_argument(
        "--wheels", type=Path, help="keep the Triton versions here; default: fetched each time"
    )
    asked = parser.parse_args()
    wants = [
        present_case(kernel, widths, asked.bytes, architecture)
        for architecture in asked.only
        for kernel in asked.kernels
        for widths in ([(w, w) for w in KERNELS[kernel]] if asked.classes else main_widths(kernel))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        write_tiles(choose(wants, asked.wheels or Path(scratch), most=asked.most))
