"""How a recipe trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from segdeformer.config.fields import Beta, Natural, Positive, PositiveFloat, Share, Strict
from segdeformer.config.losses import DEFAULT_LOSSES, LossConfig, with_named_losses

Precision = Literal["float32", "bfloat16", "float16"]

# Optional keys default to None: TOML cannot say null, so only then does a resolved recipe read back.


class TrainConfig(Strict):
    """AdamW, linear warm-up times poly decay, a weighted sum of losses (Eq. 9).

    batch_size: images of one optimiser step, over all processes and accumulated parts.
    decoder_lr_multiplier: all decoder parameters, norms and tokens too, get this times the rate.
    layer_decay: every block of the encoder learns at this times the rate of the block after it (timm's ViTs
        and pyramids; BEiT's rule).
    clip_norm: longest allowed gradient, over all parameters together.
    ema_decay: validate and keep as best an exponential moving average of the weights.
    precision: of the forward pass; weights, sums and losses stay float32. float16 scales its losses.
    max_skipped_steps: steps in a row without finite loss and gradient that are left out before training ends.
    losses: the terms of the loss; by default L_seg + 0.4 L_attn + 0.4 L_aux.
    """

    iterations: Positive = 160_000
    batch_size: Positive = 16
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    learning_rate: PositiveFloat = 6e-5
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    decoder_lr_multiplier: PositiveFloat = 10.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    warmup_iterations: Natural = 1500
    warmup_ratio: Share = 1e-6
    poly_power: Annotated[float, Field(ge=0)] = 1.0
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: PositiveFloat | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Precision = "float32"
    max_skipped_steps: Natural = 5
    losses: Annotated[tuple[LossConfig, ...], Field(strict=False)] = DEFAULT_LOSSES
    validate_every: Positive = 16_000
    checkpoint_every: Positive = 4_000

    @model_validator(mode="before")
    @classmethod
    def _old_keys_are_terms(cls, values: Any) -> Any:
        return with_named_losses(values)

    @model_validator(mode="after")
    def _terms_are_told_apart(self) -> TrainConfig:
        names = [term.name for term in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"`losses` has terms of one name: {', '.join(names)}; rename one")
        if all(term.of != "logits" for term in self.losses):
            raise ValueError("no term of `losses` is `of` the `logits`; without one nothing is learned")
        return self
