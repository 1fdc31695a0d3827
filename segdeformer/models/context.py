"""SegDeformer's context: internal attention over pixels, external attention through class tokens.

B batch, N pixels, M reduced pixels, C decoder width, K classes, R reduction.
Two projection styles: `affine` is the paper's equations, `conv_bn_relu` the authors' released code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.kernels.attention import attention
from segdeformer.kernels.external_attention import external_attention
from segdeformer.kernels.impl import Impl
from segdeformer.models.few_keys import block_bias, block_means
from segdeformer.models.layers import TokenConvBNReLU, Tokens, initialise_decoder, keys_of, tokens_of
from segdeformer.models.momentum import MomentumTokens

if TYPE_CHECKING:  # modules need no recipe
    from segdeformer.config import ContextConfig, Projection, ReductionBy

ExternalForm = Literal["low_rank", "plain"]
MLP_RATIO = 4
SMALL = 0.02  # standard deviation


class ExternalContext(NamedTuple):
    context_BNC: Tensor
    class_logits_BNK: Tensor  # float32, Attn_mid of Eq. 6, before the softmax


class ContextOutput(NamedTuple):
    tokens: Tokens  # X + Y_int + Y_ext
    class_logits_BNK: Tensor | None  # for L_attn (Eq. 8); None when nothing supervises it


class Reduce(nn.Module):
    """Fewer keys and values: an R x R convolution of stride R (Section 3.4), zero-padded, never cropped."""

    def __init__(self, in_width: int, out_width: int, reduction: int, *, bias: bool = True) -> None:
        super().__init__()
        self.reduction = reduction
        self.conv = nn.Conv2d(in_width, out_width, reduction, stride=reduction, bias=bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """(B, M, out_width) with M = ceil(height / R) * ceil(width / R)."""
        below, right = -tokens.height % self.reduction, -tokens.width % self.reduction
        return tokens_of(self.conv(F.pad(tokens.as_map(), (0, right, 0, below)))).pixels_BNC


def _projection(style: Projection, width: int) -> nn.Module:
    return nn.Linear(width, width) if style == "affine" else TokenConvBNReLU(width, width)


def _output_projection(style: Projection, width: int) -> nn.Module:
    # The equations have none; the released code projects the output of both attentions once more.
    return nn.Identity() if style == "affine" else TokenConvBNReLU(width, width)


class InternalAttention(nn.Module):
    """Y_int of Eq. 5: every pixel attends to every pixel (or to the reduced ones)."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        projection: Projection,
        reduction: int,
        reduction_by: ReductionBy = "conv",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.key_stride = self.trained_key_stride = reduction if reduction_by == "mean" else 1
        self.heads = heads
        self.impl: Impl = impl
        self.scale = (width // heads) ** -0.5
        self.query = _projection(projection, width)
        self.key = _projection(projection, width)
        self.value = _projection(projection, width)
        self.output = _output_projection(projection, width)
        self.reduce = Reduce(width, width, reduction) if reduction > 1 and reduction_by == "conv" else None

    def forward(self, tokens: Tokens) -> Tensor:
        pixels_BNC = tokens.pixels_BNC
        sources_BMC = self.reduce(tokens) if self.reduce else pixels_BNC
        queries = self.query(pixels_BNC)
        keys, values, bias_M = few_keys(self.key, self.value, sources_BMC, tokens, self.key_stride)
        mixed_BNC = multi_head_attention(
            queries, keys, values, heads=self.heads, scale=self.scale, bias_M=bias_M, impl=self.impl
        )
        return self.output(mixed_BNC)


def few_keys(
    key: nn.Module, value: nn.Module, sources_BMC: Tensor, tokens: Tokens, stride: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of the sources, or their means over blocks, and the blocks' bias.

    Means are taken before a linear projection, which gives the same for r^2 less work, and after another.
    """
    if stride == 1:
        return keys_of(key, sources_BMC), value(sources_BMC), None
    bias_M = block_bias(tokens, stride)
    if isinstance(key, nn.Linear):
        means_BMC = block_means(sources_BMC, tokens, stride)
        return keys_of(key, means_BMC), value(means_BMC), bias_M
    keys, values = (block_means(projected(sources_BMC), tokens, stride) for projected in (key, value))
    return keys, values, bias_M


def multi_head_attention(
    queries_BNC: Tensor,
    keys_BMC: Tensor,
    values_BME: Tensor,
    *,
    heads: int,
    scale: float,
    bias_M: Tensor | None = None,
    impl: Impl,
) -> Tensor:
    """Attention with heads in the batch, (B * heads, N, C / heads); returns (B, N, E)."""
    if heads == 1:
        return attention(queries_BNC, keys_BMC, values_BME, scale=scale, bias_M=bias_M, impl=impl)
    split = [
        x.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1) for x in (queries_BNC, keys_BMC, values_BME)
    ]
    mixed = attention(*split, scale=scale, bias_M=bias_M, impl=impl)
    return mixed.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


class InternalBlock(nn.Module):
    """Residual internal attention, then an optional residual MLP (Table 4)."""

    def __init__(self, attention_: InternalAttention, *, width: int, mlp: bool) -> None:
        super().__init__()
        self.attention = attention_
        self.mlp = (
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, MLP_RATIO * width),
                nn.GELU(),
                nn.Linear(MLP_RATIO * width, width),
            )
            if mlp
            else None
        )

    def forward(self, tokens: Tokens) -> Tokens:
        pixels_BNC = tokens.pixels_BNC + self.attention(tokens)
        if self.mlp is not None:
            pixels_BNC = pixels_BNC + self.mlp(pixels_BNC)
        return tokens._replace(pixels_BNC=pixels_BNC)


class ClassTokens(nn.Module):
    """The learned external tokens: what each class tells (info) and how it is found (class), Eq. 10.

    Without decoupling one K x C table serves both.
    """

    def __init__(self, num_classes: int, width: int, *, decouple: bool) -> None:
        super().__init__()
        self.info_KC = nn.Parameter(torch.empty(num_classes, width))
        self.class_KC = nn.Parameter(torch.empty(num_classes, width)) if decouple else None
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=SMALL)

    def tables(self) -> tuple[Tensor, Tensor]:
        """(info, class), each (K, C)."""
        return self.info_KC, self.info_KC if self.class_KC is None else self.class_KC


class ExternalAttention(nn.Module):
    """Eqs. 6 and 7: each pixel becomes a mixture of class prototypes, then attends to those mixtures.

    form `low_rank` (exact, the default of the affine style): X_mid has rank K, so the keys and values
    of Eq. 7 are never made; the second attention runs K wide on P = softmax(Attn_mid) itself.
    `plain` is Eq. 7 as printed. It also runs with reduced keys, which are few, and in the
    `conv_bn_relu` style, whose ReLU ends the rank.
    second_stage False stops after Eq. 6 and returns X_mid (Table 5, without Y_ext).
    """

    def __init__(
        self,
        width: int,
        tokens: ClassTokens | MomentumTokens,
        *,
        second_stage: bool,
        projection: Projection,
        reduction: int,
        reduction_by: ReductionBy = "conv",
        impl: Impl = "auto",
        form: ExternalForm = "low_rank",
    ) -> None:
        super().__init__()
        by_conv = second_stage and reduction > 1 and reduction_by == "conv"
        if second_stage:
            self.key_stride = self.trained_key_stride = reduction if reduction_by == "mean" else 1
        self.scale = width**-0.5
        self.impl: Impl = impl
        self.low_rank = form == "low_rank" and projection == "affine" and not by_conv
        self.second_stage = second_stage
        self.tokens = tokens
        self.middle_query = nn.Linear(width, width)
        self.middle_key = nn.Linear(width, width)
        # The released code takes the info tokens as they are.
        self.middle_value = nn.Linear(width, width) if projection == "affine" else nn.Identity()
        if second_stage:
            self.query = _projection(projection, width)
            self.key = _projection(projection, width)
            self.value = _projection(projection, width)
            self.output = _output_projection(projection, width)
        self.reduce = Reduce(width, width, reduction) if by_conv else None

    def forward(self, tokens: Tokens) -> ExternalContext:
        info_KC, class_KC = self.tokens.tables()
        prototypes_KC = self.middle_value(info_KC)
        keys_KC = keys_of(self.middle_key, class_KC)
        class_logits_BNK = (self.middle_query(tokens.pixels_BNC) @ keys_KC.T) * self.scale
        class_logits_BNK = class_logits_BNK.to(torch.promote_types(class_logits_BNK.dtype, torch.float32))
        if self.second_stage and self.low_rank:
            return ExternalContext(
                self._second_low_rank(tokens, class_logits_BNK, prototypes_KC), class_logits_BNK
            )
        mixtures_BNC = class_logits_BNK.softmax(dim=-1).to(prototypes_KC.dtype) @ prototypes_KC
        if not self.second_stage:
            return ExternalContext(mixtures_BNC, class_logits_BNK)
        return ExternalContext(self._second_plain(tokens, mixtures_BNC), class_logits_BNK)

    def _second_plain(self, tokens: Tokens, mixtures_BNC: Tensor) -> Tensor:
        """Eq. 7 as printed."""
        sources_BMC = self.reduce(tokens._replace(pixels_BNC=mixtures_BNC)) if self.reduce else mixtures_BNC
        keys, values, bias_M = few_keys(self.key, self.value, sources_BMC, tokens, self.key_stride)
        mixed_BNC = attention(
            self.query(tokens.pixels_BNC), keys, values, scale=self.scale, bias_M=bias_M, impl=self.impl
        )
        return self.output(mixed_BNC)

    def _second_low_rank(self, tokens: Tokens, class_logits_BNK: Tensor, prototypes_KC: Tensor) -> Tensor:
        """Eq. 7 through K x C keys and values: Z (G Wve) + bve, Z = softmax(Qe (G Wke)^T P^T) P."""
        assert isinstance(self.key, nn.Linear)
        assert isinstance(self.value, nn.Linear)
        keys_KC = prototypes_KC @ self.key.weight.T
        values_KC = prototypes_KC @ self.value.weight.T
        scores_BNK = self.query(tokens.pixels_BNC) @ keys_KC.T
        mixed_BNK = few_mixtures_attention(
            scores_BNK, class_logits_BNK, tokens, self.key_stride, scale=self.scale, impl=self.impl
        )
        # The key's bias shifts whole rows of scores, so softmax ignores it: its gradient is 0, not absent.
        return F.linear(mixed_BNK, values_KC.T, self.value.bias + 0.0 * self.key.bias)


def few_mixtures_attention(
    scores_BNK: Tensor, class_logits_BNK: Tensor, tokens: Tokens, stride: int, *, scale: float, impl: Impl
) -> Tensor:
    """softmax(scale * Q~ P^T) P, (B, N, K), over all rows of P, or over means of blocks of them.

    Means of convex weights are convex weights, so one tile still serves as keys and values.
    """
    if stride == 1:
        return external_attention(scores_BNK, class_logits_BNK, scale=scale, impl=impl)
    shares_BNK = class_logits_BNK.softmax(dim=-1).to(scores_BNK.dtype)
    means_BMK = block_means(shares_BNK, tokens, stride)
    bias_M = block_bias(tokens, stride)
    return attention(scores_BNK, means_BMK, means_BMK, scale=scale, bias_M=bias_M, impl=impl)


class Context(nn.Module):
    """F = X + Y_int + Y_ext (Eqs. 2 and 3); hands out Attn_mid if it is to be supervised."""

    def __init__(
        self, *, internal: nn.Sequential | None, external: ExternalAttention | None, supervised: bool
    ) -> None:
        super().__init__()
        self.internal = internal
        self.external = external
        self.supervised = supervised

    def forward(self, tokens: Tokens) -> ContextOutput:
        # The blocks are residual, so after them stands X + Y_int.
        mixed_BNC = self.internal(tokens).pixels_BNC if self.internal is not None else tokens.pixels_BNC
        if self.external is None:
            return ContextOutput(tokens._replace(pixels_BNC=mixed_BNC), None)
        external = self.external(tokens)
        return ContextOutput(
            tokens._replace(pixels_BNC=mixed_BNC + external.context_BNC),
            external.class_logits_BNK if self.supervised else None,
        )


def build_context(
    config: ContextConfig,
    *,
    width: int,
    num_classes: int,
    impl: Impl = "auto",
    external_form: ExternalForm = "low_rank",
) -> Context:
    """The context that a recipe describes, initialised for training."""
    internal = external = None
    if config.internal is not None:
        internal = nn.Sequential(
            *(
                InternalBlock(
                    InternalAttention(
                        width,
                        heads=config.internal.heads,
                        projection=config.projection,
                        reduction=config.reduction,
                        reduction_by=config.reduction_by,
                        impl=impl,
                    ),
                    width=width,
                    mlp=config.internal.mlp,
                )
                for _ in range(config.internal.depth)
            )
        )
    if config.external is not None:
        tokens: ClassTokens | MomentumTokens
        if config.external.momentum is not None:
            tokens = MomentumTokens(num_classes, width, momentum=config.external.momentum)
        else:
            tokens = ClassTokens(num_classes, width, decouple=config.external.decouple)
        external = ExternalAttention(
            width,
            tokens,
            second_stage=config.external.second_stage,
            projection=config.projection,
            reduction=config.reduction,
            reduction_by=config.reduction_by,
            impl=impl,
            form=external_form,
        )
    supervised = config.external is not None and config.external.attention_loss
    context = Context(internal=internal, external=external, supervised=supervised)
    context.apply(initialise_decoder)
    if config.start == "unit":
        _start_at_unit_scale(context)
    return context


def _start_at_unit_scale(context: Context) -> None:
    """Linear projections N(0, 1/C), tokens N(0, 1): queries, keys and values are as large as their inputs.

    From trunc-normal 0.02 all scores are near 0, attention is uniform, and the product of two small
    projections hardly learns.
    """
    if context.external is not None:
        for table in context.external.tokens.tables():
            nn.init.normal_(table)
    for module in context.modules():
        if isinstance(module, InternalAttention | ExternalAttention):
            for layer in module.children():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
