"""Changes of a recipe that a caller or a command line asks for, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from segdeformer.config.data import DataConfig
from segdeformer.config.recipe import OPEN, Recipe
from segdeformer.errors import UsageError
from segdeformer.refusals import explain


def change_recipe(
    recipe: Recipe,
    *,
    data: DataConfig | None = None,
    num_classes: int | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    precision: str | None = None,
    weights: str | None = None,
    mode: str | None = None,
    scales: Sequence[float] | None = None,
    flip: bool | None = None,
    key_stride: int | None = None,
    keeps_schedule: bool = False,
) -> Recipe:
    """The recipe with whatever is not None put in, validated anew.

    num_classes: of the data, once that is known; then class weights are counted, of data `folder` too.
    weights: of the encoder. mode, scales, flip, key_stride: of the evaluation. Warm-up and intervals scale
    with `iterations`, unless a run that has begun `keeps_schedule`. Raises `UsageError` in one line.
    """
    values = recipe.model_dump(exclude_none=True)
    train = values["train"]
    if iterations is not None and not keeps_schedule:
        ratio = iterations / train["iterations"]
        train["warmup_iterations"] = round(train["warmup_iterations"] * ratio)
        for name in ("validate_every", "checkpoint_every"):
            train[name] = max(1, round(train[name] * ratio))
    if data is not None:
        values["data"] = data.model_dump(exclude_none=True)
    if num_classes is not None:
        values["model"]["num_classes"] = num_classes
    if weights is not None:
        values["model"]["encoder"]["weights"] = weights
    protocol = {"mode": mode, "scales": scales, "flip": flip, "key_stride": key_stride}
    schedule = {"iterations": iterations, "batch_size": batch_size, "seed": seed, "precision": precision}
    train.update({key: value for key, value in schedule.items() if value is not None})
    values["evaluate"].update({key: value for key, value in protocol.items() if value is not None})
    try:
        return Recipe.model_validate(values, context=OPEN if num_classes is None else None)
    except ValidationError as error:
        first = error.errors()[0]
        where, key = [*map(str, first["loc"][:2]), "", ""][:2]  # nowhere: tables that contradict each other
        if where == "evaluate" and protocol.get(key) is not None:
            raise UsageError(f"--{key}: {first['msg']}; got {first['input']!r}") from None
        raise UsageError(f"{recipe.name}: {explain(error, Recipe)}") from None


def differences(before: Any, after: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Every value of nested tables that differs, by its dotted key, as (before, after); None for none.

    Tables in a list that have names, such as a loss's terms, are told apart by these.
    """
    before, after = _by_name(before), _by_name(after)
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys((*before, *after)):
            found |= differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
        return found
    return {} if before == after else {path: (before, after)}


def _by_name(values: Any) -> Any:
    if not isinstance(values, list | tuple) or not values:
        return values
    named = all(isinstance(value, dict) and "name" in value for value in values)
    return {value["name"]: value for value in values} if named else values
