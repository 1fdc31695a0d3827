"""Compile every Triton kernel with every shipped tile for five kinds of cards, on a machine without any.

    python benchmarks/aot.py            writes benchmarks/results/aot.md

Shared memory, registers and spills come from the compiled code, the matrix instruction from its assembly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from segdeformer.kernels import attention_launches as attention
from segdeformer.kernels import external_attention_triton as external
from segdeformer.kernels import upsample_launches as upsampling
from segdeformer.kernels.launch import Launch
from segdeformer.kernels.tiles import (
    ARCHITECTURES,
    TUNED,
    WIDTHS,
    Architecture,
    Tile,
    default_tile,
    padded_width,
    read_tiles,
)

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.uint8: "u8",
}
# Beyond the classes of the default tiles: the decoder's own widths (internal attention folded and not,
# external attention of 150, 171 and 19 classes).
MAIN_WIDTHS = {
    "attention": [(256, 256), (256, 150), (512, 512), (512, 150)],
    "external": [(150, 150), (171, 171), (19, 19)],
}
NUM_PIXELS = 16384
TENSOR_MEMORY = 512  # columns
MOST_SPILL_BYTES = {2: 64, 4: 1024}
MOST_RAGGED_SPILL_BYTES = 256  # of half precision with masks
TABLE = Path(__file__).parent / "results" / "aot.md"


class Case(NamedTuple):
    """One kernel, one tile, one card."""

    kernel: str
    width: int
    value_width: int
    element_bytes: int
    architecture: str
    tile: Tile
    even: bool = True  # whole blocks; else there are masks at the edges


class Compiled(NamedTuple):
    """What the compiler made of a case."""

    case: Case
    shared_bytes: int
    registers: int
    spill_bytes: int  # the stack frame of a thread: spilled registers, and what else lies there
    instruction: str  # of the matrix products
    tensor_memory: int = 0  # columns of Blackwell's; beyond 512 the code is a trap that compiles

    @property
    def allowed_spill_bytes(self) -> int:
        """Half precision, the main road, hardly spills; exact float32 products may where tiles are wide."""
        return MOST_SPILL_BYTES[self.case.element_bytes] if self.case.even else MOST_RAGGED_SPILL_BYTES

    @property
    def fits(self) -> bool:
        limit = ARCHITECTURES[self.case.architecture].shared_bytes
        return self.shared_bytes <= limit and self.tensor_memory <= TENSOR_MEMORY


def build_launch(case: Case) -> Launch | None:
    """The kernel's call on tensors without memory; None where the tile rules the kernel out."""
    if case.kernel.startswith("upsampled"):
        return build_upsampling_launch(case)
    dtype = _dtype(case)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    few = case.kernel == "attention_forward_few_keys"
    if few and not case.tile.block_keys:
        return None
    n = NUM_PIXELS if case.even else NUM_PIXELS - 1
    m = case.tile.block_keys if few else n
    d, e = case.width, case.value_width
    is_external = case.kernel.startswith("external")
    values = empty(1, m, padded_width(e))
    keys = values if is_external else empty(1, m, padded_width(d))
    x = attention.Operands(empty(1, n, padded_width(d)), keys, values, d, e, 1 / 16)
    lse = empty(1, n, dtype=torch.float32)
    upstream = attention.Upstream(empty(1, n, padded_width(e)), lse, lse)
    out, of_queries, of_keys, of_values = empty(1, n, e), empty(1, n, d), empty(1, m, d), empty(1, m, e)
    match case.kernel:
        case "attention_forward" | "external_forward":
            return attention.forward_launch(x, out, lse, keys_are_values=is_external, tile=case.tile)
        case "attention_forward_few_keys":
            return attention.few_keys_launch(x, out, lse, tile=case.tile)
        case "attention_backward_queries" | "external_backward_queries":
            return attention.backward_queries_launch(
                x, upstream, of_queries, keys_are_values=is_external, tile=case.tile
            )
        case "attention_weights_and_grads":
            return attention.weights_launch(x, upstream, empty(1024, n), empty(1024, n), tile=case.tile)
        case "external_backward_keys":
            logits = empty(1, n, d, dtype=torch.float32)
            return external.external_backward_keys_launch(x, upstream, logits, logits, tile=case.tile)
        case "row_deltas":
            return attention.deltas_launch(out, out, lse)
        case "class_probabilities":
            return external.probabilities_launch(empty(1, n, d, dtype=torch.float32), x.keys)
        case _:
            part = case.kernel.removeprefix("attention_backward_")
            return attention.backward_keys_launch(x, upstream, of_keys, of_values, part=part, tile=case.tile)


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
    if architecture.backend == "hip":
        assembly = code.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", assembly)
        spills = _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
        instructions = re.findall(r"v_mfma_\w+", assembly)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, spills = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
        instructions = re.findall(
            r"wgmma\.mma_async\S*?\.(m\d+n\d+k\d+)|(tcgen05\.mma)\.|mma\.sync\.aligned\.(m\d+n\d+k\d+)",
            code.asm["ptx"],
        )
        names = ("wgmma {}", "{}", "mma.sync {}")
        instructions = [n.format(x) for found in instructions for n, x in zip(names, found, strict=True) if x]
    widest = max(set(instructions), key=_size, default="fma")
    tensor_memory = getattr(code.metadata, "tmem_size", None) or 0
    return Compiled(case, code.metadata.shared, registers, spills, widest, tensor_memory)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found.group(1))


def _size(instruction: str) -> int:
    total = 1
    for number in re.findall(r"(?<=[mnkx_])\d+", instruction):
        total *= int(number)
    return total


KERNELS = (
    "attention_forward",
    "attention_forward_few_keys",
    "attention_backward_queries",
    "attention_backward_keys",
    "attention_backward_values",
    "attention_backward_keys_and_values",
    "attention_weights_and_grads",
    "external_forward",
    "external_backward_queries",
    "external_backward_keys",
)
FIXED = ("row_deltas", "class_probabilities", "upsampled_loss", "upsampled_loss_gradient", "upsampled_argmax")


def class_widths(kernel: str) -> list[int]:
    """The classes of default tiles that a kernel is used for."""
    match kernel:
        case "attention_backward_keys" | "attention_backward_values":
            return [192, 256]  # narrower ones go together, wider ones in chunks
        case "attention_backward_keys_and_values":
            return [64, 128]
        case "attention_weights_and_grads":
            return [256, 512]
        case "attention_backward_queries":
            return [64, 128, 192, 256]
    return list(WIDTHS)


def shipped_cases(architectures: Iterable[str], *, main_only: bool = False) -> Iterator[Case]:
    """Every default tile at its class's widest, at the decoder's own widths, and every measured tile.

    main_only: the decoder's own widths in half precision.
    """
    for name in architectures:
        for kernel in KERNELS:
            classes = class_widths(kernel)
            widths = set(main_widths(kernel))
            if not main_only:
                widths |= {(width, width) for width in classes}
            for (d, e), element_bytes in itertools.product(sorted(widths), (2,) if main_only else (2, 4)):
                padded = padded_width(d), padded_width(e)
                tile = default_tile(kernel, *padded, element_bytes, ARCHITECTURES[name])
                yield Case(kernel, d, e, element_bytes, name, tile)
                if element_bytes == 2 and (d, e) in main_widths(kernel) and tile.block_keys and not main_only:
                    yield Case(kernel, d, e, element_bytes, name, tile, even=False)
        for kernel, width in itertools.product(FIXED, (150,) if main_only else (19, 150)):
            yield Case(kernel, width, width, 2, name, Tile(0, 0, 4, 1))
            yield Case(kernel, width, width, 4, name, Tile(0, 0, 4, 1))
    for path in sorted(TUNED.glob("*.json")):
        measured = read_tiles(path)
        for kernel, by_width in measured.get("tiles", {}).items():
            for text, by_bytes in by_width.items():
                d, e = (int(width) for width in text.split("x"))
                for element_bytes, tile in by_bytes.items():
                    yield Case(kernel, d, e, int(element_bytes), measured["architecture"], Tile(*tile))


def main_widths(kernel: str) -> list[tuple[int, int]]:
    """The decoder's own widths that a kernel is used for."""
    classes = class_widths(kernel)
    narrower = max((width for width in WIDTHS if width < classes[0]), default=0)
    return [
        (d, e)
        for d, e in MAIN_WIDTHS[kernel.partition("_")[0]]
        if narrower < max(padded_width(d), padded_width(e)) <= classes[-1]
    ]


def compile_all(cases: Iterable[Case]) -> list[Compiled]:
    """Every case that applies; raises `RuntimeError` for one that does not compile."""
    results = []
    unique = list(dict.fromkeys(cases))
    with multiprocessing.Pool(os.cpu_count()) as pool:
        for case, compiled in zip(unique, pool.imap(compile_case, unique, chunksize=4), strict=True):
            if isinstance(compiled, Compiled):
                results.append(compiled)
            elif compiled != "does not apply":
                raise RuntimeError(f"{case}: {compiled}")
    return results


def write_table(results: list[Compiled], path: Path) -> None:
    """The table as Markdown."""
    lines = [
        "# Every Triton kernel, compiled ahead of time",
        "",
        f"Triton {triton.__version__}, no GPU involved. Regenerate with `python benchmarks/aot.py`.",
        "Tile: queries x keys, warps, pipeline stages. Spills: bytes of a thread's stack frame.",
        f"Ragged: {NUM_PIXELS - 1:,} pixels, which no tile divides, with masks at the edges.",
        "",
    ]
    for name, card in ARCHITECTURES.items():
        lines += [f"## {name}, {card.shared_bytes // 1024} KB of shared memory", ""]
        lines += ["| kernel | widths | bytes | tile | shared B | registers | spills B | products |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {c.kernel}{'' if c.even else ', ragged'} | {c.width}, {c.value_width} | {c.element_bytes} "
            f"| {c.tile if c.tile.block_queries else ''} | {r.shared_bytes:,} | {r.registers} "
            f"| {r.spill_bytes} | {r.instruction} |"
            for r in results
            if (c := r.case).architecture == name
        ]
        lines.append("")
    path.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(ARCHITECTURES)
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="compile for these cards only"
    )
    parser.add_argument("--main", action="store_true", help="only the decoder's own widths, half precision")
    parser.add_argument("--out", type=Path, help=f"the table; default: {TABLE} when everything is compiled")
    parser.add_argument("--json", type=Path, help="the same as JSON")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, so nothing compiles; unset it")
    results = compile_all(shipped_cases(arguments.only, main_only=arguments.main))
    complete = arguments.only == names and not arguments.main
    if arguments.out or complete:
        write_table(results, arguments.out or TABLE)
    if arguments.json:
        rows = [r.case._asdict() | r._asdict() | {"case": None} for r in results]
        arguments.json.write_text(json.dumps(rows))
    bad = [r for r in results if not r.fits or r.spill_bytes > r.allowed_spill_bytes]
    for result in bad:
        print(result, file=sys.stderr)
    print(f"{len(results)} kernels compiled, {len(bad)} do not fit or spill more than allowed")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
