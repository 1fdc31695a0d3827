"""The terms of the training loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from segdeformer.config.fields import Options, PythonPath, Share, Strict, kind_or_own

LossAverage = Literal["valid", "all"]
LogitsName = Literal["logits", "class_logits", "auxiliary_logits"]


class LossTerm(Strict):
    """A term: `weight` times the loss of one of the model's logits, logged as `loss_NAME`.

    of: `logits`, `class_logits` (the middle logits of Eq. 6, for L_attn of Eq. 8), or `auxiliary_logits`.
        Left out where the model has none.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    of: LogitsName = "logits"
    weight: Annotated[float, Field(ge=0)] = 1.0


class CrossEntropyConfig(LossTerm):
    """Cross-entropy at the labels' size (Eqs. 8-9).

    average: divide the sum by the `valid` pixels or by `all` (mmsegmentation). class_weights: one factor per
    class.
    """

    kind: Literal["cross_entropy"] = "cross_entropy"
    average: LossAverage = "all"
    label_smoothing: Share = 0.0
    class_weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)] | None = None


class OwnLossConfig(LossTerm):
    """A term of one's own, a Python path; see `protocols.OwnLoss`."""

    kind: PythonPath
    options: Options | None = None


LossConfig = Annotated[
    Annotated[CrossEntropyConfig, Tag("cross_entropy")] | Annotated[OwnLossConfig, Tag("module:name")],
    Discriminator(kind_or_own),
]

DEFAULT_LOSSES: tuple[CrossEntropyConfig, ...] = (
    CrossEntropyConfig(name="seg"),
    CrossEntropyConfig(name="attn", of="class_logits", weight=0.4),
    CrossEntropyConfig(name="aux", of="auxiliary_logits", weight=0.4),
)
# Keys of [train] before terms had names, and the terms' keys that they stand for.
OLD_SHARED = {
    "loss_average": "average",
    "label_smoothing": "label_smoothing",
    "class_weights": "class_weights",
}
OLD_WEIGHTS = {"attention_loss_weight": "attn", "auxiliary_loss_weight": "aux"}


def with_named_losses(train: Any) -> Any:
    """The values of a recipe's [train] of the version before, with `losses` instead of the old keys."""
    if not isinstance(train, dict) or not any(key in train for key in (*OLD_SHARED, *OLD_WEIGHTS)):
        return train
    old = {key: value for key, value in train.items() if key in OLD_SHARED or key in OLD_WEIGHTS}
    if "losses" in train:
        raise ValueError(
            f"has `losses` and the older `{next(iter(old))}`; move it into the terms of `losses`"
        )
    shared = {new: old[key] for key, new in OLD_SHARED.items() if old.get(key) is not None}
    weights = {name: old[key] for key, name in OLD_WEIGHTS.items() if key in old}
    losses = []
    for term in DEFAULT_LOSSES:
        values = term.model_dump(exclude_none=True) | shared
        losses.append(values | ({"weight": weights[term.name]} if term.name in weights else {}))
    return {key: value for key, value in train.items() if key not in old} | {"losses": losses}
