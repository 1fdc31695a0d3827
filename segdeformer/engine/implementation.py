"""What `auto` stands for on a GPU on which a model's operations were never measured, found in seconds.

Only commands compare, once at their start; inside the library nothing does. The first process of a run
compares and keeps the answers in the user's cache, and all go by its answers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from segdeformer.config import EvalConfig, Recipe
from segdeformer.engine.distributed import ALONE, Processes, explained_loss, from_first
from segdeformer.engine.losses import training_losses
from segdeformer.errors import UserError
from segdeformer.kernels.choices import (
    Choice,
    agree,
    answers_by_class,
    measured_choices,
    read_choices,
    tuned_choices,
)
from segdeformer.kernels.impl import Call, Impl, calls_noted
from segdeformer.kernels.tiles import LARGEST_WIDTH, architecture_of, size_class
from segdeformer.kernels.upsample_argmax import upsample_argmax
from segdeformer.kernels.upsample_cross_entropy import upsample_cross_entropy
from segdeformer.models.segmenter import Segmenter
from segdeformer.models.skeleton import build_skeleton

if TYPE_CHECKING:
    from segdeformer.engine.run import Run
    from segdeformer.kernels.races import Fought, Race

SECONDS = 10.0


def settle_training(run: Run, *, say: Callable[[str], None]) -> None:
    """Before a run trains: for its steps and its validations."""
    recipe, part_size = run.recipe, run.part_size
    settle_impl(
        run.impl,
        run.device,
        lambda: training_calls(recipe, part_size),
        about={"train": recipe.train.precision, "model": recipe.model.model_dump_json(), "batch": part_size}
        | {"crop": recipe.augment.crop, "evaluate": recipe.evaluate.model_dump_json()},
        processes=run.processes,
        say=say,
    )


def settle_inference(
    model: Segmenter,
    recipe: Recipe,
    protocol: EvalConfig,
    *,
    device: torch.device,
    impl: Impl,
    processes: Processes = ALONE,
    say: Callable[[str], None],
) -> None:
    """Before a model scores or predicts images under a protocol."""
    settle_impl(
        impl,
        device,
        lambda: inference_calls(model, recipe, protocol, device=device),
        about={"folded": model.is_folded, "model": recipe.model.model_dump_json()}
        | {"crop": recipe.augment.crop, "evaluate": protocol.model_dump_json()},
        processes=processes,
        say=say,
    )


def training_calls(recipe: Recipe, part_size: int) -> list[Call]:
    """What `auto` decides in a step on `part_size` images and in a validation, by shapes alone."""
    dtype = getattr(torch, recipe.train.precision)
    model = build_skeleton(recipe.model)
    crop = recipe.augment.crop
    images_B3HW = torch.empty(part_size, 3, *crop, dtype=dtype, device="meta")
    labels_BHW = torch.empty(part_size, *crop, dtype=torch.uint8, device="meta")
    with calls_noted() as calls, torch.enable_grad():
        # In the dtype that autocast gives its products: the meta device has no autocast.
        training_losses(model.to(dtype)(images_B3HW), labels_BHW, recipe.train, None)
    return calls + inference_calls(model.float(), recipe, recipe.evaluate, device=images_B3HW.device)


def inference_calls(
    model: Segmenter, recipe: Recipe, protocol: EvalConfig, *, device: torch.device
) -> list[Call]:
    """What `auto` decides for one image, a blank one of the protocol's window or of the training crop."""
    size = protocol.window if protocol.mode == "slide" else recipe.augment.crop
    one_view = protocol.mode == "whole" and len(protocol.scales) == 1 and not protocol.flip
    with calls_noted() as calls, torch.inference_mode():
        logits_1Khw = model(torch.zeros(1, 3, *size, device=device)).logits_BKhw.float()
        if one_view:  # others are put together in strips, whatever the implementation
            upsample_argmax(logits_1Khw, size)
            upsample_cross_entropy(logits_1Khw, torch.zeros(1, *size, dtype=torch.uint8, device=device))
    return calls


def settle_impl(
    impl: Impl,
    device: torch.device,
    find_calls: Callable[[], Sequence[Call]],
    *,
    about: Mapping[str, object],
    processes: Processes = ALONE,
    say: Callable[[str], None],
) -> None:
    """Compare what was not measured yet of the calls that `find_calls` makes, and let all go by the answers.

    about: what the calls depend on; where they were settled before, they are not even made. All processes
    of a run must call it; the first one compares, in about `SECONDS`, and says so in a line before and
    another after. What fails, is wrong or has no time left stays PyTorch's.
    """
    if impl != "auto" or device.type != "cuda":
        return
    choices = _settled(device, find_calls, about, say) if processes.is_first else []
    with explained_loss():
        choices = from_first(choices, processes)
    agree(device, choices)


def _settled(
    device: torch.device,
    find_calls: Callable[[], Sequence[Call]],
    about: Mapping[str, object],
    say: Callable[[str], None],
) -> list[Choice]:
    """All choices that hold now."""
    if not can_compare(device):
        return measured_choices(device)
    from segdeformer.kernels.auto_file import AutoFile

    gpu = torch.cuda.get_device_name(device)
    file, tuned = AutoFile.read(gpu), tuned_choices(device)
    known = tuned + file.choices
    digest = hashlib.sha256(json.dumps([dict(about), tuned]).encode()).hexdigest()[:16]
    if digest in file.settled:
        return known
    try:
        races = open_races(find_calls(), known)
    except (RuntimeError, ValueError):  # the command's own first step meets it too, and can explain it
        return known
    rows: list[dict[str, Any]] = []
    if races:
        say(
            f"auto: {len(races)} operations of this model were never measured on {gpu}; comparing Triton "
            f"with PyTorch, about {SECONDS:.0f} s"
        )
        results = _compare(races, device)
        verdicts = [_verdict(race, results.get(race)) for race in races]
        rows = [verdict.row for verdict in verdicts if verdict.row is not None]
        say(f"auto: {_summary(verdicts)}")
    problem = file.add(rows, digest if len(rows) == len(races) else None)
    if problem is not None:
        say(f"auto: this is not kept for the next time ({problem})")
    return known + read_choices(rows)


def can_compare(device: torch.device) -> bool:
    """Whether our kernels could run there."""
    if importlib.util.find_spec("triton") is None:
        return False
    from segdeformer.kernels.launch import interpreting

    try:
        architecture_of(device)
    except UserError:
        return False
    return not interpreting()


def open_races(calls: Sequence[Call], known: Sequence[Choice]) -> list[Race]:
    """What has to be compared: one race for each kind of call and size class that nothing is known of."""
    from segdeformer.kernels.races import Race

    found: dict[tuple[object, ...], Race] = {}
    for call in calls:
        race = Race.of(call)
        place = size_class(race.size)
        # In float32 PyTorch's attention is out of reach; and wider than this there is no kernel.
        bytes_wanted = (2, 4) if race.is_upsampling else (2,)
        if race.element_bytes not in bytes_wanted or max(race.width, race.value_width) > LARGEST_WIDTH:
            continue
        if place not in answers_by_class(known, *call[:5]):
            kind = race.operation, race.widths_key, race.element_bytes, race.training
            found.setdefault((*kind, place), race)
    return list(found.values())


def _compare(races: Sequence[Race], device: torch.device) -> dict[Race, Fought]:
    from segdeformer.kernels.comparing import compare

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the comparison runs in a process of its own
    return {fought.race: fought for fought in compare(races, device, seconds=SECONDS)}


class _Verdict(NamedTuple):
    """What came of a race. row: as it is kept; None if it is to be run again the next time."""

    by_triton: bool
    words: str
    row: dict[str, Any] | None


def _verdict(race: Race, fought: Fought | None) -> _Verdict:
    name = race.label
    if fought is None:
        return _Verdict(False, f"{name} (not compared: no time left)", None)
    choice, refusals = fought.choice, fought.refusals
    if not refusals and choice is not None:
        times = f"{choice.triton_ms:.3g} ms to {choice.sdpa_ms:.3g}"
        return _Verdict(choice.triton_wins, f"{name} ({times})", choice.row())
    side, reason = next(iter(refusals.items()))
    words = f"{name} ({side}: {reason})"
    if side != "triton":
        return _Verdict(False, words, None)
    lost = choice or Choice(*race.key, triton_ms=math.inf, sdpa_ms=math.inf)
    return _Verdict(False, words, lost.row() | {"reason": reason})


def _summary(verdicts: Sequence[_Verdict]) -> str:
    ours = ", ".join(verdict.words for verdict in verdicts if verdict.by_triton)
    theirs = ", ".join(verdict.words for verdict in verdicts if not verdict.by_triton)
    return "; ".join(
        f"{side} for {names}" for side, names in (("triton", ours), ("PyTorch", theirs)) if names
    )
