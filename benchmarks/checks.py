"""Every Triton kernel against float64: all dtypes, odd sizes, strides, large logits, poisoned memory.

    python -m benchmarks.checks [--seconds 100] [--out FOLDER] [--interpret]

An attention may be off by twice the error of the textbook form in the same dtype, plus 16 epsilons times the
largest exact value or 1; `check_upsampling` says what the operations on upsampled logits may be. Groups of
cases run in several processes, because most of the time is compiling.
B batch, N queries, M keys, D key width, E value width, K classes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.check_upsampling import UpsamplingGroup, upsampling_cases, upsampling_groups
from benchmarks.machine import Machine, section_arguments, short, this_machine
from benchmarks.poison import poisoned_memory
from benchmarks.records import open_records
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.clock import synchronize
from segdeformer.kernels.external_attention import external_attention, external_attention_reference

WORKERS = 12
BATCH = 2
ROUNDINGS = 16
LARGE = 40  # times the usual logits: nearly all weight on one key
# Each of 19, 32, 64, 150, 160, 256, 512 as D and as E; the decoder's own pairs first.
WIDTHS = (
    (256, 256),
    (256, 150),
    (512, 512),
    (19, 19),
    (32, 64),
    (64, 32),
    (160, 512),
    (150, 160),
    (512, 150),
)
CLASSES = (150, 19, 171, 2)
# Few sizes make many cases, but only these kinds of sizes make different code: 1, multiples of 16, others.
SIZES = ((17, 63), (63, 1000), (128, 128), (1000, 200))
MORE_SIZES = ((1, 1), (1, 1000), (1000, 1), (200, 17), (128, 63))  # for the first widths only
EXTERNAL_SIZES = (17, 63, 128, 1000)
MORE_EXTERNAL_SIZES = (1, 200)


class Group(NamedTuple):
    """Cases of one operation, one pair of widths and one dtype: one task for a process."""

    operation: str
    width: int
    value_width: int
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation} {self.width}, {self.value_width} {dtype}"


def groups(machine: Machine) -> Iterator[Group]:
    """All attentions, the decoder's own widths first."""
    external = tuple((n, n) for n in EXTERNAL_SIZES)
    more_external = tuple((n, n) for n in MORE_EXTERNAL_SIZES)
    pairs = itertools.zip_longest(CLASSES, WIDTHS)
    for place, (num_classes, widths) in enumerate(pairs):
        for dtype in machine.dtypes:
            if num_classes is not None:
                sizes = external + (more_external if place == 0 else ())
                yield Group("external", num_classes, num_classes, dtype, sizes)
            sizes = SIZES + (MORE_SIZES if place == 0 else ())
            yield Group("attention", widths[0], widths[1], dtype, sizes)


def smaller(group: Group) -> Group:
    """For a rehearsal: the interpreter takes a second for what a GPU does in a microsecond."""
    return group._replace(sizes=((17, 17),) if group.operation == "external" else ((17, 33),))


def attention_cases(group: Group, machine: Machine) -> Iterator[tuple[str, Callable[[], float]]]:
    """Names, and what gives the share of its allowance that a case takes."""
    cases = ["plain", "strided", "large logits"]
    if machine.is_rehearsal and group.dtype == torch.float32:
        # NumPy's products k q and q k differ by several roundings: its backward misses its forward's lse.
        cases.remove("large logits")
    for (n, m), case in itertools.product(group.sizes, cases):
        yield f"{n} x {m}, {case}", partial(run_case, group, n, m, case, machine)


def run_group(group: Group | UpsamplingGroup) -> tuple[str, dict[str, Any]]:
    """Its name, its failures and the largest share of its allowance that any result took; for a worker."""
    machine = this_machine()
    worst, failures, num_cases = 0.0, [], 0
    if not usable(machine):
        failure = "not run: an earlier kernel left the GPU unusable for its process; run again"
        return group.name, {"num_cases": 0, "failures": [failure]}
    if isinstance(group, UpsamplingGroup):
        cases = upsampling_cases(group, machine)
    else:
        cases = attention_cases(group, machine)
    for name, share_of in cases:
        num_cases += 1
        try:
            share = share_of()
        except (RuntimeError, ValueError, AssertionError) as error:
            failures.append(f"{name}: {' '.join(str(error).split())[-300:]}")
            if not usable(machine):
                break
            continue
        worst = max(worst, share)
        if not share <= 1:  # NaN is never allowed
            failures.append(f"{name}: {share:.3g} times the allowed error")
    return group.name, {"num_cases": num_cases, "failures": failures, "worst_share_of_allowed": short(worst)}


def usable(machine: Machine) -> bool:
    """Some errors stay: then nothing else can run in this process."""
    try:
        synchronize(machine.device)
    except RuntimeError:
        return False
    return True


def run_case(group: Group, n: int, m: int, case: str, machine: Machine) -> float:
    """The largest error of output and gradients as a share of what is allowed; NaN if any element is."""
    generator = torch.Generator(machine.device).manual_seed(n * 10007 + m)
    large = LARGE if case == "large logits" else 1

    def random(factor: float, *shape: int, dtype: torch.dtype = group.dtype) -> Tensor:
        made = (factor * torch.randn(shape, generator=generator, device=machine.device)).to(dtype)
        return strided(made) if case == "strided" else made

    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    if group.operation == "external":
        scale, scores = 1.0, random(3 * large, BATCH, n, group.width)
        inputs = [scores, random(3, BATCH, n, group.width, dtype=torch.float32)]
        run, reference = external_attention, external_attention_reference
    else:
        scale, queries = group.width**-0.5, random(large, BATCH, n, group.width)
        inputs = [queries, random(1, BATCH, m, group.width), random(1, BATCH, m, group.value_width)]
        run, reference = attention, attention_reference
    upstream = random(1, BATCH, n, group.value_width)

    def everything(function: Callable[..., Tensor], *, exact: bool, **options: Any) -> list[Tensor]:
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in inputs]
        out = function(*leaves, scale=scale, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    exact = everything(reference, exact=True)
    eager = everything(reference, exact=False)
    with poisoned_memory():
        ours = everything(run, exact=False, impl="triton")
    shares = []
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        allowed = 2 * (theirs.double() - right).abs().max()
        allowed += ROUNDINGS * torch.finfo(group.dtype).eps * right.abs().max().clamp(min=1)
        shares.append(((mine.double() - right).abs().max() / allowed).item())
    return max(shares, key=lambda share: float("inf") if share != share else share)


def strided(tensor: Tensor) -> Tensor:
    """The same values in columns of a wider matrix that starts at an odd place, transposed in memory."""
    batch, rows, width = tensor.shape
    wide = tensor.new_full((batch, width + 5, rows + 3), float("nan"))
    view = wide[:, 3 : width + 3, 1 : rows + 1].transpose(1, 2)
    view.copy_(tensor)
    return view


def main() -> None:
    arguments = section_arguments(__doc__)
    deadline = time.monotonic() + arguments.seconds
    machine = this_machine()
    records = open_records(arguments.out, machine)
    wanted: list[Group | UpsamplingGroup] = [
        *(smaller(group) if machine.is_rehearsal else group for group in groups(machine)),
        *upsampling_groups(machine),
    ]
    records.table["num_check_groups"] = len(wanted)
    todo = [group for group in wanted if not right(records.section("checks").get(group.name))]
    context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
    with context.Pool(min(WORKERS, os.cpu_count() or 1)) as pool:
        results = pool.imap_unordered(run_group, todo)
        for _ in todo:
            try:
                name, entry = results.next(timeout=max(0.0, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                print("out of time; run again to go on")
                break
            records.add("checks", name, entry)
            state = f"{len(entry['failures'])} FAILED" if entry["failures"] else "ok"
            print(f"{name}: {entry['num_cases']} cases {state}", flush=True)
    failed = [name for name, entry in records.section("checks").items() if not right(entry)]
    sys.exit(1 if failed else 0)


def right(entry: dict[str, Any] | None) -> bool:
    """Whether a group ran and nothing failed."""
    return entry is not None and not entry["failures"]


if __name__ == "__main__":
    main()
