"""What a converted checkpoint says besides its weights: recipe, classes, licence."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

from segdeformer.config import DataName, ModelConfig, Recipe, load_recipe
from segdeformer.data.classes import CLASS_TABLES, ClassTable, default_colors, load_classes
from segdeformer.data.published import SETS
from segdeformer.errors import UsageError, UserError
from segdeformer.models.skeleton import without_weights
from segdeformer.weights.deduce import Deduced
from segdeformer.weights.names import PROJECT_TITLES
from segdeformer.weights.source import Source

NVIDIA = "NVIDIA Source Code License for SegFormer (non-commercial)"
APACHE = "Apache-2.0"
MIT = "MIT"

# Data sets whose classes ship with the package, by their number.
KNOWN_DATA: dict[int, DataName] = {about["classes"]: cast(DataName, name) for name, about in SETS.items()}
LEAST_AGREEMENT = 0.9  # of class names that make a file's table that of a known data set; spellings differ

OTHER_DATA_RECIPE = "folder-pretrained"


class Classes(NamedTuple):
    """origin: where the names come from, in words."""

    table: ClassTable
    data: DataName  # `folder` where no known data set has these classes
    origin: str


def find_classes(source: Source, num_classes: int, wanted: str | None) -> Classes:
    """The classes that `wanted` names (data set or TOML file), else the file's own, else by their number."""
    if wanted is not None:
        known = next((data for data in KNOWN_DATA.values() if data == wanted), None)
        path = CLASS_TABLES / f"{known}.toml" if known else Path(wanted)
        if not path.is_file():
            raise UsageError(
                f"--classes {wanted}: neither {', '.join(KNOWN_DATA.values())} nor a TOML file of class names"
            )
        table = load_classes(path)
        if len(table.names) != num_classes:
            raise UsageError(
                f"--classes {wanted}: has {len(table.names)} classes, the model in {source.path} has "
                f"{num_classes}"
            )
        return Classes(table, known or "folder", wanted)
    data = KNOWN_DATA.get(num_classes)
    shipped = load_classes(CLASS_TABLES / f"{data}.toml") if data else None
    names = source.class_names
    if names is None or len(names) != num_classes:
        if data and shipped:
            return Classes(shipped, data, f"{data}, since there are {num_classes}; the file names none")
        unnamed = tuple(f"class {index}" for index in range(num_classes))
        table = ClassTable(unnamed, default_colors(num_classes))
        return Classes(table, "folder", "unnamed; name them with --classes FILE")
    if data and shipped:
        alike = sum(_plain(one) == _plain(other) for one, other in zip(names, shipped.names, strict=True))
        if alike >= LEAST_AGREEMENT * num_classes:
            return Classes(shipped, data, f"{data}, as in the file")
    unique = tuple(dict.fromkeys(name.strip() for name in names))
    if len(unique) != num_classes:
        raise UserError(f"{source.path}: two of its class names are the same; name them with --classes FILE")
    colors = source.class_colors or default_colors(num_classes)
    return Classes(ClassTable(unique, colors), "folder", "as in the file")


def _plain(name: str) -> str:
    """A class name without what spellings differ in, or its first word of several: `bed `, `rug;carpet`."""
    return "".join(c for c in name.partition(";")[0].lower() if c.isalnum())


def make_recipe(source: Source, deduced: Deduced, classes: Classes) -> Recipe:
    """Our recipe for this data and kind of model, with the model of the file."""
    recipes = SETS[classes.data]["converted"] if classes.data in SETS else {}
    base = load_recipe(recipes.get(deduced.family, OTHER_DATA_RECIPE))
    encoder = deduced.config.encoder.model_copy(update={"drop_path": base.model.encoder.drop_path})
    model = deduced.config.model_copy(update={"encoder": encoder})
    name = f"{source.path.resolve().stem}-from-{source.project}"
    description = f"{deduced.title}, converted from {PROJECT_TITLES[source.project]}"
    return _with_model(base, source, model).model_copy(
        update={"name": name, "description": description, "reported": None}
    )


def adapt_recipe(source: Source, recipe: Recipe, num_classes: int) -> Recipe:
    """A named recipe, with what the weights decide: no pretraining file, and a folder's number of classes."""
    if recipe.data.name != "folder" and recipe.model.num_classes != num_classes:
        raise UsageError(
            f"--recipe {recipe.name}: is for {recipe.model.num_classes} classes, the model in {source.path} "
            f"has {num_classes}"
        )
    model = recipe.model.model_copy(update={"num_classes": num_classes})
    return _with_model(recipe, source, model)


def _with_model(recipe: Recipe, source: Source, model: ModelConfig) -> Recipe:
    data = recipe.data
    if source.mean_std is not None:
        mean, std = source.mean_std
        data = data.model_copy(update={"mean": mean, "std": std})
    return recipe.model_copy(update={"model": without_weights(model), "data": data})


def default_license(source: Source, config: ModelConfig, *, microsoft: bool) -> str:
    """What the file states, or what published weights are under. Every MiT stems from NVIDIA's weights."""
    if source.license is not None:
        return source.license
    if config.encoder.name.startswith("mit_"):
        return NVIDIA
    return MIT if microsoft else APACHE


def forbids_commerce(license_text: str) -> bool:
    """Whether a licence's name says that it does."""
    return "non-commercial" in license_text.lower() or "noncommercial" in license_text.lower()
