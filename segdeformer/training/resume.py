"""The optimiser's state by the names of parameters, so that it fits any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segdeformer.errors import UserError


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Each parameter's tensors of the optimiser, unsharded; all processes of a sharded model must call it."""
    return {
        name: {key: full_tensor(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def give_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]], *, origin: Path
) -> None:
    """Put a stored state into a fresh optimiser of the same model, sharded where the model is.

    Raises `UserError` if it is another model's.
    """
    parameters = dict(model.named_parameters())
    strange = sorted(state.keys() - parameters.keys()) + [
        name
        for name in sorted(state.keys() & parameters.keys())
        if any(value.ndim and value.shape != parameters[name].shape for value in state[name].values())
    ]
    if strange:
        raise UserError(
            f"{origin} holds the optimiser's state of another model (`{strange[0]}`); it cannot be resumed"
        )
    for name, values in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: _like(value, parameter) for key, value in values.items()}


def full_tensor(value: Any) -> Any:
    """A sharded tensor (a DTensor) put together in each process; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device, and sharded as it is; the step counter is a number on the CPU."""
    if value.ndim == 0 and value.shape != parameter.shape:
        return value.clone()
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, copy=True, memory_format=torch.preserve_format)
