"""PyTorch operators with gradients whose calls cost the host little.

What `torch.library.custom_op` and `register_autograd` give, tracing and shapes without data included, by the
layer below them: those two add to forward + backward about as much as our kernels' own host code takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def define_operator(
    name: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Register `segdeformer::name`, (schema), with what computes it and what only makes its outputs."""
    qualified = f"segdeformer::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("cpu", "cuda"), run)
    torch.library.register_fake(qualified, shapes)
    operator: torch._ops.OpOverload = getattr(torch.ops.segdeformer, name).default
    return operator


def define_with_gradient(
    name: str,
    inputs: Sequence[str],
    run: Callable[..., Any],
    shapes: Callable[..., Any],
    backward: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., Any]:
    """Register an operator of these tensors and a scale, which gives (result, log-sum-exp), and its gradient.

    inputs: names; those that end in `?` come last, may be None, and have no gradient.
    backward: of the input tensors, the two outputs, the result's gradient and the scale; gives the gradients
    of the input tensors. The log-sum-exp has none.
    """
    learned = [tensor for tensor in inputs if not tensor.endswith("?")]
    others = [f"Tensor? {tensor.removesuffix('?')}" for tensor in inputs[len(learned) :]]
    tensors = ", ".join([*(f"Tensor {tensor}" for tensor in learned), *others])
    operator = define_operator(name, f"({tensors}, float scale) -> (Tensor, Tensor)", run, shapes)
    grads = ", ".join(["Tensor"] * len(learned))
    given = f"({tensors}, Tensor out, Tensor lse, Tensor grad_out, float scale)"
    backward_operator = define_operator(
        f"{name}_backward",
        f"{given} -> ({grads})",
        backward,
        lambda *given: empty_like(*given[: len(learned)]),
    )
    return _differentiable(operator, backward_operator, len(learned))


def empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, unlike those of torch.empty_like."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _differentiable(
    operator: torch._ops.OpOverload, backward: Callable[..., tuple[Tensor, ...]], num_learned: int
) -> Callable[..., Any]:
    class WithGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result, lse = operator(*inputs)
            ctx.save_for_backward(*inputs[:-1], result, lse)
            ctx.scale = inputs[-1]
            ctx.mark_non_differentiable(lse)
            ctx.set_materialize_grads(False)  # or the log-sum-exp's would be made, of zeros
            return result, lse

        @staticmethod
        def backward(ctx: Any, grad: Any, _: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(f"{operator.name()} has no second derivatives; use impl `reference`")
            without = [None] * (len(ctx.needs_input_grad) - num_learned)
            return *backward(*ctx.saved_tensors, grad, ctx.scale), *without

    def autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for tensor in inputs[:num_learned]:
                if tensor.requires_grad:
                    return WithGradient.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    torch.library.impl(operator.name().removesuffix(".default"), "Autograd")(autograd)
    return operator
