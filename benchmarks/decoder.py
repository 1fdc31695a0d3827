"""The whole decoder: folded and not, against the textbook, against SDPA, and SegFormer's for scale.

Inference from the encoder's four maps (MiT-B1's channels, random) to logits, equal weights, all ways in turn
in one run. Then the memory of a forward + backward of MiT-B1 with our decoder and with SegFormer's, under
autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.machine import Machine, free_bytes, tiles_digest
from benchmarks.phases import Contender, Session, measure_contenders, measure_rows
from segdeformer.kernels.impl import Impl
from segdeformer.kernels.tuning.judge import Expected, Verdict, judge

SECONDS = 1.0
TRAINING_BATCH = 2


class Shape(NamedTuple):
    """A decoder and the square image that its maps come from."""

    width: int
    num_classes: int
    image_px: int

    @property
    def num_pixels(self) -> int:
        return (self.image_px // 4) ** 2


SHAPES = (Shape(256, 150, 512), Shape(256, 19, 1024), Shape(512, 150, 512))


def build_decoder(shape: Shape, impl: Impl, *, plain: bool = False, context: bool = True) -> nn.Module:
    """The affine decoder out of its parts, seeded; without context it is SegFormer's."""
    from segdeformer.models.context import (
        ClassTokens,
        Context,
        ExternalAttention,
        InternalAttention,
        InternalBlock,
    )
    from segdeformer.models.fusion import MLPFusion
    from segdeformer.models.mit import MIT_SIZES
    from segdeformer.models.segmenter import Head, SegDeformer

    torch.manual_seed(0)
    width = shape.width
    fusion = MLPFusion(MIT_SIZES["mit_b1"].channels, width=width)
    head = Head(width, shape.num_classes, dropout=0.1)
    mined = None
    if context:
        internal = InternalAttention(width, heads=1, projection="affine", reduction=1, impl=impl)
        external = ExternalAttention(
            width,
            ClassTokens(shape.num_classes, width, decouple=True),
            second_stage=True,
            projection="affine",
            reduction=1,
            impl=impl,
            form="plain" if plain else "low_rank",
        )
        blocks = nn.Sequential(InternalBlock(internal, width=width, mlp=False))
        mined = Context(internal=blocks, external=external, supervised=True)
    return SegDeformer(fusion=fusion, context=mined, head=head)


def ways(shape: Shape, machine: Machine) -> dict[str, nn.Module]:
    """The decoder in each way to run it, for inference; the first says what rounding costs in this dtype."""
    built: dict[str, nn.Module] = {}
    if 3 * shape.num_pixels**2 * machine.halves[0].itemsize < 0.8 * free_bytes(machine):
        built["textbook eager"] = build_decoder(shape, "reference", plain=True)
    built["sdpa, unfolded"] = build_decoder(shape, "sdpa", plain=True)
    built["sdpa, unfolded, low rank"] = build_decoder(shape, "sdpa")
    built["sdpa, folded"] = build_decoder(shape, "sdpa").eval().fold()  # type: ignore[operator]
    built["unfolded"] = build_decoder(shape, "triton")
    built["folded"] = build_decoder(shape, "triton").eval().fold()  # type: ignore[operator]
    built["segformer"] = build_decoder(shape, "sdpa", context=False)
    return {name: way.eval().to(machine.device, machine.halves[0]) for name, way in built.items()}


@torch.inference_mode()
def measure_inference(shape: Shape, machine: Machine, without: Mapping[str, str]) -> dict[str, Any]:
    """Times and peaks of every way whose logits are right, by the same decoder in float32."""
    dtype = machine.halves[0]
    generator = torch.Generator(machine.device).manual_seed(0)
    sides = [shape.image_px // stride for stride in (4, 8, 16, 32)]
    maps = [
        torch.randn(1, channels, side, side, generator=generator, device=machine.device).to(dtype)
        for channels, side in zip((64, 128, 320, 512), sides, strict=True)
    ]
    precise = build_decoder(shape, "sdpa").eval().to(machine.device, torch.float32)
    right = precise([m.float() for m in maps]).logits_BKhw
    eager_errors: list[float] = []  # of the first way

    def judge_logits(results: Any) -> Verdict:
        logits = results.logits_BKhw
        eager_errors.append(logits_error(logits, right))
        wanted = Expected("logits", right, eager_errors[0], logits_error, "off by", dtype=dtype)
        return judge([logits], [wanted])

    named = (
        Contender(name, partial(decoder, maps), None if name == "segformer" else judge_logits)
        for name, decoder in ways(shape, machine).items()
    )
    entries = measure_contenders(named, machine, without, seconds=SECONDS)
    return {**shape._asdict(), "dtype": str(dtype), "contenders": entries}


def logits_error(logits: Tensor, right: Tensor) -> float:
    """The largest, as a share of the largest logit."""
    return ((logits.float() - right).abs().max() / right.abs().max()).item()


def train_step(encoder: nn.Module, decoder: nn.Module, image: Tensor, machine: Machine) -> None:
    """A forward + backward under autocast."""
    with torch.autocast(machine.device.type, machine.halves[0]):
        logits, class_logits, *_ = decoder(encoder(image))
    loss = logits.float().square().mean()
    if class_logits is not None:
        loss = loss + 0.4 * class_logits.square().mean()
    loss.backward()
    for part in (encoder, decoder):
        part.zero_grad(set_to_none=True)


def training_ways(shape: Shape, image: Tensor, machine: Machine) -> Iterator[Contender]:
    """The whole model with our decoder and with SegFormer's; there is nothing to compare results with."""
    from segdeformer.models.mit import MIT_SIZES, MiT

    for name, context in (("unfolded", True), ("segformer", False)):
        parts = MiT(MIT_SIZES["mit_b1"]), build_decoder(shape, "triton", context=context)
        encoder, decoder = (part.train().to(machine.device) for part in parts)
        yield Contender(name, partial(train_step, encoder, decoder, image, machine), None)


def measure(row: tuple[Shape, str], machine: Machine, without: Mapping[str, str]) -> dict[str, Any]:
    """One shape's inference, or its training: there the peaks count, above the weights and the image."""
    shape, kind = row
    if kind == "inference":
        return measure_inference(shape, machine, without)
    image = torch.randn(TRAINING_BATCH, 3, shape.image_px, shape.image_px, device=machine.device)
    named = training_ways(shape, image, machine)
    entries = measure_contenders(named, machine, without, seconds=SECONDS)
    return {**shape._asdict(), "batch": TRAINING_BATCH, "contenders": entries}


def run(session: Session) -> int:
    """Measure what is not recorded yet; how many rows are left."""
    shapes = [Shape(32, 19, 64)] if session.machine.is_rehearsal else list(SHAPES)
    wanted = [(shape, "inference") for shape in shapes]
    wanted.insert(1, (shapes[0], "training memory"))
    rows = {f"{shape.width}, {shape.num_classes}, {kind}": (shape, kind) for shape, kind in wanted}
    tiles = tiles_digest(session.machine)
    return measure_rows(session, "decoder", rows, measure, tiles_of=lambda row: tiles)
