"""Checkpoints: one safetensors file with the weights, the resolved recipe and the classes inside.

A run folder holds `last.safetensors`, `best.safetensors`, `recipe.toml`, `metrics.jsonl`, and under
`checkpoints/` what a resumed run goes on from (see `saves`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from segdeformer.config import Recipe, validate_recipe
from segdeformer.data.classes import ClassTable
from segdeformer.errors import UsageError, UserError
from segdeformer.files import replacing
from segdeformer.kernels.impl import Impl
from segdeformer.models.few_keys import set_key_stride
from segdeformer.models.segmenter import Segmenter
from segdeformer.models.skeleton import without_weights
from segdeformer.weights.build import build_model
from segdeformer.weights.signatures import failed_download, is_pytorch

FORMAT = "segdeformer-1"
METADATA_KEY = "segdeformer"
LAST, BEST, MODEL = "last.safetensors", "best.safetensors", "model.safetensors"
RUNS = Path("runs")


class Checkpoint(NamedTuple):
    """What a checkpoint file tells besides the weights."""

    path: Path
    recipe: Recipe
    classes: ClassTable
    iteration: int
    best_miou: float | None
    validation_due: bool  # stopped before the validation of this iteration was done
    folded: bool  # for inference only, see `Segmenter.fold`
    license: str | None = None  # of the weights, where they were converted from another project's


class Loaded(NamedTuple):
    """A model in eval mode, and where it came from."""

    model: Segmenter
    checkpoint: Checkpoint


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    impl: Impl = "auto",
    fold: bool | None = None,
    key_stride: int | None = None,
    model: Segmenter | None = None,
) -> Loaded:
    """Load a model from a checkpoint, or from a run folder (its best, else its last).

    fold: True for a folded model (`Segmenter.fold`), False for one that is not, None as it was saved.
    key_stride: of every attention (see `models.few_keys`), an approximation where it is over 1; None as it
        was saved, which is all keys or as it was trained.
    model: one's own, which the checkpoint's weights are loaded into; by default the recipe's is built.
    Raises `UserError` when there is none, it is damaged, its weights do not fit its recipe, or it cannot
    be had as `fold` says.
    """
    checkpoint = read_checkpoint(find_checkpoint(path))
    if fold is False and checkpoint.folded:
        raise UsageError(f"{checkpoint.path} holds a folded model, which cannot be unfolded; run it folded")
    model = saved_model(checkpoint, impl=impl, model=model).to(device).eval()
    set_key_stride(model, checkpoint.recipe.evaluate.key_stride if key_stride is None else key_stride)
    return Loaded(model.fold() if fold else model, checkpoint)


def save(path: str | Path, model: Segmenter, checkpoint: Checkpoint) -> None:
    """Write a loaded model, folded say, as a checkpoint of its own.

    Raises `UserError` when the file cannot be written.
    """
    about = checkpoint._replace(validation_due=False)._asdict()
    del about["path"], about["folded"]  # where it is now, and as the model is
    save_checkpoint(Path(path), model, **about)


def save_key_stride(checkpoint: Checkpoint, stride: int) -> None:
    """Write into the checkpoint's file that it is evaluated and predicts with this key stride.

    Its weights stay as they are. Raises `UserError` when the file cannot be read or written.
    """
    values = checkpoint.recipe.model_dump(exclude_none=True)
    values["evaluate"]["key_stride"] = stride
    recipe = validate_recipe(values, str(checkpoint.path))
    save(checkpoint.path, saved_model(checkpoint), checkpoint._replace(recipe=recipe))


def saved_model(checkpoint: Checkpoint, *, impl: Impl = "auto", model: Segmenter | None = None) -> Segmenter:
    """The checkpoint's model, or one's own, with its weights; no file of pretraining is needed any more."""
    if model is None:
        model = build_model(without_weights(checkpoint.recipe.model), impl=impl)
    if checkpoint.folded:
        model = model.fold()
    load_weights(model, checkpoint.path)
    return model


def find_checkpoint(path: str | Path | None) -> Path:
    """The checkpoint that a file, a run or checkpoint folder, or nothing (the newest run of runs/) means."""
    if path is None:
        path = newest_run()
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no checkpoint {path}: neither a file nor a run folder")
    for name in (BEST, LAST, MODEL):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds no checkpoint ({BEST} or {LAST}); was it trained to its first save?")


def newest_run(runs: Path = RUNS) -> Path:
    """The run folder saved to last; raises `UserError` when there is none."""
    saved = sorted(runs.glob(f"*/{LAST}"), key=lambda file: file.stat().st_mtime)
    if not saved:
        raise UserError(f"no run in {runs}/ yet; name a checkpoint, or start with `segdeformer train`")
    return saved[-1].parent


def save_checkpoint(
    path: Path,
    model: Segmenter,
    *,
    recipe: Recipe,
    classes: ClassTable,
    iteration: int,
    best_miou: float | None,
    validation_due: bool = False,
    license: str | None = None,
) -> None:
    """Write weights, recipe and classes as one file, whole or not at all.

    Raises `UserError`, and keeps what was there, when a weight is not finite or the disk is full.
    """
    broken = [n for n, t in model.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise UserError(
            f"weights are not finite at iteration {iteration} (`{broken[0]}`), {path} is left as it was; "
            "start anew with a lower train.learning_rate"
        )
    about = {
        "format": FORMAT,
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "classes": {"names": classes.names, "colors": classes.colors},
        "iteration": iteration,
        "best_miou": best_miou,
        "validation_due": validation_due,
        "folded": model.is_folded,
    }
    if license is not None:
        about["license"] = license
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as aside:
        try:
            # One key: safetensors writes several in random order, and equal runs should make equal files.
            save_file(weights, aside, {METADATA_KEY: json.dumps(about)})
        except SafetensorError as error:  # a full disk arrives as this
            raise _system_error(error) from None


def _system_error(error: SafetensorError) -> OSError:
    """The operating system's error inside one of safetensors."""
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(None, str(error))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's metadata; the weights stay on disk. Raises `UserError` where it is none."""
    if (instead := failed_download(path)) is not None:
        raise UserError(f"{path} {instead}")
    if is_pytorch(path):
        raise UserError(
            f"{path} is a PyTorch file, no checkpoint of segdeformer; make one of another project's whole "
            f"model by `segdeformer convert {path} --out FILE`, start from an encoder's weights by "
            f"`segdeformer train --weights {path}`"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({error}); it may be truncated or of another kind"
        ) from None
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path} is a safetensors file, but no checkpoint of segdeformer ({FORMAT}); "
            "for encoder weights use `segdeformer train --weights FILE`"
        )
    try:
        return _described(path, json.loads(metadata[METADATA_KEY]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read as a checkpoint: its description is damaged "
            f"({type(error).__name__}: {error}); use another copy"
        ) from None


def _described(path: Path, about: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a description; whatever is raised, it is damaged or of another format."""
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}, expected {FORMAT}")
    classes = about["classes"]
    return Checkpoint(
        path=path,
        recipe=validate_recipe(about["recipe"], str(path)),
        classes=ClassTable(tuple(classes["names"]), tuple(tuple(color) for color in classes["colors"])),
        iteration=int(about["iteration"]),
        best_miou=about["best_miou"],
        validation_due=bool(about["validation_due"]),
        folded=bool(about.get("folded", False)),  # files from before folding lack it
        license=about.get("license"),
    )


def load_weights(model: Segmenter, path: Path) -> None:
    """Copy a checkpoint's weights into a model of the same recipe; every key must match."""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({error}); it may be truncated") from None
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unexpected or wrong:
        raise UserError(
            f"{path} does not fit its own recipe: {len(missing)} keys missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of other shapes {sorted(wrong)[:3]}"
        )
    model.load_state_dict(weights)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
