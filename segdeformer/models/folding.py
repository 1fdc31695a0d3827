"""Exact folding of the affine decoder for inference: one linear layer, then attention in logit space.

B batch, N pixels, M reduced pixels, C decoder width, K classes, E width of the internal values,
O and I a layer's outputs and inputs, W any width, R reduction.

Class tokens are constants now, the head W_h is linear and the fusion a sum, so what follows the softmaxes
moves into logit space, and everything before them is one linear layer on X:

    X -> [Q | K | X Wv W_h | A | Q~ | X W_h]
    logits = X W_h + softmax(Q K^T) (X Wv W_h) + softmax(Q~ P^T) P (V~ W_h) + constants,  P = softmax(A)

The scales 1/sqrt(C) are in the weights of Q, A and Q~. Biases of keys shift whole rows of scores and drop
out; biases of values count once, because the weights of an attention sum to one, and are constants too.
With more classes than channels, or several heads, W_h would widen the internal values (E = K instead of C,
or K per head instead of C / heads): there W_h comes after the attention, and E = C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, NoReturn, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.errors import UsageError
from segdeformer.kernels.attention import attention
from segdeformer.kernels.impl import Impl
from segdeformer.models.batch_norms import fused_fusion
from segdeformer.models.context import (
    Context,
    ExternalAttention,
    InternalAttention,
    InternalBlock,
    Reduce,
    few_mixtures_attention,
    multi_head_attention,
)
from segdeformer.models.few_keys import block_bias, block_means
from segdeformer.models.fusion import Fusion
from segdeformer.models.layers import SegOutput, Tokens

ALIGNMENT = 16  # columns; each part then starts at a multiple of 32 bytes in half precision too

T = TypeVar("T")
KeyStrides = tuple[int, int]  # as it is, and as trained


class Affine(NamedTuple):
    """x -> W x + b in float64 on the CPU, where the layers are multiplied."""

    weight_OI: Tensor
    bias_O: Tensor

    def then(self, weight_OI: Tensor) -> Affine:
        """This, and a matrix after it."""
        return Affine(weight_OI @ self.weight_OI, weight_OI @ self.bias_O)

    def plus(self, constant_O: Tensor) -> Affine:
        return Affine(self.weight_OI, self.bias_O + constant_O)

    def scaled(self, factor: float) -> Affine:
        return Affine(self.weight_OI * factor, self.bias_O * factor)


class Parts(NamedTuple, Generic[T]):
    """What the one linear layer makes of each pixel, in the order of its columns; None where not needed."""

    queries: T | None  # C wide
    keys: T | None  # C wide; None with reduction, as the next
    values: T | None  # E wide, X Wv W_h or X Wv
    class_logits: T | None  # K wide, A
    external: T | None  # Q~, K wide; with reduction Qe, C wide
    logits: T  # K wide, X W_h and all constants


class FoldedInternal(nn.Module):
    """Y_int W_h, without its constant."""

    def __init__(
        self,
        *,
        heads: int,
        impl: Impl,
        key_strides: KeyStrides,
        reduce: Reduce | None,
        head: nn.Linear | None,
    ) -> None:
        super().__init__()
        self.key_stride, self.trained_key_stride = key_strides
        self.heads = heads
        self.impl: Impl = impl
        self.reduce = reduce  # to keys and values
        self.head = head  # W_h where the values do not hold it

    def forward(self, tokens: Tokens, parts: Parts[Tensor]) -> Tensor:
        keys, values = parts.keys, parts.values
        assert parts.queries is not None
        if self.reduce is not None:
            width = parts.queries.shape[-1]
            reduced_BMW = self.reduce(tokens)
            keys, values = reduced_BMW[..., :width], reduced_BMW[..., width:]
        assert keys is not None
        assert values is not None
        bias_M = block_bias(tokens, self.key_stride)  # keys and values are means already
        mixed_BNE = multi_head_attention(
            parts.queries, keys, values, heads=self.heads, scale=1.0, bias_M=bias_M, impl=self.impl
        )
        return mixed_BNE if self.head is None else self.head(mixed_BNE)


class FoldedExternal(nn.Module):
    """Y_ext W_h, or X_mid W_h without the second stage; without its constant."""

    def __init__(
        self, *, impl: Impl, key_strides: KeyStrides | None, reduce: Reduce | None, values: nn.Linear | None
    ) -> None:
        super().__init__()
        if key_strides is not None:  # there is a second stage
            self.key_stride, self.trained_key_stride = key_strides
        self.impl: Impl = impl
        self.reduce = reduce  # from P to keys and K-wide values
        self.values = values  # K x K, from mixtures of classes to logits; None with `reduce`

    def forward(self, tokens: Tokens, parts: Parts[Tensor]) -> Tensor:
        class_logits_BNK, queries = parts.class_logits, parts.external
        assert class_logits_BNK is not None
        if queries is not None and self.values is not None:
            return self.values(
                few_mixtures_attention(
                    queries, class_logits_BNK, tokens, self.key_stride, scale=1.0, impl=self.impl
                )
            )
        shares_BNK = class_logits_BNK.softmax(dim=-1).to(tokens.pixels_BNC.dtype)
        if queries is None:
            assert self.values is not None
            return self.values(shares_BNK)
        assert self.reduce is not None
        width = queries.shape[-1]
        reduced_BMW = self.reduce(tokens._replace(pixels_BNC=shares_BNK))
        keys_BMC, values_BMK = reduced_BMW[..., :width], reduced_BMW[..., width:]
        return attention(queries, keys_BMC, values_BMK, scale=1.0, impl=self.impl)


class PartsLinear(nn.Linear):
    """One linear layer whose columns are handed out as named views.

    Every part starts at a multiple of 16 columns, with zero rows of the weight between, so that kernels can
    read the views as they are.
    """

    def __init__(self, parts: Parts[Affine]) -> None:
        first = 0
        spans = []
        for part in parts:
            width = 0 if part is None else part.bias_O.numel()
            spans.append(None if part is None else slice(first, first + width))
            first += -(-width // ALIGNMENT) * ALIGNMENT
        super().__init__(parts.logits.weight_OI.shape[1], first, device="meta")  # draws no random numbers
        self.spans: Parts[slice] = Parts(*spans)  # type: ignore[arg-type]  # `logits` is never None
        weight_OI = parts.logits.weight_OI.new_zeros(self.weight.shape)
        bias_O = weight_OI.new_zeros(first)
        for part, span in zip(parts, spans, strict=True):
            if part is not None:
                weight_OI[span], bias_O[span] = part
        self.weight, self.bias = nn.Parameter(weight_OI), nn.Parameter(bias_O)

    def parts(self, pixels_BNC: Tensor) -> Parts[Tensor]:
        """Views of one (B, N, columns) tensor."""
        columns = self(pixels_BNC)
        return Parts(*(None if span is None else columns[..., span] for span in self.spans))

    def part(self, pixels_BNC: Tensor, name: str) -> Tensor | None:
        """One part alone."""
        span = getattr(self.spans, name)
        return None if span is None else F.linear(pixels_BNC, self.weight[span], self.bias[span])


class FoldedDecoder(nn.Module):
    """What `SegDeformer.fold` makes: the same logits by fewer and narrower operations; cannot be trained."""

    def __init__(
        self,
        *,
        fusion: Fusion,
        project: PartsLinear,
        internal: FoldedInternal | None,
        external: FoldedExternal | None,
        supervised: bool,
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.project = project
        self.internal = internal
        self.external = external
        self.supervised = supervised  # then Attn_mid is handed out, as unfolded
        self.eval().requires_grad_(False)

    def forward(self, maps: Sequence[Tensor]) -> SegOutput:
        tokens: Tokens = self.fusion(maps)
        pixels_BNC, class_map = tokens.pixels_BNC, None
        together = self.project.parts(pixels_BNC) if made_together(pixels_BNC.device) else None
        logits_BNK = self._parts(together, pixels_BNC, "logits").logits
        if self.internal is not None:
            parts = self._internal_parts(together, tokens)
            logits_BNK = logits_BNK + self.internal(tokens, parts)
        if self.external is not None:
            parts = self._parts(together, pixels_BNC, "class_logits", "external")
            assert parts.class_logits is not None
            wide = torch.promote_types(parts.class_logits.dtype, torch.float32)
            class_logits_BNK = parts.class_logits.to(wide)
            class_map = tokens._replace(pixels_BNC=class_logits_BNK).as_map() if self.supervised else None
            logits_BNK = logits_BNK + self.external(tokens, parts._replace(class_logits=class_logits_BNK))
        return SegOutput(tokens._replace(pixels_BNC=logits_BNK).as_map(), class_map, None)

    def _internal_parts(self, together: Parts[Tensor] | None, tokens: Tokens) -> Parts[Tensor]:
        """Queries of all pixels; keys and values of all, or of the means of blocks."""
        assert self.internal is not None
        pixels_BNC, stride = tokens.pixels_BNC, self.internal.key_stride
        if stride == 1:
            return self._parts(together, pixels_BNC, "queries", "keys", "values")
        of_means = self._parts(None, block_means(pixels_BNC, tokens, stride), "keys", "values")
        return self._parts(together, pixels_BNC, "queries")._replace(
            keys=of_means.keys, values=of_means.values
        )

    def _parts(self, together: Parts[Tensor] | None, pixels_BNC: Tensor, *names: str) -> Parts[Tensor]:
        """Views of one product, or these parts alone."""
        if together is not None:
            return together
        made = {name: self.project.part(pixels_BNC, name) for name in names}
        return Parts(**(dict.fromkeys(Parts._fields) | made))

    def train(self, mode: bool = True) -> Self:
        if mode:
            refuse_training()
        return super().train(mode)


def made_together(device: torch.device) -> bool:
    """Whether all parts are one product: on a GPU. On a CPU one by one, so that less is held at a time."""
    return device.type != "cpu"


def refuse_training() -> NoReturn:
    raise ValueError("a folded model cannot be trained; train the unfolded one and fold it again")


def refuse_folding(obstacle: str) -> NoReturn:
    raise UsageError(f"this model cannot be folded for inference: {obstacle}; run it unfolded")


def folding_obstacle(context: Context | None) -> str | None:
    """The setting that keeps a decoder with this context from being folded, and why; None if it can be."""
    if context is None:
        return None
    blocks = list(context.internal or ())
    projections: list[nn.Module] = [context.external.middle_value] if context.external is not None else []
    for block in blocks:
        assert isinstance(block, InternalBlock)
        if block.mlp is not None:
            return "context.internal.mlp = true, whose GELU is not linear"
        projections.append(block.attention.query)
    if len(blocks) > 1:
        return f"context.internal.depth = {len(blocks)}, whose blocks build on each other"
    if not all(isinstance(projection, nn.Linear) for projection in projections):
        return 'context.projection = "conv_bn_relu", whose ReLU is not linear; only "affine" can be'
    return None


def fold_decoder(fusion: Fusion, context: Context | None, classify: nn.Conv2d) -> FoldedDecoder:
    """The folded decoder, of the same dtype, on the same device. Its weights are computed in float64.

    Raises `UsageError` when `folding_obstacle` finds one.
    """
    obstacle = folding_obstacle(context)
    if obstacle is not None:
        refuse_folding(obstacle)
    head = _affine(classify)
    parts: Parts[Affine] = Parts(None, None, None, None, None, head)
    internal = external = None
    if context is not None and context.internal is not None:
        block = context.internal[0]
        assert isinstance(block, InternalBlock)
        internal, parts = _fold_internal(block.attention, head.weight_OI, parts)
    if context is not None and context.external is not None:
        external, parts = _fold_external(context.external, head.weight_OI, parts)
    folded = FoldedDecoder(
        fusion=fused_fusion(fusion),
        project=PartsLinear(parts),
        internal=internal,
        external=external,
        supervised=context is not None and context.supervised,
    )
    return folded.to(classify.weight)  # dtype and device


def _fold_internal(
    inner: InternalAttention, head_KC: Tensor, parts: Parts[Affine]
) -> tuple[FoldedInternal, Parts[Affine]]:
    key, value = _affine(inner.key), _affine(inner.value)
    num_classes, width = head_KC.shape
    narrow = inner.heads == 1 and num_classes <= width
    values_EC = head_KC @ value.weight_OI if narrow else value.weight_OI
    constant_K = head_KC @ value.bias_O
    reduce = None
    if inner.reduce is None:
        parts = parts._replace(keys=_matrix(key.weight_OI), values=_matrix(values_EC))
    else:
        reduce = _convolution(inner.reduce, torch.cat([key.weight_OI, values_EC]))
        constant_K = constant_K + head_KC @ value.weight_OI @ _double(inner.reduce.conv.bias)
    parts = parts._replace(
        queries=_affine(inner.query).scaled(inner.scale),
        logits=parts.logits.plus(constant_K),
    )
    head = None if narrow else _linear(head_KC)
    key_strides = inner.key_stride, inner.trained_key_stride
    internal = FoldedInternal(
        heads=inner.heads, impl=inner.impl, key_strides=key_strides, reduce=reduce, head=head
    )
    return internal, parts


def _fold_external(
    outer: ExternalAttention, head_KC: Tensor, parts: Parts[Affine]
) -> tuple[FoldedExternal, Parts[Affine]]:
    info_KC, class_KC = (_double(table) for table in outer.tokens.tables())
    middle_key, middle_value = _affine(outer.middle_key), _affine(outer.middle_value)
    class_keys_KC = class_KC @ middle_key.weight_OI.T + middle_key.bias_O
    prototypes_KC = info_KC @ middle_value.weight_OI.T + middle_value.bias_O
    parts = parts._replace(class_logits=_affine(outer.middle_query).then(class_keys_KC).scaled(outer.scale))
    if not outer.second_stage:
        values = _linear(head_KC @ prototypes_KC.T)
        return FoldedExternal(impl=outer.impl, key_strides=None, reduce=None, values=values), parts

    key_strides = outer.key_stride, outer.trained_key_stride
    query, key, value = _affine(outer.query), _affine(outer.key), _affine(outer.value)
    values_KC = head_KC @ value.weight_OI
    constant_K = head_KC @ value.bias_O
    if outer.reduce is None:
        query = query.then(prototypes_KC @ key.weight_OI.T)
        values = _linear(values_KC @ prototypes_KC.T)
        external = FoldedExternal(impl=outer.impl, key_strides=key_strides, reduce=None, values=values)
    else:
        both_OC = torch.cat([key.weight_OI, values_KC])
        reduce = _convolution(outer.reduce, both_OC, before_CI=prototypes_KC.T)
        external = FoldedExternal(impl=outer.impl, key_strides=key_strides, reduce=reduce, values=None)
        constant_K = constant_K + values_KC @ _double(outer.reduce.conv.bias)
    parts = parts._replace(
        external=query.scaled(outer.scale),
        logits=parts.logits.plus(constant_K),
    )
    return external, parts


def _double(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().to("cpu", torch.float64)


def _affine(layer: nn.Module) -> Affine:
    """A linear layer, or a 1x1 convolution."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return Affine(_double(layer.weight).flatten(1), _double(layer.bias))


def _matrix(weight_OI: Tensor) -> Affine:
    return Affine(weight_OI, weight_OI.new_zeros(weight_OI.shape[0]))


def _linear(weight_OI: Tensor) -> nn.Linear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI)
    return linear


def _convolution(reduce: Reduce, after_OC: Tensor, *, before_CI: Tensor | None = None) -> Reduce:
    """The R x R convolution between two matrices, without its bias."""
    weight_OIRR = torch.einsum("oc,cirs->oirs", after_OC, _double(reduce.conv.weight))
    if before_CI is not None:
        weight_OIRR = torch.einsum("ocrs,ci->oirs", weight_OIRR, before_CI)
    with torch.device("meta"):
        folded = Reduce(weight_OIRR.shape[1], weight_OIRR.shape[0], reduce.reduction, bias=False)
    folded.conv.weight = nn.Parameter(weight_OIRR)
    return folded
