"""One training of a study: a recipe with a changed start, its scores, and how sharp its attention became."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.study.starts import STARTS
from segdeformer import api
from segdeformer.ablation.results import count_images, write_image_counts
from segdeformer.commit import commit
from segdeformer.config import Recipe, load_recipe
from segdeformer.config.changes import change_recipe
from segdeformer.data.datasets import choose_data, open_splits
from segdeformer.data.loader import training_batch
from segdeformer.files import write_text
from segdeformer.inference.statistics import image_sums, mious
from segdeformer.measure.sharpness import attention_sharpness
from segdeformer.models.segmenter import Segmenter
from segdeformer.training.loop import Step, Validated
from segdeformer.training.run import RECIPE
from segdeformer.weights.build import build_model

CURVE_POINTS = 8  # of sharpness, over a run
PROBED_IMAGES = 4

# Forms beside the starts of an affine context with both attentions.
FORMS: dict[str, dict[str, Any]] = {
    "fusion only": {"context": None},
    "conv_bn_relu": {"projection": "conv_bn_relu"},
    "internal only, small": {"external": None},
    "external only, small": {"internal": None},
    "internal only, unit": {"external": None},
    "external only, unit": {"internal": None},
}


@dataclass(frozen=True)
class Setting:
    """A recipe on its data. name: of its folder."""

    name: str
    recipe: str
    data: str | None = None
    classes: str | None = None
    weights: str | None = None
    iterations: int | None = None


@dataclass(frozen=True)
class Job:
    setting: Setting
    variant: str
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        """Of this training; results.json in it says that it is done."""
        return self.out / self.setting.name / self.variant.replace(" ", "_") / f"seed-{self.seed}"

    @property
    def is_done(self) -> bool:
        return (self.folder / "results.json").exists()


def variant_names() -> list[str]:
    """What `Job.variant` may be; a start may also be that of `internal only` or `external only`."""
    return [*FORMS, *STARTS]


def run(job: Job, threads: int) -> str:
    """Train from where it stands, score every validation image, write results.json; a line to print."""
    torch.set_num_threads(threads)
    setting = job.setting
    recipe = _recipe(job)
    data = open_splits(recipe.data)
    model = _fresh_model(recipe, job.variant)
    if (job.folder / RECIPE).exists():
        training = api.train(data=data, model=model, out=job.folder, resume=True, device="cpu", workers=0)
    else:
        training = api.train(recipe, data=data, model=model, out=job.folder, device="cpu", workers=0)
    notes_file = job.folder / "notes.json"
    notes: dict[str, Any] = {"curve": [], "seconds": 0.0}
    if notes_file.exists():
        notes = json.loads(notes_file.read_text("utf-8"))
    every = max(1, recipe.train.iterations // CURVE_POINTS)
    probe = training_batch(data.val, _probing(recipe), 0, places=range(PROBED_IMAGES)).images_B3HW
    began = time.perf_counter()
    if not notes["curve"]:  # of a run that was stopped before its first validation, from there on
        _note(notes, training.run.progress.iteration, model, probe)
    for event in training:
        if isinstance(event, Step) and event.iteration % every == 0:
            _note(notes, event.iteration, model, probe)
        if isinstance(event, Validated):
            scores = {"iteration": event.iteration, "miou": event.report.scores.miou}
            notes.setdefault("validations", []).append(scores)
            now = time.perf_counter()
            notes["seconds"] += now - began
            began = now
            write_text(notes_file, json.dumps(notes))
    counts = count_images(model.eval(), data.val, recipe, iteration=recipe.train.iterations)
    write_image_counts(job.folder / "image_counts.npz", counts)
    miou = float(mious(image_sums(counts.counts[None]))[0])
    results = {
        "setting": setting.name,
        "variant": job.variant,
        "seed": job.seed,
        "miou": miou,
        **notes,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "commit": commit(),
    }
    write_text(job.folder / "results.json", json.dumps(results, indent=1) + "\n")
    for weights in (job.folder / "checkpoints").rglob("*"):
        if weights.is_file():
            weights.unlink()  # a study keeps scores
    for weights in job.folder.glob("*.safetensors"):
        weights.unlink()
    return f"{setting.name}, {job.variant}, seed {job.seed}: mIoU {miou:.2%}, {notes['seconds']:.0f} s"


def _recipe(job: Job) -> Recipe:
    setting = job.setting
    recipe = load_recipe(setting.recipe)
    classes = None if setting.classes is None else Path(setting.classes)
    recipe = change_recipe(
        recipe,
        data=choose_data(recipe.data, setting.data, classes),
        iterations=setting.iterations,
        seed=job.seed,
        weights=setting.weights,
    )
    values = recipe.model_dump(exclude_none=True)
    form = FORMS.get(job.variant, {})
    values["model"]["context"]["start"] = "small"  # what the starts change
    if "context" in form:
        del values["model"]["context"]
    else:
        context = values["model"]["context"] | form
        values["model"]["context"] = {key: value for key, value in context.items() if value is not None}
    return Recipe.model_validate(values)


def _probing(recipe: Recipe) -> Recipe:
    """The same images and crops for every seed."""
    values = recipe.model_dump(exclude_none=True)
    values["train"]["seed"] = 0
    return Recipe.model_validate(values)


def _fresh_model(recipe: Recipe, variant: str) -> Segmenter:
    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe.model)
    start = variant.split(", ")[-1] if "only, " in variant else variant
    if start in STARTS:
        STARTS[start](model.decoder.context)  # type: ignore[arg-type]
    return model


def _note(notes: dict[str, Any], iteration: int, model: Segmenter, probe: torch.Tensor) -> None:
    found = attention_sharpness(model, probe)
    notes["curve"].append({"iteration": iteration, "sharpness": [each._asdict() for each in found]})
