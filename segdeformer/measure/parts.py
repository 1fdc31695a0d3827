"""The parts of a model that are measured one by one: encoder, fusion, context, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Generic, NamedTuple, TypeVar

from torch import nn

from segdeformer.models.segmenter import Segmenter

T = TypeVar("T")


class Split(NamedTuple, Generic[T]):
    """A forward pass by its parts; what the decoder does outside of fusion and head is context.

    head: None for a folded model, whose head is part of what computes the context.
    """

    encoder: T
    fusion: T
    context: T
    head: T | None


@contextmanager
def metered(model: Segmenter, read: Callable[[], T]) -> Iterator[dict[str, tuple[T, T]]]:
    """Read a meter (a clock, a counter) before and after the encoder, the decoder, its fusion and its head.

    What it gives holds the last pass.
    """
    readings: dict[str, tuple[T, T]] = {}
    modules: dict[str, nn.Module] = {"encoder": model.encoder, "decoder": model.decoder}
    modules |= {name: part for name, part in model.decoder.named_children() if name in ("fusion", "head")}
    names = {id(module): name for name, module in modules.items()}

    def before(module: nn.Module, inputs: object) -> None:
        now = read()
        readings[names[id(module)]] = now, now

    def after(module: nn.Module, inputs: object, output: object) -> None:
        name = names[id(module)]
        readings[name] = readings[name][0], read()

    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield readings


def split_of(spent: Mapping[str, int]) -> Split[int]:
    """The split of whole numbers (FLOPs, nanoseconds) that `metered` modules took."""
    head = spent.get("head")
    context = spent["decoder"] - spent["fusion"] - (head or 0)
    return Split(spent["encoder"], spent["fusion"], context, head)
