"""torch.compile, torch.export and FakeTensor see the kernels as operators."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from segdeformer.config import load_recipe
from segdeformer.kernels.attention import attention
from segdeformer.kernels.external_attention import external_attention
from segdeformer.kernels.upsample import operator, strips  # noqa: F401 (operators)
from segdeformer.weights.build import build_model

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small_model(impl):
    torch.manual_seed(0)
    config = load_recipe("synthetic").model
    return build_model(config, impl=impl).to(DEVICE).eval()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def test_a_whole_model_compiles_as_one_graph_and_not_anew_for_every_size():
    model = small_model("triton")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in [(64, 64), (65, 97), (96, 64)]:
        images = torch.randn(2, 3, *size, device=DEVICE)
        ours, expected = compiled(images), model(images)
        for mine, plain in zip(ours[:2], expected[:2], strict=True):
            torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2  # fixed sizes, then any size


def test_gradients_flow_through_a_compiled_graph():
    def loss(q, k, v, scores, class_logits):
        return attention(q, k, v, scale=0.2, impl="triton").square().sum() + (
            external_attention(scores, class_logits, scale=0.2, impl="triton").square().sum()
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (35, 50, 20):
        inputs = [torch.randn(2, n, w, device=DEVICE, requires_grad=True) for w in (32, 32, 19, 21, 21)]
        compiled(*inputs).backward()
        ours = [x.grad.clone() for x in inputs]
        for x in inputs:
            x.grad = None
        loss(*inputs).backward()
        for mine, x in zip(ours, inputs, strict=True):
            torch.testing.assert_close(mine, x.grad)
    assert counter.frame_count == 2


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_an_exported_model_gives_the_same_logits(impl):
    model = small_model(impl)
    images = torch.randn(1, 3, 64, 96, device=DEVICE)
    with torch.no_grad():
        exported = torch.export.export(model, (images,))
        torch.testing.assert_close(exported.module()(images).logits_BKhw, model(images).logits_BKhw)
    names = {str(node.target) for node in exported.graph.nodes}
    assert ("segdeformer.external_attention.default" in names) == (impl == "triton")


def test_fake_tensors_get_shapes_and_dtypes_without_running_a_kernel():
    with FakeTensorMode():
        q, v = torch.empty(2, 35, 32, dtype=torch.bfloat16), torch.empty(2, 7, 19, dtype=torch.bfloat16)
        out = torch.ops.segdeformer.attention(q, q[:, :7], v, None, 0.5)
        mixed = torch.ops.segdeformer.external_attention(q, q.float(), 0.5)
    assert [(t.shape, t.dtype) for t in (*out, *mixed)] == [
        ((2, 35, 19), torch.bfloat16),
        ((2, 35), torch.float32),
        ((2, 35, 32), torch.bfloat16),
        ((2, 35), torch.float32),
    ]


def test_the_operators_pass_pytorchs_own_checks():
    def leaf(*shape):
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    for op, inputs in [
        (torch.ops.segdeformer.attention, (leaf(2, 35, 32), leaf(2, 20, 32), leaf(2, 20, 19), None)),
        (
            torch.ops.segdeformer.attention,
            (leaf(2, 35, 32), leaf(2, 20, 32), leaf(2, 20, 19), torch.randn(20, device=DEVICE)),
        ),
        (torch.ops.segdeformer.external_attention, (leaf(2, 35, 19), leaf(2, 35, 19))),
    ]:
        torch.library.opcheck(op.default, (*inputs, 0.2))
    labels = torch.randint(0, 19, (2, 9, 11), device=DEVICE)
    for logits in (leaf(2, 19, 4, 5), leaf(2, 4, 5, 23).permute(0, 3, 1, 2)[:, 2:21]):
        for op, options in [
            (torch.ops.segdeformer.upsample_loss, (labels, None, 255, 0.0)),
            (torch.ops.segdeformer.upsample_loss_strips, (labels, None, 255, 0.0, True)),
            (torch.ops.segdeformer.upsample_argmax, (9, 11, True)),
            (torch.ops.segdeformer.upsample_argmax_strips, (9, 11, True)),
        ]:
            torch.library.opcheck(op.default, (logits, *options), test_utils=CHECKS)
