"""A recipe's model with the weights that it starts from."""

from __future__ import annotations

from segdeformer.config import ModelConfig
from segdeformer.kernels.impl import Impl
from segdeformer.models.context import ExternalForm
from segdeformer.models.segmenter import Segmenter, build_segmenter
from segdeformer.plugins import is_path
from segdeformer.weights.encoder import load_encoder_weights


def build_model(
    config: ModelConfig, *, impl: Impl = "auto", external_form: ExternalForm = "low_rank"
) -> Segmenter:
    """The whole model of a recipe, its encoder loaded as `config.encoder.weights` says.

    Options as in `build_decoder`. Raises `UserError` when the encoder or its weights cannot be had.
    """
    model = build_segmenter(config, impl=impl, external_form=external_form)
    if config.encoder.weights not in ("none", "timm") and not is_path(config.encoder.name):
        model.weights_report = load_encoder_weights(model.encoder, config.encoder.weights)
    return model
