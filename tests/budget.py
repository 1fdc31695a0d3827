"""How wrong a kernel may be: not a guess, but twice what the textbook form costs in the same dtype."""

import torch

from segdeformer.kernels.tuning.judge import largest_allowed, worst_row_error


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_no_worse(ours, eager, oracle):
    """At most twice the error of the textbook form in the same dtype, plus rounding, in every element.

    Stricter than the rows of `judge`, which large problems on other machines are held to.
    """
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


def assert_small_gradients_no_worse(ours, reference, inputs, upstream, *, power):
    """`upstream` is too small for half precision's products; the yardstick meets it times 2^power, exactly.

    Row by row, relative to the row: gradients this small would pass any budget with an absolute term. Both
    are rounded to the dtype at the end, where the smallest numbers lose their last bits whatever is done.
    """

    def gradients(function, convert, factor):
        leaves = [convert(x.detach()).requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward((upstream.double() * factor).to(out.dtype))
        return [(x.grad.double() / factor).to(given.dtype) for x, given in zip(leaves, inputs, strict=True)]

    exact = [x.grad for x in _exact(reference, inputs, upstream)]
    mine = gradients(ours, torch.clone, 1)
    yardstick = gradients(reference, torch.clone, 2.0**power)
    for own, eager, oracle in zip(mine, yardstick, exact, strict=True):
        error, allowed = (
            worst_row_error(own, oracle),
            largest_allowed(worst_row_error(eager, oracle), own.dtype),
        )
        assert error <= allowed, (error, allowed)


def _exact(reference, inputs, upstream):
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    reference(*leaves).backward(upstream.double())
    return leaves
