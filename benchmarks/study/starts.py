"""How the context may start, and small changes of its form, each a function that changes a fresh model.

C decoder width. `small`, trunc-normal 0.02 throughout, is how a model is handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from segdeformer.models.context import Context, ExternalAttention, InternalAttention, InternalBlock

Change = Callable[[Context], None]


def _attentions(context: Context) -> Iterable[InternalAttention | ExternalAttention]:
    for block in context.internal or ():
        assert isinstance(block, InternalBlock)
        yield block.attention
    if context.external is not None:
        yield context.external


def unit(
    context: Context,
    *,
    query: float = 1.0,
    key: float = 1.0,
    value: float = 1.0,
    middle: float = 1.0,
    external: float = 1.0,
    tokens: float = 1.0,
) -> None:
    """Projections N(0, gain^2 / C), tokens N(0, tokens^2); `external` is for Eq. 7. 0: left small."""
    gains = {"query": query, "key": key, "value": value}
    for attention in _attentions(context):
        is_external = isinstance(attention, ExternalAttention)
        for name, child in attention.named_children():
            if not isinstance(child, nn.Linear):
                continue
            gain = middle if name.startswith("middle") else gains[name] * (external if is_external else 1.0)
            if gain:
                nn.init.normal_(child.weight, std=gain * child.in_features**-0.5)
        if is_external and tokens:
            for table in (*attention.tokens.parameters(), *attention.tokens.buffers()):
                if table.is_floating_point():
                    nn.init.normal_(table, std=tokens)


def torch_default(context: Context) -> None:
    """As PyTorch begins its linears, uniform with deviation (3 C)^-0.5; tokens N(0, 1)."""
    unit(context, query=0, key=0, value=0, middle=0)
    for module in context.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
            nn.init.zeros_(module.bias)


class _Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def faster(context: Context, *, tokens: float = 1.0, middle: float = 1.0) -> None:
    """Parameters that learn `factor` times as fast and start alike, for Adam by learning their 1/factor."""
    external = context.external
    assert external is not None
    parts: list[tuple[nn.Module, str, float]] = [
        (external.tokens, name, tokens) for name, _ in list(external.tokens.named_parameters())
    ]
    parts += [(external.middle_query, "weight", middle), (external.middle_key, "weight", middle)]
    for module, name, factor in parts:
        if factor != 1.0:
            parameter = getattr(module, name)
            with torch.no_grad():
                parameter.div_(factor)
            parametrize.register_parametrization(module, name, _Scaled(factor))


def output_gain(context: Context, *, gain: float) -> None:
    """A learned scale per channel of Y_int and Y_ext, which folds away."""
    for attention in _attentions(context):
        width = attention.query.in_features  # type: ignore[union-attr]
        attention.register_parameter("gain_C", nn.Parameter(torch.full((width,), gain)))
        attention.register_forward_hook(_gained)


def _gained(module: Any, _: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * module.gain_C
    return output._replace(context_BNC=output.context_BNC * module.gain_C)


class _TokenNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


def norm_before(context: Context, *, layer_norm: bool = False) -> None:
    """A norm of X before the projections: BatchNorm, which folds away, or LayerNorm, which does not."""
    for attention in _attentions(context):
        width = attention.query.in_features  # type: ignore[union-attr]
        attention.add_module("norm", nn.LayerNorm(width) if layer_norm else _TokenNorm(width))
        attention.register_forward_pre_hook(
            lambda module, inputs: (inputs[0]._replace(pixels_BNC=module.norm(inputs[0].pixels_BNC)),)
        )


def norm_after(context: Context) -> None:
    """BatchNorm of queries, keys and values, which folds away; Eq. 7 runs as it is printed."""
    for attention in _attentions(context):
        if isinstance(attention, ExternalAttention):
            attention.low_rank = False
        for name in ("query", "key", "value"):
            linear: Any = getattr(attention, name)
            setattr(attention, name, nn.Sequential(linear, _TokenNorm(linear.out_features)))


def _both(*changes: Change) -> Change:
    def change(context: Context) -> None:
        for each in changes:
            each(context)

    return change


def _nothing(context: Context) -> None:
    pass


STARTS: dict[str, Change] = {
    "small": _nothing,
    "unit": unit,
    "torch": torch_default,
    "unit, values small": partial(unit, value=0),
    "unit, tokens small": partial(unit, tokens=0),
    "tokens only": partial(unit, query=0, key=0, value=0, middle=0),
    "projections x 0.5": partial(unit, query=0.5, key=0.5, value=0.5, middle=0.5),
    "queries, keys x 0.5": partial(unit, query=0.5, key=0.5),
    "queries, keys x 1.41": partial(unit, query=2**0.5, key=2**0.5),
    "queries, keys x 2": partial(unit, query=2.0, key=2.0),
    "values x 0.5": partial(unit, value=0.5),
    "values x 2": partial(unit, value=2.0),
    "middle x 0.5": partial(unit, middle=0.5),
    "middle x 2": partial(unit, middle=2.0),
    "external x 0.5": partial(unit, external=0.5),
    "external x 2": partial(unit, external=2.0),
    "tokens x 0.3": partial(unit, tokens=0.3),
    "tokens x 3": partial(unit, tokens=3.0),
    "unit, gain 1": _both(unit, partial(output_gain, gain=1.0)),
    "unit, gain 0.1": _both(unit, partial(output_gain, gain=0.1)),
    "unit, BatchNorm before": _both(unit, norm_before),
    "unit, BatchNorm after": _both(unit, norm_after),
    "unit, LayerNorm before": _both(unit, partial(norm_before, layer_norm=True)),
    "small, BatchNorm before": norm_before,
    "small, BatchNorm after": norm_after,
    "unit, tokens learn x 10": _both(unit, partial(faster, tokens=10.0)),
    "unit, middle learns x 4": _both(unit, partial(faster, middle=4.0)),
    "small, tokens learn x 10": partial(faster, tokens=10.0),
}
