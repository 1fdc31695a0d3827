"""What an operation should give: its reference in float64, and how far a result is from it.

It runs over blocks of queries and never holds an N x M matrix, so full-size problems can be checked on the
card that runs them.
B batch, N queries, M keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_SCORES = 2**25  # of a block: 256 MiB in float64
# Epsilons of rounding that a result may have beside its inputs' own. Half precisions add up in float32; in
# float32 the order of a sum and the base of an exponential show.
ROUNDINGS = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 64}


class Answer(NamedTuple):
    out: Tensor
    grads: tuple[Tensor, ...]  # of the inputs, in their order; empty without an upstream gradient


def answer(
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    scale: float,
    grad_out: Tensor | None = None,
    exact: bool,
) -> Answer:
    """`reference` of (B, N, .) queries and (B, M, .) others, block by block.

    exact: in float64. Otherwise the textbook form in the inputs' own dtypes, the yardstick of
    `largest_allowed`; only sums over blocks are then kept in float32.
    """
    precise = torch.float64 if exact else torch.float32
    leaves = [t.detach().to(precise).requires_grad_(grad_out is not None) for t in inputs]
    dtypes = [precise if exact else t.dtype for t in inputs]
    batch, num_queries, _ = inputs[0].shape
    rows_per_block = max(1, BLOCK_SCORES // (batch * inputs[1].shape[1]))
    outs = []
    with torch.set_grad_enabled(grad_out is not None):
        for first in range(0, num_queries, rows_per_block):
            rows = slice(first, first + rows_per_block)
            parts = [leaf[:, rows] if i == 0 else leaf for i, leaf in enumerate(leaves)]
            out = reference(*(t.to(dtype) for t, dtype in zip(parts, dtypes, strict=True)), scale=scale)
            if grad_out is not None:
                out.backward(grad_out[:, rows].to(out.dtype))
            outs.append(out.detach())
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return Answer(torch.cat(outs, dim=1), tuple(grads))


def worst_row_error(result: Tensor, exact: Tensor) -> float:
    """The largest error of a row, relative to that row's length, or the typical length if that is longer.

    Sharper than one number for all: a single wrong row shows. NaN when any element is NaN.
    """
    lengths = exact.double().norm(dim=-1)
    typical = lengths.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return ((result.double() - exact).norm(dim=-1) / lengths.maximum(typical)).max().item()


def largest_allowed(eager_error: float, dtype: torch.dtype) -> float:
    """Twice the error of the textbook form in the same dtype, plus rounding."""
    return 2 * eager_error + ROUNDINGS[dtype] * torch.finfo(dtype).eps
