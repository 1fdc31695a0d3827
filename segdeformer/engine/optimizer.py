"""AdamW's parameter groups and the learning rate at every iteration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from segdeformer.config import TrainConfig
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

    In mmcv's rules the decoder's key outranks the norms': decoder norms, biases and class tokens
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
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    encoder_ids = {id(p) for p in encoder}
    rate, decay = config.learning_rate, config.weight_decay
    groups = [
        ParameterGroup("encoder", rate, decay, [p for p in encoder if id(p) not in undecayed]),
        ParameterGroup("encoder norms, positions", rate, 0.0, [p for p in encoder if id(p) in undecayed]),
        ParameterGroup(
            "decoder",
            rate * config.decoder_lr_multiplier,
            decay,
            [p for p in model.parameters() if p.requires_grad and id(p) not in encoder_ids],
        ),
    ]
    return [group for group in groups if group.parameters]


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
