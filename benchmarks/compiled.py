"""Compile one Triton kernel ahead of time, for a card that is not here, and read what came of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from segdeformer.kernels.attention import launch as attention
from segdeformer.kernels.external_attention import launch as external
from segdeformer.kernels.launch import Launch
from segdeformer.kernels.tiles import ARCHITECTURES, Architecture, Tile, padded_width
from segdeformer.kernels.tuning.resources import MATRIX_INSTRUCTIONS, Resources, resources_of
from segdeformer.kernels.tuning.trial import launch_of, results_of
from segdeformer.kernels.upsample import launch as upsampling

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.uint8: "u8",
}
NUM_PIXELS = 16384


class Case(NamedTuple):
    """One kernel, one tile, one card."""

    kernel: str
    width: int
    value_width: int
    element_bytes: int
    architecture: str
    tile: Tile
    even: bool = True  # whole blocks; else there are masks at the edges

    def __str__(self) -> str:
        ragged = "" if self.even else ", ragged"
        size = f"{self.width}, {self.value_width}, {self.element_bytes} bytes"
        return f"{self.architecture} {self.kernel}{ragged} ({size}) with {self.tile}"


class Compiled(NamedTuple):
    """What the compiler made of a case."""

    case: Case
    resources: Resources

    @property
    def resident_blocks(self) -> int:
        return self.resources.resident_blocks(ARCHITECTURES[self.case.architecture])

    @property
    def slow_products(self) -> bool:
        """Whether half precision is not multiplied by the card's own matrix instruction."""
        if self.case.element_bytes != 2 or not self.case.kernel.startswith(("attention", "external")):
            return False
        if self.case.kernel == "attention_forward_few_keys":  # its small blocks may use the older ones
            return self.resources.instruction == "fma"
        return not self.resources.instruction.startswith(MATRIX_INSTRUCTIONS[self.case.architecture])


def build_launch(case: Case) -> Launch | None:
    """The kernel's call on tensors without memory; None where the tile rules the kernel out."""
    if case.kernel.startswith("upsampled"):
        return build_upsampling_launch(case)

    usual = _dtype(case)

    def empty(*shape: int, dtype: torch.dtype = usual) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    few = case.kernel == "attention_forward_few_keys"
    if few and not case.tile.block_keys:
        return None
    n = NUM_PIXELS if case.even else NUM_PIXELS - 1
    m = case.tile.block_keys if few else n
    d, e = case.width, case.value_width
    values = empty(1, m, padded_width(e))
    is_external = case.kernel.startswith("external")
    keys = values if is_external else empty(1, m, padded_width(d))
    lse, class_logits = empty(1, n, dtype=torch.float32), empty(1, n, d, dtype=torch.float32)
    if case.kernel == "row_deltas":
        return attention.deltas_launch(empty(1, n, e), empty(1, n, e), lse)
    if case.kernel == "class_probabilities":
        return external.probabilities_launch(class_logits, keys)
    upstream = attention.Upstream(empty(1, n, padded_width(e)), lse, lse)
    queries = empty(1, n, padded_width(d))
    # Blocks of an odd map have biases; the code with them holds all that the code without them does.
    bias = None if case.even or is_external else empty(m, dtype=torch.float32)
    x = attention.Operands(queries, keys, values, d, e, 1 / 16, is_external, bias, upstream)
    results = results_of(case.kernel, (n, m), (d, e), usual, queries.device)
    return launch_of(case.kernel, x, {**results, "class_logits": class_logits}, case.tile)


def build_upsampling_launch(case: Case) -> Launch:
    """A kernel on logits upsampled 4 times."""
    dtype = _dtype(case)
    logits = torch.empty(2, 128, 128, case.width, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    labels = torch.empty(2, 512, 512, dtype=torch.uint8, device="meta")
    lse = torch.empty(2, 512, 512, device="meta")
    up = upsampling.Upsampling(logits, 512, 512)
    terms = upsampling.LossTerms(labels, None, 255, 0.0)
    match case.kernel:
        case "upsampled_loss":
            return upsampling.loss_launch(up, terms, lse, lse)
        case "upsampled_loss_gradient":
            return upsampling.gradient_launch(up, terms, lse, lse[0, 0, :1], logits)
        case _:
            return upsampling.argmax_launch(up, labels, lse)


def _dtype(case: Case) -> torch.dtype:
    return torch.float32 if case.element_bytes == 4 else torch.bfloat16


def compile_launch(launch: Launch, architecture: Architecture) -> triton.compiler.CompiledKernel:
    """Machine code for a card, specialised as the launch itself would be."""
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes = {}
    for place, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
        elif name in launch.tensors:
            signature[name] = f"*{TYPES[launch.tensors[name].dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(launch.numbers[name], float):
            signature[name] = "fp32"
        elif launch.numbers[name] == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if launch.numbers[name] % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    target = (
        architecture.name if architecture.backend == "hip" else int(architecture.name.removeprefix("sm_"))
    )
    return triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget(architecture.backend, target, architecture.warp_size),
        options=launch.options,
    )


def compile_case(case: Case) -> Compiled | str:
    """A case's resources, or one line on why it does not compile; for a worker process."""
    launch = build_launch(case)
    if launch is None:
        return "does not apply"
    architecture = ARCHITECTURES[case.architecture]
    try:
        code = compile_launch(launch, architecture)
    except (TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
    return Compiled(case, resources_of(code, architecture))
