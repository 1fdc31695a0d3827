"""Which implementation of an operation runs: chosen by name and a fixed rule, never changed silently."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "sdpa", "blocks", "reference"]
ChosenImpl = Literal["sdpa", "blocks", "reference"]

# From here on, by measurement, `blocks` outruns scaled_dot_product_attention on a CPU.
LEAST_SCORES_FOR_BLOCKS = 2**22


def check_impl(impl: str) -> Impl:
    """The name if it can run here; raises `ValueError` for one that cannot.

    sdpa: PyTorch's scaled_dot_product_attention, which never stores the N x M scores.
    blocks: on a CPU without gradients, faster than sdpa for large maps.
    reference: the textbook equation, which stores the scores.
    auto: see `choose_impl`.
    """
    match impl:
        case "auto" | "sdpa" | "blocks" | "reference":
            return impl
        case "triton":
            raise ValueError("impl `triton` is not in this version; use auto, sdpa, blocks or reference")
        case _:
            raise ValueError(f"impl is `{impl}`; expected one of {', '.join(get_args(Impl))}")


def choose_impl(impl: Impl, queries_BND: Tensor, keys_BMD: Tensor) -> ChosenImpl:
    """What runs. `auto` is `blocks` for large float32 maps on a CPU without gradients, else `sdpa`."""
    chosen = check_impl(impl)
    if chosen == "auto":
        large = queries_BND.shape[1] * keys_BMD.shape[1] >= LEAST_SCORES_FOR_BLOCKS
        plain = queries_BND.device.type == "cpu" and queries_BND.dtype == torch.float32
        return "blocks" if large and plain and not torch.is_grad_enabled() else "sdpa"
    assert chosen != "triton"
    return chosen


def describe_impl(impl: Impl, device: torch.device) -> str:
    """The choice in words, for the terminal."""
    if impl != "auto":
        return impl
    if device.type == "cpu":
        return "auto (sdpa, and blocks for large maps without gradients)"
    return "auto (sdpa)"
