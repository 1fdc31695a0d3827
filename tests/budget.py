"""How wrong a kernel may be: not a guess, but twice what the textbook form costs in the same dtype."""

import torch


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_no_worse(ours, eager, oracle):
    """At most twice the error of the textbook form in the same dtype, plus rounding."""
    rounding = torch.finfo(ours.dtype).eps * max(1.0, oracle.abs().max().item())
    error, allowed = (ours.double() - oracle).abs().max(), (eager.double() - oracle).abs().max()
    assert error <= 2 * allowed + 16 * rounding, (error.item(), allowed.item())


def assert_values_and_gradients_no_worse(ours, reference, inputs, upstream):
    """The same budget for the output and the gradient of every input; inputs in the dtype to test."""
    results = {}
    for name, function, convert in [
        ("oracle", reference, torch.Tensor.double),
        ("eager", reference, torch.clone),
        ("ours", ours, torch.clone),
    ]:
        leaves = [convert(x.detach()).requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(upstream.to(out.dtype))
        results[name] = [out.detach(), *(x.grad for x in leaves)]
    for mine, eager, oracle in zip(results["ours"], results["eager"], results["oracle"], strict=True):
        assert mine.dtype == eager.dtype
        assert_no_worse(mine, eager, oracle)
