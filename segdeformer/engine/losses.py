"""The training loss, its parts kept apart (Eq. 9). B batch, K classes, HW image."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from segdeformer.config import IGNORE_INDEX, TrainConfig
from segdeformer.kernels.impl import Impl
from segdeformer.kernels.upsample_cross_entropy import upsample_cross_entropy
from segdeformer.models.layers import SegOutput


class Losses(NamedTuple):
    """Scalars; the parts are unweighted."""

    total: Tensor
    segmentation: Tensor  # L_seg
    attention: Tensor | None  # L_attn
    auxiliary: Tensor | None

    def detached(self) -> Losses:
        """The same numbers without their graph."""
        attention, auxiliary = (
            part.detach() if part is not None else None for part in (self.attention, self.auxiliary)
        )
        return Losses(self.total.detach(), self.segmentation.detach(), attention, auxiliary)


def training_losses(
    output: SegOutput,
    labels_BHW: Tensor,
    config: TrainConfig,
    class_weights_K: Tensor | None,
    *,
    impl: Impl = "auto",
) -> Losses:
    """L_seg + w_attn L_attn + w_aux L_aux, each part where the model gives its logits."""

    def loss(logits_BKhw: Tensor) -> Tensor:
        return upsample_cross_entropy(
            logits_BKhw,
            labels_BHW,
            ignore_index=IGNORE_INDEX,
            class_weights_K=class_weights_K,
            label_smoothing=config.label_smoothing,
            average=config.loss_average,
            impl=impl,
        )

    segmentation = total = loss(output.logits_BKhw)
    attention = auxiliary = None
    if output.class_logits_BKhw is not None:
        attention = loss(output.class_logits_BKhw)
        total = total + config.attention_loss_weight * attention
    if output.auxiliary_logits_BKhw is not None:
        auxiliary = loss(output.auxiliary_logits_BKhw)
        total = total + config.auxiliary_loss_weight * auxiliary
    return Losses(total, segmentation, attention, auxiliary)
