"""Our attentions against the textbook, every SDPA backend and FlexAttention, all in one run.

External stage, `plain` form: softmax(Qe Ke^T / sqrt C) Ve with C-wide keys and values, as the textbook has
it; `low rank`: softmax(Q~ P^T) P, K wide, P = softmax(A) inside. Both get their inputs made: the plain form
is spared its two projections of N x C, ours the smaller ones to and from K.
Widths that a backend does not take are padded with zeros beforehand, outside of the timing: in its favour.
Every contender's results for the last image are checked against float64 first. Then they run in turn, by CUDA
events, each after a flush of the L2 cache; the table has medians. Results are written after each row, and a
second run goes on.
B batch, N pixels, M keys, C decoder width, K classes, E value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.machine import Machine, tiles_digest
from benchmarks.phases import (
    Contender,
    Judge,
    Session,
    kind_name,
    know_ceilings,
    measure_contenders,
    measure_rows,
)
from segdeformer.kernels.attention import attention_reference
from segdeformer.kernels.tiles import padded_width
from segdeformer.kernels.tuning.cases import AttentionInputs, attention_inputs, step
from segdeformer.kernels.tuning.crew import EXACT_PATIENCE_S, stage
from segdeformer.kernels.tuning.judge import Verdict, judge

BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
SDPA_MULTIPLE, FLEX_MULTIPLE = 8, 16
FLEX_PATIENCE_S = 300.0  # TorchInductor tries several tiles
NUM_GOAL_ROWS = 9
FIRST_ROWS = (  # operation, C, K or E, N, M; those of the goals first, then few keys, and 1/16 maps
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
)


class Row(NamedTuple):
    """One comparison. `internal` and `reduced` are attention over all pixels and over fewer keys."""

    operation: str  # external, internal or reduced
    width: int  # C, of queries and keys
    value_width: int  # K for external
    num_pixels: int
    num_keys: int
    batch: int
    dtype: torch.dtype
    training: bool  # forward + backward, else forward
    with_flex: bool = False  # its compilation takes long, so such rows come last

    @property
    def name(self) -> str:
        keys = f" x {self.num_keys}" if self.num_keys != self.num_pixels else ""
        flex = " with Flex" if self.with_flex else ""
        return (
            f"{self.operation} ({self.width}, {self.value_width}, {self.num_pixels}{keys}) "
            f"batch {self.batch} {kind_name(self.dtype, training=self.training)}{flex}"
        )


def first_rows(machine: Machine) -> list[Row]:
    """The decoder's own shapes in the usual dtype."""
    wanted = []
    for operation, c, e, pixels, keys in FIRST_ROWS:
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
    with_flex = [r for r in with_flex if (r.operation, r.width) != ("external", 512)]
    batches = [row._replace(batch=4) for row in goals]
    return [
        *(row._replace(with_flex=True) for row in with_flex),
        *batches,
        *(row._replace(dtype=machine.halves[1]) for row in goals),
    ]


class Form(NamedTuple):
    """One way to write the operation."""

    name: str
    widths: tuple[int, int]  # of scores, and of values: what FLOPs are counted by
    inputs: AttentionInputs
    judge: Judge

    def flops(self, row: Row) -> float:
        """Of the products over N x M: two in the forward, five more in the backward."""
        d, e = self.widths
        per_score = 2 * (d + e) + (2 * (3 * d + 2 * e) if row.training else 0)
        return float(row.batch * row.num_pixels * row.num_keys * per_score)


def make_forms(row: Row, machine: Machine) -> list[Form]:
    """The plain form and, for the external stage, ours in front of it. Inputs are leaves in training."""
    sizes = row.batch, row.num_pixels, row.num_keys
    wanted = [("plain", "attention", (row.width, row.value_width))]
    if row.operation == "external":
        low_rank = ("low rank", "external_attention", (row.value_width, row.value_width))
        wanted = [low_rank, ("plain", "attention", (row.width, row.width))]
    forms = []
    for name, operation, widths in wanted:
        inputs = attention_inputs(
            operation, widths, sizes, dtype=row.dtype, device=machine.device, training=row.training
        )
        forms.append(Form(name, widths, inputs, expected(inputs)))
    return forms


def expected(inputs: AttentionInputs) -> Judge:
    """What judges results in the inputs' widths or wider, those of the last image."""
    last = tuple(t.detach()[-1:] for t in inputs.tensors)
    grad_out = None if inputs.grad_out is None else inputs.grad_out[-1:]
    right = inputs._replace(tensors=last, grad_out=grad_out).expected()

    def judge_results(results: list[Tensor]) -> Verdict:
        pairs = zip(results, right, strict=grad_out is not None)
        return judge([result.detach()[-1:, ..., : w.exact.shape[2]] for result, w in pairs], right)

    return judge_results


def contenders(row: Row, forms: list[Form], machine: Machine) -> Iterator[Contender]:
    """Ours first."""

    def contender(
        name: str,
        form: Form,
        attend: Callable[..., Tensor],
        tensors: tuple[Tensor, ...] | None = None,
        needs_bytes: int = 0,
    ) -> Contender:
        grad_out, tensors = form.inputs.grad_out, tensors or form.inputs.tensors
        if grad_out is not None:
            grad_out = F.pad(grad_out, (0, tensors[-1].shape[2] - grad_out.shape[2]))
        run = step(partial(attend, scale=form.inputs.scale), tensors, grad_out)
        patience_s = FLEX_PATIENCE_S if name.startswith("Flex") else None
        work = {"tflops": form.flops(row) / 1e9}
        return Contender(name, run, form.judge, {"form": form.name}, needs_bytes, patience_s, work)

    ours, plain = forms[0], forms[-1]
    yield contender("ours (triton)", ours, partial(ours.inputs.function, impl="triton"))
    copies = 6 if row.training else 3  # of scores: scaled, softmax, and their gradients
    matrix_bytes = row.batch * row.num_pixels * row.num_keys * row.dtype.itemsize
    yield contender("textbook eager", plain, attention_reference, needs_bytes=copies * matrix_bytes)
    # Where keys and values differ in width, also with values as wide as keys.
    d, e = (_up(width, SDPA_MULTIPLE) for width in plain.widths)
    wide = max(d, e)
    paddings = {"": (d, d, e)} if d == e else {"": (d, d, e), f", values padded to {wide}": (wide,) * 3}
    for padding, widths in paddings.items():
        tensors = _padded(plain.inputs.tensors, widths)
        for backend in BACKENDS if not padding else BACKENDS[:-1]:
            needs = 2 * copies * matrix_bytes if backend is SDPBackend.MATH else 0
            attend = partial(_sdpa, backend=backend)
            yield contender(f"{_name(backend)}{padding}", plain, attend, tensors, needs)
    if row.operation == "external":
        # Scores with zero columns; logits with columns of -inf, whose probability is 0.
        width = _up(row.value_width, SDPA_MULTIPLE)
        tensors = _padded(ours.inputs.tensors, (width, width), last=-torch.inf)
        for backend in BACKENDS[:-1]:
            yield contender(
                f"{_name(backend)}, low rank", ours, partial(_sdpa_low_rank, backend=backend), tensors
            )
    if row.with_flex:
        compiled = compiled_flex("eager" if machine.is_rehearsal else "inductor")
        widest = max(plain.widths)
        for width in sorted({_up(widest, FLEX_MULTIPLE), 1 << (widest - 1).bit_length()}):
            tensors = _padded(plain.inputs.tensors, (width,) * 3)
            name = f"FlexAttention, compiled, {width} wide"
            yield contender(name, plain, partial(_one_head, compiled), tensors)


def _name(backend: SDPBackend) -> str:
    return f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}"


def _padded(tensors: tuple[Tensor, ...], widths: tuple[int, ...], *, last: float = 0.0) -> tuple[Tensor, ...]:
    """With columns of zeros, in the last one of `last`."""
    if all(t.shape[2] == width for t, width in zip(tensors, widths, strict=True)):
        return tensors
    fills = [0.0] * (len(tensors) - 1) + [last]
    return tuple(
        F.pad(t.detach(), (0, width - t.shape[2]), value=fill).requires_grad_(t.requires_grad)
        for t, width, fill in zip(tensors, widths, fills, strict=True)
    )


def _one_head(
    attend: Callable[..., Tensor], queries: Tensor, keys: Tensor, values: Tensor, *, scale: float
) -> Tensor:
    return attend(queries.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1), scale=scale).squeeze(1)


def _sdpa(*tensors: Tensor, scale: float, backend: SDPBackend) -> Tensor:
    with sdpa_kernel([backend]):
        return _one_head(F.scaled_dot_product_attention, *tensors, scale=scale)


def _sdpa_low_rank(scores: Tensor, middle: Tensor, *, scale: float, backend: SDPBackend) -> Tensor:
    mixtures = middle.softmax(dim=-1).to(scores.dtype)
    return _sdpa(scores, mixtures, mixtures, scale=scale, backend=backend)


def compiled_flex(backend: str) -> Callable[..., Tensor]:
    """FlexAttention, which is only fast when it is compiled, for one row.

    PyTorch gives up on a function that it compiled for eight shapes, and then runs it uncompiled; hence the
    reset, and the full graph, with which giving up is an error.
    """
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)


def _up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def measure(row: Row, machine: Machine, without: Mapping[str, str]) -> dict[str, Any]:
    """A row's contenders, but those `without`, for these reasons."""
    stage("exact results", EXACT_PATIENCE_S)
    named = contenders(row, make_forms(row, machine), machine)
    return {
        **row._asdict(),
        "dtype": str(row.dtype),
        "contenders": measure_contenders(named, machine, without),
    }


def run(session: Session, wanted: Iterable[Row]) -> int:
    """Measure what is not recorded yet; how many rows are left."""
    know_ceilings(session)

    def tiles_of(row: Row) -> str:
        width = row.value_width if row.operation == "external" else row.width
        return tiles_digest(session.machine, (padded_width(width), padded_width(row.value_width)))

    return measure_rows(session, "rows", {row.name: row for row in wanted}, measure, tiles_of=tiles_of)
