"""Third-party models: those of segmentation_models_pytorch (smp), for the same commands.

B batch, C channels of one map, K classes, HW image, hw a map.
smp's encoder, decoder and classifier are taken as they are. Ours is that images have any size: they are
padded at the bottom and right, and the logits cropped back. smp's last resizing is left out, since our loss
and argmax resize. smp is imported only when one of its models is built.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeformer.errors import UsageError, UserError
from segdeformer.models.downloads import explained_download
from segdeformer.models.encoders import create_timm, four
from segdeformer.models.layers import SegOutput

if TYPE_CHECKING:  # modules need no recipe
    from segdeformer.config import ModelConfig, ThirdPartyConfig

# What a recipe says elsewhere, or what our frame does itself.
OURS = {"encoder_name", "encoder_weights", "encoder_output_indices", "in_channels", "classes"}
OURS |= {"activation", "upsampling", "aux_params", "kwargs", "self"}
TIMM_PREFIX = "tu-"  # smp's, of timm encoders
PROBED_PX = (64, 128, 256)  # sides of the image on which a model is tried when it is built


class ThirdPartyMaps(NamedTuple):
    """What smp's encoder makes: first the four maps that every encoder returns, cropped to the image."""

    stage1: Tensor | None  # stride 4; None where smp's encoder has no such map
    stage2: Tensor | None
    stage3: Tensor | None
    stage4: Tensor | None
    features: list[Tensor]  # what smp's decoder takes, of the padded image
    prefix_tokens: list[Tensor | None] | None  # of a ViT, for DPT
    size: tuple[int, int]  # of the image in px
    padded: tuple[int, int]


class ThirdPartyEncoder(nn.Module):
    """An encoder of smp.

    first: index of the map with stride 4 among smp's. channels and strides: of the four maps, 0 where there
    is none. multiple: of the padded sides; least_px: the smallest side that the decoder takes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        first: int,
        channels: tuple[int, int, int, int],
        strides: tuple[int, int, int, int],
        multiple: int,
        least_px: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.first = first
        self.channels = channels
        self.strides = strides
        self.multiple = multiple
        self.least_px = least_px

    def forward(self, images_B3HW: Tensor) -> ThirdPartyMaps:
        height, width = images_B3HW.shape[2:]
        padded = self.padded_size(height, width)
        images_B3HW = F.pad(images_B3HW, (0, padded[1] - width, 0, padded[0] - height))
        features, prefix_tokens = features_of(self.backbone, images_B3HW)
        maps = [cropped(x, (height, width), padded) for x in features[self.first : self.first + 4]]
        one, two, three, four = [*maps, None, None, None, None][:4]
        return ThirdPartyMaps(one, two, three, four, features, prefix_tokens, (height, width), padded)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that the backbone sees for an image of this size."""
        height, width = (
            math.ceil(max(n, self.least_px) / self.multiple) * self.multiple for n in (height, width)
        )
        return height, width


class ThirdPartyDecoder(nn.Module):
    """A decoder of smp, which is all fusion here, and its classifier, without the last resizing."""

    def __init__(self, *, fusion: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.fusion = fusion
        self.head = head

    def forward(self, maps: ThirdPartyMaps) -> SegOutput:
        logits_BKhw = logits_of(self.fusion, self.head, maps.features, maps.prefix_tokens)
        return SegOutput(cropped(logits_BKhw, maps.size, maps.padded), None, None)


class ThirdPartyModel(NamedTuple):
    encoder: ThirdPartyEncoder
    decoder: ThirdPartyDecoder


class Trial(NamedTuple):
    """A model run once on an image of least_px x least_px."""

    least_px: int
    features: list[Tensor]
    is_pyramid: bool


def features_of(backbone: nn.Module, images_B3HW: Tensor) -> tuple[list[Tensor], list[Tensor | None] | None]:
    """smp's maps, the image itself and maps without channels included; and a ViT's prefix tokens, for DPT."""
    made = backbone(images_B3HW)
    if isinstance(made, tuple):
        features, prefix_tokens = made
        return list(features), list(prefix_tokens)
    return list(made), None


def logits_of(
    fusion: nn.Module,
    head: nn.Module,
    features: list[Tensor],
    prefix_tokens: list[Tensor | None] | None,
) -> Tensor:
    """(B, K, h, w) at the size at which the decoder leaves them."""
    # A list of its own: some decoders write into it.
    if prefix_tokens is None:
        return head(fusion(list(features)))
    return head(fusion(list(features), prefix_tokens))


def cropped(map_BChw: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """The part of a padded image's map that covers the image; a started cell is kept."""
    rows, columns = (
        -(-n * cells // whole) for n, cells, whole in zip(size, map_BChw.shape[2:], padded, strict=True)
    )
    return map_BChw[:, :, :rows, :columns]


def build_third_party(config: ModelConfig) -> ThirdPartyModel:
    """The model that `fusion.kind = "third_party"` names, its weights random or from the hub.

    A weights file is not read here, see `load_encoder_weights`. Parameters that the model never uses, such as
    those of stages beyond `encoder_depth`, are left out.
    Raises `UserError` when smp is not installed or the weights cannot be had, `UsageError` when it knows no
    such decoder, encoder or option, or cannot join them.
    """
    from segdeformer.config import ThirdPartyConfig

    assert isinstance(config.fusion, ThirdPartyConfig)
    architecture = _architecture(config.fusion)
    name = _encoder_name(config, config.fusion)
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is about to do
            model = _create(architecture, name, config, config.fusion)
            trial = _tried(model)
    except UserError:
        raise
    except (
        AssertionError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"`model.fusion`: segmentation_models_pytorch cannot join `{config.fusion.decoder}` and "
            f"`{config.encoder.name}` with these options: {reason}"
        ) from error
    drop_unused(model)
    first = 2 if trial.is_pyramid else 0  # after strides 1 and 2; all maps of DPT's ViT have one size
    stages = trial.features[first : first + 4]
    stages += [trial.features[0][:, :0]] * (4 - len(stages))
    encoder = ThirdPartyEncoder(
        model.encoder,
        first=first,
        channels=four(x.shape[1] for x in stages),
        strides=four(trial.least_px // x.shape[2] if x.shape[1] else 0 for x in stages),
        multiple=model.encoder.output_stride * (1 if trial.is_pyramid else 2),  # DPT halves its last map
        least_px=trial.least_px,
    )
    return ThirdPartyModel(encoder, ThirdPartyDecoder(fusion=model.decoder, head=model.segmentation_head))


def _architecture(config: ThirdPartyConfig) -> type[nn.Module]:
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise UserError(
            '`model.fusion.kind` = "third_party" needs segmentation_models_pytorch, which is not installed; '
            "pip install segmentation-models-pytorch"
        ) from None
    known: dict[str, type[nn.Module]] = {
        name: value
        for name, value in vars(smp).items()
        if isinstance(value, type) and issubclass(value, smp.base.SegmentationModel)
    }
    if config.decoder not in known:
        raise UsageError(
            f"`model.fusion.decoder`: segmentation_models_pytorch has no `{config.decoder}`; "
            f"{_hint(config.decoder, known)}"
        )
    architecture = known[config.decoder]
    arguments = inspect.signature(architecture.__init__).parameters
    options = [option for option in arguments if option not in OURS]
    if "encoder_output_stride" not in options and config.decoder != "DPT":
        options.append("output_stride")  # every pyramid takes it: the others hand it on to their encoder
    for option in config.options:
        if option not in options:
            raise UsageError(
                f"`model.fusion.options`: `{config.decoder}` has no option `{option}`; "
                f"{_hint(option, options)}"
            )
    return architecture


def _encoder_name(config: ModelConfig, fusion: ThirdPartyConfig) -> str:
    """smp's name of the encoder: its own encoders by their names, timm's with a prefix."""
    import timm
    from segmentation_models_pytorch.encoders import get_encoder_names

    encoder = config.encoder
    name = encoder.name.removeprefix(TIMM_PREFIX)
    own = name == encoder.name and name in get_encoder_names() and fusion.decoder != "DPT"
    if not own and not timm.is_model(name.partition(".")[0]):
        raise UsageError(
            "`model.encoder.name`: neither segmentation_models_pytorch nor timm has an encoder "
            f"`{encoder.name}`; {_hint(name, [*get_encoder_names(), *timm.list_models()])}"
        )
    if encoder.feature_norm:
        raise UsageError(
            '`model.encoder.feature_norm` is not for `fusion.kind = "third_party"`; set it to false'
        )
    if encoder.out_indices is not None and fusion.decoder != "DPT":
        raise UsageError(
            f"`model.encoder.out_indices` is for flat (ViT) encoders; `{fusion.decoder}` takes a pyramid"
        )
    if own and (encoder.drop_path or encoder.image_size):
        raise UsageError(
            f"`model.encoder`: `{name}` of segmentation_models_pytorch has neither drop path nor image size; "
            "set drop_path to 0 and leave image_size out"
        )
    return name if own else TIMM_PREFIX + name


def _create(architecture: type[nn.Module], name: str, config: ModelConfig, fusion: ThirdPartyConfig) -> Any:
    encoder = config.encoder
    pretrained: bool | str | None = None
    if encoder.weights == "timm":
        pretrained = True if name.startswith(TIMM_PREFIX) else "imagenet"
    arguments: dict[str, Any] = {
        "encoder_weights": pretrained,
        "classes": config.num_classes,
        **fusion.options,
    }
    if "upsampling" in inspect.signature(architecture.__init__).parameters:
        arguments["upsampling"] = 1
    if encoder.out_indices is not None:
        arguments["encoder_output_indices"] = list(encoder.out_indices)
    model: Any
    if name.startswith(TIMM_PREFIX):
        model, _ = create_timm(encoder, lambda **options: architecture(name, **arguments, **options))
    else:
        with explained_download(encoder.name):
            model = architecture(name, **arguments)
    if hasattr(model.segmentation_head, "upsampling_factor"):
        model.segmentation_head.upsampling_factor = 1.0  # DPT's, which is no argument
    return model


def _tried(model: Any) -> Trial:
    """Run the model on the smallest image that it takes, for its maps' sizes and which parameters it uses."""
    was_training = model.training
    model.eval()  # draws no random numbers, and leaves the norms' statistics
    multiple = 2 * model.encoder.output_stride
    for least_px in PROBED_PX:
        side = math.ceil(least_px / multiple) * multiple
        try:
            features, prefix_tokens = features_of(model.encoder, torch.zeros(1, 3, side, side))
            logits_of(model.decoder, model.segmentation_head, features, prefix_tokens).sum().backward()
        except RuntimeError:  # PAN halves its last map three times more
            if least_px == PROBED_PX[-1]:
                raise
        else:
            break
    model.train(was_training)
    return Trial(side, features, is_pyramid=prefix_tokens is None)


def drop_unused(module: nn.Module) -> None:
    """Leave out what a backward pass gave no gradient though it may have one, and forget the gradients."""
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if parameters and all(p.requires_grad and p.grad is None for p in parameters):
            setattr(module, name, nn.Identity())
        else:
            drop_unused(child)
    for parameter in module.parameters(recurse=False):
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None


def _hint(name: str, known: Iterable[str]) -> str:
    """The nearest names, whatever their case; or all."""
    lowered = {k.lower(): k for k in known}
    near = [f"`{lowered[k]}`" for k in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    return f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(list(lowered.values())[:12])}"
