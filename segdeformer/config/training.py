"""How a recipe trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from segdeformer.config.fields import Beta, Natural, Positive, PositiveFloat, Share, Strict

LossAverage = Literal["valid", "all"]
Precision = Literal["float32", "bfloat16", "float16"]

# Optional keys default to None: TOML cannot say null, so only then does a resolved recipe read back.


class TrainConfig(Strict):
    """AdamW, linear warm-up times poly decay, L_seg + weight * L_attn (Eq. 9).

    batch_size: images of one optimiser step, over all processes and accumulated parts.
    decoder_lr_multiplier: all decoder parameters, norms and tokens too, get this times the rate.
    layer_decay: every block of the encoder learns at this times the rate of the block after it (timm's ViTs
        and pyramids; BEiT's rule).
    clip_norm: longest allowed gradient, over all parameters together.
    ema_decay: validate and keep as best an exponential moving average of the weights.
    precision: of the forward pass; weights, sums and losses stay float32. float16 scales its losses.
    max_skipped_steps: steps in a row without finite loss and gradient that are left out before training ends.
    loss_average: divide the summed cross-entropy by the `valid` pixels or by `all` (mmsegmentation).
    class_weights: one factor per class.
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
    loss_average: LossAverage = "all"
    attention_loss_weight: Annotated[float, Field(ge=0)] = 0.4
    auxiliary_loss_weight: Annotated[float, Field(ge=0)] = 0.4
    class_weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)] | None = None
    label_smoothing: Share = 0.0
    validate_every: Positive = 16_000
    checkpoint_every: Positive = 4_000
