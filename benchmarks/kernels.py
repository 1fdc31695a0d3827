"""Our kernels against the textbook, every SDPA backend and FlexAttention, all in one run.

Every contender's results are checked against float64 first (forward: sampled rows; training: all gradients
of the last image). The contenders of a row then run in turn, by CUDA events, each after a flush of the L2
cache; the table has medians. Results are written after each row, and a second run goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import Contender, Form, Row, contenders, make_forms
from benchmarks.machine import (
    Machine,
    ceilings,
    free_bytes,
    peak_mib,
    short,
    this_machine,
    tiles_digest,
    timings,
)
from benchmarks.phases import Session, begin_contender, measure_rows, one_result
from segdeformer.kernels.clock import synchronize
from segdeformer.kernels.crew import COMPILE_PATIENCE_S, stage
from segdeformer.kernels.oracle import answer, largest_allowed, worst_row_error
from segdeformer.kernels.tiles import padded_width
from segdeformer.kernels.tune import EXACT_PATIENCE_S

ROW_SECONDS = 0.6
NUM_SAMPLED = 256
NUM_GOAL_ROWS = 9
FLEX_PATIENCE_S = 300.0  # TorchInductor tries several tiles
# What contenders raise for shapes they do not take. KernelError is a ValueError.
REFUSALS = (RuntimeError, ValueError, NotImplementedError, AssertionError)


class Expected(NamedTuple):
    """The exact results of a form for the last image, and each one's allowed worst row error."""

    rows: Tensor | slice  # of the output
    results: list[Tensor]  # the output, then in training the gradients of the inputs
    allowed: list[float]


def first_rows(machine: Machine) -> list[Row]:
    """The decoder's own shapes in the usual dtype, those of the goals first; then few keys, and 1/16 maps."""

    def both(operation: str, c: int, e: int, n: int, keys: int | None = None) -> list[Row]:
        return [one(operation, c, e, n, keys, training=training) for training in (False, True)]

    def one(
        operation: str, c: int, e: int, n: int, keys: int | None = None, *, training: bool = False
    ) -> Row:
        n = min(n, machine.most_pixels or n)
        m = n if keys is None else min(keys, n // 2)
        return Row(operation, c, e, n, m, 1, machine.halves[0], training)

    wanted = [
        *both("external", 256, 150, 16384),
        *both("external", 512, 150, 16384),
        *both("external", 256, 19, 65536),
        one("internal", 256, 150, 16384),  # folded: inference only
        *both("internal", 512, 512, 16384),
        *both("internal", 256, 256, 16384),
        *both("reduced", 256, 256, 16384, 1024),
        one("reduced", 256, 150, 16384, 1024),
        *both("reduced", 256, 256, 16384, 256),
        one("reduced", 256, 150, 16384, 256),
        *both("internal", 256, 256, 1024),
        *both("external", 256, 171, 16384),
    ]
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


def expected(form: Form, row: Row, grad_out: Tensor | None) -> Expected:
    """By the form's reference, in float64 and, for the yardstick, in the row's dtype."""
    queries, *others = (t.detach()[-1:] for t in form.inputs)
    rows: Tensor | slice = slice(None)
    if grad_out is None and row.num_pixels > NUM_SAMPLED:
        generator = torch.Generator(queries.device).manual_seed(1)
        rows = torch.randint(row.num_pixels, (NUM_SAMPLED,), generator=generator, device=queries.device)
    inputs = (queries[:, rows], *others)
    upstream = None if grad_out is None else grad_out[-1:]
    exact, eager = (
        answer(form.reference, inputs, scale=row.scale, grad_out=upstream, exact=precise)
        for precise in (True, False)
    )
    results = [exact.out, *exact.grads]
    allowed = [
        largest_allowed(worst_row_error(rounded, precise), row.dtype)
        for rounded, precise in zip([eager.out, *eager.grads], results, strict=True)
    ]
    return Expected(rows, results, allowed)


def step(contender: Contender, grad_out: Tensor | None) -> Callable[[], list[Tensor]]:
    """One forward, or forward + backward: the output and the gradients of the contender's inputs."""
    inputs = contender.inputs

    def run() -> list[Tensor]:
        if grad_out is None:
            with torch.no_grad():
                return [contender.run(*inputs)]
        out = contender.run(*inputs)
        upstream = grad_out
        if out.shape[2] > grad_out.shape[2]:
            upstream = padded_grads.setdefault(out.shape[2], _padded(grad_out, out.shape[2]))
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    padded_grads: dict[int, Tensor] = {}
    return run


def _padded(tensor: Tensor, width: int) -> Tensor:
    return F.pad(tensor, (0, width - tensor.shape[2]))


def check(results: list[Tensor], right: Expected) -> tuple[float, str | None]:
    """The worst row error of the results, and why they are not acceptable."""
    worst = 0.0
    for place, (result, exact, allowed) in enumerate(zip(results, right.results, right.allowed, strict=True)):
        mine = result.detach()[-1:, ..., : exact.shape[2]]
        error = worst_row_error(mine[:, right.rows] if place == 0 else mine, exact)
        worst = max(worst, error)
        if not error <= allowed:  # NaN is never allowed
            what = "output" if place == 0 else f"gradient {place}"
            return error, f"wrong {what}: worst row off by {error:.2g}, allowed {allowed:.2g}"
    return worst, None


def measure(row: Row, machine: Machine, without: Mapping[str, str]) -> dict[str, Any]:
    """Check everyone but those `without`, for these reasons; then time those that are right."""
    stage("exact results", EXACT_PATIENCE_S)
    forms = make_forms(row, machine)
    out_widths = {form.name: form.widths[1] for form in forms}
    generator = torch.Generator(machine.device).manual_seed(2)
    grads_out: dict[str, Tensor | None] = {
        name: torch.randn(row.batch, row.num_pixels, width, generator=generator, device=machine.device).to(
            row.dtype
        )
        if row.training
        else None
        for name, width in out_widths.items()
    }
    right = {form.name: expected(form, row, grads_out[form.name]) for form in forms}
    entries: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    flops = {}
    for contender in contenders(row, forms, machine):
        entry = entries[contender.name] = {"form": contender.form.name}
        if contender.name in without:
            entry["refused"] = without[contender.name]
            continue
        begin_contender(contender.name, FLEX_PATIENCE_S if contender.name.startswith("Flex") else None)
        if contender.needs_bytes > 0.8 * free_bytes(machine):
            entry["refused"] = f"N x M matrices of {contender.needs_bytes / 2**30:.0f} GiB do not fit"
            continue
        run = step(contender, grads_out[contender.form.name])
        outcome = first_run(run, partial(check, right=right[contender.form.name]), machine)
        if isinstance(outcome, str):
            entry["refused"] = outcome
            continue
        entry["worst_row_error"] = short(outcome)
        peak = peak_mib(run, machine)
        entry["peak_mib"] = None if peak is None else round(peak, 1)
        runs[contender.name] = run
        flops[contender.name] = contender.form.flops(row)
    for name, (ms, eager_ms) in timings(runs, machine, seconds=ROW_SECONDS).items():
        tflops = short(flops[name] / ms / 1e9)
        entries[name] |= {"ms": short(ms), "eager_ms": short(eager_ms), "tflops": tflops}
    return {**{k: str(v) if k == "dtype" else v for k, v in row._asdict().items()}, "contenders": entries}


def first_run(
    run: Callable[[], list[Tensor]],
    judge: Callable[[list[Tensor]], tuple[float, str | None]],
    machine: Machine,
) -> float | str:
    """The worst error of the first call, or why the contender is out; judge: both, of its results."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            results = run()
            synchronize(machine.device)
        except REFUSALS as error:
            synchronize(machine.device)  # an error that stays ends this process: the others go on in another
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            reasons = [first_line, *(str(warning.message) for warning in caught)]  # SDPA warns of its reasons
            return " ".join(" ".join(reasons).split())[:400]
    worst, reason = judge(results)
    return worst if reason is None else reason


def measure_ceilings(_task: None) -> Iterator[dict[str, float]]:
    """This machine's own limits."""
    stage("ceilings", COMPILE_PATIENCE_S)
    yield ceilings(this_machine())


def know_ceilings(session: Session) -> None:
    """Measure this machine's limits, once."""
    if "ceilings" not in session.records.table and (found := one_result(session, measure_ceilings)):
        session.records.table["ceilings"] = found
        session.records.write()
        print(f"ceilings: {found}", flush=True)


def run(session: Session, wanted: Iterable[Row]) -> int:
    """Measure what is not recorded yet; how many rows are left."""
    know_ceilings(session)

    def tiles_of(row: Row) -> str:
        widths = (row.value_width,) * 2 if row.operation == "external" else (row.width, row.value_width)
        return tiles_digest(session.machine, (padded_width(widths[0]), padded_width(widths[1])))

    rows = {row.name: row for row in wanted}
    return measure_rows(session, "rows", rows, measure, tiles_of=tiles_of, summary=summary)


def summary(name: str, entry: dict[str, Any]) -> str:
    """The best times."""
    timed = {n: c["ms"] for n, c in entry.get("contenders", {}).items() if "ms" in c}
    if not timed:
        return f"{name}: {entry.get('skipped') or entry['contenders']}"
    times = ", ".join(f"{n} {ms:.3f}" for n, ms in sorted(timed.items(), key=lambda item: item[1])[:4])
    return f"{name}: {times} ms"
