"""The typed recipe: everything that decides a result, nothing that does not.

A recipe is one complete TOML file. Unknown keys, wrong types and values out of range are
refused with the path of the key. Devices, workers and implementations are not in it: they
do not change results beyond rounding.
"""

from segdeformer.config.changes import change_recipe
from segdeformer.config.data import AugmentConfig, DataConfig, DataName, EvalConfig, EvalMode, TransformConfig
from segdeformer.config.fields import IGNORE_INDEX, Strict
from segdeformer.config.losses import CrossEntropyConfig, LossAverage, LossConfig, OwnLossConfig
from segdeformer.config.model import (
    AuxiliaryConfig,
    ContextConfig,
    EncoderConfig,
    ExternalConfig,
    FaPNConfig,
    FPNConfig,
    FusionConfig,
    HeadConfig,
    InternalConfig,
    MLPFusionConfig,
    ModelConfig,
    OwnFusionConfig,
    Projection,
    ReductionBy,
    Start,
    ThirdPartyConfig,
    UperNetConfig,
)
from segdeformer.config.recipe import (
    DEFAULT_RECIPE,
    Recipe,
    ReportedConfig,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_text,
    recipe_toml,
    validate_recipe,
)
from segdeformer.config.training import TrainConfig

__all__ = [
    "DEFAULT_RECIPE",
    "IGNORE_INDEX",
    "AugmentConfig",
    "AuxiliaryConfig",
    "ContextConfig",
    "CrossEntropyConfig",
    "DataConfig",
    "DataName",
    "EncoderConfig",
    "EvalConfig",
    "EvalMode",
    "ExternalConfig",
    "FPNConfig",
    "FaPNConfig",
    "FusionConfig",
    "HeadConfig",
    "InternalConfig",
    "LossAverage",
    "LossConfig",
    "MLPFusionConfig",
    "ModelConfig",
    "OwnFusionConfig",
    "OwnLossConfig",
    "Projection",
    "Recipe",
    "ReductionBy",
    "ReportedConfig",
    "Start",
    "Strict",
    "ThirdPartyConfig",
    "TrainConfig",
    "TransformConfig",
    "UperNetConfig",
    "change_recipe",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
    "recipe_text",
    "recipe_toml",
    "validate_recipe",
]
