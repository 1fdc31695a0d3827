"""FLOPs of a forward pass: matrix products, convolutions and attention, a multiply-add as two.

Norms, activations, softmax, biases and resizing are not counted: together they are a few percent of the
operations. Every attention counts 2 N M (D + E): scores, then the mixture of values.

B batch, N queries, M keys, D key width, E value width.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from segdeformer.config import ModelConfig
from segdeformer.measure.speed import Split, metered, split_of
from segdeformer.models.fusion import MLPFusion
from segdeformer.models.segmenter import Segmenter
from segdeformer.models.skeleton import build_skeleton

Shape = Sequence[int]


class Flops(NamedTuple):
    """Of one forward pass over a batch."""

    total: int
    parts: Split[int]


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, taught what it lacks: attention on a CPU, our kernels, deformable convolution.

    It counts what runs inside it, on any device; so `sdpa`, which fills up unequal widths with zeros,
    counts more than the other implementations where it does. `model_flops` does not.
    """
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
    }
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("segdeformer.kernels.attention.operator")
        importlib.import_module("segdeformer.kernels.external_attention.operator")
        formulas[torch.ops.segdeformer.attention] = _attention_flops
        formulas[torch.ops.segdeformer.external_attention] = _external_attention_flops
    if importlib.util.find_spec("torchvision") is not None:
        importlib.import_module("torchvision.ops")
        formulas[torch.ops.torchvision.deform_conv2d] = _deformable_convolution_flops
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention_flops(queries: Shape, keys: Shape, values: Shape, *options: object, **more: object) -> int:
    """Of (B, N, D), (B, M, D), (B, M, E), with heads after B or without."""
    batch, num_queries = math.prod(queries[:-2]), queries[-2]
    return 2 * batch * num_queries * keys[-2] * (queries[-1] + values[-1])


def _external_attention_flops(scores: Shape, class_logits: Shape, *options: object, **more: object) -> int:
    """Keys and values are both P, which is as large as the class logits."""
    return _attention_flops(scores, class_logits, class_logits)


def _deformable_convolution_flops(
    images: Shape, weight: Shape, *options: object, out_shape: Shape, **more: object
) -> int:
    """As of a convolution; finding the places between pixels is not counted."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def model_flops(model: Segmenter, *, batch: int, size: tuple[int, int]) -> Flops:
    """Of images (batch, 3, *size) to logits, in the form that the model has (folded or not), by its parts.

    The same number for every implementation, device and dtype: each of our attentions counts as its
    definition. Nothing is computed, only shapes, so a large model takes no memory and a second or two.
    The model stays as it is.
    """
    shadow = _shadow(model)
    counter = flop_counter()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        images_B3HW = torch.empty(batch, 3, *size, device="cpu")
        with counter, metered(shadow, counter.get_total_flops) as readings:
            shadow(images_B3HW)
    spent = {name: after - before for name, (before, after) in readings.items()}
    return Flops(counter.get_total_flops(), split_of(spent))


def printed_flops(config: ModelConfig, *, batch: int, size: tuple[int, int]) -> int:
    """Of the same model by the equations as papers print them, to compare with their figures.

    Eq. 7 in its C-wide form, nothing folded, and Eq. 1 over the concatenation of all maps at the first
    one's size, where our MLP fusion mixes each map at its own size, which is the same and less work.
    """
    model = build_skeleton(config, external_form="plain")
    saved = 0
    fusion = getattr(model.decoder, "fusion", None)

    def count_saved(fusion: MLPFusion, inputs: tuple[Sequence[Tensor]]) -> None:
        nonlocal saved
        first, *others = [math.prod(map_BChw.shape[-2:]) for map_BChw in inputs[0]]
        saved = sum(2 * batch * (first - pixels) * fusion.width**2 for pixels in others)

    if isinstance(fusion, MLPFusion):
        fusion.register_forward_pre_hook(count_saved)
    return model_flops(model, batch=batch, size=size).total + saved


def _shadow(model: Segmenter) -> Segmenter:
    """A copy with shapes in place of weights, on the CPU in float32, each attention as its definition."""
    shapes: dict[int, Any] = {}
    with FakeTensorMode():
        for tensor in chain(model.parameters(), model.buffers()):
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            fake = torch.empty(tensor.shape, dtype=dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            shapes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    shadow = copy.deepcopy(model, shapes)
    for module in shadow.modules():
        if hasattr(module, "impl"):
            setattr(module, "impl", "reference")  # noqa: B010  # for mypy a module's attribute is a tensor
    return shadow
