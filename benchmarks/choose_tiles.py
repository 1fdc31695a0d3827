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
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.aot import KERNELS, class_widths, main_widths
from benchmarks.compiled import NUM_PIXELS, Case, Compiled
from benchmarks.versions import VERSIONS, compile_with
from segdeformer.kernels.tiles import ARCHITECTURES, TUNED, Tile, default_tile, padded_width
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


class Wanted(NamedTuple):
    """A tile to choose."""

    architecture: str
    kernel: str
    width: int  # as the model has it: an odd one takes more registers than its padded class
    value_width: int
    element_bytes: int

    @property
    def target(self) -> Target:
        num_rows = MANY_PIXELS if max(self.width, self.value_width) <= 32 else NUM_PIXELS
        widths = padded_width(self.width), padded_width(self.value_width)
        return Target(self.kernel, widths, self.element_bytes, ARCHITECTURES[self.architecture], num_rows)

    def present(self) -> Tile:
        target = self.target
        return default_tile(self.kernel, *target.widths, self.element_bytes, target.architecture)

    def case(self, tile: Tile) -> Case:
        return Case(self.kernel, self.width, self.value_width, self.element_bytes, self.architecture, tile)

    def candidates(self, most: int) -> list[Tile]:
        """The present tile, then those that may be as fast. The tuner tries bulk copies, and checks them."""
        target, present = self.target, self.present()
        tiles = [t for t in candidate_tiles(target, present) if not t.tma]
        estimates = {t: scores_per_cycle(target, t, estimated_resources(target, t)) for t in tiles}
        best = sorted(tiles[1:], key=lambda tile: -estimates[tile])
        likely = [tile for tile in tiles[1:] if estimates[tile] >= PROMISE * estimates[present]]
        # The best few in any case: the present tile may turn out not to fit.
        return [present, *dict.fromkeys([*likely[:most], *best[: most // 2]])]

    def score(self, made: Compiled | None) -> float:
        """Scores in a cycle by the model; 0 for what the gate would not let pass."""
        if made is None or made.slow_products:
            return 0.0
        return scores_per_cycle(self.target, made.case.tile, made.resources)


def choose(wanted: list[Wanted], folder: Path, *, most: int) -> dict[Wanted, Tile]:
    """The tile of each, compiled with the oldest version, which needs most memory, then the best with all."""
    tiles = {want: want.candidates(most) for want in wanted}
    scores: dict[Case, float] = {}
    for version in VERSIONS:
        cases = [want.case(tile) for want in wanted for tile in tiles[want]]
        made = {row.case: row for row in compile_with(version, cases, folder).compiled}
        for want in wanted:
            for case in map(want.case, tiles[want]):
                scores[case] = min(scores.get(case, float("inf")), want.score(made.get(case)))
            present = want.present()
            enough = GAIN * scores[want.case(present)]
            best = sorted(tiles[want], key=lambda tile: -scores[want.case(tile)])
            better = [tile for tile in best if scores[want.case(tile)] > enough]
            tiles[want] = list(dict.fromkeys([present, *better[:FINALISTS]]))
        print(f"Triton {version}: {len(made)} of {len(cases)} compiled", flush=True)
    chosen = {}
    for want in wanted:
        present = want.present()
        best = max(tiles[want], key=lambda tile: scores[want.case(tile)])
        old, new = scores[want.case(present)], scores[want.case(best)]
        if not new:
            raise RuntimeError(f"no candidate of {want} fits with every version")
        chosen[want] = best if new > GAIN * old else present
        print(f"{want.case(present)}: {old:.2f} scores a cycle; {best}: {new:.2f}; taken: {chosen[want]}")
    return chosen


def write_tiles(chosen: dict[Wanted, Tile]) -> None:
    """Put them into `defaults.json`."""
    path = TUNED / "defaults.json"
    table = json.loads(path.read_text())
    for want, tile in chosen.items():
        by_width = table[want.architecture].setdefault(want.kernel, {})
        by_width.setdefault("{}x{}".format(*want.target.widths), {})[str(want.element_bytes)] = tile
    text = json.dumps(table, indent=1)
    path.write_text(re.sub(r"\[\s+([^]]*?)\s+\]", _one_line, text) + "\n")


def _one_line(found: re.Match[str]) -> str:
    return "[" + " ".join(found.group(1).split()) + "]"


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
        Wanted(architecture, kernel, *widths, asked.bytes)
        for architecture in asked.only
        for kernel in asked.kernels
        for widths in ([(w, w) for w in class_widths(kernel)] if asked.classes else main_widths(kernel))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        write_tiles(choose(wants, asked.wheels or Path(scratch), most=asked.most))
