"""Which implementation of an operation runs: chosen by name and a fixed rule, never changed silently.

B batch, N queries, M keys, D key width, E value width, K classes, hw map, HW output.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from segdeformer.kernels.choices import Kind, Operation, measured_choices, switches
from segdeformer.kernels.tiles import architecture_of

Impl = Literal["auto", "triton", "sdpa", "blocks", "reference"]
ChosenImpl = Literal["triton", "sdpa", "blocks", "reference"]
ChosenUpsampling = Literal["triton", "strips", "reference"]

# From here on `blocks` may outrun scaled_dot_product_attention on a CPU: see `cpu`.
LEAST_SCORES_FOR_BLOCKS = 2**22


class Call(NamedTuple):
    """What an operation was called with when `auto` was to decide."""

    operation: str
    width: int  # D or K
    value_width: int  # E or K
    element_bytes: int
    training: bool
    batch: int  # heads are in it
    source: tuple[int, ...]  # (N,), or the map's (h, w)
    target: tuple[int, ...]  # (M,), or the output's (H, W)


# What `calls_noted` notes into, in its own thread or task only.
_noting: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("noting", default=None)


@contextlib.contextmanager
def calls_noted() -> Iterator[list[Call]]:
    """Inside, in this thread, every call that `auto` decides is noted, on whatever device it runs."""
    calls: list[Call] = []
    token = _noting.set(calls)
    try:
        yield calls
    finally:
        _noting.reset(token)


def check_impl(impl: str, device: torch.device | None = None) -> Impl:
    """The name if it can run here (on `device`, when given); raises `ValueError` for one that cannot.

    triton: this project's kernels, on a GPU (or, with TRITON_INTERPRET=1, slowly anywhere).
    sdpa: PyTorch's scaled_dot_product_attention, which never stores the N x M scores.
    blocks: on a CPU without gradients, faster than sdpa for large maps.
    reference: the textbook equation, which stores the scores.
    With sdpa and blocks, loss and argmax of upsampled logits are made in strips of rows.
    auto: see `choose_impl`.
    """
    match impl:
        case "auto" | "sdpa" | "blocks" | "reference":
            return impl
        case "triton":
            if importlib.util.find_spec("triton") is None:
                raise ValueError(
                    "impl `triton` needs Triton, which is not installed; use auto, sdpa or reference"
                )
            from segdeformer.kernels.launch import interpreting

            if device is not None and device.type != "cuda" and not interpreting():
                raise ValueError(
                    f"impl `triton` needs a GPU, the device is {device}; use auto, sdpa, blocks or reference "
                    "(or set TRITON_INTERPRET=1 to try the kernels, slowly, on the CPU)"
                )
            if device is not None and device.type == "cuda":
                architecture_of(device)
            return impl
        case _:
            raise ValueError(f"impl is `{impl}`; expected one of {', '.join(get_args(Impl))}")


def choose_impl(
    impl: Impl,
    queries_BND: Tensor,
    keys_BMD: Tensor,
    values_BME: Tensor,
    *,
    operation: Operation = "attention",
) -> ChosenImpl:
    """What runs.

    `auto` on a GPU: what measurements on this GPU say is faster for these widths, this element size and
    a problem of about this size, with or without gradients; `sdpa` where nothing was measured. On a CPU:
    for large float32 maps without gradients `blocks`, unless `sdpa` was measured to be faster; else `sdpa`.
    """
    if impl in ("triton", "sdpa", "blocks", "reference"):
        return impl
    check_impl(impl)
    (batch, num_queries, width), num_keys = queries_BND.shape, keys_BMD.shape[1]
    training = torch.is_grad_enabled()
    kind = Kind(operation, width, values_BME.shape[2], queries_BND.element_size(), training)
    device, num_scores = queries_BND.device, batch * num_queries * num_keys
    if _ours_is_faster(device, kind, num_scores, batch, (num_queries,), (num_keys,)):
        return "triton"
    large = num_queries * num_keys >= LEAST_SCORES_FOR_BLOCKS
    plain = queries_BND.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if device.type == "cpu" and large and plain and not training:
        from segdeformer.kernels.cpu import blocks_are_faster

        return "blocks" if blocks_are_faster(kind.width, kind.value_width, num_keys) else "sdpa"
    return "sdpa"


def _ours_is_faster(
    device: torch.device, kind: Kind, size: int, batch: int, source: tuple[int, ...], target: tuple[int, ...]
) -> bool:
    """What `auto` goes by; the call is noted where somebody listens."""
    if not torch.compiler.is_compiling() and (calls := _noting.get()) is not None:
        calls.append(Call(*kind, batch, source, target))
    return device.type == "cuda" and _faster_on_gpu(str(device), kind, size)


def _faster_on_gpu(device: str, kind: Kind, size: int) -> bool:
    """Whether our kernels are. In a compiled graph size may be a symbol, and the answer a guard on it."""
    ours = False
    for switch in _switches(device, *kind):
        if size < switch:
            break
        ours = not ours
    return ours


def _switches(device: str, *kind: Any) -> tuple[int, ...]:
    return switches(device, Kind(*kind))


# torch.compile takes the answer as it stands, and does not look into files. This is all that
# torch.compiler.assume_constant_result does, but for importing the compiler, 150 MiB and 2 s.
_switches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_upsampling(
    impl: Impl, operation: Operation, logits_BKhw: Tensor, size: tuple[int, ...]
) -> ChosenUpsampling:
    """What runs for an operation on logits upsampled to `size` = (H, W); `sdpa` and `blocks` say nothing.

    `strips`, in PyTorch, a few output rows at a time, is what `auto` takes, but for a GPU on which the
    Triton kernels were measured to be faster.
    """
    if impl == "triton" or impl == "reference":
        return impl
    check_impl(impl)
    if impl == "auto":
        batch, num_classes, height, width = logits_BKhw.shape
        element_bytes, training = logits_BKhw.element_size(), operation == "upsample_cross_entropy"
        kind = Kind(operation, num_classes, num_classes, element_bytes, training)
        full = size[0], size[1]
        values = batch * num_classes * full[0] * full[1]
        if _ours_is_faster(logits_BKhw.device, kind, values, batch, (height, width), full):
            return "triton"
    return "strips"


def describe_impl(impl: Impl, device: torch.device) -> str:
    """The choice in words, for the terminal."""
    if impl != "auto":
        return impl
    if device.type == "cpu":
        return "auto (sdpa, and blocks for large maps without gradients; upsampling in strips)"
    name = torch.cuda.get_device_name(device)
    choices = measured_choices(device)
    if not choices:
        return f"auto (sdpa: nothing measured on {name} yet; `segdeformer bench --tune` does)"
    wins = sum(choice.triton_wins for choice in choices)
    return f"auto (as measured on {name}: triton in {wins} of {len(choices)} cases, else PyTorch)"
