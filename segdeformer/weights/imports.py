"""A model of another project as one of ours.

Every tensor of its file is used, or is on the list below of those that are not. One that neither the model
nor the list knows is an error, and so is one that the model needs and the file lacks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segdeformer.config import ModelConfig, Recipe, load_recipe
from segdeformer.errors import UserError, and_more, count
from segdeformer.models.encoders import TimmEncoder
from segdeformer.models.segmenter import Segmenter
from segdeformer.weights.build import build_model
from segdeformer.weights.deduce import deduce_model
from segdeformer.weights.labels import Classes, adapt_recipe, default_license, find_classes, make_recipe
from segdeformer.weights.names import (
    NAMINGS,
    PROJECT_TITLES,
    Naming,
    Project,
    Table,
    classifier_of,
    name_table,
)
from segdeformer.weights.source import Source, read_source

# NVlabs' files have `conv_seg` too, which is not their classifier, so mmsegmentation's comes last.
CLASSIFIERS = tuple(classifier_of(project) for project in ("nvlabs", "huggingface", "mmseg"))
POSITION_INDEX = "relative_position_index"


class Unused(NamedTuple):
    """Names in a file that a model has no use for, as a regular expression, and why not."""

    pattern: str
    reason: str


ANY_PROJECT = (
    Unused(r"(backbone\.)?(head|classifier|fc)\.(\w+\.)*(weight|bias)", "classifier of the pretraining"),
    Unused(rf".*\.{POSITION_INDEX}", "made from the window; compared, and equal"),
    Unused(r".*\.attn_mask", "made from the image size"),
    Unused(r"data_preprocessor\.(mean|std)", "in the recipe, as data.mean and data.std"),
    Unused(r"ema_(backbone|neck|decode_head|auxiliary_head)_\w+", "what mmcv's averaging keeps aside"),
    Unused(r"steps|n_averaged|num_updates", "counter of a running average"),
)
OTHER_COPY = Unused(
    r"(.+\.)?(backbone|neck|segformer|decode_head|auxiliary_head)\..+", "another copy of the model"
)
NVLABS_UNUSED = Unused(r"decode_head\.conv_seg\.(weight|bias)", "NVlabs' code never calls it")
AUXILIARY_UNUSED = Unused(r"auxiliary_head\..+", "training only; not the one 3x3 block that ours is")
COUNTER = ".num_batches_tracked"  # older files lack it, and it is used in no model here


class SetAside(NamedTuple):
    name: str
    reason: str


class Imported(NamedTuple):
    """A converted model in eval mode.

    missing: names that the file lacks, which start at zero. used: number of its tensors in the model.
    """

    model: Segmenter
    source: Source
    naming: Naming
    recipe: Recipe
    title: str
    classes: Classes
    license: str
    used: int
    unused: tuple[SetAside, ...]
    missing: tuple[str, ...]


def import_model(
    path: Path,
    *,
    project: Project | None = None,
    prefix: str | None = None,
    recipe_name: str | None = None,
    classes: str | None = None,
    license_text: str | None = None,
) -> Imported:
    """Read a model file of NVlabs, mmsegmentation or Hugging Face.

    project, prefix: see `read_source`. recipe_name: a recipe or TOML file whose model the file must have;
    None deduces it. classes: a data set's name or a TOML file. license_text: None takes that of the published
    weights.
    Raises `UserError` when the file cannot be read or its tensors are not those of the model.
    """
    source = read_source(path, project=project, prefix=prefix)
    num_classes = _num_classes(source)
    found = find_classes(source, num_classes, classes)
    if recipe_name is None:
        deduced = deduce_model(source)
        recipe, title = make_recipe(source, deduced, found), deduced.title
        model = build_model(recipe.model)
        naming = deduced.naming
    else:
        recipe = adapt_recipe(source, load_recipe(recipe_name), num_classes)
        if not any(name.startswith("auxiliary_head.") for name in source.tensors):
            # It is for training: a file without one does not need it.
            model_config = recipe.model.model_copy(update={"auxiliary": None})
            recipe = recipe.model_copy(update={"model": model_config})
        title = f"recipe {recipe_name}"
        model = build_model(recipe.model)
        naming = max(
            NAMINGS[source.project],
            key=lambda naming: sum(link.theirs in source.tensors for link in name_table(model, naming).links),
        )
    table = name_table(model, naming)
    if table.unknown:
        raise UserError(
            f"{path}: {title} has `{table.unknown[0]}` (and {len(table.unknown) - 1} more), for which "
            f"{PROJECT_TITLES[source.project]}'s files have no name; the file holds {_looks_like(source)}"
        )
    missing = _fill(model, table, source, title)
    unused = _account(table, source, recipe.model, title)
    _compare_position_indices(model, source)
    license_text = license_text or default_license(source, recipe.model, microsoft=naming == "microsoft")
    return Imported(
        model=model.eval(),
        source=source,
        naming=naming,
        recipe=recipe,
        title=title,
        classes=found,
        license=license_text,
        used=len(table.links) - len(missing),
        unused=unused,
        missing=missing,
    )


def _num_classes(source: Source) -> int:
    weight = next((source.tensors[name] for name in CLASSIFIERS if name in source.tensors), None)
    if weight is None:
        raise UserError(f"{source.path}: has none of {', '.join(f'`{name}`' for name in CLASSIFIERS)}")
    num_classes = len(weight) if weight.ndim else 1
    if not 2 <= num_classes <= 255:
        raise UserError(f"{source.path}: predicts {count(num_classes, 'class')}; 2 to 255 can be converted")
    return num_classes


def _fill(model: Segmenter, table: Table, source: Source, title: str) -> tuple[str, ...]:
    """Load the file's tensors into the model; return the names of the counters that it lacks."""
    state = model.state_dict()
    values: dict[str, Tensor] = {}
    lacking = [link.theirs for link in table.links if link.theirs not in source.tensors]
    if needed := [name for name in lacking if not name.endswith(COUNTER)]:
        seems = _looks_like(source)
        raise UserError(
            f"{source.path}: lacks `{source.prefix}{needed[0]}`{and_more(needed)}, which {title} needs; "
            + ("the file is damaged" if seems == title else f"the file holds {seems}")
        )
    for link in table.links:
        if link.theirs in lacking:
            values.update((name, torch.zeros_like(state[name])) for name in link.ours)
            continue
        given, expected = source.tensors[link.theirs], link.write(state).shape
        if given.shape != expected:
            raise UserError(
                f"{source.path}: `{source.prefix}{link.theirs}` has shape {tuple(given.shape)}, {title} "
                f"needs {tuple(expected)}"
            )
        if not torch.isfinite(given).all():
            raise UserError(
                f"{source.path}: `{source.prefix}{link.theirs}` holds NaN or infinity; take another file"
            )
        values |= link.read(given, state)
    model.load_state_dict(values)
    return tuple(lacking)


def _account(table: Table, source: Source, config: ModelConfig, title: str) -> tuple[SetAside, ...]:
    """Why each tensor that is not used is not; raises `UserError` for one without a reason."""
    known: tuple[Unused, ...] = ANY_PROJECT
    if source.project == "nvlabs":
        known = (NVLABS_UNUSED, *known)
    if config.auxiliary is None:
        known = (AUXILIARY_UNUSED, *known)
    used = {link.theirs for link in table.links}
    rest = [(name, known) for name in source.tensors if name not in used]
    rest += [(name, (OTHER_COPY, *known)) for name in source.aside]
    aside, strange = [], []
    for name, rules in rest:
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            strange.append(name)
        else:
            aside.append(SetAside(name, rule.reason))
    if strange:
        raise UserError(
            f"{source.path}: `{strange[0]}`{and_more(strange)} has no place in {title}, which would compute "
            "something else; nothing was converted"
        )
    return tuple(aside)


def _compare_position_indices(model: Segmenter, source: Source) -> None:
    """Swin's index into the table of relative positions: ours is made anew, and must be the file's."""
    given = [name for name in source.tensors if name.endswith(POSITION_INDEX)]
    if not given or not isinstance(model.encoder, TimmEncoder):
        return
    own = next(buffer for name, buffer in model.encoder.named_buffers() if name.endswith(POSITION_INDEX))
    for name in given:
        if not torch.equal(source.tensors[name].long(), own.long()):
            raise UserError(
                f"{source.path}: `{source.prefix}{name}` orders the relative positions in another way than "
                "Swin; it cannot be converted"
            )


def _looks_like(source: Source) -> str:
    """What the file seems to hold, for an error."""
    try:
        return deduce_model(source).title
    except UserError:
        return f"a model in {PROJECT_TITLES[source.project]}'s names"


def report_values(imported: Imported) -> dict[str, Any]:
    """Everything about a conversion, for JSON."""
    source = imported.source
    return {
        "source": str(source.path),
        "project": source.project,
        "names": imported.naming,
        "container": source.container,
        "prefix": source.prefix,
        "model": imported.title,
        "recipe": imported.recipe.model_dump(mode="json", exclude_none=True),
        "classes": {"origin": imported.classes.origin, "names": imported.classes.table.names},
        "license": imported.license,
        "tensors": len(source.tensors) + len(source.aside),
        "used": imported.used,
        "unused": {item.name: item.reason for item in imported.unused},
        "missing": list(imported.missing),
        "not_read": list(source.passed_over),
    }
