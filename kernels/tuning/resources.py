"""What a compiled Triton kernel takes of a card: read from its code, which need not be loaded."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

from segdeformer.kernels.tiles import Architecture

MATRIX_INSTRUCTIONS = {  # that a card is fast with
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "gfx942": "v_mfma",
}


class Resources(NamedTuple):
    """Of one program, and what it multiplies with."""

    shared_bytes: int
    registers: int  # of a thread
    warps: int  # with those that the compiler adds
    spill_bytes: int = 0  # the stack frame of a thread: spilled registers, and what else lies there
    instruction: str = ""  # the largest of the matrix products; `fma` without any
    tensor_columns: int = 0  # of tensor memory; beyond the card's the code is a trap that compiles

    def resident_blocks(self, architecture: Architecture) -> int:
        """How many of these programs run on a multiprocessor at a time; 0 where it does not fit."""
        return architecture.resident_blocks(
            registers=self.registers,
            shared_bytes=self.shared_bytes,
            warps=self.warps,
            tensor_columns=self.tensor_columns,
        )


def resources_of(code: Any, architecture: Architecture) -> Resources:
    """Of a `triton.compiler.CompiledKernel` for this card."""
    if architecture.backend == "hip":
        assembly = code.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", assembly)
        spill_bytes = _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
        instructions = re.findall(r"v_mfma_\w+", assembly)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, spill_bytes = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
        found = re.findall(
            r"wgmma\.mma_async\S*?\.(m\d+n\d+k\d+)|(tcgen05\.mma)\.|mma\.sync\.aligned\.(m\d+n\d+k\d+)",
            code.asm["ptx"],
        )
        names = ("wgmma {}", "{}", "mma.sync {}")
        instructions = [n.format(x) for places in found for n, x in zip(names, places, strict=True) if x]
    return Resources(
        code.metadata.shared,
        registers,
        code.metadata.num_warps,
        spill_bytes,
        max(set(instructions), key=_size, default="fma"),
        getattr(code.metadata, "tmem_size", None) or 0,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found.group(1))


def _size(instruction: str) -> int:
    total = 1
    for number in re.findall(r"(?<=[mnkx_])\d+", instruction):
        total *= int(number)
    return total
