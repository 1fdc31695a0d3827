"""What each of our tensors is called, and how it is laid out, in another project's files.

One table per project serves both directions. O out, I in channels, C channels of a map, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from segdeformer.models.encoders import TimmEncoder
from segdeformer.models.mit import EXPANSION, REDUCTIONS, STRIDES, MiT
from segdeformer.models.segmenter import Segmenter

Project = Literal["nvlabs", "mmseg", "huggingface"]
PROJECT_TITLES = {"nvlabs": "NVlabs", "mmseg": "mmsegmentation", "huggingface": "Hugging Face"}

Layout = Literal["same", "linear", "convolution", "table", "unfolded"]

# nvlabs, mmseg and huggingface as in `Project`. microsoft: mmsegmentation's heads on Swin's own names.
# transformers5: what Hugging Face's modules are called inside transformers 5, which writes `huggingface`.
Naming = Literal["nvlabs", "mmseg", "microsoft", "huggingface", "transformers5"]
NAMINGS: dict[Project, tuple[Naming, ...]] = {
    "nvlabs": ("nvlabs",),
    "mmseg": ("mmseg", "microsoft"),
    "huggingface": ("huggingface", "transformers5"),
}

# What Hugging Face's config.json says of a MiT of any size.
HUGGINGFACE_MIT = {
    "sr_ratios": list(REDUCTIONS),
    "patch_sizes": [7, 3, 3, 3],
    "strides": [4, 2, 2, 2],
    "mlp_ratios": [EXPANSION] * len(STRIDES),
    "hidden_act": "gelu",
}


def _swap_first_and_last(value: Tensor) -> Tensor:
    """Of the last three dimensions, which are then one."""
    return value.transpose(-1, -3).flatten(-3)


def _as_convolution(value: Tensor) -> Tensor:
    return value[:, :, None, None]


def _as_linear(value: Tensor) -> Tensor:
    return value.flatten(1)


# From ours to theirs, and back; what is not here is the same.
LAYOUTS: dict[Layout, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": (_as_linear, _as_convolution),  # (O, I) there, (O, I, 1, 1) here
    "convolution": (_as_convolution, _as_linear),  # the other way round
    "table": (lambda value: value[None], lambda value: value[0]),  # (1, K, C) there
    "unfolded": (  # 2x2 pixels in the last dimension, there ordered (C, row, column), here (column, row, C)
        lambda value: _swap_first_and_last(value.unflatten(-1, (2, 2, -1))),
        lambda value: _swap_first_and_last(value.unflatten(-1, (-1, 2, 2))),
    ),
}


class Link(NamedTuple):
    """One tensor there, and ours, which are concatenated in this order."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = "same"

    def write(self, state: Mapping[str, Tensor]) -> Tensor:
        """Our tensors as the other project's one."""
        values = [state[name] for name in self.ours]
        value = torch.cat(values) if len(values) > 1 else values[0]
        return LAYOUTS[self.layout][0](value) if self.layout in LAYOUTS else value

    def read(self, value: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other project's tensor as ours, with the rows that they have in `state`."""
        value = LAYOUTS[self.layout][1](value) if self.layout in LAYOUTS else value
        rows = [len(state[name]) for name in self.ours] if len(self.ours) > 1 else None
        return dict(zip(self.ours, value.split(rows) if rows else [value], strict=True))


def written(links: Sequence[Link], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names, and in the shapes, of another project."""
    return {link.theirs: link.write(state) for link in links}


class Rule(NamedTuple):
    """A module of ours, as a regular expression, and its name there.

    kind: `block` for our ConvBNReLU, whose `.0` and `.1` are `.conv` and `.bn` there; `tensor` when it is no
    module but a parameter itself. layout: `linear` is its weight's alone, others are of all its tensors.
    """

    ours: str
    theirs: str
    kind: Literal["module", "block", "tensor"] = "module"
    layout: Layout = "same"


class Names(NamedTuple):
    """One of a MiT's modules in a stage, and what it is called there. s counts stages from 1, i from 0."""

    ours: str
    nvlabs: str
    mmseg: str
    huggingface: str
    transformers5: str


CLASSIFIER = r"decoder\.head\.classify"
INTERNAL, EXTERNAL = r"decoder\.context\.internal\.0", r"decoder\.context\.external"
# fmt: off
STAGE_NAMES = (
    Names("patch_embed.proj", "patch_embed{s}.proj", "layers.{i}.0.projection",
          "encoder.patch_embeddings.{i}.proj", "stages.{i}.patch_embeddings.proj"),
    Names("patch_embed.norm", "patch_embed{s}.norm", "layers.{i}.0.norm",
          "encoder.patch_embeddings.{i}.layer_norm", "stages.{i}.patch_embeddings.layer_norm"),
    Names("norm", "norm{s}", "layers.{i}.2", "encoder.layer_norm.{i}", "stages.{i}.layer_norm"),
)
BLOCK = Names("blocks.{j}", "block{s}.{j}", "layers.{i}.1.{j}",
              "encoder.block.{i}.{j}", "stages.{i}.blocks.{j}")
# A name that stands in several rows of a column is one tensor there: ours, concatenated in this order.
BLOCK_NAMES = (
    Names("norm1", "norm1", "norm1", "layer_norm_1", "layernorm_before"),
    Names("attention.query", "attn.q", "attn.attn.in_proj", "attention.self.query", "attention.q_proj"),
    Names("attention.key", "attn.kv", "attn.attn.in_proj", "attention.self.key", "attention.k_proj"),
    Names("attention.value", "attn.kv", "attn.attn.in_proj", "attention.self.value", "attention.v_proj"),
    Names("attention.proj", "attn.proj", "attn.attn.out_proj", "attention.output.dense", "attention.o_proj"),
    Names("attention.reduce", "attn.sr", "attn.sr", "attention.self.sr",
          "attention.sequence_reduction.sequence_reduction"),
    Names("attention.reduce_norm", "attn.norm", "attn.norm", "attention.self.layer_norm",
          "attention.sequence_reduction.layer_norm"),
    Names("norm2", "norm2", "norm2", "layer_norm_2", "layernorm_after"),
    Names("ffn.expand", "mlp.fc1", "ffn.layers.0", "mlp.dense1", "mlp.fc1"),
    Names("ffn.depthwise", "mlp.dwconv.dwconv", "ffn.layers.1", "mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
    Names("ffn.contract", "mlp.fc2", "ffn.layers.4", "mlp.dense2", "mlp.fc2"),
)
MIT_NAMES = (*STAGE_NAMES, *(Names(*map(".".join, zip(BLOCK, row, strict=True))) for row in BLOCK_NAMES))
NVLABS = (
    *(Rule(rf"decoder\.fusion\.project\.{i}", rf"decode_head.linear_c{i + 1}.proj", layout="linear")
      for i in range(4)),
    Rule(r"decoder\.fusion\.fuse", "decode_head.linear_fuse", "block"),
    Rule(CLASSIFIER, "decode_head.linear_pred"),
)
HUGGINGFACE = (
    Rule(r"decoder\.fusion\.project\.(\d)", r"decode_head.linear_c.\1.proj", layout="linear"),
    Rule(r"decoder\.fusion\.fuse\.0", "decode_head.linear_fuse"),
    Rule(r"decoder\.fusion\.fuse\.1", "decode_head.batch_norm"),
    Rule(CLASSIFIER, "decode_head.classifier"),
)
TRANSFORMERS5 = (
    Rule(r"decoder\.fusion\.project\.(\d)", r"decode_head.linear_projections.\1.proj", layout="linear"),
    *HUGGINGFACE[1:],
)
MMSEG_HEADS = (
    Rule(r"decoder\.fusion\.project\.(\d)", r"decode_head.convs.\1", "block"),
    Rule(r"decoder\.fusion\.fuse", "decode_head.fusion_conv", "block"),
    Rule(r"decoder\.fusion\.psp_modules\.(\d)", r"decode_head.psp_modules.\1.1", "block"),
    Rule(r"decoder\.fusion\.(bottleneck|fpn_bottleneck)", r"decode_head.\1", "block"),
    Rule(r"decoder\.fusion\.(lateral_convs|fpn_convs)\.(\d)", r"decode_head.\1.\2", "block"),
    Rule(r"decoder\.fusion\.neck\.(lateral_convs|convs)\.(\d)", r"neck.\1.\2.conv"),
    Rule(CLASSIFIER, "decode_head.conv_seg"),
    Rule(r"auxiliary\.block", "auxiliary_head.convs.0", "block"),
    Rule(r"auxiliary\.head\.classify", "auxiliary_head.conv_seg"),
    # The released SegDeformer head.
    Rule(INTERNAL + r"\.attention\.(query|key|value)\.block", r"decode_head.trans.attn.\1_project", "block"),
    Rule(INTERNAL + r"\.attention\.output\.block", "decode_head.trans.attn.out_project", "block"),
    Rule(EXTERNAL + r"\.(query|key|value)\.block", r"decode_head.trans.cross_attn.\1_project", "block"),
    Rule(EXTERNAL + r"\.output\.block", "decode_head.trans.cross_attn.out_project", "block"),
    Rule(EXTERNAL + r"\.middle_query", "decode_head.class_token.q"),
    Rule(EXTERNAL + r"\.middle_key", "decode_head.class_token.k"),
    Rule(EXTERNAL + r"\.tokens\.info_KC", "decode_head.class_token.prop_token", "tensor", "table"),
    Rule(EXTERNAL + r"\.tokens\.class_KC", "decode_head.class_token.cls_token", "tensor", "table"),
)
# timm has a stage's patch merging at its start, the others at the end of the stage before.
SWIN_MERGING = r"encoder\.backbone\.layers\.{here}\.downsample\.(norm|reduction)"
MMSEG_SWIN = (
    Rule(r"encoder\.backbone\.patch_embed\.proj", "backbone.patch_embed.projection"),
    Rule(r"encoder\.backbone\.patch_embed\.norm", "backbone.patch_embed.norm"),
    Rule(r"encoder\.backbone\.layers\.(\d)\.blocks\.(\d+)\.(norm[12])", r"backbone.stages.\1.blocks.\2.\3"),
    Rule(r"encoder\.backbone\.layers\.(\d)\.blocks\.(\d+)\.attn(|\.qkv|\.proj)",
         r"backbone.stages.\1.blocks.\2.attn.w_msa\3"),
    Rule(r"encoder\.backbone\.layers\.(\d)\.blocks\.(\d+)\.mlp\.fc1",
         r"backbone.stages.\1.blocks.\2.ffn.layers.0.0"),
    Rule(r"encoder\.backbone\.layers\.(\d)\.blocks\.(\d+)\.mlp\.fc2",
         r"backbone.stages.\1.blocks.\2.ffn.layers.1"),
    *(Rule(SWIN_MERGING.format(here=i), rf"backbone.stages.{i - 1}.downsample.\1", layout="unfolded")
      for i in (1, 2, 3)),
    Rule(r"encoder\.norms\.(\d)", r"backbone.norm\1"),
)
MICROSOFT_SWIN = (
    *(Rule(SWIN_MERGING.format(here=i), rf"backbone.layers.{i - 1}.downsample.\1") for i in (1, 2, 3)),
    Rule(r"encoder\.backbone\.(patch_embed\.\w+|layers\.\d\.blocks\.\d+\.(?:\w+\.)*\w+?)", r"backbone.\1"),
    Rule(r"encoder\.norms\.(\d)", r"backbone.norm\1"),
)
MMSEG_VIT = (
    Rule(r"encoder\.backbone\.(cls_token|pos_embed)", r"backbone.\1", "tensor"),
    Rule(r"encoder\.backbone\.patch_embed\.proj", "backbone.patch_embed.projection"),
    Rule(r"encoder\.backbone\.blocks\.(\d+)\.norm([12])", r"backbone.layers.\1.ln\2"),
    Rule(r"encoder\.backbone\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)",
         r"backbone.layers.\1.attn.attn.in_proj_\2", "tensor"),
    Rule(r"encoder\.backbone\.blocks\.(\d+)\.attn\.proj", r"backbone.layers.\1.attn.attn.out_proj"),
    Rule(r"encoder\.backbone\.blocks\.(\d+)\.mlp\.fc1", r"backbone.layers.\1.ffn.layers.0.0"),
    Rule(r"encoder\.backbone\.blocks\.(\d+)\.mlp\.fc2", r"backbone.layers.\1.ffn.layers.1"),
)
# fmt: on
HEADS: dict[Naming, tuple[Rule, ...]] = {
    "nvlabs": NVLABS,
    "mmseg": MMSEG_HEADS,
    "microsoft": MMSEG_HEADS,
    "huggingface": HUGGINGFACE,
    "transformers5": TRANSFORMERS5,
}
BLOCK_PARTS = {"0": "conv", "1": "bn"}


def classifier_of(naming: Naming) -> str:
    """What the weight of the layer that tells the classes is called."""
    return next(f"{rule.theirs}.weight" for rule in HEADS[naming] if rule.ours == CLASSIFIER)


class Table(NamedTuple):
    """Names of a whole model. unknown: our tensors that the other project has no name for."""

    links: tuple[Link, ...]
    unknown: tuple[str, ...]


def name_table(model: Segmenter, naming: Naming) -> Table:
    """Every tensor of the model, by its name in the other project."""
    links = []
    if isinstance(model.encoder, MiT) and naming != "microsoft":
        before = "segformer." if naming in ("huggingface", "transformers5") else "backbone."
        for theirs, ours, layout in mit_links(model.encoder, naming):
            links.append(Link(before + theirs, tuple(f"encoder.{name}" for name in ours), layout))
    rules = HEADS[naming] + _encoder_rules(model, naming)
    taken = {name for link in links for name in link.ours}
    unknown = []
    for name, tensor in model.state_dict().items():
        if name in taken:
            continue
        link = next((link for rule in rules if (link := _apply(rule, name, tensor))), None)
        if link is None:
            unknown.append(name)
        else:
            links.append(link)
    return Table(tuple(links), tuple(unknown))


def mit_links(encoder: MiT, naming: Naming) -> list[Link]:
    """Every tensor of a MiT, by its name in the other project's encoder."""
    templates = {row.ours: getattr(row, naming) for row in MIT_NAMES}
    links: dict[str, Link] = {}
    for name, tensor in encoder.state_dict().items():
        _, stage, *middle, kind = name.split(".")
        module = re.sub(r"^blocks\.\d+", "blocks.{j}", ".".join(middle))
        theirs = templates[module].format(i=stage, s=int(stage) + 1, j=name.split(".")[3])
        theirs += f"_{kind}" if theirs.endswith("in_proj") else f".{kind}"
        # mmsegmentation writes the linear layers of the Mix-FFN as 1x1 convolutions.
        layout: Layout = "convolution" if ".ffn." in theirs and tensor.ndim == 2 else "same"
        before = links[theirs].ours if theirs in links else ()
        links[theirs] = Link(theirs, (*before, name), layout)
    return list(links.values())


def _encoder_rules(model: Segmenter, naming: Naming) -> tuple[Rule, ...]:
    family = type(model.encoder.backbone).__name__ if isinstance(model.encoder, TimmEncoder) else "MiT"
    match naming, family:
        case "mmseg", "SwinTransformer":
            return MMSEG_SWIN
        case "microsoft", "SwinTransformer":
            return MICROSOFT_SWIN
        case "mmseg", "VisionTransformer":
            return MMSEG_VIT
    return ()


def _apply(rule: Rule, name: str, tensor: Tensor) -> Link | None:
    if rule.kind == "tensor":
        found = re.fullmatch(rule.ours, name)
        return Link(found.expand(rule.theirs), (name,), rule.layout) if found else None
    part = r"\.(?P<part>[01])" if rule.kind == "block" else ""
    found = re.fullmatch(rf"(?:{rule.ours}){part}\.(?P<kind>\w+)", name)
    if found is None:
        return None
    middle = f".{BLOCK_PARTS[found['part']]}" if part else ""
    layout: Layout = rule.layout
    if layout == "linear" and tensor.ndim != 4:
        layout = "same"  # its bias
    return Link(f"{found.expand(rule.theirs)}{middle}.{found['kind']}", (name,), layout)
