"""Loss and argmax of bilinearly upsampled logits, without holding them at full resolution."""

from segdeformer.kernels.upsample.argmax import ArgmaxResult, upsample_argmax, upsample_confusion
from segdeformer.kernels.upsample.cross_entropy import HardPixels, upsample_cross_entropy

__all__ = ["ArgmaxResult", "HardPixels", "upsample_argmax", "upsample_confusion", "upsample_cross_entropy"]
