"""The paper's ablations, Tables 4 to 8, as typed changes to a recipe. A row without `over` is a baseline."""

from __future__ import annotations

from typing import NamedTuple

from segdeformer.config import ExternalConfig, InternalConfig


class Context(NamedTuple):
    """The attentions of a row. Projection style and reduction stay the base recipe's."""

    internal: InternalConfig | None = None
    external: ExternalConfig | None = None
    over: str | None = None  # the row that the gain is over


class ModelOf(NamedTuple):
    """A row that takes the model of a shipped recipe; the number of classes is the data's."""

    recipe: str
    over: str | None = None


Row = Context | ModelOf

TABLE_4: dict[str, Row] = {
    "no internal": Context(),
    "1 head": Context(internal=InternalConfig(), over="no internal"),
    "1 head, depth 2": Context(internal=InternalConfig(depth=2), over="no internal"),
    "2 heads": Context(internal=InternalConfig(heads=2), over="no internal"),
    "1 head, MLP": Context(internal=InternalConfig(mlp=True), over="no internal"),
}

TABLE_5: dict[str, Row] = {
    "no external": Context(),
    "momentum": Context(
        external=ExternalConfig(tokens="momentum", attention_loss=False, decouple=False), over="no external"
    ),
    "momentum, L_attn": Context(
        external=ExternalConfig(tokens="momentum", decouple=False), over="no external"
    ),
    "learned": Context(external=ExternalConfig(attention_loss=False, decouple=False), over="no external"),
    "learned, L_attn, no Y_ext": Context(
        external=ExternalConfig(second_stage=False, decouple=False), over="no external"
    ),
    "learned, L_attn": Context(external=ExternalConfig(decouple=False), over="no external"),
    "learned, L_attn, decoupled": Context(external=ExternalConfig(), over="no external"),
}

TABLE_6: dict[str, Row] = {
    "no context": Context(),
    "internal": Context(internal=InternalConfig(), over="no context"),
    "external": Context(external=ExternalConfig(), over="no context"),
    "internal + external": Context(internal=InternalConfig(), external=ExternalConfig(), over="no context"),
}

TABLE_7: dict[str, Row] = {
    "DeiT-S UperNet": ModelOf("ade20k-upernet-deit-s"),
    "DeiT-S SegDeformer": ModelOf("ade20k-segdeformer-deit-s", over="DeiT-S UperNet"),
    "DeiT-S UperNet + SegDeformer": ModelOf("ade20k-segdeformer-deit-s-upernet", over="DeiT-S UperNet"),
    "Swin-S UperNet": ModelOf("ade20k-upernet-swin-s"),
    "Swin-S SegDeformer": ModelOf("ade20k-segdeformer-swin-s", over="Swin-S UperNet"),
    "Swin-S UperNet + SegDeformer": ModelOf("ade20k-segdeformer-swin-s-upernet", over="Swin-S UperNet"),
    "Swin-S UperNet + SegDeformer, efficient": ModelOf(
        "ade20k-segdeformer-swin-s-upernet-efficient", over="Swin-S UperNet"
    ),
    "SegFormer-B2": ModelOf("ade20k-segformer-b2"),
    "SegFormer-B2 + SegDeformer": ModelOf("ade20k-segdeformer-b2", over="SegFormer-B2"),
    "SegFormer-B2 + SegDeformer, efficient": ModelOf("ade20k-segdeformer-b2-efficient", over="SegFormer-B2"),
}

# The paper prints the first row twice, once for each comparison; it is trained once.
TABLE_8: dict[str, Row] = {
    "depth 2, width 256": ModelOf("ade20k-segformer-b2"),
    "depth 8, width 256": ModelOf("ade20k-segformer-b2-depth8", over="depth 2, width 256"),
    "SegDeformer": ModelOf("ade20k-segdeformer-b2", over="depth 2, width 256"),
    "depth 8, width 512": ModelOf("ade20k-segformer-b2-depth8-width512", over="depth 2, width 256"),
    "SegDeformer, efficient": ModelOf("ade20k-segdeformer-b2-efficient", over="depth 2, width 256"),
}

TABLES: dict[int, dict[str, Row]] = {4: TABLE_4, 5: TABLE_5, 6: TABLE_6, 7: TABLE_7, 8: TABLE_8}
