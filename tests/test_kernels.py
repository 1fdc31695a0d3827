"""The operations against float64 definitions written out here, with odd sizes."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from budget import assert_no_worse, random

from segdeformer import kernels
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.attention.blocks import attention_blocks
from segdeformer.kernels.external_attention import external_attention, external_attention_reference
from segdeformer.kernels.upsample.cross_entropy import upsample_cross_entropy
from segdeformer.kernels.upsample.rows import mix_rows, source_rows

SIZES = [(1, 1, 19, 19), (17, 63, 32, 32), (200, 17, 64, 19), (63, 200, 19, 64), (128, 1, 150, 32)]


def explicit_attention(q, k, v, scale):
    """Eq. 5 query by query, in float64."""
    rows = []
    for batch in range(q.shape[0]):
        for query in q[batch].double():
            scores = (k[batch].double() * query).sum(-1) * scale
            weights = (scores - scores.max()).exp()
            rows.append((weights[:, None] * v[batch].double()).sum(0) / weights.sum())
    return torch.stack(rows).unflatten(0, q.shape[:2])


@pytest.mark.parametrize(("n", "m", "d", "e"), SIZES)
@pytest.mark.parametrize("impl", ["sdpa", "blocks", "reference"])
def test_attention_equals_the_sum_written_out(n, m, d, e, impl):
    q, k, v = random(2, n, d), random(2, m, d, seed=1), random(2, m, e, seed=2)
    oracle = explicit_attention(q, k, v, d**-0.5)
    assert_no_worse(
        attention(q, k, v, scale=d**-0.5, impl=impl), attention_reference(q, k, v, scale=d**-0.5), oracle
    )


@pytest.mark.parametrize(("n", "m", "d", "e"), SIZES)
def test_attention_gradients_are_no_worse_than_the_textbook_form(n, m, d, e):
    upstream = random(2, n, e, seed=3)
    gradients = {}
    for name, dtype, function in [
        ("oracle", torch.float64, attention_reference),
        ("eager", torch.float32, attention_reference),
        ("ours", torch.float32, lambda *a, scale: attention(*a, scale=scale, impl="sdpa")),
    ]:
        inputs = [
            random(2, *s, seed=i, dtype=dtype).requires_grad_()
            for i, s in enumerate([(n, d), (m, d), (m, e)])
        ]
        (function(*inputs, scale=d**-0.5) * upstream.to(dtype)).sum().backward()
        gradients[name] = [x.grad for x in inputs]
    for ours, eager, oracle in zip(gradients["ours"], gradients["eager"], gradients["oracle"], strict=True):
        assert_no_worse(ours, eager, oracle)


@pytest.mark.parametrize("impl", ["sdpa", "blocks", "reference"])
def test_equal_scores_give_the_mean_and_large_scores_stay_finite(impl):
    values = random(1, 7, 5)
    mean = attention(torch.zeros(1, 3, 4), random(1, 7, 4), values, scale=1.0, impl=impl)
    torch.testing.assert_close(mean, values.mean(1, keepdim=True).expand(1, 3, 5))
    big = 60 * torch.eye(7)[None]
    picked = attention(big, torch.eye(7)[None], values, scale=1.0, impl=impl)
    torch.testing.assert_close(picked, values, atol=1e-5, rtol=0)


def test_attention_accepts_strided_inputs_and_keeps_batch_items_apart():
    q, k, v = (random(64, 3, 30, seed=i)[:, :, ::2].transpose(0, 1) for i in range(3))
    together = attention(q, k, v, scale=0.3)
    alone = torch.cat([attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], scale=0.3) for i in range(3)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.double(), explicit_attention(q, k, v, 0.3), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 2, 4), (1, 3, 5), (1, 3, 4)], "queries are 4 wide, keys 5"),
        ([(1, 2, 4), (1, 3, 4), (1, 2, 4)], "3 keys and 2 values"),
        ([(1, 2, 4), (2, 3, 4), (1, 3, 4)], "batches 1, 2, 1"),
        ([(2, 4), (1, 3, 4), (1, 3, 4)], r"expected \(B,N,D\)"),
        ([(1, 2, 4), (1, 0, 4), (1, 0, 4)], "0 keys, 4 wide; attention needs"),
        ([(1, 2, 0), (1, 3, 0), (1, 3, 4)], "3 keys, 0 wide; attention needs"),
    ],
)
def test_attention_says_which_shapes_disagree(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(s) for s in shapes), scale=1.0)


@pytest.mark.parametrize("num_classes", [2, 19, 150])
@pytest.mark.parametrize("num_pixels", [1, 63, 200])
def test_external_attention_is_two_softmaxes_around_p(num_pixels, num_classes):
    scores, class_logits = random(2, num_pixels, num_classes), random(2, num_pixels, num_classes, seed=1)
    p = class_logits.double().softmax(-1)
    oracle = ((scores.double() @ p.transpose(1, 2)) * 0.2).softmax(-1) @ p
    eager = external_attention_reference(scores, class_logits, scale=0.2)
    assert_no_worse(eager, eager, oracle)
    ours = external_attention(scores, class_logits, scale=0.2, impl="sdpa")
    assert_no_worse(ours, eager, oracle)
    torch.testing.assert_close(ours.sum(-1), torch.ones(2, num_pixels), atol=1e-5, rtol=0)  # convex


def test_references_pass_gradcheck():
    q, k, v = (
        random(1, n, d, seed=n, dtype=torch.float64).requires_grad_() for n, d in [(3, 4), (5, 4), (5, 2)]
    )
    assert torch.autograd.gradcheck(lambda *a: attention_reference(*a, scale=0.5), (q, k, v))
    a, b = (random(1, 4, 3, seed=s, dtype=torch.float64).requires_grad_() for s in (7, 8))
    assert torch.autograd.gradcheck(lambda *x: external_attention_reference(*x, scale=0.5), (a, b))


@pytest.mark.parametrize(("n", "m", "d", "e"), [(1500, 2049, 19, 32), (1024, 1025, 64, 17), (1, 3000, 8, 8)])
def test_blocks_with_ragged_edges_equal_float64(n, m, d, e):
    q, k, v = 3 * random(2, n, d), 3 * random(2, m, d, seed=1), random(2, m, e, seed=2)
    oracle = attention_reference(q.double(), k.double(), v.double(), scale=d**-0.5)
    assert_no_worse(
        attention_blocks(q, k, v, scale=d**-0.5), attention_reference(q, k, v, scale=d**-0.5), oracle
    )


def test_blocks_refuse_to_drop_gradients():
    q = torch.zeros(1, 2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="`blocks` has no gradients"):
        attention(q, q, q, scale=1.0, impl="blocks")
    with torch.no_grad():
        assert attention(q, q, q, scale=1.0, impl="blocks").abs().max() == 0


def test_label_smoothing_mixes_in_the_mean_over_classes():
    logits, labels = random(1, 4, 3, 3), torch.randint(0, 4, (1, 3, 3))
    log_p = logits.double().log_softmax(1)
    hit = log_p.gather(1, labels[:, None])[:, 0]
    expected = -(0.9 * hit + 0.1 * log_p.mean(1)).mean()
    assert upsample_cross_entropy(logits, labels, label_smoothing=0.1).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ("size", "full"),
    [((8, 8), (32, 32)), ((5, 7), (171, 29)), ((128, 171), (512, 683)), ((6, 4), (3, 2)), ((1, 1), (5, 5))],
)
def test_strips_of_rows_equal_the_whole_resize(size, full):
    values = random(1, 3, *size)
    whole = F.interpolate(values.double(), full, mode="bilinear", align_corners=False)
    source = source_rows(size[0], full[0])
    strips = [mix_rows(values, source.between(top, top + 7), full[1]) for top in range(0, full[0], 7)]
    eager = F.interpolate(values, full, mode="bilinear", align_corners=False)
    assert_no_worse(torch.cat(strips, 2), eager, whole)  # float32 coordinates cost PyTorch up to 3e-5 too


def test_the_package_gives_the_operations_as_functions_by_the_names_of_the_field():
    names = (
        "attention",
        "external_attention",
        "upsample_argmax",
        "upsample_confusion",
        "upsample_cross_entropy",
    )
    assert sorted(kernels.__all__) == sorted(names)
    assert all(inspect.isfunction(getattr(kernels, name)) for name in names)
    loss = inspect.signature(kernels.upsample_cross_entropy).parameters
    assert {"class_weights", "ignore_index", "label_smoothing", "average", "impl"} <= set(loss)
