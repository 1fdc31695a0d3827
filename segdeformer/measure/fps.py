"""Several models or ways to run one, side by side: time, FLOPs, memory, and the paper's speeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from segdeformer.config import Recipe, load_recipe
from segdeformer.errors import UserError
from segdeformer.kernels.impl import Call, calls_noted, describe_impl
from segdeformer.kernels.tuning.clock import synchronize
from segdeformer.measure.alternatives import Alternative, Built, build, check_setting, make_run, random_images
from segdeformer.measure.flops import Flops, model_flops, printed_flops
from segdeformer.measure.implementation import settle_impl
from segdeformer.measure.machine import Machine, this_machine
from segdeformer.measure.memory import Memory, measure_memory
from segdeformer.measure.parameters import count_recipe
from segdeformer.measure.speed import SPLIT_PASSES, Latency, Length, Split, alternating_ms, latency, split_ms
from segdeformer.models.skeleton import without_weights
from segdeformer.paper.figures import PaperSpeed, paper_speeds
from segdeformer.runtime import Runtime
from segdeformer.runtime.device import explained_shortage

# Table 7's, with which the paper makes its point, and the full model with few keys.
DEFAULTS = (
    "ade20k-segformer-b2",
    "ade20k-segdeformer-b2",
    "ade20k-segdeformer-b2-efficient",
    "ade20k-segdeformer-b2,key-stride=4",
)
LESS = "take fewer models, or a smaller --size or --batch"


def default_size(device: torch.device) -> tuple[int, int]:
    """(height, width) of images that a device passes in reasonable time."""
    return (256, 256) if device.type == "cpu" else (512, 512)


class Options(NamedTuple):
    """What all models of a comparison have in common. argmax: up to each pixel's class."""

    batch: int
    size: tuple[int, int]
    argmax: bool
    warmup: int
    length: Length
    memory: bool


class Measured(NamedTuple):
    """One model in one setting."""

    alternative: Alternative
    recipe: str
    folding: str
    impl: str  # what `auto` stands for here
    parameters: int  # trained ones, as `--params` counts
    flops: Flops
    printed_flops: int
    latency: Latency
    split_ms: Split[float]  # of eager passes
    memory: Memory | None
    paper: PaperSpeed | None  # where the recipe is a row of Table 7


class Comparison(NamedTuple):
    machine: Machine
    device: str
    options: Options
    measured: list[Measured]

    @property
    def base(self) -> Measured:
        """Whose speed is 1: SegFormer-B2, as in the paper, where it is here; else the first."""
        bases = [m for m in self.measured if m.paper is not None and m.paper.relative == 1]
        return (bases or self.measured)[0]

    def relative_speed(self, one: Measured) -> float:
        """How many times the base's images per second, by medians of alternating rounds."""
        return self.base.latency.p50_ms / one.latency.p50_ms

    def paper_speed(self, one: Measured) -> float | None:
        """The same ratio in Table 7; None where one of the two is not in it."""
        if one.paper is None or self.base.paper is None:
            return None
        return one.paper.relative / self.base.paper.relative


@torch.inference_mode()
def compare(
    alternatives: Sequence[Alternative],
    options: Options,
    device: torch.device,
    *,
    say: Callable[[str], None],
    tell: Callable[[str], None],
) -> Comparison:
    """Measure all. `say` is told what is being done, `tell` what `auto` has been found to stand for.

    Raises `UserError` when one cannot be had or does not run so.
    """
    for alternative in alternatives:
        check_setting(alternative, device)
    machine = this_machine(device)
    models = []
    for alternative in alternatives:
        say(f"building {alternative.label}")
        with explained_shortage(LESS):
            models.append(build(alternative, device))
    for built in models:
        _settle_auto(built, options, tell)
    memories = [_memory(built, options, say) for built in models]
    times_ms = _times(models, options, device, say)
    measured = []
    for built, memory in zip(models, memories, strict=True):
        say(f"parts of {built.alternative.label}")
        measured.append(_measured(built, times_ms[built.alternative.label], memory, options))
    return Comparison(machine, str(device), options, measured)


def _settle_auto(built: Built, options: Options, tell: Callable[[str], None]) -> None:
    """Compare what was not measured yet of this model's operations, where `auto` decides about them."""
    setting = built.eager.alternative.setting

    def find_calls() -> list[Call]:
        images_B3HW = random_images(built, options.batch, options.size)
        with calls_noted() as calls:
            make_run(built.eager, images_B3HW, argmax=options.argmax)()
        return calls

    about = {
        "bench": setting._asdict(),
        "model": built.recipe.model.model_dump_json(),
        "folding": built.folding,
        "images": [options.batch, *options.size],
        "argmax": options.argmax,
    }
    settle_impl(Runtime(built.device, setting.impl), find_calls, about=about, say=tell)


def _memory(built: Built, options: Options, say: Callable[[str], None]) -> Memory | None:
    say(f"memory of {built.alternative.label}")
    if not options.memory:
        return None
    with _explained(built.alternative.label):
        return measure_memory(built, batch=options.batch, size=options.size, argmax=options.argmax)


def _times(
    models: Sequence[Built], options: Options, device: torch.device, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Milliseconds of each round by label."""
    runs = {}
    for built in models:
        label = built.alternative.label
        say(f"warming up {label}")
        images_B3HW = random_images(built, options.batch, options.size)
        with _explained(label):
            runs[label] = make_run(built, images_B3HW, argmax=options.argmax)
            for _ in range(options.warmup):
                runs[label]()
            synchronize(device)
    rounds = []
    for round_ms in alternating_ms(runs, length=options.length, wait=partial(synchronize, device)):
        rounds.append(round_ms)
        say(f"round {len(rounds)}: " + ", ".join(f"{ms:.1f}" for ms in round_ms.values()) + " ms")
    return {label: [round_ms[label] for round_ms in rounds] for label in runs}


@contextmanager
def _explained(label: str) -> Iterator[None]:
    """Turn what PyTorch raises in a model's first passes into a `UserError` that names the model."""
    try:
        with explained_shortage(LESS):
            yield
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
    except (RuntimeError, ValueError) as error:  # a dtype without a kernel, a missing compiler, ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{label} does not run in this setting: {reason}") from None


def _measured(built: Built, times_ms: Sequence[float], memory: Memory | None, options: Options) -> Measured:
    recipe, batch, size = built.recipe, options.batch, options.size
    passes = min(len(times_ms), SPLIT_PASSES)
    return Measured(
        alternative=built.alternative,
        recipe=recipe.name,
        folding=built.folding,
        impl=describe_impl(built.alternative.setting.impl, built.device),
        parameters=count_recipe(recipe).total,
        flops=model_flops(built.model, batch=batch, size=size),
        printed_flops=printed_flops(recipe.model, batch=batch, size=size),
        latency=latency(times_ms, batch=batch),
        split_ms=split_ms(built.model, random_images(built, batch, size), passes=passes),
        memory=memory,
        paper=_paper_speed(recipe),
    )


def _paper_speed(recipe: Recipe) -> PaperSpeed | None:
    """Table 7's, if the model is that of one of its recipes, wherever its weights come from."""
    speed = paper_speeds().get(recipe.name)
    if speed is None or without_weights(load_recipe(recipe.name).model) != without_weights(recipe.model):
        return None
    return speed
