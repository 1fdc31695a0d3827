"""Which implementation of an operation runs: chosen once, by name, never changed silently."""

from __future__ import annotations

from typing import Literal, get_args

Impl = Literal["auto", "triton", "sdpa", "reference"]
ResolvedImpl = Literal["sdpa", "reference"]


def resolve_impl(impl: str) -> ResolvedImpl:
    """Turn a request into what will run.

    `auto` takes PyTorch's scaled_dot_product_attention, which never stores the N x M scores.
    `reference` is the textbook equation and stores them.

    Raises `ValueError` for an unknown name, and for `triton`, which this version does not have yet.
    """
    match impl:
        case "auto" | "sdpa":
            return "sdpa"
        case "reference":
            return "reference"
        case "triton":
            raise ValueError("impl `triton` is not in this version; use `auto`, `sdpa` or `reference`")
        case _:
            raise ValueError(f"impl is `{impl}`; expected one of {', '.join(get_args(Impl))}")
