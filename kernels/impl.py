"""Which implementation of an operation runs: chosen by name and a fixed rule, never changed silently."""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, get_args

import torch
from torch import Tensor

from segdeformer.kernels.tiles import architecture_of, measured_choices

Impl = Literal["auto", "triton", "sdpa", "blocks", "reference"]
ChosenImpl = Literal["triton", "sdpa", "blocks", "reference"]
ChosenUpsampling = Literal["triton", "strips", "reference"]
Operation = Literal["attention", "external_attention", "upsample_cross_entropy", "upsample_argmax"]

# From here on, by measurement, `blocks` outruns scaled_dot_product_attention on a CPU.
LEAST_SCORES_FOR_BLOCKS = 2**22


def check_impl(impl: str, device: torch.device | None = None) -> Impl:
    """The name if it can run here (on `device`, when given); raises `ValueError` for one that cannot.

    triton: this project's kernels, on a GPU (or, with TRITON_INTERPRET=1, slowly anywhere).
    sdpa: PyTorch's scaled_dot_product_attention, which never stores the N x M scores.
    blocks: on a CPU without gradients, faster than sdpa for large maps.
    reference: the textbook equation, which stores the scores.
    With sdpa and blocks, losses and winners of upsampled logits are made in strips of rows.
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

    `auto` on a GPU: what measurements on this GPU say is faster for these widths and this element
    size, with or without gradients; `sdpa` where nothing was measured. On a CPU: `blocks` for large
    float32 maps without gradients, else `sdpa`.
    """
    if impl in ("triton", "sdpa", "blocks", "reference"):
        return impl
    check_impl(impl)
    if queries_BND.device.type == "cuda":
        return _faster_on_gpu(
            str(queries_BND.device),
            operation,
            queries_BND.shape[-1],
            values_BME.shape[-1],
            queries_BND.element_size(),
            torch.is_grad_enabled(),
        )
    large = queries_BND.shape[1] * keys_BMD.shape[1] >= LEAST_SCORES_FOR_BLOCKS
    plain = queries_BND.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    on_cpu = queries_BND.device.type == "cpu"
    return "blocks" if on_cpu and large and plain and not torch.is_grad_enabled() else "sdpa"


def _faster_on_gpu(
    device: str, operation: Operation, width: int, value_width: int, element_bytes: int, training: bool
) -> ChosenImpl:
    return _recorded_faster(device, operation, width, value_width, element_bytes, training)


# torch.compile takes the answer as it stands, and does not look into files. This is all that
# torch.compiler.assume_constant_result does, but for importing the compiler, 150 MiB and 2 s.
_faster_on_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _recorded_faster(
    device: str, operation: Operation, width: int, value_width: int, element_bytes: int, training: bool
) -> ChosenImpl:
    for choice in measured_choices(torch.device(device)):
        if choice.serves(operation, width, value_width, element_bytes, training):
            return "triton" if choice.triton_ms < choice.sdpa_ms else "sdpa"
    return "sdpa"


def choose_upsampling(impl: Impl, operation: Operation, logits_BKhw: Tensor) -> ChosenUpsampling:
    """What runs for an operation on upsampled logits; `sdpa` and `blocks` say nothing about it.

    `strips`, in PyTorch, a few output rows at a time, is what `auto` takes, but for a GPU on which the
    Triton kernels were measured to be faster.
    """
    if impl == "triton" or impl == "reference":
        return impl
    check_impl(impl)
    if impl == "auto" and logits_BKhw.device.type == "cuda":
        num_classes, training = logits_BKhw.shape[1], operation == "upsample_cross_entropy"
        place, element_bytes = str(logits_BKhw.device), logits_BKhw.element_size()
        chosen = _faster_on_gpu(place, operation, num_classes, num_classes, element_bytes, training)
        return "triton" if chosen == "triton" else "strips"
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
    wins = sum(choice.triton_ms < choice.sdpa_ms for choice in choices)
    return f"auto (as measured on {name}: triton in {wins} of {len(choices)} cases, else PyTorch)"
