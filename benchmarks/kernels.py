"""Our kernels against the textbook, every SDPA backend and FlexAttention, all in one run.

Every contender's results are checked against float64 first (forward: sampled rows; training: all gradients
of the last image). The contenders of a row then run in turn, by CUDA events, each after a flush of the L2
cache; the table has medians. Results are written after each row, and a second run goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Form, Judge, Row, contenders, make_forms
from benchmarks.machine import Machine, tiles_digest
from benchmarks.phases import Session, know_ceilings, measure_contenders, measure_rows
from segdeformer.kernels.tiles import padded_width
from segdeformer.kernels.tuning.crew import EXACT_PATIENCE_S, stage
from segdeformer.kernels.tuning.judge import Verdict, expected_attention, judge

ROW_SECONDS = 0.6
NUM_SAMPLED = 256
NUM_GOAL_ROWS = 9


def first_rows(machine: Machine) -> list[Row]:
    """The decoder's own shapes in the usual dtype, those of the goals first; then few keys, and 1/16 maps."""
    wanted = []
    for operation, c, e, pixels, keys in (
        ("external", 256, 150, 16384, None),
        ("external", 512, 150, 16384, None),
        ("external", 256, 19, 65536, None),
        ("internal", 256, 150, 16384, None),
        ("internal", 512, 512, 16384, None),
        ("internal", 256, 256, 16384, None),
        ("reduced", 256, 256, 16384, 1024),
        ("reduced", 256, 150, 16384, 1024),
        ("reduced", 256, 256, 16384, 256),
        ("reduced", 256, 150, 16384, 256),
        ("internal", 256, 256, 1024, None),
        ("external", 256, 171, 16384, None),
    ):
        n = min(pixels, machine.most_pixels or pixels)
        row = Row(operation, c, e, n, n if keys is None else min(keys, n // 2), 1, machine.halves[0], False)
        is_folded = operation != "external" and e == 150  # which never trains
        wanted += [row] if is_folded else [row, row._replace(training=True)]
    return [*wanted[:2], *wanted[6:7], *wanted[11:13]] if machine.is_rehearsal else wanted


def further_rows(machine: Machine) -> list[Row]:
    """FlexAttention beside those of the goals; then these in batches, and in the other half precision."""
    first = first_rows(machine)
    if machine.is_rehearsal:
        return [first[0]._replace(with_flex=True), first[-1]._replace(batch=4)]
    goals = first[:NUM_GOAL_ROWS]
    with_flex = [r for r in first[: NUM_GOAL_ROWS + 2] if r.operation == "internal" or r.value_width == 150]
    return [
        *(
            row._replace(with_flex=True)
            for row in with_flex
            if (row.operation, row.width) != ("external", 512)
        ),
        *(row._replace(batch=4) for row in goals),
        *(row._replace(dtype=machine.halves[1]) for row in goals),
    ]


def expected(form: Form, row: Row) -> Judge:
    """What judges results of a form, those of the last image, by its reference; a forward by some rows."""
    queries, *others = (t.detach()[-1:] for t in form.inputs)
    rows: Tensor | slice = slice(None)
    if not row.training and row.num_pixels > NUM_SAMPLED:
        generator = torch.Generator(queries.device).manual_seed(1)
        rows = torch.randint(row.num_pixels, (NUM_SAMPLED,), generator=generator, device=queries.device)
    inputs = (queries[:, rows], *others)
    upstream = None if form.grad_out is None else form.grad_out[-1:]
    right = expected_attention(form.reference, inputs, scale=row.scale, grad_out=upstream)

    def judge_results(results: list[Tensor]) -> Verdict:
        mine = [
            result.detach()[-1:, ..., : wanted.exact.shape[2]]
            for result, wanted in zip(results, right, strict=True)
        ]
        return judge([mine[0][:, rows], *mine[1:]], right)

    return judge_results


def measure(row: Row, machine: Machine, without: Mapping[str, str]) -> dict[str, Any]:
    """A row's contenders, but those `without`, for these reasons."""
    stage("exact results", EXACT_PATIENCE_S)
    forms = make_forms(row, machine)
    judges = {form.name: expected(form, row) for form in forms}
    named = contenders(row, forms, judges, machine)
    entries = measure_contenders(named, machine, without, seconds=ROW_SECONDS)
    return {**row._asdict(), "dtype": str(row.dtype), "contenders": entries}


def run(session: Session, wanted: Iterable[Row]) -> int:
    """Measure what is not recorded yet; how many rows are left."""
    know_ceilings(session)

    def tiles_of(row: Row) -> str:
        widths = (row.value_width,) * 2 if row.operation == "external" else (row.width, row.value_width)
        return tiles_digest(session.machine, (padded_width(widths[0]), padded_width(widths[1])))

    return measure_rows(session, "rows", {row.name: row for row in wanted}, measure, tiles_of=tiles_of)
