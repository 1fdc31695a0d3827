"""Nothing in a loop waits for a GPU, and operators, which a CUDA graph may capture, stay on their device.

Proved without one: fake CUDA tensors, or meta tensors where gradients are taken, have no values, so that
reading one is an error; and every operation is asked for the devices that it touches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segdeformer.config import DataConfig, EvalConfig, Recipe, load_recipe
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.classes import ClassTable
from segdeformer.data.loader import training_batch
from segdeformer.data.samples import Splits
from segdeformer.inference import evaluate
from segdeformer.inference import views as inference
from segdeformer.kernels.launch import Launch
from segdeformer.kernels.upsample import operator as upsample_triton
from segdeformer.kernels.upsample import rows, strips
from segdeformer.kernels.upsample.argmax import add_confusion, upsample_confusion
from segdeformer.kernels.upsample.cross_entropy import HardPixels, upsample_cross_entropy
from segdeformer.models.layers import SegOutput
from segdeformer.runtime import Runtime
from segdeformer.training.run import start_run
from segdeformer.training.step import take_step

GPU = torch.device("cuda", 0)


class WaitedError(AssertionError):
    """An operation that waits for a GPU, or copies from or to it in the middle of the work."""


class NoWaiting(TorchDispatchMode):
    """Raises at an operation on tensors of two devices, but for asynchronous copies to the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            non_blocking = (kwargs or {}).get("non_blocking", False)
            to_gpu = isinstance(result, torch.Tensor) and result.device.type != "cpu"
            if not (non_blocking and to_gpu and func is torch.ops.aten._to_copy.default):
                raise WaitedError(f"{func} on {[(str(t.device), tuple(t.shape)) for t in tensors]}")
        return result


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    with FakeTensorMode(), NoWaiting():
        yield


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def labels_like(*shape: int) -> torch.Tensor:
    return fake(*shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0, 0].item(),
        lambda x: int(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.cpu().numpy(),
        lambda x: x[x > 0],
        lambda x: torch.bincount(x.long().flatten()),
        lambda x: torch.tensor([1.0, 2.0], device=GPU),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.copy_(torch.ones(4, 5)),
        lambda x: x[torch.tensor([1, 2])],
        lambda x: x[0, 0].copy_(torch.tensor(1.0)),
        lambda x: torch.ones(4, 5).to(GPU),
    ],
)
def test_the_proof_sees_what_waits(wait):
    with fake_gpu(), pytest.raises((WaitedError, DataDependentOutputException, DynamicOutputShapeException)):
        wait(fake(4, 5))


@pytest.mark.parametrize("size", [(5, 7), (8, 8)])
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.1)])
def test_strips_of_the_loss_read_nothing_back(monkeypatch, size, weighted, smoothing):
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 19 * 32 * 5)  # strips of five rows
    loss_strips = strips.upsample_loss_strips._init_fn
    with fake_gpu():
        weights = fake(19) if weighted else None
        logits = fake(2, 19, *size, dtype=torch.bfloat16)
        total, losses, gradient = loss_strips(logits, labels_like(2, 32, 32), weights, 255, smoothing, True)
    assert (total.shape, losses.shape, gradient.shape) == ((), (2, 32, 32), (2, 19, *size))
    assert {x.device for x in (total, losses, gradient)} == {GPU}


def test_strips_of_the_argmax_read_nothing_back(monkeypatch):
    monkeypatch.setattr(rows, "STRIP_BYTES", 4 * 19 * 32 * 5)
    with fake_gpu():
        ids, confidence = strips.upsample_argmax_strips._init_fn(fake(2, 19, 5, 7), 33, 32, True)
    assert (ids.shape, ids.dtype, confidence.shape) == ((2, 33, 32), torch.uint8, (2, 33, 32))


@pytest.mark.parametrize("num_classes", [19, 300])
def test_confusion_is_counted_without_a_look(num_classes):
    with fake_gpu():
        matrix = fake(num_classes, num_classes, dtype=torch.int64)
        add_confusion(matrix, labels_like(33, 41), fake(33, 41, dtype=torch.int16))
        upsample_confusion(fake(1, num_classes, 5, 7), labels_like(1, 33, 41), matrix, impl="sdpa")
    assert matrix.device == GPU


@pytest.mark.parametrize("average", ["valid", "all"])
@pytest.mark.parametrize("hard", [None, HardPixels(0.7, 100)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_around_its_operator_waits_for_nothing(average, hard, weighted):
    with fake_gpu():
        weights = fake(19) if weighted else None
        loss = upsample_cross_entropy(
            fake(2, 19, 5, 7),
            labels_like(2, 33, 41),
            class_weights=weights,
            ignore_index=-100,
            average=average,
            hard_pixels=hard,
            impl="sdpa",
        )
    assert loss.device == GPU


@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.1)])
def test_the_host_s_part_of_the_kernels_waits_for_nothing(monkeypatch, weighted, smoothing):
    launched = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch))
    with fake_gpu():
        logits, labels = fake(2, 19, 5, 7, dtype=torch.bfloat16), labels_like(2, 33, 41)
        weights = fake(19) if weighted else None
        upsample_triton.upsample_loss_triton._init_fn(logits, labels, weights, 255, smoothing)
        upsample_triton.upsample_loss_backward._init_fn(
            logits, labels, weights, fake(2, 33, 41), fake(), 255, smoothing
        )
        upsample_triton.upsample_argmax_triton._init_fn(logits, 33, 41, True)
    names = [launch.name for launch in launched]
    assert names == ["upsampled_loss", "upsampled_loss_gradient", "upsampled_argmax"]
    for launch in launched:  # nothing is made anew for each call but what the caller asked for
        given = {"logits", "labels", "class_weights", "weight_sum", "lse", "losses", "factor", "grad_logits"}
        assert set(launch.tensors) <= given | {"ids", "confidence"}


class Quarter(torch.nn.Module):
    """Logits at a quarter of the image, made of nothing."""

    def forward(self, images_B3HW: torch.Tensor) -> SegOutput:
        height, width = (-(-side // 4) for side in images_B3HW.shape[2:])
        return SegOutput(images_B3HW.new_zeros(images_B3HW.shape[0], 19, height, width), None, None)


PROTOCOLS = [
    EvalConfig(),
    EvalConfig(flip=True, scales=(0.5, 1.0)),
    EvalConfig(mode="slide", window=(24, 24), stride=(16, 16)),
    EvalConfig(mode="slide", window=(24, 24), stride=(16, 16), resize_to=(64, 48)),
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=["whole", "several", "slide", "slide, resized"])
def test_an_image_is_evaluated_without_waiting(monkeypatch, protocol):
    monkeypatch.setattr(rows, "STRIP_BYTES", 4 * 19 * 53 * 9)
    monkeypatch.setattr(  # fake tensors have no pinned memory
        inference, "moved", lambda tensor, device: tensor.to(device, non_blocking=True)
    )
    image = np.zeros((45, 53, 3), np.uint8)
    tally = evaluate.Tally(ClassTable(tuple(map(str, range(19))), ((0, 0, 0),) * 19))
    with fake_gpu():
        tally.counts_KK = fake(19, 19, dtype=torch.int64)
        views = inference.make_views(Quarter(), image, protocol, DataConfig(name="synthetic"), GPU)
        with torch.inference_mode():
            ids = evaluate.add_image(tally, views, labels_like(45, 53), "sdpa")
    assert (ids.shape, ids.dtype, ids.device) == ((45, 53), torch.uint8, GPU)
    assert [loss.device for loss in tally.image_losses] == [GPU]


def momentum_recipe(**changes: object) -> Recipe:
    base = load_recipe("synthetic")
    external = base.model.context.external.model_copy(update={"momentum": 0.1, "decouple": False})
    context = base.model.context.model_copy(update={"external": external})
    train = base.train.model_copy(update={"iterations": 3, "batch_size": 4, **changes})
    return base.model_copy(
        update={
            "model": base.model.model_copy(update={"context": context}),
            "augment": base.augment.model_copy(update={"crop": (40, 48)}),
            "train": train,
        }
    )


@pytest.mark.parametrize("momentum", [False, True])
def test_a_training_step_waits_once(monkeypatch, tmp_path, momentum):
    """On meta tensors, which autograd takes anywhere; what the wait would bring is put in."""
    recipe = momentum_recipe(clip_norm=1.0)
    if not momentum:
        recipe = recipe.model_copy(update={"model": load_recipe("synthetic").model})
    device = torch.device("meta")
    data = SyntheticDataset("train", num_images=5, size_hw=(49, 63))
    run = start_run(recipe, tmp_path / "run", Splits(data, data), runtime=Runtime(device))
    waits = []

    def tolist(tensor: torch.Tensor) -> list[float]:
        waits.append((tensor.device.type, tuple(tensor.shape)))
        return [1.5, 1.0, 0.5, 0.0, 2.0]

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: contextlib.nullcontext()
    )  # meta tensors have none
    batch = training_batch(data, recipe, 0)
    with NoWaiting():
        result = take_step(run, [batch], [dict.fromkeys(("seg", "attn", "aux"), 1.0)], stop_asked=True)
    assert waits == [("meta", (5,))]
    assert (result.losses.total.item(), result.gradient_norm, result.skipped) == (1.5, 2.0, False)
    assert all(p.grad is not None and p.grad.is_meta for p in run.model.parameters() if p.requires_grad)
    assert run.optimizer.state
