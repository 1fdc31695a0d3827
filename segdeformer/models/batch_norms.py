"""Fold BatchNorms into the convolutions before them, for inference."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from segdeformer.models.context import Context
from segdeformer.models.encoders import Encoder, TimmEncoder
from segdeformer.models.fusion import Fusion
from segdeformer.models.layers import ConvBNReLU, TokenConvBNReLU


def fused_fusion(fusion: Fusion) -> Fusion:
    """A copy in eval mode without BatchNorms."""
    fused = copy.deepcopy(fusion).eval()
    for block in fused.modules():
        if isinstance(block, ConvBNReLU):
            block[0], block[1] = _fused(block[0], block[1])
    return fused


def fused_context(context: Context | None) -> Context | None:
    """A copy in eval mode, whose projections are linear layers and ReLUs on tokens, without BatchNorms."""
    fused = copy.deepcopy(context)
    if fused is None:
        return None
    for parent in list(fused.modules()):
        for name, child in parent.named_children():
            if isinstance(child, TokenConvBNReLU):
                setattr(parent, name, nn.Sequential(_linear(child.block), nn.ReLU(inplace=True)))
    return fused.eval()


def _linear(block: ConvBNReLU) -> nn.Linear:
    """A 1x1 convolution and its BatchNorm as one linear layer: tokens need no other memory order."""
    conv, _ = _fused(block[0], block[1])
    linear = nn.Linear(conv.in_channels, conv.out_channels, device="meta")  # draws no random numbers
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1))
    assert conv.bias is not None
    linear.bias = nn.Parameter(conv.bias.detach())
    return linear


def fused_encoder(encoder: Encoder) -> Encoder:
    """A copy in eval mode without those BatchNorms that take a convolution's output, and alone take it.

    Certain is what a trace of the encoder's own code shows. Encoders that cannot be traced, such as
    those that branch on an image's size, keep their BatchNorms. MiT has none.
    """
    fused = copy.deepcopy(encoder).eval()
    if not isinstance(fused, TimmEncoder) or not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules()):
        return fused
    # Tracing may leave its placeholders in a model's caches, hence another copy.
    for conv_name, norm_name in list(_conv_norm_pairs(copy.deepcopy(fused))):
        conv, after = _fused(fused.get_submodule(conv_name), fused.get_submodule(norm_name))
        fused.set_submodule(conv_name, conv)
        fused.set_submodule(norm_name, after)
    return fused


def _fused(conv: nn.Module, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """The convolution with the norm in it, and what remains of the norm: nothing, or its activation."""
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    dtype = conv.weight.dtype
    fused = fuse_conv_bn_eval(conv.double(), norm.double()).to(dtype)
    # timm's BatchNormAct2d goes on with dropout and an activation.
    children = [norm.get_submodule(name) for name in ("drop", "act") if hasattr(norm, name)]
    return fused, nn.Sequential(*children)


class _FeatureTracer(fx.Tracer):
    traced_func_name = "features"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _conv_norm_pairs(encoder: TimmEncoder) -> Iterator[tuple[str, str]]:
    """Names of convolutions and BatchNorms that may become one; each runs once, for the other only."""
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.norm_act import BatchNormAct2d

    try:
        graph = _FeatureTracer().trace(encoder)
    except (fx.proxy.TraceError, NameError):  # a branch on a value; a module kept outside of modules
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A weight read without calling its module would change its meaning.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv_name, norm_name = str(before.target), str(node.target)
        conv, norm = encoder.get_submodule(conv_name), encoder.get_submodule(norm_name)
        # Exact types: subclasses may standardise their weights or use the batch's statistics.
        if type(conv) not in (nn.Conv2d, Conv2dSame) or type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
            continue
        once = calls[conv_name] == calls[norm_name] == 1 and not {conv_name, norm_name} & read
        if once and norm.track_running_stats:
            yield conv_name, norm_name
