"""Encoders: images in, four feature maps out. MiT is ours, everything else comes from timm.

B batch, H W image size, C channels of one map, h w its size: ceil(H / stride), ceil(W / stride).
timm is imported only when one of its models is built.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.errors import UsageError, UserError, count
from segdeformer.models.downloads import explained_download
from segdeformer.models.mit import MIT_SIZES, MiT
from segdeformer.models.own import build_own_encoder
from segdeformer.plugins import is_path

if TYPE_CHECKING:  # modules need no recipe
    from segdeformer.config import EncoderConfig

# timm marks these as of fixed input size, for their training; their code takes any size.
ANY_SIZE_MODELS = {"MultiScaleVit", "SwiftFormer", "Twins", "VisionTransformerSAM", "Xcit"}
# Blocks that cut the coarsest map into 2x2 patches, and would stretch an odd one.
PATCH_BLOCKS = {"MobileVitBlock", "MobileVitV2Block"}


class TimmEncoder(nn.Module):
    """Four feature maps of a timm model, at any image size.

    Images are padded at the bottom and right with zeros, the mean of normalised images, to
    `multiple`, and maps are cropped back. Models with `fixed_size` are padded to exactly that.
    Class and register tokens are dropped. `norms` are LayerNorms over each map's channels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        levels: tuple[int, int, int, int],
        channels: tuple[int, int, int, int],
        strides: tuple[int, int, int, int],
        multiple: int,
        fixed_size: tuple[int, int] | None,
        feature_norm: bool,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.name = name
        self.levels = levels
        self.channels = channels
        self.strides = strides
        self.multiple = multiple
        self.fixed_size = fixed_size
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels) if feature_norm else None

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        height, width = images_B3HW.shape[2:]
        target = self.padded_size(height, width)
        images_B3HW = F.pad(images_B3HW, (0, target[1] - width, 0, target[0] - height))
        maps_BChw = self.features(images_B3HW)
        self._check(maps_BChw, target)
        maps_BChw = [
            m[:, :, : math.ceil(height / s), : math.ceil(width / s)]
            for m, s in zip(maps_BChw, self.strides, strict=True)
        ]
        if self.norms is None:
            return maps_BChw
        return [
            norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, m in zip(self.norms, maps_BChw, strict=True)
        ]

    def features(self, images_B3HW: Tensor) -> list[Tensor]:
        """The backbone's maps of images that need no padding."""
        return self.backbone.forward_intermediates(
            images_B3HW, indices=list(self.levels), intermediates_only=True
        )

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that the backbone sees for an image of this size."""
        if self.fixed_size is None:
            height, width = (math.ceil(n / self.multiple) * self.multiple for n in (height, width))
            return height, width
        if height > self.fixed_size[0] or width > self.fixed_size[1]:
            raise UserError(
                f"encoder `{self.name}` takes at most {self.fixed_size[0]}x{self.fixed_size[1]} px, "
                f"got {height}x{width}; set encoder.image_size = [{height}, {width}], or evaluate with a "
                "sliding window"
            )
        return self.fixed_size

    def _check(self, maps_BChw: Sequence[Tensor], padded: tuple[int, int]) -> None:
        for level, channels, stride, map_BChw in zip(
            self.levels, self.channels, self.strides, maps_BChw, strict=True
        ):
            expected = (channels, math.ceil(padded[0] / stride), math.ceil(padded[1] / stride))
            if map_BChw.shape[1:] != expected:
                raise UserError(
                    f"encoder `{self.name}` does not keep to the sizes that timm states: level {level} has "
                    f"shape {tuple(map_BChw.shape[1:])}, expected {expected}; choose another encoder"
                )


class WeightsReport(NamedTuple):
    """What a file gave to an encoder. `missing` are our names, `unexpected` the file's."""

    source: str
    source_format: str
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resampled: tuple[str, ...]
    passed_over: tuple[str, ...]
    container: str | None = None  # the dict in the file that they were taken from

    def lines(self) -> list[str]:
        """For the terminal: a summary, and a line for each list that is not empty."""
        lists = {
            "resampled to this size": self.resampled,
            "missing in the file, left as initialised": self.missing,
            "in the file but not used": self.unexpected,
            "objects in the file that were not read": self.passed_over,
        }
        inside = f"`{self.container}`, " if self.container else ""
        told = f"({inside}{self.source_format} names)"
        summary = f"encoder weights: {count(self.loaded, 'tensor')} from {self.source} {told}"
        return [summary, *(f"  {title}: {', '.join(names)}" for title, names in lists.items() if names)]


# Both are modules with `.channels` and `.strides` of length four, which return four maps.
Encoder = MiT | TimmEncoder


def build_encoder(config: EncoderConfig) -> Any:
    """Build the encoder with random weights, or timm's pretrained ones for `weights = "timm"`.

    A weights file is not read here: `weights.build` does that.
    """
    if is_path(config.name):
        weights = {} if config.weights == "none" else {"weights": config.weights}
        return build_own_encoder(config.name, weights | (config.options or {}))
    if config.name in MIT_SIZES:
        return _build_mit(config)
    return _build_timm(config)


def _build_mit(config: EncoderConfig) -> MiT:
    if config.weights == "timm":
        raise UserError(
            f"timm has no weights for `{config.name}`; set encoder.weights to a file in the names of "
            "Hugging Face, NVlabs or mmsegmentation"
        )
    if config.out_indices is not None:
        raise UsageError(
            f"`model.encoder.out_indices` is for flat (ViT) encoders; `{config.name}` is a pyramid"
        )
    if config.feature_norm:
        raise UsageError(f"`model.encoder.feature_norm`: `{config.name}` normalises its maps already")
    return MiT(MIT_SIZES[config.name], drop_path=config.drop_path)


def _build_timm(config: EncoderConfig) -> TimmEncoder:
    import timm

    _check_name(config.name)
    pretrained = config.weights == "timm"
    if pretrained and not timm.is_model_pretrained(config.name):
        raise UserError(f"timm has no weights for `{config.name}`; set encoder.weights to `none` or a file")
    backbone, accepted = create_timm(
        config, lambda **options: timm.create_model(config.name, pretrained=pretrained, **options)
    )
    if not hasattr(backbone, "forward_intermediates"):
        raise UserError(
            f"encoder `{config.name}` gives no feature maps in this version of timm; take another"
        )
    levels = _choose_levels(config, [info["reduction"] for info in backbone.feature_info])
    infos = [backbone.feature_info[level] for level in levels]
    strides = four(info["reduction"] for info in infos)
    backbone.prune_intermediate_layers(list(levels), prune_norm=True, prune_head=True)
    if isinstance(getattr(backbone, "head", None), nn.Module):  # ConvNeXt's keeps its norm in timm 1.0.19
        backbone.head = nn.Identity()

    kinds = {type(module).__name__ for module in backbone.modules()}
    any_size = (
        not backbone.pretrained_cfg.get("fixed_input_size", False)
        or accepted & {"dynamic_img_size", "strict_img_size"}
        or type(backbone).__name__ in ANY_SIZE_MODELS
    )
    multiple = math.lcm(*strides) * (2 if kinds & PATCH_BLOCKS else 1)
    if "SwinTransformerBlock" in kinds:
        from segdeformer.models.swin_windows import pad_before_shifting

        pad_before_shifting(backbone)
        multiple = strides[0]  # Swin pads each map itself
    built_size = config.image_size if "img_size" in accepted else backbone.pretrained_cfg["input_size"][1:]
    return TimmEncoder(
        backbone,
        name=config.name,
        levels=levels,
        channels=four(info["num_chs"] for info in infos),
        strides=strides,
        multiple=multiple,
        fixed_size=None if any_size else built_size,
        feature_norm=config.feature_norm,
    )


def _check_name(name: str) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture) and (not tag or name in timm.list_pretrained(f"{architecture}.*")):
        return
    known = timm.list_pretrained() if tag else [*MIT_SIZES, *timm.list_models()]
    near = [f"`{n}`" for n in difflib.get_close_matches(name, known, n=3, cutoff=0.5)]
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
    raise UsageError(f"`model.encoder.name`: neither a MiT nor a timm model is called `{name}`; {hint}")


def create_timm(config: EncoderConfig, create: Callable[..., Any]) -> tuple[Any, set[str]]:
    """Create a timm model with as many of our options as it takes; return it and their names.

    timm cannot say which arguments a model takes, but a model refuses the others before it builds.
    """
    wanted = {
        "dynamic_img_size": True,  # ViTs: resample the position grid to each image
        "strict_img_size": False,  # Swins: make the window masks for each image
        "always_partition": True,  # Swins: no smaller windows if the first image size is small
        "img_size": config.image_size,
        "drop_path_rate": config.drop_path,  # 0 too: Swin's own default is 0.1
    }
    options = {name: value for name, value in wanted.items() if value is not None}
    with explained_download(config.name):
        while True:
            try:
                model = create(**options)
                break
            except TypeError as error:
                refused = {option for option in options if f"'{option}'" in str(error)}
                if "unexpected keyword" not in str(error) or not refused:
                    raise
                options = {k: v for k, v in options.items() if k not in refused}
    if config.drop_path and "drop_path_rate" not in options:
        raise UsageError(f"`model.encoder.drop_path`: `{config.name}` has no drop path; set it to 0")
    return model, set(options)


def _choose_levels(config: EncoderConfig, reductions: list[int]) -> tuple[int, int, int, int]:
    """Indices of the four maps among those that the model offers, finest first."""
    num_maps = len(reductions)
    flat = len(set(reductions)) == 1
    if config.out_indices is not None:
        if not flat:
            raise UsageError(
                f"`model.encoder.out_indices` is for flat (ViT) encoders; `{config.name}` is a pyramid"
            )
        if max(config.out_indices) >= num_maps or list(config.out_indices) != sorted(set(config.out_indices)):
            raise UsageError(
                f"`model.encoder.out_indices`: {list(config.out_indices)} must ascend and stay below the "
                f"{num_maps} blocks of `{config.name}`"
            )
        return config.out_indices
    if flat:
        levels = [num_maps * (i + 1) // 4 - 1 for i in range(4)]  # 12 blocks: 2, 5, 8, 11
    else:
        levels = [i for i in range(num_maps) if reductions[i] not in reductions[i + 1 :]][-4:]
        if len(levels) < 4:
            levels = list(range(num_maps))[-4:]  # some pyramids repeat their last stride
    if num_maps < 4:
        raise UserError(
            f"encoder `{config.name}` gives {count(num_maps, 'map')}, at strides {reductions}, and four "
            "are needed; choose another"
        )
    return four(levels)


def four(values: Iterable[int]) -> tuple[int, int, int, int]:
    """Exactly four numbers, one a map."""
    a, b, c, d = values
    return a, b, c, d
