"""How sharp a model's attentions are: whether they choose, or only average.

B batch, N queries, M keys, C width, K classes, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segdeformer.models.context import ExternalAttention, InternalAttention, few_keys
from segdeformer.models.layers import Tokens
from segdeformer.models.segmenter import Segmenter

MOST_QUERIES = 512  # of an image; more are taken at even distances


class Sharpness(NamedTuple):
    """Of one softmax, averaged over queries.

    score_deviation: standard deviation of a query's scores, in nats. effective_keys: exp of the mean entropy
    of the weights, from 1 (one key has all the weight) to num_keys (uniform).
    """

    name: str  # of the attention: internal.0 (Eq. 5), middle (Eq. 6), external (Eq. 7)
    score_deviation: float
    effective_keys: float
    num_keys: int


@torch.no_grad()
def attention_sharpness(model: Segmenter, images_B3HW: Tensor) -> list[Sharpness]:
    """Every attention of an unfolded model on normalised images; empty where it has no context.

    The model is in eval mode meanwhile, and afterwards as it was. Scores are taken in float32.
    """
    context = getattr(model.decoder, "context", None)
    if context is None:
        return []
    found: list[Sharpness] = []
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for index, block in enumerate(context.internal or ()):
            see = partial(_internal, found, f"internal.{index}")
            stack.enter_context(_watched(block.attention, see))
        if context.external is not None:
            stack.enter_context(_watched(context.external, partial(_external, found)))
        model(images_B3HW)
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _watched(module: nn.Module, see: Callable[[Any, Tokens, Any], None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda called, inputs, output: see(called, inputs[0], output))
    try:
        yield
    finally:
        handle.remove()


def _internal(found: list[Sharpness], name: str, module: InternalAttention, tokens: Tokens, _: Any) -> None:
    sources_BMC = module.reduce(tokens) if module.reduce else tokens.pixels_BNC
    keys_BMC, _, bias_M = few_keys(module.key, module.value, sources_BMC, tokens, module.key_stride)
    queries, keys = (
        x.unflatten(2, (module.heads, -1)).transpose(1, 2)
        for x in (module.query(_some(tokens.pixels_BNC)), keys_BMC)
    )
    found.append(_of_scores(name, queries @ keys.mT * module.scale, bias_M))


def _external(found: list[Sharpness], module: ExternalAttention, tokens: Tokens, output: Any) -> None:
    class_logits_BNK = output.class_logits_BNK
    found.append(_of_scores("middle", _some(class_logits_BNK)))
    if not module.second_stage:
        return
    prototypes_KC = module.middle_value(module.tokens.tables()[0])
    sources_BMC = class_logits_BNK.softmax(-1).to(prototypes_KC.dtype) @ prototypes_KC
    if module.reduce:
        sources_BMC = module.reduce(tokens._replace(pixels_BNC=sources_BMC))
    keys_BMC, _, bias_M = few_keys(module.key, module.value, sources_BMC, tokens, module.key_stride)
    queries_BNC = module.query(_some(tokens.pixels_BNC))
    found.append(_of_scores("external", queries_BNC @ keys_BMC.mT * module.scale, bias_M))


def _some(x_BNC: Tensor) -> Tensor:
    return x_BNC[:, :: -(-x_BNC.shape[1] // MOST_QUERIES)]


def _of_scores(name: str, scores: Tensor, bias_M: Tensor | None = None) -> Sharpness:
    scores = scores.float() if bias_M is None else scores.float() + bias_M
    log_weights = scores.log_softmax(-1)
    entropy = -(log_weights.exp() * log_weights).sum(-1).mean()
    deviation = scores.std(-1, correction=0).mean()
    return Sharpness(name, deviation.item(), entropy.exp().item(), scores.shape[-1])
