"""Who runs in a row of `kernels`: our kernels, the textbook, every SDPA backend, FlexAttention.

External stage, `plain` form: softmax(Qe Ke^T / sqrt C) Ve with C-wide keys and values, as the textbook has
it; `low rank`: softmax(Q~ P^T / sqrt C) P, K wide, P = softmax(A) inside. Both get their inputs made: the
plain form is spared its two projections of N x C, ours the smaller ones to and from K.
Widths that a backend does not take are padded with zeros beforehand, outside of the timing: in its favour.
B batch, N pixels, M keys, C decoder width, K classes, E value width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.machine import Machine
from benchmarks.phases import Contender
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.external_attention import external_attention, external_attention_reference
from segdeformer.kernels.tuning.cases import step
from segdeformer.kernels.tuning.judge import Verdict

BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
SDPA_MULTIPLE, FLEX_MULTIPLE = 8, 16
FLEX_PATIENCE_S = 300.0  # TorchInductor tries several tiles

Judge = Callable[[list[Tensor]], Verdict]


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
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        return (
            f"{self.operation} ({self.width}, {self.value_width}, {self.num_pixels}"
            f"{f' x {self.num_keys}' if self.num_keys != self.num_pixels else ''}) "
            f"batch {self.batch} {dtype} {'forward + backward' if self.training else 'forward'}"
            f"{' with Flex' if self.with_flex else ''}"
        )

    @property
    def scale(self) -> float:
        return self.width**-0.5


class Form(NamedTuple):
    """One way to write the operation: its inputs, and the reference that says what comes out."""

    name: str
    inputs: tuple[Tensor, ...]
    reference: Callable[..., Tensor]
    widths: tuple[int, int]  # of scores, and of values: what FLOPs are counted by
    grad_out: Tensor | None

    def flops(self, row: Row) -> float:
        """Of the products over N x M: two in the forward, five more in the backward."""
        d, e = self.widths
        per_score = 2 * (d + e) + (2 * (3 * d + 2 * e) if row.training else 0)
        return float(row.batch * row.num_pixels * row.num_keys * per_score)


def make_forms(row: Row, machine: Machine) -> list[Form]:
    """The plain form and, for the external stage, ours in front of it. Inputs are leaves in training."""
    generator = torch.Generator(machine.device).manual_seed(0)

    def random(factor: float, *shape: int) -> Tensor:
        return factor * torch.randn(shape, generator=generator, device=machine.device)

    def leaf(tensor: Tensor, dtype: torch.dtype = row.dtype) -> Tensor:
        return tensor.to(dtype).requires_grad_(row.training)

    def upstream(width: int) -> Tensor | None:
        return random(1, row.batch, row.num_pixels, width).to(row.dtype) if row.training else None

    b, n, m, c, e = row.batch, row.num_pixels, row.num_keys, row.width, row.value_width
    if row.operation != "external":
        inputs = (leaf(random(1, b, n, c)), leaf(random(1, b, m, c)), leaf(random(1, b, m, e)))
        return [Form("plain", inputs, attention_reference, (c, e), upstream(e))]
    queries, keys_KC, values_KC = random(2, b, n, c), random(1, e, c), random(1, e, c)
    middle = random(3, b, n, e)
    mixtures = middle.softmax(dim=-1)
    plain = tuple(leaf(t) for t in (queries, mixtures @ keys_KC, mixtures @ values_KC))
    low_rank = (leaf(queries @ keys_KC.T), leaf(middle, torch.float32))
    return [
        Form("low rank", low_rank, external_attention_reference, (e, e), upstream(e)),
        Form("plain", plain, attention_reference, (c, c), upstream(c)),
    ]


def contenders(
    row: Row, forms: list[Form], judges: Mapping[str, Judge], machine: Machine
) -> Iterator[Contender]:
    """Ours first. judges: by the form's name, of results in the form's widths or wider."""

    def contender(
        name: str, form: Form, inputs: tuple[Tensor, ...], run: Callable[..., Tensor], needs_bytes: int = 0
    ) -> Contender:
        grad_out, width = form.grad_out, inputs[-1].shape[2]
        if grad_out is not None:
            grad_out = F.pad(grad_out, (0, width - grad_out.shape[2]))
        return Contender(
            name,
            step(run, inputs, grad_out),
            judges[form.name],
            {"form": form.name},
            needs_bytes,
            FLEX_PATIENCE_S if name.startswith("Flex") else None,
            {"tflops": form.flops(row) / 1e9},
        )

    ours, plain = forms[0], forms[-1]
    operation = external_attention if row.operation == "external" else attention
    triton = functools.partial(operation, scale=row.scale, impl="triton")
    yield contender("ours (triton)", ours, ours.inputs, triton)
    copies = 6 if row.training else 3  # of scores: scaled, softmax, and their gradients
    matrix_bytes = row.batch * row.num_pixels * row.num_keys * row.dtype.itemsize
    textbook = functools.partial(attention_reference, scale=row.scale)
    yield contender("textbook eager", plain, plain.inputs, textbook, copies * matrix_bytes)
    for padding, inputs in _sdpa_inputs(plain, row):
        for backend in BACKENDS if not padding else BACKENDS[:-1]:
            needs = 2 * copies * matrix_bytes if backend is SDPBackend.MATH else 0
            run = functools.partial(_sdpa, backend=backend, row=row)
            yield contender(f"{_name(backend)}{padding}", plain, inputs, run, needs)
    if row.operation == "external":
        inputs = _padded_low_rank(ours, row)
        for backend in BACKENDS[:-1]:
            run = functools.partial(_sdpa_low_rank, backend=backend, row=row)
            yield contender(f"{_name(backend)}, low rank", ours, inputs, run)
    if row.with_flex:
        compiled = compiled_flex("eager" if machine.is_rehearsal else "inductor")
        for width in sorted({_up(w, FLEX_MULTIPLE) for w in plain.widths} | {_power(max(plain.widths))}):
            if width >= max(plain.widths):
                inputs = _pad(plain.inputs, width, width, row)
                run = functools.partial(_flex, compiled=compiled, row=row)
                yield contender(f"FlexAttention, compiled, {width} wide", plain, inputs, run)


def _name(backend: SDPBackend) -> str:
    return f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}"


def _sdpa_inputs(plain: Form, row: Row) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Widths up to a multiple of 8; where keys and values differ, also with values as wide as keys."""
    d, e = (_up(width, SDPA_MULTIPLE) for width in plain.widths)
    yield "", _pad(plain.inputs, d, e, row)
    if d != e:
        yield f", values padded to {max(d, e)}", _pad(plain.inputs, max(d, e), max(d, e), row)


def _pad(inputs: tuple[Tensor, ...], width: int, value_width: int, row: Row) -> tuple[Tensor, ...]:
    wanted = (width, width, value_width)
    if all(t.shape[2] == w for t, w in zip(inputs, wanted, strict=True)):
        return inputs
    padded = (F.pad(t.detach(), (0, w - t.shape[2])) for t, w in zip(inputs, wanted, strict=True))
    return tuple(t.requires_grad_(row.training) for t in padded)


def _padded_low_rank(ours: Form, row: Row) -> tuple[Tensor, ...]:
    """Scores with zero columns; logits with columns of -inf, whose probability is 0."""
    scores, middle = (t.detach() for t in ours.inputs)
    more = -row.value_width % SDPA_MULTIPLE
    padded = F.pad(scores, (0, more)), F.pad(middle, (0, more), value=-torch.inf)
    return tuple(t.requires_grad_(row.training) for t in padded)


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor, *, backend: SDPBackend, row: Row) -> Tensor:
    with sdpa_kernel([backend]):
        out_B1NE = F.scaled_dot_product_attention(
            queries.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1), scale=row.scale
        )
    return out_B1NE.squeeze(1)


def _sdpa_low_rank(scores: Tensor, middle: Tensor, *, backend: SDPBackend, row: Row) -> Tensor:
    mixtures = middle.softmax(dim=-1).to(scores.dtype)
    return _sdpa(scores, mixtures, mixtures, backend=backend, row=row)


def _flex(
    queries: Tensor, keys: Tensor, values: Tensor, *, compiled: Callable[..., Tensor], row: Row
) -> Tensor:
    out_B1NE = compiled(queries.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1), scale=row.scale)
    return out_B1NE.squeeze(1)


def compiled_flex(backend: str) -> Callable[..., Tensor]:
    """FlexAttention, which is only fast when it is compiled, for one row.

    PyTorch gives up on a function that it compiled for eight shapes, and then runs it uncompiled; hence the
    reset, and the full graph, with which giving up is an error.
    """
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)


def _up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _power(width: int) -> int:
    return 1 << (width - 1).bit_length()
