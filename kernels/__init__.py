"""The operations of the SegDeformer decoder: a folder each, its plain-PyTorch reference beside it.

The references are the specification. Nothing here knows models, data or recipes.
"""

from segdeformer.kernels.attention import attention
from segdeformer.kernels.external_attention import external_attention
from segdeformer.kernels.upsample import upsample_argmax, upsample_confusion, upsample_cross_entropy

__all__ = [
    "attention",
    "external_attention",
    "upsample_argmax",
    "upsample_confusion",
    "upsample_cross_entropy",
]
