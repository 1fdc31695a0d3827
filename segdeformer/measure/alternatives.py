"""The models that are compared: a recipe, run or checkpoint each, and how it runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from segdeformer.config import Recipe, load_recipe, recipe_names
from segdeformer.errors import UsageError
from segdeformer.kernels.impl import Impl, check_impl
from segdeformer.kernels.upsample import upsample_argmax
from segdeformer.models.context import ExternalAttention, ExternalForm
from segdeformer.models.few_keys import set_key_stride
from segdeformer.models.segmenter import Segmenter
from segdeformer.models.skeleton import without_weights
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import find_checkpoint, load, read_checkpoint

DtypeName = Literal["float32", "float16", "bfloat16"]
CHANGES = (
    "key-stride=N, impl=NAME, form=plain, form=low_rank, dtype=NAME, fold, no-fold, compile, no-compile, "
    "cuda-graphs, no-cuda-graphs, channels-last, no-channels-last"
)
SWITCHES = ("fold", "compile", "cuda-graphs", "channels-last")
VALUES = ("key-stride", "impl", "form", "dtype")


class Setting(NamedTuple):
    """How a model runs; none of it but the key stride changes results beyond rounding.

    key_stride: see `models.few_keys`; None: as it was saved or trained.
    form: of Eq. 7, `low_rank` or `plain` as printed, for models that are not folded.
    """

    key_stride: int | None = None
    impl: Impl = "auto"
    form: ExternalForm = "low_rank"
    dtype: DtypeName = "float32"
    fold: bool | None = None  # None: wherever it can be
    compile: bool = False
    cuda_graphs: bool = False
    channels_last: bool = False


class Alternative(NamedTuple):
    label: str
    source: str  # a recipe's name, a TOML file, a run folder, a checkpoint
    setting: Setting


class Built(NamedTuple):
    """A model in eval mode on its device in its dtype."""

    alternative: Alternative
    recipe: Recipe
    model: Segmenter
    folding: str  # whether it is folded, and if not why

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eager(self) -> Built:
        """The same, neither compiled nor in a graph."""
        setting = self.alternative.setting._replace(compile=False, cuda_graphs=False)
        return self._replace(alternative=self.alternative._replace(setting=setting))


def parse_alternatives(models: Sequence[str], against: Sequence[str], setting: Setting) -> list[Alternative]:
    """Each text is MODEL, MODEL,CHANGE,... or, in `against`, CHANGE,... of the first model.

    Raises `UsageError` for what is neither, and for `against` without a model.
    """
    found: list[Alternative] = []
    for text in models:
        source, *changes = [text] if Path(text).exists() else text.split(",")
        found.append(_alternative(source, changes, setting, found))
    for text in against:
        if not found:
            raise UsageError(f"--against {text}: name a MODEL to compare with: a recipe, run or checkpoint")
        first, *changes = [text] if Path(text).exists() else text.split(",")
        if _is_change(first):
            found.append(_alternative(found[0].source, [first, *changes], found[0].setting, found))
        else:
            found.append(_alternative(first, changes, setting, found))
    return found


def _alternative(
    source: str, changes: Sequence[str], setting: Setting, others: Sequence[Alternative]
) -> Alternative:
    for change in changes:
        setting = changed(setting, change)
    label = ", ".join([source.rstrip("/").removeprefix("runs/"), *changes])
    same = sum(other.label.partition(" (")[0] == label for other in others)
    return Alternative(f"{label} ({same + 1})" if same else label, source, setting)


def _is_change(text: str) -> bool:
    name, equals, _ = text.partition("=")
    return name in VALUES if equals else text.removeprefix("no-") in SWITCHES


def changed(setting: Setting, change: str) -> Setting:
    """Raises `UsageError` for an unknown name or value. `impl` is checked where the device is known."""
    if not _is_change(change):
        raise UsageError(f"`{change}` is no change of a model; there are {CHANGES}")
    name, equals, value = change.partition("=")
    if not equals:
        switch = change.removeprefix("no-").replace("-", "_")
        return setting._replace(**cast(Any, {switch: not change.startswith("no-")}))
    allowed = {"form": get_args(ExternalForm), "dtype": get_args(DtypeName)}.get(name)
    if allowed and value not in allowed:
        raise UsageError(f"`{change}`: expected one of {', '.join(allowed)}")
    if name == "key-stride":
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"`{change}`: expected a whole number from 1 on")
        return setting._replace(key_stride=int(value))
    return setting._replace(**cast(Any, {name: value}))


def is_recipe(source: str) -> bool:
    """Whether it is a recipe's name or TOML file, not a run folder or checkpoint.

    Raises `UsageError` when it is nothing at all.
    """
    if source in recipe_names() or source.endswith(".toml"):
        return True
    if Path(source).exists():
        return False
    near = difflib.get_close_matches(source, recipe_names(), n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise UsageError(
        f"no model `{source}`: neither a recipe, a TOML file, a run folder nor a checkpoint; "
        f"{hint}`segdeformer recipes` lists recipes"
    )


def recipe_of(source: str) -> Recipe:
    """Its recipe; raises `UserError` when it cannot be read."""
    return load_recipe(source) if is_recipe(source) else read_checkpoint(find_checkpoint(source)).recipe


def load_model(source: str, impl: Impl = "auto") -> Segmenter:
    """A checkpoint's model, or a recipe's with random weights from seed 0; on the CPU, in eval mode."""
    if not is_recipe(source):
        return load(source, impl=impl).model
    torch.manual_seed(0)
    return build_model(without_weights(load_recipe(source).model), impl=impl).eval()


def check_setting(alternative: Alternative, device: torch.device) -> None:
    """Raise `UsageError` for a setting that this device cannot have."""
    try:
        check_impl(alternative.setting.impl, device)
    except ValueError as error:
        raise UsageError(f"{alternative.label}: {error}") from None
    if alternative.setting.cuda_graphs and device.type != "cuda":
        raise UsageError(
            f"{alternative.label}: cuda-graphs needs a CUDA GPU, the device is {device}; leave it out"
        )


def build(alternative: Alternative, device: torch.device) -> Built:
    """Load, fold and move the model. Raises `UserError` when it cannot be had, or not so."""
    source, setting = alternative.source, alternative.setting
    model = load_model(source, setting.impl)
    if model.is_folded and (setting.fold is False or setting.form == "plain"):
        raise UsageError(f"{alternative.label}: it was saved folded, which cannot be undone")
    obstacle = model.folding_obstacle
    if setting.form == "plain":
        obstacle = "Eq. 7 in its plain form"
        for module in model.modules():
            if isinstance(module, ExternalAttention):
                module.low_rank = False
    if setting.fold and obstacle:
        raise UsageError(f"{alternative.label}: it cannot be folded: {obstacle}; leave out fold")
    if setting.key_stride is not None:
        try:
            set_key_stride(model, setting.key_stride)
        except UsageError as error:
            raise UsageError(f"{alternative.label}: {error}") from None
    if setting.fold is False or obstacle:
        folding = f"not folded: {obstacle}" if obstacle else "not folded"
    else:
        model, folding = model.fold(), "folded"
    model = model.to(device, getattr(torch, setting.dtype)).requires_grad_(False)
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Built(alternative, recipe_of(source), model, folding)


def random_images(built: Built, batch: int, size: tuple[int, int]) -> Tensor:
    """(batch, 3, H, W) normalised images of noise, the same for all, as the model takes them."""
    setting = built.alternative.setting
    images_B3HW = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    memory = torch.channels_last if setting.channels_last else torch.contiguous_format
    return images_B3HW.to(built.device, getattr(torch, setting.dtype), memory_format=memory)


def make_run(built: Built, images_B3HW: Tensor, *, argmax: bool) -> Callable[[], Tensor]:
    """From images to logits at the decoder's resolution, or to each pixel's class, as the setting says."""
    setting = built.alternative.setting
    height, width = images_B3HW.shape[2:]

    def forward(images_B3HW: Tensor) -> Tensor:
        logits_BKhw = built.model(images_B3HW).logits_BKhw
        if argmax:
            return upsample_argmax(logits_BKhw, (height, width), impl=setting.impl).ids_BHW
        return logits_BKhw

    compiled = torch.compile(forward) if setting.compile else forward
    if setting.cuda_graphs:
        return _captured(compiled, images_B3HW)
    return lambda: compiled(images_B3HW)


def _captured(forward: Callable[[Tensor], Tensor], images_B3HW: Tensor) -> Callable[[], Tensor]:
    """A CUDA graph of one pass: the kernels of a pass started at once."""
    with torch.cuda.device(images_B3HW.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries and compilers must have settled before the capture
                forward(images_B3HW)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward(images_B3HW)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
