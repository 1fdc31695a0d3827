"""Our kernels against the textbook, every SDPA backend and FlexAttention, all in one run.

    python -m benchmarks.kernels [--seconds 300] [--out FOLDER] [--interpret]

Every contender's results are checked against float64 first (forward: sampled rows; training: all gradients
of the last image). The contenders of a row then run in turn, by CUDA events, each after a flush of the L2
cache; the table has medians. Results are written after each row, and a second run goes on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import Contender, Form, Row, contenders, make_forms
from benchmarks.machine import (
    Machine,
    alternating_ms,
    ceilings,
    free_bytes,
    peak_mib,
    section_arguments,
    short,
    this_machine,
)
from benchmarks.records import Records, open_records
from segdeformer.kernels.clock import synchronize
from segdeformer.kernels.oracle import answer, largest_allowed, worst_row_error

ROW_SECONDS = 1.0
NUM_SAMPLED = 256
FEW_KEYS = 1024
# What contenders raise for shapes they do not take. KernelError is a ValueError.
REFUSALS = (RuntimeError, ValueError, NotImplementedError, AssertionError)


class Expected(NamedTuple):
    """The exact results of a form for the last image, and each one's allowed worst row error."""

    rows: Tensor | slice  # of the output
    results: list[Tensor]  # the output, then in training the gradients of the inputs
    allowed: list[float]


def rows(machine: Machine) -> Iterator[Row]:
    """All comparisons, those of the goals first."""

    def row(operation: str, c: int, e: int, n: int, *, training: bool) -> Row:
        n = min(n, machine.most_pixels or n)
        num_keys = min(FEW_KEYS, n // 2) if operation == "reduced" else n
        return Row(operation, c, e, n, num_keys, 1, machine.halves[0], training)

    external = [(256, 150, 16384), (512, 150, 16384), (256, 19, 65536)]
    first = [row("external", *shape, training=training) for shape in external for training in (False, True)]
    first += [row("internal", 256, 150, 16384, training=False)]  # folded: inference only
    first += [row("internal", 512, 512, 16384, training=training) for training in (False, True)]
    first += [row("internal", 256, 256, 16384, training=training) for training in (False, True)]
    first += [row("external", 256, 171, 16384, training=training) for training in (False, True)]
    first += [row("reduced", 256, 256, 16384, training=training) for training in (False, True)]
    yield from first
    if machine.is_rehearsal:
        yield from (first[0]._replace(with_flex=True), first[-1]._replace(batch=4))
        return
    yield from (r._replace(with_flex=True) for r in first if r.operation != "reduced")
    for batch in (1, 4):
        for dtype in machine.halves:
            if (batch, dtype) != (1, machine.halves[0]):
                yield from (r._replace(batch=batch, dtype=dtype) for r in first)


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


def measure(row: Row, machine: Machine, limits: dict[str, float]) -> dict[str, Any]:
    """Check everyone, then time those that are right."""
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
    ceiling = limits[f"matmul_tflops_{str(row.dtype).removeprefix('torch.')}"]
    for name, ms in alternating_ms(runs, machine, seconds=ROW_SECONDS).items():
        tflops = flops[name] / ms / 1e9
        entries[name] |= {
            "ms": short(ms),
            "tflops": short(tflops),
            "share_of_matmul": short(tflops / ceiling),
        }
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
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            reasons = [first_line, *(str(warning.message) for warning in caught)]  # SDPA warns of its reasons
            return " ".join(" ".join(reasons).split())[:400]
    worst, reason = judge(results)
    return worst if reason is None else reason


def main() -> None:
    arguments = section_arguments(__doc__)
    began = time.monotonic()
    machine = this_machine()
    records = open_records(arguments.out, machine)
    run(records, machine, seconds=arguments.seconds - (time.monotonic() - began))


def run(records: Records, machine: Machine, *, seconds: float) -> None:
    """All rows that are not recorded yet, until the time is over."""
    deadline = time.monotonic() + seconds
    limits = known_ceilings(records, machine)
    print(f"ceilings: {limits}", flush=True)
    todo = [row for row in rows(machine) if row.name not in records.section("rows")]
    for place, row in enumerate(todo):
        if time.monotonic() >= deadline:
            print(f"out of time with {len(todo) - place} rows left; run again to go on")
            return
        with records.trying("rows", row.name):
            try:
                entry = measure(row, machine, limits)
            except torch.OutOfMemoryError as error:
                entry = {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
        records.add("rows", row.name, entry)
        print(summary(row.name, entry), flush=True)


def known_ceilings(records: Records, machine: Machine) -> dict[str, float]:
    """This machine's limits, measured once."""
    if "ceilings" not in records.table:
        records.table["ceilings"] = ceilings(machine)
        records.write()
    found: dict[str, float] = records.table["ceilings"]
    return found


def summary(name: str, entry: dict[str, Any]) -> str:
    """Our time and the best other one."""
    timed = {n: c["ms"] for n, c in entry.get("contenders", {}).items() if "ms" in c}
    if not timed:
        return f"{name}: {entry.get('skipped', 'nobody ran')}"
    times = ", ".join(f"{n} {ms:.3f}" for n, ms in sorted(timed.items(), key=lambda item: item[1])[:4])
    return f"{name}: {times} ms"


if __name__ == "__main__":
    main()
