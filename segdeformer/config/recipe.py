"""A whole recipe: read, validated, written."""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from segdeformer.config.data import AugmentConfig, DataConfig, EvalConfig
from segdeformer.config.fields import Strict
from segdeformer.config.losses import LossConfig
from segdeformer.config.model import ModelConfig, UperNetConfig
from segdeformer.config.toml import parse_toml, read_toml_text
from segdeformer.config.training import TrainConfig
from segdeformer.errors import UsageError
from segdeformer.refusals import explain

DEFAULT_RECIPE = "landcover"
OPEN = {"num_classes": "open"}  # context of a validation before the classes.toml of a `folder` has been read


class ReportedConfig(Strict):
    """What the paper reports for this row, for the report's second column; never used otherwise."""

    table: Annotated[int, Field(ge=1, le=8)]
    row: str
    miou: float | None = None
    miou_multi_scale: float | None = None
    params_millions: float | None = None


class Recipe(Strict):
    name: str
    description: str
    reported: ReportedConfig | None = None
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvalConfig = EvalConfig()

    @property
    def active_losses(self) -> tuple[LossConfig, ...]:
        """The terms whose logits the model makes."""
        external = None if self.model.context is None else self.model.context.external
        made = {
            "logits": True,
            "class_logits": external is not None and external.attention_loss,
            "auxiliary_logits": self.model.auxiliary is not None,
        }
        return tuple(term for term in self.train.losses if made[term.of])

    def check_class_weights(self) -> None:
        """Raises `ValueError` where a loss has other than one weight per class."""
        for place, term in enumerate(self.train.losses):
            weights = getattr(term, "class_weights", None)
            if weights is not None and len(weights) != self.model.num_classes:
                raise ValueError(
                    f"train.losses.{place}.class_weights has {len(weights)} values for "
                    f"model.num_classes {self.model.num_classes}"
                )

    @model_validator(mode="after")
    def _one_weight_per_class(self, info: ValidationInfo) -> Recipe:
        if not (info.context == OPEN and self.data.name == "folder"):
            self.check_class_weights()
        return self

    @model_validator(mode="after")
    def _auxiliary_head_learns(self) -> Recipe:
        if self.model.auxiliary and all(term.of != "auxiliary_logits" for term in self.train.losses):
            raise ValueError(
                'model.auxiliary has no term in train.losses: add one of "auxiliary_logits", or leave it out'
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_sees_two_values(self) -> Recipe:
        fusion = self.model.fusion
        if isinstance(fusion, UperNetConfig) and 1 in fusion.pools and self.train.batch_size == 1:
            raise ValueError(
                "train.batch_size is 1, but BatchNorm after UperNet's 1x1 pool sees one value per image and "
                "needs two; set it to 2 or more"
            )
        return self


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    folder = resources.files("segdeformer") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path.

    Raises `UsageError` when there is no such recipe, the file is no TOML, or a key or value is wrong.
    """
    if name_or_path in recipe_names():
        return parse_recipe(recipe_text(name_or_path), name_or_path)
    return parse_recipe(_recipe_file(name_or_path), name_or_path)


def recipe_text(name: str) -> str:
    """The TOML of a shipped recipe, comments and all; raises `UsageError` for an unknown name."""
    if name in recipe_names():
        return read_toml_text(resources.files("segdeformer") / "recipes" / f"{name}.toml")
    raise _no_recipe(name)


def _recipe_file(name_or_path: str) -> str:
    path = Path(name_or_path)
    if not path.is_file():
        raise _no_recipe(name_or_path)
    try:
        return read_toml_text(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: cannot be read as a TOML text file ({error})") from None


def _no_recipe(name: str) -> UsageError:
    near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return UsageError(
        f"no recipe `{name}`: neither a shipped recipe nor a TOML file; "
        f"{hint}`segdeformer recipes` lists them"
    )


def parse_recipe(text: str, origin: str) -> Recipe:
    """Validate TOML text strictly. `origin` names it in errors.

    Of data `folder`, class weights are not counted yet: its classes.toml decides the number of classes.
    """
    try:
        values = parse_toml(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin}: not valid TOML: {error}") from None
    return validate_recipe(values, origin, context=OPEN)


def validate_recipe(values: dict[str, Any], origin: str, *, context: Any = None) -> Recipe:
    """Validate a nested dict, as read from TOML or from a checkpoint's metadata.

    context: `OPEN` before the data is known.
    """
    try:
        return Recipe.model_validate(values, context=context)
    except ValidationError as error:
        raise UsageError(f"{origin}: {explain(error, Recipe)}") from None


def recipe_toml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as TOML that `load_recipe` reads back."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
