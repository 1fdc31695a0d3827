"""Compile every Triton kernel with every shipped tile for five kinds of cards, on a machine without any.

    python -m benchmarks.aot               with the installed Triton
    python -m benchmarks.aot --versions    with all that we promise, installed aside; writes results/aot.md

A program that does not fit its card, or does not use the card's matrix instruction in half precision, is a
failure. Spills are the compiler's, differ from version to version, and are reported.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import triton

from benchmarks.compiled import NUM_PIXELS, Case, Compiled
from benchmarks.versions import VERSIONS, Report, compile_here, compile_with
from segdeformer.kernels.tiles import (
    ARCHITECTURES,
    TUNED,
    WIDTHS,
    Tile,
    default_tile,
    padded_width,
    read_tiles,
)
from segdeformer.kernels.tuning.cases import WIDTHS_OF
from segdeformer.kernels.tuning.resources import MATRIX_INSTRUCTIONS

TABLE = Path(__file__).parent / "results" / "aot.md"

KERNELS = {  # and the classes of default tiles that each is used for
    "attention_forward": WIDTHS,
    "attention_forward_few_keys": WIDTHS,
    "attention_backward_queries": (64, 128, 192, 256),
    "attention_backward_keys": (192, 256),  # narrower ones go together, wider ones in chunks
    "attention_backward_values": (192, 256),
    "attention_backward_keys_and_values": (64, 128),
    "attention_weights_and_grads": (256, 512),
    "external_forward": WIDTHS,
    "external_backward_queries": WIDTHS,
    "external_backward_keys": WIDTHS,
}
FIXED = ("row_deltas", "class_probabilities", "upsampled_loss", "upsampled_loss_gradient", "upsampled_argmax")
FIXED_WIDTHS = (19, 150)


def shipped_cases(architectures: Iterable[str]) -> Iterator[Case]:
    """Every default tile at its class's widest, at the decoder's own widths, and every measured tile."""
    for name in architectures:
        for kernel, classes in KERNELS.items():
            ours = main_widths(kernel)
            widths = sorted({*ours, *((width, width) for width in classes)})
            for pair, element_bytes in itertools.product(widths, (2, 4)):
                case = present_case(kernel, pair, element_bytes, name)
                yield case
                if is_main(case) and case.tile.block_keys:
                    yield case._replace(even=False)
        for kernel, width, element_bytes in itertools.product(FIXED, FIXED_WIDTHS, (2, 4)):
            yield Case(kernel, width, width, element_bytes, name, Tile(0, 0, 4, 1))
    for path in sorted(TUNED.glob("*.json")):
        measured = read_tiles(path)
        for kernel, by_width in measured.get("tiles", {}).items():
            for text, by_bytes in by_width.items():
                d, e = (int(width) for width in text.split("x"))
                for element_bytes, by_size in by_bytes.items():
                    for tile in by_size.values() if isinstance(by_size, dict) else [by_size]:
                        yield Case(kernel, d, e, int(element_bytes), measured["architecture"], Tile(*tile))


def present_case(kernel: str, widths: tuple[int, int], element_bytes: int, architecture: str) -> Case:
    """With the default tile."""
    padded = (padded_width(width) for width in widths)
    tile = default_tile(kernel, *padded, element_bytes, ARCHITECTURES[architecture])
    return Case(kernel, *widths, element_bytes, architecture, tile)


def main_widths(kernel: str) -> list[tuple[int, int]]:
    """The decoder's own widths that a kernel is used for."""
    classes = KERNELS[kernel]
    operation = "external_attention" if kernel.startswith("external") else "attention"
    narrower = max((width for width in WIDTHS if width < classes[0]), default=0)
    return [
        (d, e)
        for d, e in WIDTHS_OF[operation]
        if narrower < max(padded_width(d), padded_width(e)) <= classes[-1]
    ]


def is_main(case: Case) -> bool:
    """Whether it is what the gate compiles with every version: the decoder's own widths, half precision."""
    widths = [(FIXED_WIDTHS[-1],) * 2] if case.kernel in FIXED else main_widths(case.kernel)
    return case.element_bytes == 2 and case.even and (case.width, case.value_width) in widths


def failures_of(report: Report) -> dict[Case, str]:
    """What a card cannot run, or not as it should, and why."""
    unfit = {made.case: reason for made in report.compiled if (reason := failure_of(made)) is not None}
    return report.errors | unfit


def failure_of(made: Compiled) -> str | None:
    """One line on why a card cannot run a program, or not as it should; None if all is well."""
    card, needs = ARCHITECTURES[made.case.architecture], made.resources
    if not made.resident_blocks:
        return (
            f"does not fit: {needs.shared_bytes:,} B of shared memory ({card.shared_bytes:,}), "
            f"{needs.warps} warps of {needs.registers} registers, "
            f"{needs.tensor_columns} columns of tensor memory ({card.tensor_columns})"
        )
    if made.slow_products and is_main(made.case):
        return f"multiplies with {needs.instruction}, not {MATRIX_INSTRUCTIONS[card.name]}"
    return None


def write_table(reports: list[Report], path: Path) -> None:
    """All versions in a line each, then what the newest made of the decoder's own widths."""
    newest = reports[-1]
    lines = [
        "# Every Triton kernel, compiled ahead of time",
        "",
        "No GPU involved. Regenerate with `make aot`. Half precision at the decoder's own widths with every "
        "version, all that is shipped (float32, classes of widths, masks at ragged edges) with the newest. "
        "A failure is a program that does not fit its card or does not use its matrix instruction. "
        "Spill: bytes of a thread's stack frame.",
        "",
        "| Triton | programs | failures | spill | worst spill |",
        "|---|---|---|---|---|",
    ]
    lines += [_summary(f"{report.version}, main widths", report, is_main) for report in reports]
    lines += [
        _summary(f"{newest.version}, everything", newest, lambda case: True),
        "",
        f"The decoder's own widths in half precision, {NUM_PIXELS:,} pixels, with Triton {newest.version}. "
        "Tile: queries x keys, warps, pipeline stages. Resident: programs on a multiprocessor at a time.",
    ]
    for name, card in ARCHITECTURES.items():
        lines += ["", f"## {name}, {card.shared_bytes // 1024} KB of shared memory", ""]
        lines += ["| kernel | widths | tile | shared B | registers | resident | spill B | products |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {c.kernel} | {c.width}, {c.value_width} | {c.tile if c.tile.block_queries else ''} "
            f"| {r.shared_bytes:,} | {r.registers} | {made.resident_blocks} | {r.spill_bytes} "
            f"| {r.instruction} |"
            for made in newest.compiled
            if (c := made.case).architecture == name and is_main(c) and (r := made.resources)
        ]
    path.write_text("\n".join(lines) + "\n")


def _summary(name: str, report: Report, wanted: Callable[[Case], bool]) -> str:
    rows = [row for row in report.compiled if wanted(row.case)]
    num_failures = sum(wanted(case) for case in failures_of(report))
    worst = max(rows, key=lambda row: row.resources.spill_bytes)
    num_spilling = sum(row.resources.spill_bytes > 0 for row in rows)
    where = f"{worst.resources.spill_bytes} B: {worst.case}" if worst.resources.spill_bytes else ""
    return f"| {name} | {len(rows)} | {num_failures} | {num_spilling} | {where} |"


def show(report: Report, seconds: float) -> int:
    """Print what came of a version; how many failures there are."""
    failures = failures_of(report)
    for case, reason in failures.items():
        print(f"Triton {report.version}, {case}: {reason}", file=sys.stderr)
    spills = [made.resources.spill_bytes for made in report.compiled]
    print(
        f"Triton {report.version}: {len(report.compiled)} programs compiled in {seconds:.0f} s, "
        f"{len(failures)} failures; {sum(map(bool, spills))} spill, at worst {max(spills, default=0)} B",
        flush=True,
    )
    return len(failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(ARCHITECTURES)
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="compile for these cards only"
    )
    parser.add_argument("--main", action="store_true", help="only the decoder's own widths, half precision")
    parser.add_argument("--versions", action="store_true", help=f"with Triton {', '.join(VERSIONS)}")
    parser.add_argument("--wheels", type=Path, help="keep these versions here; default: fetched each time")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table of --versions")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, so nothing compiles; unset it")
    everything = list(shipped_cases(arguments.only))
    main_cases = [case for case in everything if is_main(case)]
    if arguments.main:
        everything = main_cases
    if not arguments.versions:
        began = time.monotonic()
        report = compile_here(everything)
        sys.exit(1 if show(report, time.monotonic() - began) else 0)
    reports, num_failures = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for version in dict.fromkeys([*VERSIONS[:-1], triton.__version__, VERSIONS[-1]]):
            began = time.monotonic()
            cases = everything if version == VERSIONS[-1] else main_cases
            reports.append(compile_with(version, cases, arguments.wheels or Path(scratch)))
            num_failures += show(reports[-1], time.monotonic() - began)
    if arguments.only == names and not arguments.main:
        write_table(reports, arguments.out)
    sys.exit(1 if num_failures else 0)


if __name__ == "__main__":
    main()
