"""The decoder's shapes, and random inputs of them: what is checked, tuned, compared and measured.

B batch, N queries, M keys, D key width, E value width, K classes, hw map, HW output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor

from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.external_attention import external_attention, external_attention_reference
from segdeformer.kernels.impl import Call, Impl
from segdeformer.kernels.tiles import WIDEST_FUSED_BACKWARD, padded_width
from segdeformer.kernels.tuning.judge import (
    Expected,
    LossTask,
    expected_argmax,
    expected_attention,
    expected_loss,
)
from segdeformer.kernels.upsample.argmax import upsample_argmax
from segdeformer.kernels.upsample.cross_entropy import upsample_cross_entropy

UPSAMPLING = ("upsample_cross_entropy", "upsample_argmax")
SCALE = 4  # of the decoder's map to the image
MAP_PX = {150: 128, 19: 256, 171: 128}  # sides of the maps of ADE20K's, Cityscapes' and COCO-Stuff's images
PRODUCTS_OF_A_VALUE = 2000  # that a GPU makes in the time in which it upsamples one logit in strips
# Of a comparison's check in float64 where it must be quick: most queries, keys, rows of a map, images. All
# remainders by 256 stay, and with them the kernels that are compiled for the whole problem.
MOST_QUERIES, MOST_KEYS, MOST_ROWS, MOST_IMAGES = 2048, 8192, 32, 2
MOST_EXTERNAL = 4096  # where the queries are the keys


class Comparison(NamedTuple):
    """One operation of a decoder, whose implementations are compared; widths as the model has them."""

    operation: str
    width: int
    value_width: int
    element_bytes: int
    training: bool  # forward + backward
    num_pixels: int  # queries, or places of the map that is upsampled
    num_keys: int | None = None  # None: the pixels
    batch: int = 1
    map_hw: tuple[int, int] | None = None  # that is upsampled; None: a square
    full_hw: tuple[int, int] | None = None  # that it is upsampled to; None: four times as large

    @classmethod
    def of(cls, call: Call) -> Self:
        """The comparison that decides about a call."""
        kind = cls(*call[:5], num_pixels=math.prod(call.source), batch=call.batch)
        if not kind.is_upsampling:
            return kind._replace(num_keys=call.target[0])
        (height, width), (full_height, full_width) = call.source, call.target
        return kind._replace(map_hw=(height, width), full_hw=(full_height, full_width))

    @property
    def is_upsampling(self) -> bool:
        return self.operation in UPSAMPLING

    @property
    def alternative(self) -> str:
        """What runs where the Triton kernels do not."""
        return "strips" if self.is_upsampling else "sdpa"

    @property
    def keys(self) -> int:
        return self.num_pixels if self.num_keys is None else self.num_keys

    @property
    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the map and of the output."""
        side = math.isqrt(self.num_pixels)
        height, width = self.map_hw or (side, side)
        return (height, width), self.full_hw or (SCALE * height, SCALE * width)

    @property
    def size(self) -> int:
        """B N M scores, or B K H W upsampled values."""
        if self.is_upsampling:
            return self.batch * self.width * math.prod(self.sides[1])
        return self.batch * self.num_pixels * self.keys

    @property
    def label(self) -> str:
        """The operation and its size in words."""
        dtype = "float32" if self.element_bytes == 4 else "half precision"
        if self.is_upsampling:
            what = "loss" if self.operation == "upsample_cross_entropy" else "argmax"
            height, width = self.sides[1]
            return f"upsampled {what} of {self.batch} x {self.width} x {height} x {width}, {dtype}"
        name = self.operation.replace("_", " ")
        wide = f"{self.width}" if self.width == self.value_width else f"{self.width} and {self.value_width}"
        training = ", training" if self.training else ""
        return f"{name} of {self.batch} x {self.num_pixels} x {self.keys}, {wide} wide, {dtype}{training}"

    @property
    def work(self) -> float:
        """Roughly in proportion to its time, to do the longest first."""
        if self.is_upsampling:
            return self.size * PRODUCTS_OF_A_VALUE
        return self.size * (self.width + self.value_width) * (3.5 if self.training else 1.0)

    @property
    def key(self) -> tuple[str, int, int, int, bool, int]:
        """What a `Choice` is found by."""
        return *self[:5], self.size

    @property
    def widths_key(self) -> str:
        return f"{padded_width(self.width)}x{padded_width(self.value_width)}"

    @property
    def has_two_backwards(self) -> bool:
        fits = max(padded_width(self.width), padded_width(self.value_width)) <= WIDEST_FUSED_BACKWARD
        return self.operation == "attention" and self.training and fits

    def within(self, most_pixels: int | None) -> Comparison:
        """The same with one image of at most so many pixels, and as many keys; None: the whole."""
        if most_pixels is None:
            return self
        if self.is_upsampling:
            side = math.isqrt(min(self.num_pixels, most_pixels // SCALE**2))
            return self._replace(num_pixels=side**2, batch=1, map_hw=None, full_hw=None)
        keys = None if self.num_keys is None else min(self.num_keys, most_pixels)
        return self._replace(num_pixels=min(self.num_pixels, most_pixels), num_keys=keys, batch=1)

    def checked_quickly(self) -> Comparison:
        """A part of it, of which float64 takes a fraction of a second on any card."""
        batch = min(self.batch, MOST_IMAGES)
        if self.is_upsampling:
            (height, width), (full_height, full_width) = self.sides
            rows, columns = min(height, MOST_ROWS), min(width, MOST_ROWS)
            full = (max(1, full_height * rows // height), max(1, full_width * columns // width))
            return self._replace(batch=batch, map_hw=(rows, columns), full_hw=full)
        if self.operation == "external_attention":
            return self._replace(batch=batch, num_pixels=_at_most(self.num_pixels, MOST_EXTERNAL))
        num_pixels, keys = _at_most(self.num_pixels, MOST_QUERIES), _at_most(self.keys, MOST_KEYS)
        return self._replace(batch=batch, num_pixels=num_pixels, num_keys=keys)

    def inputs(self, device: torch.device) -> AttentionInputs | UpsamplingInputs:
        """Random ones in the dtype that is timed."""
        dtype, training = dtypes_of(self.element_bytes, device)[0], self.training
        if self.is_upsampling:
            task = make_loss_task(self.batch, self.width, *self.sides, dtype=dtype, device=device)
            return UpsamplingInputs(task, self.operation, training)
        widths, sizes = (self.width, self.value_width), (self.batch, self.num_pixels, self.keys)
        return attention_inputs(self.operation, widths, sizes, dtype=dtype, device=device, training=training)


def _at_most(number: int, most: int) -> int:
    """The number, or the largest up to `most` with the same remainder by 256."""
    return number if number <= most else most - (most - number) % 256


def decoder_comparisons() -> list[Comparison]:
    """The operations of the paper's decoders, those that matter most first.

    In half precision: in float32 PyTorch's products on tensor cores are out of reach. Batches are such that
    one size class below and one above are those of common batches too. Of upsampling, as
    `choose_upsampling` asks: the loss in training, the argmax not, K as both widths.
    """
    found = []
    for operation, d, e, num_pixels, num_keys, batch in DECODER:
        forward = Comparison(operation, d, e, 2, False, num_pixels, num_keys)
        found += [forward, forward._replace(training=True, batch=batch)][: 2 if batch else 1]
    for k, element_bytes in ((150, 2), (150, 4), (19, 2), (171, 2)):
        loss = Comparison(
            "upsample_cross_entropy", k, k, element_bytes, True, num_pixels=MAP_PX[k] ** 2, batch=4
        )
        found += [loss, loss._replace(operation="upsample_argmax", training=False)]
    return found


# Attentions of the decoder: operation, D, E, N, M (None: the pixels), batch in training. Batch 0: of folded
# models, which do not train.
DECODER: tuple[tuple[str, int, int, int, int | None, int], ...] = (
    *(("external_attention", k, k, MAP_PX[k] ** 2, None, 1 if k == 19 else 4) for k in MAP_PX),
    ("attention", 256, 256, 16384, None, 4),
    ("attention", 256, 150, 16384, None, 0),
    ("attention", 256, 256, 16384, 1024, 4),  # reduction 4
    ("attention", 256, 150, 16384, 1024, 0),  # folded, as with key stride 4
    ("attention", 150, 150, 16384, 1024, 4),  # the external stage with key stride 4
    ("attention", 256, 256, 1024, None, 8),  # maps at 1/16
    ("external_attention", 150, 150, 1024, None, 8),
    ("attention", 512, 512, 16384, None, 4),
    ("attention", 512, 150, 16384, None, 0),
    ("attention", 256, 150, 1024, None, 0),
    ("attention", 256, 256, 16384, 256, 0),  # reduction 8
)
# The decoder's pairs of D and E, with which kernels are compiled and checked.
WIDTHS_OF = {
    operation: list(dict.fromkeys(shape[1:3] for shape in DECODER if shape[0] == operation))
    for operation in ("attention", "external_attention")
}


class AttentionInputs(NamedTuple):
    """What an attention is called with; leaves where there is an upstream gradient."""

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    scale: float
    grad_out: Tensor | None

    def step(self, impl: Impl) -> Callable[[], list[Tensor]]:
        """Runs it once: the output and, in training, the gradients."""
        return step(partial(self.function, scale=self.scale, impl=impl), self.tensors, self.grad_out)

    def expected(self, *, least: float = 0.0) -> list[Expected]:
        return expected_attention(
            self.reference, self.tensors, scale=self.scale, grad_out=self.grad_out, least=least
        )


class UpsamplingInputs(NamedTuple):
    """What an operation on upsampled logits is called with."""

    task: LossTask
    operation: str
    training: bool = True  # a loss with its gradient

    def step(self, impl: Impl) -> Callable[[], list[Tensor]]:
        """Runs it once: the loss and its gradient, or the ids."""
        function = upsample_cross_entropy if self.operation == "upsample_cross_entropy" else _upsampled_ids
        return self.step_of(partial(function, impl=impl))

    def step_of(self, function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        """The same by another function of logits and labels."""
        return loss_step(
            self.task, function, training=self.training and self.operation == "upsample_cross_entropy"
        )

    def expected(self) -> list[Expected]:
        if self.operation == "upsample_argmax":
            return expected_argmax(self.task.logits_BKhw)
        return expected_loss(self.task)


def _upsampled_ids(logits_BKhw: Tensor, labels_BHW: Tensor, *, impl: Impl) -> Tensor:
    _, height, width = labels_BHW.shape
    return upsample_argmax(logits_BKhw, (height, width), impl=impl).ids_BHW


def step(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor | None
) -> Callable[[], list[Tensor]]:
    """Calls once: the output and, with an upstream gradient, the gradients of the inputs that are leaves."""
    leaves = [t for t in inputs if t.requires_grad]

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(grad_out is not None):
            out = function(*inputs)
            if grad_out is None:
                return [out]
            return [out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    return run


def loss_step(
    task: LossTask, function: Callable[..., Tensor], *, training: bool = True
) -> Callable[[], list[Tensor]]:
    """Calls once, on logits and labels: the loss and, in training, its gradient."""
    leaf = task.logits_BKhw.detach().requires_grad_(training)
    upstream = torch.tensor(task.upstream, device=leaf.device) if training else None
    return step(function, (leaf, task.labels_BHW), upstream)


def attention_inputs(
    operation: str,
    widths: tuple[int, int],
    sizes: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    peak: float = 1.0,
    biased: bool = False,
    seed: int = 0,
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
) -> AttentionInputs:
    """Random ones. widths: D, E; sizes: B, N, M; peak: what the scores are multiplied by; biased: keys weigh
    differently, as blocks of 1 to 16 pixels do.

    arrange: puts the values of a tensor into another place.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(factor: float, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        made = factor * torch.randn(shape, generator=generator, device=device)
        return arrange(made.to(dtype)).requires_grad_(training)

    (d, e), (b, n, m) = widths, sizes
    if operation.startswith("external"):
        assert n == m
        # Peaked mixtures: nearly even ones would give the same rows for any weights.
        scores, class_logits = random(3 * peak, b, n, d), random(3, b, n, d, dtype=torch.float32)
        made = AttentionInputs(
            external_attention, external_attention_reference, (scores, class_logits), 1.0, None
        )
    else:
        tensors = random(peak, b, n, d), random(1, b, m, d), random(1, b, m, e)
        functions: tuple[Callable[..., Tensor], Callable[..., Tensor]] = attention, attention_reference
        if biased:
            bias_M = (torch.arange(m, device=device) % 16 + 1.0).log() - math.log(16)
            functions = partial(attention, bias_M=bias_M), partial(attention_reference, bias_M=bias_M)
        made = AttentionInputs(*functions, tensors, d**-0.5, None)
    return made._replace(grad_out=random(1, b, n, e).detach()) if training else made


def make_loss_task(
    batch: int,
    num_classes: int,
    size: tuple[int, int],
    full: tuple[int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ignored: float = 0.1,
) -> LossTask:
    """Random logits (no leaf) and int64 labels."""
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(batch, num_classes, *size, generator=generator, device=device)
    labels = torch.randint(0, num_classes, (batch, *full), generator=generator, device=device)
    labels[torch.rand(labels.shape, generator=generator, device=device) < ignored] = 255
    return LossTask(logits.to(dtype), labels)


def dtypes_of(element_bytes: int, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """What the kernels are timed in, and what their masks are checked in.

    float16 shows small errors that bfloat16's rounding hides.
    """
    if element_bytes == 4:
        return torch.float32, torch.float32
    if device.type != "cuda":
        return torch.float16, torch.float16  # the interpreter multiplies bfloat16 wrongly
    return torch.bfloat16, torch.float16
