"""The attention kernels against float64: on a GPU where there is one, else in Triton's interpreter.

Fresh memory is NaN throughout, so an element that a kernel leaves out is seen.
"""

import math

import pytest
import torch
from budget import (
    assert_no_worse,
    assert_small_gradients_no_worse,
    assert_values_and_gradients_no_worse,
    random,
)

from segdeformer.kernels import launch
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.attention import launch as attention_launches
from segdeformer.kernels.attention import operator as attention_triton
from segdeformer.kernels.attention.launch import attention_launch
from segdeformer.kernels.tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SIZES = [  # queries, keys, width, value width
    (1, 1, 19, 19),
    (1, 200, 64, 150),
    (17, 63, 32, 256),
    (63, 17, 150, 32),
    (128, 200, 256, 150),
    (200, 128, 160, 160),
    (200, 1000, 64, 19),
    (1000, 1, 32, 64),
    (63, 200, 256, 256),
    (128, 63, 512, 512),
    (17, 200, 512, 150),
    (200, 17, 19, 512),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


def made(*shape, seed=0, dtype=torch.float32):
    return random(*shape, seed=seed, dtype=dtype, device=DEVICE)


def triton_attention(scale):
    return lambda q, k, v: attention(q, k, v, scale=scale, impl="triton")


def textbook(scale):
    return lambda q, k, v: attention_reference(q, k, v, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "d", "e"), SIZES)
def test_values_and_gradients_are_no_worse_than_the_textbook_form(n, m, d, e, dtype):
    inputs = [
        made(2, n, d, dtype=dtype),
        made(2, m, d, seed=1, dtype=dtype),
        made(2, m, e, seed=2, dtype=dtype),
    ]
    upstream = made(2, n, e, seed=3, dtype=dtype)
    assert_values_and_gradients_no_worse(triton_attention(d**-0.5), textbook(d**-0.5), inputs, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "d", "e"), [("chunks", 64, 19), ("chunks", 150, 256), ("chunks", 256, 256), ("fused", 256, 256)]
)
def test_a_backward_in_chunks_gives_the_same_gradients(monkeypatch, form, d, e, dtype):
    monkeypatch.setattr(attention_triton, "backward_form", lambda queries, values: form)
    monkeypatch.setattr(attention_triton, "CHUNK_BYTES", 1)  # the least chunk, so there are several
    n, m = 300, 70
    inputs = [
        made(2, n, d, dtype=dtype),
        made(2, m, d, seed=1, dtype=dtype),
        made(2, m, e, seed=2, dtype=dtype),
    ]
    upstream = made(2, n, e, seed=3, dtype=dtype)
    assert_values_and_gradients_no_worse(triton_attention(d**-0.5), textbook(d**-0.5), inputs, upstream)


@pytest.mark.parametrize(
    ("form", "size"), [("fused", 1.0), ("fused", 1e-2), ("fused", 1e-5), ("chunks", 1e-3)]
)
def test_small_float16_gradients_lose_no_more_than_large_ones(monkeypatch, form, size):
    """2000 probabilities times a small gradient are below float16's range."""
    monkeypatch.setattr(attention_triton, "backward_form", lambda queries, values: form)
    n, m, d, e = 17, 2000, 64, 48
    shapes = [(n, d), (m, d), (m, e)]
    inputs = [made(1, *shape, seed=i, dtype=torch.float16) for i, shape in enumerate(shapes)]
    upstream = (size * made(1, n, e, seed=3)).half()
    power = -math.floor(math.log2(size))
    assert_small_gradients_no_worse(
        triton_attention(d**-0.5), textbook(d**-0.5), inputs, upstream, power=power
    )


def test_products_add_up_in_float32_in_place_or_where_pytorch_cannot_do_it_by_a_rounded_product():
    left, right = made(20, 30, dtype=torch.float16), made(30, 40, seed=1, dtype=torch.float16)
    total = made(20, 40, seed=2)
    exact = total.double() + left.double() @ right.double()
    added = attention_triton.add_product(total, left, right)
    assert added.data_ptr() == total.data_ptr()
    assert (added.double() - exact).abs().max() <= 2**-11 * exact.abs().max()
    product = attention_triton.add_product(None, left, right)
    assert (product.double() - left.double() @ right.double()).abs().max() <= 2**-11 * exact.abs().max()
    if DEVICE == "cpu":  # PyTorch's CPU has no such product
        assert not attention_triton._adds_in_place(torch.float16, torch.device("cpu"))


def test_a_gradient_is_raised_by_a_power_of_two_and_never_lowered():
    for largest, factor in [
        (0.0, 2.0),
        (1.0, 1.0),
        (0.75, 2.0),
        (2.0**-10, 2.0**10),
        (2.0**-20, 2.0**15),
        (900.0, 1.0),
    ]:
        given = torch.tensor([[largest, -largest / 2]], dtype=torch.float16, device=DEVICE)
        gradient, unit = attention_launches.raised(given)
        assert torch.equal(gradient.double(), given.double() * factor), largest
        assert unit.item() == 1 / factor
    given = torch.tensor([1e-20], dtype=torch.bfloat16)
    assert attention_launches.raised(given) == (given, None)


@pytest.mark.parametrize("num_keys", [1, 16, 63, 64])
def test_few_keys_held_on_chip_equal_the_loop_over_keys(num_keys):
    q, k, v = made(2, 200, 40), made(2, num_keys, 40, seed=1), made(2, num_keys, 70, seed=2)
    oracle = textbook(0.2)(*(x.double() for x in (q, k, v)))
    x = attention_launches.pad_operands(q, k, v, 0.2)
    for kernel, tile in [
        ("attention_forward_few_keys", Tile(32, 64, 4, 1)),
        ("attention_forward", Tile(32, 16, 4, 1)),
    ]:
        out, lse = q.new_full((2, 200, 70), float("nan")), q.new_full((2, 200), float("nan"))
        results = {"out": out, "lse": lse}
        attention_launch(kernel, x, results, tile).run()
        assert_no_worse(out, textbook(0.2)(q, k, v), oracle)
        scores = (q.double() @ k.double().transpose(1, 2)) * 0.2
        torch.testing.assert_close(
            lse.double(), scores.logsumexp(-1) / torch.tensor(2.0).log(), atol=1e-5, rtol=1e-5
        )
    assert attention_launch("attention_forward_few_keys", x, results, Tile(32, num_keys - 1, 4, 1)) is None


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (16, 64), (64, 32), (128, 128)])
@pytest.mark.parametrize("tma", [False, True])
def test_every_tile_gives_the_same_forward(queries, keys, tma):
    q, k, v = made(2, 100, 150), made(2, 77, 150, seed=1), made(2, 77, 48, seed=2)
    out, lse = q.new_full((2, 100, 48), float("nan")), q.new_full((2, 100), float("nan"))
    x = attention_launches.pad_operands(q, k, v, 0.1)
    tile = Tile(queries, keys, 4, 1, tma)
    attention_launch("attention_forward", x, {"out": out, "lse": lse}, tile).run()
    oracle = textbook(0.1)(*(x.double() for x in (q, k, v)))
    assert_no_worse(out, textbook(0.1)(q, k, v), oracle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_gradients_need_no_copies_by_the_caller(dtype):
    q, k, v = (made(90, 3, 64, seed=i, dtype=dtype)[:, :, ::2].transpose(0, 1) for i in range(3))
    packed = made(2, 50, 3 * 32, dtype=dtype)
    upstream = made(90, 64, 3, dtype=dtype).permute(2, 0, 1)[:, :, ::2]
    assert_values_and_gradients_no_worse(triton_attention(0.2), textbook(0.2), [q, k, v], upstream)
    views = list(packed.split(32, dim=2))
    assert_no_worse(
        triton_attention(0.2)(*views), textbook(0.2)(*views), textbook(0.2)(*(x.double() for x in views))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_sixty_stay_finite_and_right(dtype):
    # Row i scores +60 at key i and -60 elsewhere, or is 60 or -60 throughout.
    eye = torch.eye(40, device=DEVICE, dtype=dtype)[None]
    values = made(1, 40, 24, dtype=dtype)
    for queries, keys, expected in [
        (60 * (2 * eye - 1), eye, values.double()),
        (torch.full_like(eye, 60), eye, values.double().mean(1, keepdim=True).expand(1, 40, 24)),
        (torch.full_like(eye, -60), eye, values.double().mean(1, keepdim=True).expand(1, 40, 24)),
    ]:
        leaves = [x.clone().requires_grad_() for x in (queries, keys, values)]
        out = attention(*leaves, scale=1.0, impl="triton")
        assert_no_worse(out, attention_reference(queries, keys, values, scale=1.0), expected)
        out.sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_sum_to_one_and_ignore_a_constant_and_batches_keep_apart(dtype):
    q, k, v = (made(3, n, 32, seed=n, dtype=dtype) for n in (70, 130, 130))
    ones = attention(q, k, torch.ones_like(v[..., :20]), scale=0.3, impl="triton")
    assert (ones.double() - 1).abs().max() <= 8 * torch.finfo(dtype).eps
    # A constant on every key shifts whole rows of scores.
    constant = torch.full_like(k[:, :, :1], 8)
    one_more = [torch.cat([x, y], 2) for x, y in [(q, torch.ones_like(q[:, :, :1])), (k, constant)]]
    apart = attention(*one_more, v, scale=0.3, impl="triton")
    together = attention(q, k, v, scale=0.3, impl="triton")
    torch.testing.assert_close(apart, together, atol=8 * torch.finfo(dtype).eps, rtol=0)
    alone = torch.cat(
        [attention(q[i:][:1], k[i:][:1], v[i:][:1], scale=0.3, impl="triton") for i in range(3)]
    )
    assert torch.equal(alone, together)


def test_several_heads_lie_in_the_batch_and_an_empty_batch_is_empty():
    q = made(0, 5, 32).requires_grad_()
    out = attention(q, q, q, scale=1.0, impl="triton")
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 5, 32)
    no_queries, keys = made(2, 0, 32), made(2, 5, 32).requires_grad_()
    attention(no_queries, keys, keys, scale=1.0, impl="triton").sum().backward()
    assert torch.equal(keys.grad, torch.zeros_like(keys))


def test_autocast_decides_the_dtype():
    q = made(1, 20, 32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert attention(q, q.half(), q, scale=0.2, impl="triton").dtype == torch.float16
    with pytest.raises(ValueError, match=r"of one dtype, .*; got float32, float16, float32"):
        attention(q, q.half(), q, scale=0.2, impl="triton")


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (torch.float64, 8, "float16, bfloat16 or float32; got float64"),
        (torch.float16, 513, "up to 512, got 513"),
    ],
)
def test_inputs_that_no_kernel_takes_are_refused_in_one_line(dtype, width, message):
    q = made(1, 4, width, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, scale=1.0, impl="triton")


def test_without_a_gpu_the_kernels_say_what_they_need(monkeypatch):
    q = torch.zeros(1, 4, 8)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU, the tensors are on cpu; use auto or sdpa"):
        attention(q, q, q, scale=1.0, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        attention(*(q.bfloat16(),) * 3, scale=1.0, impl="triton")


def test_a_kernel_that_does_not_start_names_itself_shapes_tile_and_remedy():
    q = made(1, 20, 32)
    x = attention_launches.pad_operands(q, q, q, 1.0)
    results = {"out": q.clone(), "lse": q[..., 0].clone()}
    broken = attention_launch("attention_forward", x, results, Tile(24, 16, 4, 1))
    with pytest.raises(launch.KernelError) as raised:
        broken.run()  # 24 is no power of two
    message = str(raised.value)
    assert "attention_forward failed" in message
    assert "float32 queries (1, 20, 32)" in message
    assert "tile 24x16, 4 warps" in message
    assert "--impl sdpa" in message


def test_float32_products_are_exact_unless_pytorch_may_use_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert launch.dot_precision(torch.float32) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert launch.dot_precision(torch.float32) == "tf32"
        assert launch.dot_precision(torch.float16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "m", "d", "e"), [(70, 45, 24, 9), (33, 150, 24, 9), (129, 70, 256, 150), (9, 1, 16, 16)]
)
@pytest.mark.parametrize("form", ["fused", "chunks"])
def test_a_bias_of_each_key_reaches_values_and_all_gradients(monkeypatch, form, n, m, d, e, dtype):
    monkeypatch.setattr(attention_triton, "backward_form", lambda *_: form)
    bias = torch.linspace(-2, 3, m, device=DEVICE)

    def ours(q, k, v):
        return attention(q, k, v, scale=d**-0.5, bias_M=bias, impl="triton")

    def textbook(q, k, v):
        weights = ((q @ k.mT) * d**-0.5 + bias.to(q.dtype)).softmax(-1)
        return weights @ v

    inputs = [
        2 * made(2, n, d, dtype=dtype),
        made(2, m, d, seed=1, dtype=dtype),
        made(2, m, e, seed=2, dtype=dtype),
    ]
    assert_values_and_gradients_no_worse(ours, textbook, inputs, made(2, n, e, seed=3, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_are_the_values_too_are_read_once_and_get_both_gradients(dtype):
    queries, both = 2 * made(2, 70, 19, dtype=dtype), made(2, 300, 19, seed=1, dtype=dtype)
    assert_values_and_gradients_no_worse(
        lambda q, kv: attention(q, kv, kv, scale=0.3, impl="triton"),
        lambda q, kv: ((q @ kv.mT) * 0.3).softmax(-1) @ kv,
        [queries, both],
        made(2, 70, 19, seed=2, dtype=dtype),
    )
