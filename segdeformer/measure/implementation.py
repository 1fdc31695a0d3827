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
from segdeformer.errors import UserError, count, verb_of
from segdeformer.kernels.choices import (
    Choice,
    Kind,
    agree,
    answers_by_class,
    measured_choices,
    read_choices,
    tuned_choices,
)
from segdeformer.kernels.cpu import measure_when_asked
from segdeformer.kernels.impl import Call, calls_noted
from segdeformer.kernels.tiles import LARGEST_WIDTH, architecture_of, size_class
from segdeformer.kernels.upsample.argmax import upsample_argmax
from segdeformer.kernels.upsample.cross_entropy import upsample_cross_entropy
from segdeformer.models.segmenter import Segmenter
from segdeformer.models.skeleton import build_skeleton
from segdeformer.runtime import Runtime
from segdeformer.runtime.distributed import explained_loss, from_first
from segdeformer.training.losses import build_terms, training_losses

if TYPE_CHECKING:
    from segdeformer.kernels.tuning.cases import Comparison
    from segdeformer.kernels.tuning.comparison import Compared
    from segdeformer.training.run import Run

SECONDS = 10.0


def settle_training(run: Run, *, say: Callable[[str], None]) -> None:
    """Before a run trains: for its steps and its validations."""
    recipe, size = run.recipe, run.micro_batch_size
    settle_impl(
        run.runtime,
        lambda: training_calls(recipe, size),
        about={"train": recipe.train.precision, "model": recipe.model.model_dump_json(), "batch": size}
        | {"crop": recipe.augment.crop, "evaluate": recipe.evaluate.model_dump_json()},
        say=say,
    )


def settle_inference(
    model: Segmenter,
    recipe: Recipe,
    protocol: EvalConfig,
    *,
    runtime: Runtime,
    say: Callable[[str], None],
) -> None:
    """Before a model scores or predicts images under a protocol."""
    settle_impl(
        runtime,
        lambda: inference_calls(model, recipe, protocol, device=runtime.device),
        about={"folded": model.is_folded, "model": recipe.model.model_dump_json()}
        | {"crop": recipe.augment.crop, "evaluate": protocol.model_dump_json()},
        say=say,
    )


def training_calls(recipe: Recipe, micro_batch_size: int) -> list[Call]:
    """What `auto` decides in a step on `micro_batch_size` images and in a validation, by shapes alone."""
    dtype = getattr(torch, recipe.train.precision)
    model = build_skeleton(recipe.model)
    crop = recipe.augment.crop
    images_B3HW = torch.empty(micro_batch_size, 3, *crop, dtype=dtype, device="meta")
    labels_BHW = torch.empty(micro_batch_size, *crop, dtype=torch.uint8, device="meta")
    with calls_noted() as calls, torch.enable_grad():
        # In the dtype that autocast gives its products: the meta device has no autocast.
        terms = build_terms(recipe.train.losses, recipe.model.num_classes, device=images_B3HW.device)
        training_losses(model.to(dtype)(images_B3HW), labels_BHW, terms)
    return calls + inference_calls(model.float(), recipe, recipe.evaluate, device=images_B3HW.device)


def inference_calls(
    model: Segmenter, recipe: Recipe, protocol: EvalConfig, *, device: torch.device
) -> list[Call]:
    """What `auto` decides for one image, a blank one of the protocol's window or of the training crop."""
    size = protocol.window if protocol.mode == "slide" else recipe.augment.crop
    one_view = protocol.mode != "slide" and len(protocol.scales) == 1 and not protocol.flip
    with calls_noted() as calls, torch.inference_mode():
        logits_1Khw = model(torch.zeros(1, 3, *size, device=device)).logits_BKhw.float()
        if one_view:  # others are put together in strips, whatever the implementation
            upsample_argmax(logits_1Khw, size)
            upsample_cross_entropy(logits_1Khw, torch.zeros(1, *size, dtype=torch.uint8, device=device))
    return calls


def settle_impl(
    runtime: Runtime,
    find_calls: Callable[[], Sequence[Call]],
    *,
    about: Mapping[str, object],
    say: Callable[[str], None],
) -> None:
    """Compare what was not measured yet of the calls that `find_calls` makes, and let all go by the answers.

    about: what the calls depend on; where they were settled before, they are not even made. All processes
    of a run must call it; the first one compares, in about `SECONDS`, and says so in a line before and
    another after. What fails, is wrong or has no time left stays PyTorch's. On a CPU nothing is compared
    yet: see `kernels.cpu`.
    """
    device, processes = runtime.device, runtime.processes
    if runtime.impl != "auto":
        return
    if device.type == "cpu":
        measure_when_asked(say if processes.is_first else lambda line: None)
    if device.type != "cuda":
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
    from segdeformer.kernels.tuning.store import AutoFile

    gpu = torch.cuda.get_device_name(device)
    file, tuned = AutoFile.read(gpu), tuned_choices(device)
    known = tuned + file.choices
    digest = hashlib.sha256(json.dumps([dict(about), tuned]).encode()).hexdigest()[:16]
    if digest in file.settled:
        return known
    try:
        comparisons = open_comparisons(find_calls(), known)
    except (RuntimeError, ValueError):  # the command's own first step meets it too, and can explain it
        return known
    rows: list[dict[str, Any]] = []
    if comparisons:
        say(
            f"auto: {count(len(comparisons), 'operation')} of this model "
            f"{verb_of(len(comparisons), 'were')} never measured on {gpu}; "
            f"comparing Triton with PyTorch, about {SECONDS:.0f} s"
        )
        results = _compare(comparisons, device)
        verdicts = [_verdict(comparison, results.get(comparison)) for comparison in comparisons]
        rows = [verdict.row for verdict in verdicts if verdict.row is not None]
        sides = [(side, [v.words for v in verdicts if v.winner == side]) for side in ("triton", "PyTorch")]
        say("auto: " + "; ".join(f"{side} for {', '.join(names)}" for side, names in sides if names))
    problem = file.add(rows, digest if len(rows) == len(comparisons) else None)
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


def open_comparisons(calls: Sequence[Call], known: Sequence[Choice]) -> list[Comparison]:
    """What has to be compared, once for each kind of call and size class nothing is known of."""
    from segdeformer.kernels.tuning.cases import Comparison

    found: dict[tuple[object, ...], Comparison] = {}
    for call in calls:
        comparison = Comparison.of(call)
        place = size_class(comparison.size)
        # In float32 PyTorch's attention is out of reach; and wider than this there is no kernel.
        bytes_wanted = (2, 4) if comparison.is_upsampling else (2,)
        if (
            comparison.element_bytes not in bytes_wanted
            or max(comparison.width, comparison.value_width) > LARGEST_WIDTH
        ):
            continue
        if place not in answers_by_class(known, Kind(*call[:5])):
            kind = comparison.operation, comparison.widths_key, comparison.element_bytes, comparison.training
            found.setdefault((*kind, place), comparison)
    return list(found.values())


def _compare(comparisons: Sequence[Comparison], device: torch.device) -> dict[Comparison, Compared]:
    from segdeformer.kernels.tuning.comparison import compare

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the comparison runs in a process of its own
    return {compared.comparison: compared for compared in compare(comparisons, device, seconds=SECONDS)}


class _Verdict(NamedTuple):
    """What came of a comparison. row: as it is kept; None if it is to be run again the next time."""

    winner: str
    words: str
    row: dict[str, Any] | None


def _verdict(comparison: Comparison, compared: Compared | None) -> _Verdict:
    name, theirs = comparison.label, "PyTorch"
    if compared is None:
        return _Verdict(theirs, f"{name} (not compared: no time left)", None)
    choice, refusals = compared.choice, compared.refusals
    if not refusals and choice is not None:
        words = f"{name} ({choice.triton_ms:.3g} ms to {choice.alternative_ms:.3g})"
        return _Verdict("triton" if choice.triton_wins else theirs, words, choice.row())
    side, reason = next(iter(refusals.items()))
    row = None
    if side == "triton":
        lost = choice or Choice(*comparison.key, triton_ms=math.inf, alternative_ms=math.inf)
        row = lost.row() | {"reason": reason}
    return _Verdict(theirs, f"{name} ({side}: {reason})", row)
