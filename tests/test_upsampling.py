"""Losses and argmax of upsampled logits against float64, for every implementation.

The Triton kernels run on a GPU where there is one, else in Triton's interpreter; fresh memory is NaN.
"""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_no_worse, random
from test_triton_attention import DEVICE, poisoned_memory  # noqa: F401

from segdeformer.kernels.upsample import argmax as counting
from segdeformer.kernels.upsample.argmax import (
    add_confusion,
    count_on_cpu,
    count_on_gpu,
    upsample_argmax,
    upsample_confusion,
)
from segdeformer.kernels.upsample.cross_entropy import (
    HardPixels,
    upsample_cross_entropy,
)

HALVES = [torch.float16, torch.bfloat16]
SIZES = [  # classes, map, output
    (2, (8, 8), (32, 32)),  # 4 times
    (19, (2, 1), (32, 16)),  # 16 times
    (19, (5, 6), (20, 24)),
    (150, (4, 5), (17, 22)),  # 4.4 times
    (171, (5, 7), (5, 7)),  # the same
    (19, (8, 6), (4, 3)),  # half
    (7, (1, 1), (9, 5)),
    (300, (4, 5), (11, 13)),
]
OPTIONS = [
    {},
    {"average": "all"},
    {"weighted": True},
    {"label_smoothing": 0.1},
    {"weighted": True, "label_smoothing": 0.2, "average": "all"},
]


def made(*shape, seed=0, dtype=torch.float32, scale=3.0):
    return (scale * random(*shape, seed=seed, dtype=torch.float64)).to(DEVICE, dtype)


def made_labels(num_classes, batch, size, *, ignored=0.3, dtype=torch.int64):
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, num_classes, (batch, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255 if num_classes <= 255 else -1
    return labels.to(DEVICE, dtype)


def exact_loss(logits, labels, *, ignore, weights=None, label_smoothing=0.0, average="valid"):
    """The mean written out, in float64."""
    log_p = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False).log_softmax(1)
    valid = labels != ignore
    target = labels.long().where(valid, 0)
    w = (
        torch.ones(logits.shape[1], dtype=torch.float64, device=DEVICE)
        if weights is None
        else weights.double()
    )
    hit = log_p.gather(1, target[:, None])[:, 0] * w[target]
    even = (log_p * w[:, None, None]).mean(1)
    total = -(((1 - label_smoothing) * hit + label_smoothing * even) * valid).sum()
    return total / (labels.numel() if average == "all" else (w[target] * valid).sum())


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("num_classes", "size", "full"), SIZES)
def test_loss_and_gradient_equal_float64(num_classes, size, full, options, impl):
    options = dict(options)
    ignore = 255 if num_classes <= 255 else -1
    weights = torch.linspace(0.5, 2.0, num_classes, device=DEVICE) if options.pop("weighted", False) else None
    labels = made_labels(num_classes, 2, full)
    exact = made(2, num_classes, *size, dtype=torch.float64).requires_grad_()
    expected = exact_loss(exact, labels, ignore=ignore, weights=weights, **options)
    (3 * expected).backward()
    logits = exact.detach().float().requires_grad_()
    loss = upsample_cross_entropy(
        logits, labels, ignore_index=ignore, class_weights=weights, impl=impl, **options
    )
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    tolerance = 1e-4 if impl == "reference" else 1e-6  # PyTorch's float32 positions are rounded
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    largest = exact.grad.abs().max()
    assert (logits.grad.double() - exact.grad).abs().max() <= 4 * tolerance * largest


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("labels_dtype", [torch.uint8, torch.int64])
def test_half_precision_is_no_worse_than_twice_the_textbook_form(dtype, labels_dtype, impl):
    if dtype == torch.bfloat16 and impl == "triton" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    labels = made_labels(150, 2, (17, 22), dtype=labels_dtype)
    exact = made(2, 150, 4, 5, dtype=dtype).double().requires_grad_()
    expected = exact_loss(exact, labels, ignore=255)
    expected.backward()
    gradients, losses = [], []
    for function in ("eager", impl):
        logits = exact.detach().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        if function == "eager":
            full = F.interpolate(logits, (17, 22), mode="bilinear", align_corners=False)
            loss = F.cross_entropy(full, labels.long(), ignore_index=255)
        else:
            loss = upsample_cross_entropy(logits, labels, impl=impl)
        loss.backward()
        gradients.append(logits.grad)
        losses.append(loss.detach().float())
    assert_no_worse(losses[1], losses[0], expected.detach())
    assert gradients[1].dtype == dtype
    error, eager = ((g.double() - exact.grad).abs().max() for g in reversed(gradients))
    assert error <= 2 * eager + torch.finfo(dtype).eps * exact.grad.abs().max()


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("weights", [None, torch.ones(3)])
@pytest.mark.parametrize("average", ["valid", "all"])
def test_all_pixels_ignored_is_zero_loss_and_zero_gradient(average, weights, impl):
    logits = made(1, 3, 2, 2).requires_grad_()
    labels = torch.full((1, 8, 8), 255, device=DEVICE)
    weights = weights.to(DEVICE) if weights is not None else None
    loss = upsample_cross_entropy(logits, labels, class_weights=weights, average=average, impl=impl)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_stray_label_is_named_or_makes_the_loss_nan():
    logits, labels = made(1, 19, 4, 4), torch.zeros(1, 9, 9, dtype=torch.int64, device=DEVICE)
    labels[0, 3, 3:5] = 200
    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"label 200 is none of the 19 classes and not 255.*\(2 such"):
            upsample_cross_entropy(logits, labels, impl=impl)
    assert upsample_cross_entropy(logits, labels, impl="triton").isnan()
    labels[0, 3, 3:5] = -7
    assert upsample_cross_entropy(logits, labels, impl="triton").isnan()


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("hard", [HardPixels(0.7, 100), HardPixels(0.01, 300), HardPixels(0.01, 10**9)])
def test_only_hard_pixels_count(hard, impl):
    labels = made_labels(7, 2, (17, 23))
    exact = made(2, 7, 4, 6, dtype=torch.float64).requires_grad_()
    share = F.interpolate(exact, (17, 23), mode="bilinear", align_corners=False).softmax(1)
    valid = labels != 255
    share = share.gather(1, labels.where(valid, 0)[:, None])[:, 0].detach()
    ranked = share[valid].sort().values
    limit = max(hard.threshold, ranked[min(hard.kept, len(ranked)) - 1].item())
    expected = exact_loss(exact, labels.where(share <= limit + 1e-9, 255), ignore=255)
    expected.backward()
    logits = exact.detach().float().requires_grad_()
    loss = upsample_cross_entropy(logits, labels, hard_pixels=hard, impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=1e-4)


def test_gradcheck_of_the_strips_in_float64():
    labels = made_labels(5, 1, (7, 9)).cpu()
    logits = random(1, 5, 3, 4, dtype=torch.float64).requires_grad_()
    weights = torch.linspace(0.5, 2.0, 5)
    for smoothing in (0.0, 0.2):
        assert torch.autograd.gradcheck(
            lambda x, s=smoothing: upsample_cross_entropy(
                x, labels, class_weights=weights, label_smoothing=s
            ),
            (logits,),
        )


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("num_classes", "size", "full"), SIZES)
def test_argmax_and_confidence_equal_float64_but_for_ties(num_classes, size, full, layout, impl):
    logits = made(2, num_classes, *size).contiguous(memory_format=layout)
    exact = F.interpolate(logits.double(), full, mode="bilinear", align_corners=False)
    result = upsample_argmax(logits, full, confidence=True, impl=impl)
    assert result.ids_BHW.dtype == (torch.uint8 if num_classes <= 256 else torch.int16)
    chosen = exact.gather(1, result.ids_BHW.long()[:, None])[:, 0]
    assert (exact.amax(1) - chosen).max() <= 1e-3 * (1 if impl == "reference" else 0.1)
    assert (result.ids_BHW != exact.argmax(1)).float().mean() < 1e-2
    torch.testing.assert_close(result.confidence_BHW.double(), exact.softmax(1).amax(1), atol=1e-4, rtol=1e-3)
    assert upsample_argmax(logits, full, impl=impl).confidence_BHW is None


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
def test_of_equal_logits_the_lowest_id_wins(impl):
    result = upsample_argmax(torch.zeros(1, 150, 3, 4, device=DEVICE), (7, 9), impl=impl)
    assert result.ids_BHW.abs().max() == 0


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
def test_confusion_counts_every_pair_and_adds_up(impl):
    logits, labels = made(2, 19, 9, 12), made_labels(19, 2, (37, 49), dtype=torch.uint8)
    labels[0, 0, 0] = 77  # neither a class nor ignored: not counted
    matrix = torch.full((19, 19), 5, dtype=torch.int64, device=DEVICE)
    ids = upsample_confusion(logits, labels, matrix, impl=impl).ids_BHW
    expected = torch.full((19, 19), 5, dtype=torch.int64)
    for label, winner in zip(labels.flatten().tolist(), ids.flatten().tolist(), strict=True):
        if label < 19:
            expected[label, winner] += 1
    assert torch.equal(matrix.cpu(), expected)


@pytest.mark.parametrize("num_classes", [2, 19, 300])
def test_counting_in_chunks_by_sorting_and_by_bins_gives_the_same(monkeypatch, num_classes):
    monkeypatch.setattr(counting, "CHUNK_PIXELS", (100, 100))
    labels, ids = (made_labels(num_classes, 1, (37, 49), dtype=torch.int16)[0] for _ in range(2))
    ids = ids.clamp(0, num_classes - 1).flip(0)
    expected = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for label, winner in zip(labels.flatten().tolist(), ids.flatten().tolist(), strict=True):
        if 0 <= label < num_classes and label != 1:
            expected[label, winner] += 1
    for count in (count_on_cpu, count_on_gpu):
        monkeypatch.setattr(counting, "count_on_cpu", count)
        monkeypatch.setattr(counting, "count_on_gpu", count)
        matrix = torch.zeros_like(expected).to(DEVICE)
        add_confusion(matrix, labels, ids, ignore_index=1)
        assert torch.equal(matrix.cpu(), expected)
        assert count(torch.tensor([5, 0, 3, 0, 5], device=DEVICE), 5).tolist() == [2, 0, 0, 1, 0]


def test_shapes_that_do_not_belong_together_are_named():
    logits, labels = torch.zeros(2, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and labels \(1, 8, 8\) do not belong together"):
        upsample_cross_entropy(logits, labels)
    with pytest.raises(ValueError, match="do not belong together"):
        upsample_confusion(logits, labels, torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"matrix is \(3, 2\) torch.float32; expected int64 \(3, 3\)"):
        upsample_confusion(logits[:1], labels, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="average is `mean`"):
        upsample_cross_entropy(logits[:1], labels, average="mean")
    with pytest.raises(ValueError, match=r"expected \(B,K,h,w\)"):
        upsample_argmax(logits[0], (8, 8))


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("hard", [None, HardPixels(0.9, 50)])
def test_unsigned_labels_and_a_negative_ignored_id_do_not_wrap_around(impl, hard):
    logits, labels = made(1, 171, 4, 5), made_labels(171, 1, (17, 22), ignored=0.0)
    labels[0, :3] = 156  # what -100 is in eight bits
    options = {"ignore_index": -100, "hard_pixels": hard}
    wide = upsample_cross_entropy(logits, labels, impl="reference", **options)
    narrow = upsample_cross_entropy(logits, labels.to(torch.uint8), impl=impl, **options)
    torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
def test_class_weights_are_summed_in_float32_and_must_be_one_each(impl):
    logits, labels = made(1, 5, 64, 64), made_labels(5, 1, (512, 512), ignored=0.0)
    weights = torch.linspace(0.5, 2.0, 5, device=DEVICE)
    if impl == "triton":
        logits, labels = logits[:, :, :8, :8], labels[:, :32, :32]  # the interpreter is slow
    expected = upsample_cross_entropy(logits, labels, class_weights=weights.double(), impl="reference")
    loss = upsample_cross_entropy(logits, labels, class_weights=weights.half(), impl=impl)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)  # what the weights lost in float16
    for wrong in (torch.ones(4), torch.ones(6), torch.ones(1, 5)):
        with pytest.raises(ValueError, match=r"class weights are .*; expected \(5,\)"):
            upsample_cross_entropy(logits, labels, class_weights=wrong, impl=impl)
    with pytest.raises(ValueError, match=r"label_smoothing is -1\.0; expected 0 to 1"):
        upsample_cross_entropy(logits, labels, label_smoothing=-1.0, impl=impl)


def test_autocast_does_not_reach_into_the_strips():
    logits, labels = made(1, 19, 5, 7).requires_grad_(), made_labels(19, 1, (17, 29))
    upsample_cross_entropy(logits, labels).backward()
    expected, logits.grad = logits.grad, None
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        upsample_cross_entropy(logits, labels).backward()
    assert torch.equal(logits.grad, expected)


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_second_derivatives_are_refused_not_zero(impl):
    logits, labels = made(1, 5, 3, 3).requires_grad_(), made_labels(5, 1, (9, 9))

    def twice():
        loss = upsample_cross_entropy(logits, labels, impl=impl)
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        first.square().sum().backward()

    with pytest.raises(RuntimeError, match=r"second derivatives|autograd formula|not require grad|Autograd"):
        twice()


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_logits_may_be_a_slice_of_something_larger(impl):
    whole = made(2, 4, 5, 23).permute(0, 3, 1, 2)
    labels = made_labels(19, 2, (17, 22))
    gradients = []
    for logits in (whole[:, 2:21], whole[:, 2:21].contiguous()):
        leaf = logits.detach().requires_grad_()
        upsample_cross_entropy(leaf, labels, impl=impl).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    ids = [upsample_argmax(x, (17, 22), impl=impl).ids_BHW for x in (whole[:, 2:21], leaf)]
    assert torch.equal(*ids)
