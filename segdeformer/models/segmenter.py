"""Encoder and decoder put together: images in, low-resolution class logits out.

B batch, HW image, hw the fused map, which has the size of the first encoder map (1/4 or 1/16) or, behind a
neck, four times that; K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from torch import Tensor, nn

from segdeformer.errors import UsageError
from segdeformer.kernels.impl import Impl, check_impl
from segdeformer.models.batch_norms import fused_encoder
from segdeformer.models.context import Context, ExternalForm, build_context
from segdeformer.models.encoders import Encoder, WeightsReport, build_encoder
from segdeformer.models.folding import (
    FoldedDecoder,
    fold_decoder,
    folding_obstacle,
    refuse_folding,
    refuse_training,
)
from segdeformer.models.fusion import Fusion, build_fusion
from segdeformer.models.layers import ConvBNReLU, SegOutput, Tokens, initialise_decoder
from segdeformer.models.momentum import MomentumTokens
from segdeformer.models.third_party import ThirdPartyDecoder, ThirdPartyEncoder, build_third_party

if TYPE_CHECKING:  # modules need no recipe
    from segdeformer.config import ModelConfig

THIRD_PARTY_OBSTACLE = 'fusion.kind = "third_party", whose decoder is another package\'s'


class Head(nn.Module):
    """Dropout of whole channels, then a 1x1 convolution with bias (Eq. 4)."""

    def __init__(self, width: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        assert self.classify.bias is not None
        nn.init.zeros_(self.classify.bias)

    def forward(self, map_BChw: Tensor) -> Tensor:
        return self.classify(self.dropout(map_BChw))


class AuxiliaryHead(nn.Module):
    """FCN head on one encoder map: 3x3 convolution + BatchNorm + ReLU, then a `Head`; training only."""

    def __init__(self, in_channels: int, num_classes: int, *, stage: int, width: int, dropout: float) -> None:
        super().__init__()
        self.stage = stage
        self.block = ConvBNReLU(in_channels, width, kernel_size=3)
        self.head = Head(width, num_classes, dropout=dropout)
        self.block.apply(initialise_decoder)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.head(self.block(maps[self.stage - 1]))


class SegDeformer(nn.Module):
    """The decoder: fusion, context, head. With `context=None` it is SegFormer's, UperNet or another.

    Works on the four maps of any encoder, largest first.
    """

    def __init__(self, *, fusion: Fusion, context: Context | None, head: Head) -> None:
        super().__init__()
        self.fusion = fusion
        self.context = context
        self.head = head

    def forward(self, maps: Sequence[Tensor]) -> SegOutput:
        fused: Tokens = self.fusion(maps)
        tokens, class_map = fused, None
        if self.context is not None:
            tokens, class_logits_BNK = self.context(fused)
            if class_logits_BNK is not None:
                class_map = tokens._replace(pixels_BNC=class_logits_BNK).as_map()
        averaged = self.training and self.momentum_tokens is not None
        fused_map = fused.as_map().detach() if averaged else None
        return SegOutput(self.head(tokens.as_map()), class_map, None, fused_map)

    @property
    def momentum_tokens(self) -> MomentumTokens | None:
        """The external tokens, if they are class means that a training step must update."""
        external = None if self.context is None else self.context.external
        tokens = None if external is None else external.tokens
        return tokens if isinstance(tokens, MomentumTokens) else None

    def fold(self) -> FoldedDecoder:
        """The decoder for inference only, with the same logits; see `Segmenter.fold`."""
        return fold_decoder(self.fusion, self.context, self.head.classify)


class Segmenter(nn.Module):
    """Encoder, decoder, and in training an auxiliary head.

    weights_report: what the encoder got from a weights file, and what not.
    """

    def __init__(
        self,
        *,
        encoder: Encoder | ThirdPartyEncoder,
        decoder: SegDeformer | FoldedDecoder | ThirdPartyDecoder,
        auxiliary: AuxiliaryHead | None = None,
        weights_report: WeightsReport | None = None,
    ) -> None:
        super().__init__()
        self.weights_report = weights_report
        self.encoder = encoder
        self.decoder = decoder
        self.auxiliary = auxiliary

    def forward(self, images_B3HW: Tensor) -> SegOutput:
        """Logits of normalised RGB images of any size, at the size of the fused map."""
        maps = self.encoder(images_B3HW)
        output = self.decoder(maps)
        if self.auxiliary is not None and self.training:
            output = output._replace(auxiliary_logits_BKhw=self.auxiliary(maps))
        return output

    def fold(self) -> Segmenter:
        """This model for inference only: the same logits by fewer and narrower operations.

        A new model in eval mode, without gradients: the context is folded (see `folding`), BatchNorms are
        in the convolutions before them, the auxiliary head is left out. This one stays as it is.
        Raises `UsageError`, a `ValueError`, when `folding_obstacle` says why it cannot be.
        """
        if isinstance(self.decoder, FoldedDecoder):
            return self
        if isinstance(self.decoder, ThirdPartyDecoder) or isinstance(self.encoder, ThirdPartyEncoder):
            refuse_folding(THIRD_PARTY_OBSTACLE)
        decoder = self.decoder.fold()
        folded = Segmenter(
            encoder=fused_encoder(self.encoder), decoder=decoder, weights_report=self.weights_report
        )
        return folded.eval().requires_grad_(False)

    @property
    def momentum_tokens(self) -> MomentumTokens | None:
        """As the decoder's; a training step updates them by the class sums of `SegOutput.fused_BChw`."""
        return self.decoder.momentum_tokens if isinstance(self.decoder, SegDeformer) else None

    @property
    def is_folded(self) -> bool:
        return isinstance(self.decoder, FoldedDecoder)

    @property
    def folding_obstacle(self) -> str | None:
        """The setting that keeps this model from being folded, and why; None if it can be or is."""
        match self.decoder:
            case FoldedDecoder():
                return None
            case ThirdPartyDecoder():
                return THIRD_PARTY_OBSTACLE
            case _:
                return folding_obstacle(self.decoder.context)

    def train(self, mode: bool = True) -> Self:
        if mode and self.is_folded:
            refuse_training()
        return super().train(mode)


def build_decoder(
    config: ModelConfig,
    channels: Sequence[int],
    *,
    strides: Sequence[int] = (4, 8, 16, 32),
    impl: Impl = "auto",
    external_form: ExternalForm = "low_rank",
) -> SegDeformer:
    """The decoder of a recipe for encoder maps of these channels, initialised for training.

    strides: of the encoder maps; only fusions `fpn` and `fapn`, and a neck, depend on them.
    impl: see `segdeformer.kernels.impl`. external_form `plain` runs Eq. 7 as printed instead of in
    its exact low-rank form. Neither changes results beyond rounding.
    Raises `UsageError` for a third-party model, whose decoder comes with an encoder of its own.
    """
    from segdeformer.config import ThirdPartyConfig

    if isinstance(config.fusion, ThirdPartyConfig):
        raise UsageError('`model.fusion.kind` = "third_party" is a whole model; use `build_model`')
    context = None
    if config.context is not None:
        context = build_context(
            config.context,
            width=config.fusion.width,
            num_classes=config.num_classes,
            impl=check_impl(impl),
            external_form=external_form,
        )
    return SegDeformer(
        fusion=build_fusion(config.fusion, channels, strides),
        context=context,
        head=Head(config.fusion.width, config.num_classes, dropout=config.head.dropout),
    )


def build_segmenter(
    config: ModelConfig, *, impl: Impl = "auto", external_form: ExternalForm = "low_rank"
) -> Segmenter:
    """The whole model of a recipe; a weights file of its encoder is not read here, see `weights.build`.

    Options as in `build_decoder`. Raises `UserError` when the encoder cannot be had.
    """
    from segdeformer.config import ThirdPartyConfig

    encoder: Encoder | ThirdPartyEncoder
    decoder: SegDeformer | ThirdPartyDecoder
    if isinstance(config.fusion, ThirdPartyConfig):
        encoder, decoder = build_third_party(config)
    else:
        encoder = build_encoder(config.encoder)
        decoder = build_decoder(
            config, encoder.channels, strides=encoder.strides, impl=impl, external_form=external_form
        )
    auxiliary = None
    if config.auxiliary is not None:
        in_channels = encoder.channels[config.auxiliary.stage - 1]
        if not in_channels:  # of a third-party model with fewer than four maps
            raise UsageError(
                f"`model.auxiliary.stage`: this encoder has no stage {config.auxiliary.stage}; take an "
                "earlier one"
            )
        auxiliary = AuxiliaryHead(
            in_channels,
            config.num_classes,
            stage=config.auxiliary.stage,
            width=config.auxiliary.width,
            dropout=config.head.dropout,
        )
    return Segmenter(encoder=encoder, decoder=decoder, auxiliary=auxiliary)
