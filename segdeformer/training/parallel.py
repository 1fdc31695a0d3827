"""What makes a model train in many processes, compiled, or in less memory; parameters keep their names."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from segdeformer.errors import UsageError
from segdeformer.models.segmenter import Segmenter
from segdeformer.runtime.distributed import Processes
from segdeformer.training.resume import full_tensor

_Context = contextlib.AbstractContextManager[None]


def wrap_model(
    model: Segmenter, processes: Processes, device: torch.device, *, compiled: bool, sharded: bool
) -> Callable[[Tensor], Any]:
    """What training calls: the model, compiled if wanted, its gradients averaged over the processes."""
    forward: nn.Module = model
    if compiled:
        import torch._dynamo
        import torch._inductor.config

        torch._inductor.config.fallback_random = True  # dropout's numbers are those of uncompiled models
        torch._dynamo.config.allow_unspec_int_on_nn_module = True  # where images stand is a number
        forward = torch.compile(model)  # type: ignore[assignment]
    if processes.size > 1 and not sharded:
        # The strides of 1x1 convolutions' gradients differ in name only.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        forward = DistributedDataParallel(
            forward,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    return forward


def checkpoint_activations(encoder: nn.Module) -> None:
    """Compute the inside of every encoder block again for the gradients, instead of keeping it.

    Raises `UsageError` for an encoder whose blocks are not known.
    """
    blocks = list(encoder_blocks(encoder))
    if not blocks:
        name = getattr(encoder, "name", type(encoder).__name__)
        raise UsageError(f"--grad-checkpointing does not know the blocks of encoder `{name}`; leave it out")
    for block in blocks:
        run = functools.partial(checkpoint, block.forward, use_reentrant=False)
        norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms:
            run.keywords["context_fn"] = functools.partial(_once_and_again, norms)
        block.forward = run


def _once_and_again(norms: Sequence[nn.Module]) -> tuple[_Context, _Context]:
    """What a block runs in first, and what when it is computed again: BatchNorms have seen the batch then."""
    return contextlib.nullcontext(), _statistics_kept(norms)


@contextlib.contextmanager
def _statistics_kept(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Let BatchNorms update copies of their running statistics meanwhile."""
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def shard_model(model: Segmenter, device: torch.device) -> None:
    """Give every process a shard of each parameter (FSDP2), in place; blocks gather theirs when they run."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in encoder_blocks(model.encoder):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded model, put together in each process."""
    return {name: full_tensor(value) for name, value in model.state_dict().items()}


def encoder_blocks(encoder: nn.Module) -> Iterator[nn.Module]:
    """The blocks that an encoder is a stack of."""
    for parent in encoder.modules():
        for name, child in parent.named_children():
            if name in ("blocks", "layer1", "layer2", "layer3", "layer4") and isinstance(
                child, nn.Sequential | nn.ModuleList
            ):
                for block in child:  # Twins has lists of lists
                    yield from block if isinstance(block, nn.ModuleList) else [block]
