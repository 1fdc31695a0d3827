"""Launching Triton kernels: what every kernel's host side shares.

A `Launch` holds all that a kernel is called with, so that the same object is run on a GPU, run in
Triton's interpreter, or compiled ahead of time for a card that is not here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.errors import TritonError

from segdeformer.errors import KernelError, UserError
from segdeformer.kernels.tiles import LARGEST_WIDTH, Tile

T = TypeVar("T")

KERNEL_FOLDER = Path(__file__).resolve().parent
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALIGNED_BYTES = 16  # what bulk copies ask of an address
ALIGNED = 16  # elements: Triton vectorises, and pipelines, what it knows to be a multiple of this


class Launch(NamedTuple):
    """One kernel call; nothing has run yet."""

    kernel: Any  # triton.JITFunction, or the interpreter's stand-in
    grid: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, int | float]
    constants: Mapping[str, int | str | bool]
    tile: Tile

    @classmethod
    def of(
        cls,
        kernel: Any,
        grid: tuple[int, ...],
        tile: Tile,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, int | float],
        constants: Mapping[str, int | str | bool],
    ) -> Launch:
        """The call with those of the arguments that the kernel names."""
        names = kernel.arg_names
        return cls(
            kernel, grid, _named(names, tensors), _named(names, numbers), _named(names, constants), tile
        )

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def options(self) -> dict[str, int | bool]:
        """How the compiler is asked; multiply and add fused, whatever a Triton version's default."""
        return {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "enable_fp_fusion": True}

    def compile(self) -> Any:
        """The kernel's machine code for the current GPU; nothing runs."""
        return self.kernel.warmup(
            **self.tensors, **self.numbers, **self.constants, grid=self.grid, **self.options
        )

    def run(self) -> None:
        """Start it on the tensors' device; raises `KernelError`."""
        device = next(iter(self.tensors.values())).device
        if self.tile.tma and device.type == "cuda":
            allow_descriptors(device)
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        try:
            with guard:
                self.kernel[self.grid](**self.tensors, **self.numbers, **self.constants, **self.options)
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError) as error:
            raise KernelError(failure(self, error)) from error


def _named(names: Sequence[str], arguments: Mapping[str, T]) -> dict[str, T]:
    return {name: argument for name, argument in arguments.items() if name in names}


def allow_descriptors(device: torch.device) -> None:
    """Let this thread's kernels make descriptors of bulk copies; the backward runs in a thread of its own."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))


def failure(launch: Launch, error: Exception) -> str:
    """What to print when a kernel did not start."""
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in launch.tensors.items())
    dtype = str(next(iter(launch.tensors.values())).dtype).removeprefix("torch.")
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"Triton kernel {launch.name} failed ({reason[-1]}) for {dtype} {shapes} with tile {launch.tile}; "
        "measure tiles that fit this GPU with `segdeformer bench --tune`, or use --impl sdpa"
    )


@functools.cache
def kernel_sources() -> str:
    """A digest of the Triton code and of its launches: other sources are other kernels."""
    digest = hashlib.sha256()
    for name in ("triton_*.py", "launch.py", "operator.py"):
        for path in sorted(KERNEL_FOLDER.rglob(name)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def interpreting() -> bool:
    """Whether Triton's kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _mend_interpreter() -> None:
    """Let Triton 3.6 loop in its interpreter: NumPy 2.5 takes no int() of its one-element arrays any more."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


if interpreting() and triton.__version__.startswith("3.6."):
    _mend_interpreter()


def check_operands(first: Tensor, *others: Tensor) -> None:
    """Raise `ValueError` unless Triton's kernels can take these tensors together."""
    dtype, device = first.dtype, first.device
    for tensor in others:
        if tensor.dtype != dtype or tensor.device != device:
            _refuse_mixture((first, *others))
    if dtype not in DTYPES:
        _refuse_mixture((first, *others))
    if device.type != "cuda":
        check_interpreter(first)


def _refuse_mixture(tensors: tuple[Tensor, ...]) -> NoReturn:
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors) or tensors[0].dtype not in DTYPES:
        kinds = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        raise ValueError(
            f"impl `triton` takes tensors of one dtype, float16, bfloat16 or float32; got {kinds}"
        )
    places = ", ".join(str(tensor.device) for tensor in tensors)
    raise ValueError(f"impl `triton` takes tensors on one device; got {places}")


def check_interpreter(tensor: Tensor) -> None:
    """Raise `ValueError` unless Triton's interpreter runs here and can take this tensor."""
    if not interpreting():
        raise ValueError(
            f"impl `triton` needs a GPU, the tensors are on {tensor.device}; use auto or sdpa "
            "(or set TRITON_INTERPRET=1 before the start to try the kernels, slowly, on a CPU)"
        )
    if tensor.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 there")


def check_widths(*widths: int) -> None:
    """Raise `ValueError` for a width that no tile covers."""
    if max(widths) > LARGEST_WIDTH:
        raise UserError(
            f"impl `triton` takes widths up to {LARGEST_WIDTH}, got {max(widths)}; use sdpa, or more heads"
        )


def dot_precision(dtype: torch.dtype, *, tf32: bool = False) -> str:
    """How float32 products are taken: exactly, unless PyTorch's own matmul, or the caller, allows TF32."""
    if dtype != torch.float32:
        return "ieee"
    allowed = tf32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and _has_tf32() else "ieee"


@functools.cache
def _has_tf32() -> bool:
    if torch.version.hip is None or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_properties(0).gcnArchName.startswith("gfx942")


def padded_rows(matrix_BNW: Tensor, width: int) -> Tensor:
    """Rows of `width` columns, zeros behind the real ones, every row 16-byte aligned.

    A view where they are so already, else a copy: a product over N x M costs far more.
    """
    real = matrix_BNW.shape[2]
    if real < width:
        return F.pad(matrix_BNW, (0, width - real))
    batch_stride, row_stride, stride = matrix_BNW.stride()
    if (
        stride == 1
        and not (row_stride | batch_stride) % ALIGNED
        and not matrix_BNW.data_ptr() % ALIGNED_BYTES
    ):
        return matrix_BNW
    return matrix_BNW.clone(memory_format=torch.contiguous_format)
