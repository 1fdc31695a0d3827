"""AdamW's parameter groups and the learning rate at every iteration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from segdeformer.config import TrainConfig
from segdeformer.errors import UsageError
from segdeformer.models.segmenter import Segmenter

# Position tables of timm's encoders, which like norms are not decayed (Swin's own recipe).
UNDECAYED_NAMES = ("pos_embed", "relative_position_bias_table", "cls_token", "reg_token", "dist_token")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class ParameterGroup(NamedTuple):
    name: str
    learning_rate: float
    weight_decay: float
    parameters: list[nn.Parameter]

    @property
    def num_scalars(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.parameters)


def parameter_groups(model: Segmenter, config: TrainConfig) -> list[ParameterGroup]:
    """Encoder, encoder norms and positions (no decay), and everything else (rate times the multiplier).

    With `train.layer_decay` the encoder's groups are those of its layers; raises `UsageError` where none have
    names. In mmcv's rules the decoder's key outranks the norms': decoder norms, biases and class tokens
    get the multiplied rate and the decay too. That is what the published scores were trained with.
    """
    undecayed = {
        id(p)
        for module in model.encoder.modules()
        if isinstance(module, NORMS) or "Norm" in type(module).__name__
        for p in module.parameters(recurse=False)
    }
    undecayed |= {
        id(p) for name, p in model.encoder.named_parameters() if name.rpartition(".")[2] in UNDECAYED_NAMES
    }
    encoder_ids = {id(p) for p in model.encoder.parameters()}
    rate, decay = config.learning_rate, config.weight_decay
    groups = []
    for name, parameters, factor in _encoder_layers(model, config.layer_decay):
        plain = [p for p in parameters if id(p) not in undecayed]
        others = [p for p in parameters if id(p) in undecayed]
        groups.append(ParameterGroup(name, rate * factor, decay, plain))
        groups.append(ParameterGroup(f"{name} norms, positions", rate * factor, 0.0, others))
    decoder = [p for p in model.parameters() if p.requires_grad and id(p) not in encoder_ids]
    groups.append(ParameterGroup("decoder", rate * config.decoder_lr_multiplier, decay, decoder))
    return [group for group in groups if group.parameters]


class _Layer(NamedTuple):
    name: str
    parameters: list[nn.Parameter]
    factor: float  # of the learning rate


def _encoder_layers(model: Segmenter, layer_decay: float | None) -> list[_Layer]:
    """The encoder as one, or layer by layer from the input on, as timm divides it; the last has factor 1.

    With L layers, layer i has layer_decay ** (L - 1 - i) of the rate (BEiT).
    """
    learned = [(name, p) for name, p in model.encoder.named_parameters() if p.requires_grad]
    if layer_decay is None:
        return [_Layer("encoder", [p for _, p in learned], 1.0)]
    backbone: Any = getattr(model.encoder, "backbone", None)
    if not hasattr(backbone, "group_matcher"):
        raise UsageError(
            "`train.layer_decay` needs an encoder of timm that says what its layers are, such as "
            "vit_base_patch16_224; leave it out"
        )
    from timm.models import group_parameters

    layer_of = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    first, last = min(layer_of.values()), max(layer_of.values())
    layers: dict[int, list[nn.Parameter]] = {}
    for name, parameter in learned:
        place = name.removeprefix("backbone.")
        # Our norms of the maps stand after all layers; older timm has register tokens there too.
        layer = first if place in UNDECAYED_NAMES else layer_of.get(place, last)
        layers.setdefault(layer, []).append(parameter)
    numbers = sorted(layers)
    return [
        _Layer(f"encoder layer {place}", layers[number], layer_decay ** (len(numbers) - 1 - place))
        for place, number in enumerate(numbers)
    ]


def build_optimizer(groups: list[ParameterGroup], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the groups; each remembers its peak rate as `peak_lr`."""
    return torch.optim.AdamW(
        [
            {
                "params": group.parameters,
                "lr": group.learning_rate,
                "peak_lr": group.learning_rate,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=config.betas,
    )


def learning_rate_at(iteration: int, peak: float, config: TrainConfig) -> float:
    """Poly decay, multiplied by a linear warm-up during the first `warmup_iterations`."""
    remaining = 1.0 - iteration / config.iterations
    rate = (peak - config.min_learning_rate) * remaining**config.poly_power + config.min_learning_rate
    if iteration >= config.warmup_iterations:
        return rate
    missing = (1.0 - iteration / config.warmup_iterations) * (1.0 - config.warmup_ratio)
    return rate * (1.0 - missing)


def set_learning_rate(optimizer: torch.optim.Optimizer, iteration: int, config: TrainConfig) -> None:
    """Give every group its rate for this iteration."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(iteration, group["peak_lr"], config)
