"""One kernel on random inputs, to be run with any tile and checked: what the tuner measures.

B batch, N queries, M keys, D key width, E value width, K classes; n queries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from segdeformer.kernels import attention_launches, external_attention_triton
from segdeformer.kernels.attention import attention_reference
from segdeformer.kernels.attention_launches import Upstream, pad_operands
from segdeformer.kernels.external_attention import external_attention_reference
from segdeformer.kernels.launch import Launch, padded_rows
from segdeformer.kernels.oracle import BLOCK_SCORES, answer, largest_allowed, worst_row_error
from segdeformer.kernels.tiles import Tile, architecture_of, default_tile, padded_width, size_class

NUM_CHUNK_QUERIES = 1024  # rows of P and dS that `attention_weights_and_grads` writes at once


class Problem(NamedTuple):
    """A kernel to find a tile for; widths as the model has them."""

    kernel: str
    width: int
    value_width: int
    element_bytes: int
    num_pixels: int  # queries, and keys too unless the kernel is for few

    @property
    def widths(self) -> tuple[int, int]:
        return padded_width(self.width), padded_width(self.value_width)

    @property
    def widths_key(self) -> str:
        return "{}x{}".format(*self.widths)

    @property
    def size_class(self) -> int:
        """By its scores; the few keys of a kernel for few are reckoned as the pixels."""
        return size_class(self.num_pixels**2)

    @property
    def is_external(self) -> bool:
        return self.kernel.startswith("external")

    def default_tile(self, device: torch.device) -> Tile:
        """What runs where nothing was measured."""
        return default_tile(self.kernel, *self.widths, self.element_bytes, architecture_of(device))

    def num_keys(self, device: torch.device) -> int:
        if self.kernel == "attention_forward_few_keys":
            return self.default_tile(device).block_keys  # the most that it takes; 0: it is not used
        return self.num_pixels


class Output(NamedTuple):
    """A tensor that a kernel writes, and what should be in it."""

    name: str
    result: Tensor
    exact: Tensor
    allowed: float  # worst row error


class Trial:
    """A problem's inputs, outputs and expected results in one dtype, made once for all tiles.

    exact=False leaves the expected results out: enough to compile the kernel.
    """

    def __init__(
        self,
        problem: Problem,
        num_queries: int,
        num_keys: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = True,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        assert num_queries == num_keys or not problem.is_external
        self.kernel = problem.kernel
        d, e = problem.width, problem.value_width
        if problem.is_external:
            # Peaked mixtures: nearly even ones would give the same rows for any weights.
            scale, self.middle = 1.0, 3 * random(1, num_keys, d, dtype=torch.float32)
            scores = 3 * random(1, num_queries, d)
            inputs: tuple[Tensor, ...] = (scores, self.middle)
            reference: Callable[..., Tensor] = external_attention_reference
            self.operands = external_attention_triton.external_operands(scores, self.middle, scale)
        else:
            scale = d**-0.5
            queries, keys, values = random(1, num_queries, d), random(1, num_keys, d), random(1, num_keys, e)
            inputs = (2 * queries, keys, values)
            reference = attention_reference
            self.operands = pad_operands(2 * queries, keys, values, scale)
        backward = "forward" not in problem.kernel
        grad_out = random(1, num_queries, e) if backward else None
        if grad_out is not None:
            row = torch.zeros(1, num_queries, device=device)
            padded = padded_rows(grad_out, self.operands.values.shape[2])
            self.upstream = Upstream(padded, row, row)
        if exact:
            self.outputs = self._outputs(problem, inputs, grad_out, scale, reference)
        else:
            self.outputs = _unknown_outputs(problem, inputs, (num_queries, num_keys, e))

    def _outputs(
        self,
        problem: Problem,
        inputs: tuple[Tensor, ...],
        grad_out: Tensor | None,
        scale: float,
        reference: Callable[..., Tensor],
    ) -> list[Output]:
        """What should come out, in float64, and by how much the textbook form misses it in this dtype."""
        dtype = inputs[0].dtype
        exact = answer(reference, inputs, scale=scale, grad_out=grad_out, exact=True)
        eager = answer(reference, inputs, scale=scale, grad_out=grad_out, exact=False)
        lse = base2_log_sums(self.operands.queries, self.operands.keys, scale)
        pairs: dict[str, tuple[Tensor, Tensor]]  # exact, and by the textbook form
        if grad_out is None:
            pairs = {"out": (exact.out, eager.out), "lse": (lse[..., None], lse[..., None].float())}
        else:
            deltas = (exact.out * grad_out).sum(-1).float()
            self.upstream = self.upstream._replace(lse=lse.float(), deltas=deltas)
            if problem.kernel == "attention_weights_and_grads":
                pairs = _weights_and_slopes(inputs, grad_out, scale)
            else:
                of = ("queries", "middle") if problem.is_external else ("queries", "keys", "values")
                pairs = dict(zip(of, zip(exact.grads, eager.grads, strict=True), strict=True))
                pairs = {name: pairs[name] for name in _written(problem.kernel)}
        return [
            Output(
                name,
                torch.empty_like(precise, dtype=_output_dtype(name, dtype)),
                precise,
                largest_allowed(worst_row_error(rounded, precise), torch.float32 if name == "lse" else dtype),
            )
            for name, (precise, rounded) in pairs.items()
        ]

    def launch(self, tile: Tile) -> Launch | None:
        """The kernel's call with this tile; None where the tile is not for these sizes."""
        x, results = self.operands, {output.name: output.result for output in self.outputs}
        match self.kernel:
            case "attention_forward" | "external_forward":
                shared = self.kernel == "external_forward"
                out, lse = results["out"], results["lse"][..., 0]
                return attention_launches.forward_launch(x, out, lse, keys_are_values=shared, tile=tile)
            case "attention_forward_few_keys":
                out, lse = results["out"], results["lse"][..., 0]
                return attention_launches.few_keys_launch(x, out, lse, tile=tile)
            case "attention_backward_queries" | "external_backward_queries":
                shared = self.kernel == "external_backward_queries"
                return attention_launches.backward_queries_launch(
                    x, self.upstream, results["queries"], keys_are_values=shared, tile=tile
                )
            case "external_backward_keys":
                return external_attention_triton.external_backward_keys_launch(
                    x, self.upstream, self.middle, results["middle"], tile=tile
                )
            case "attention_weights_and_grads":
                chunk = x._replace(queries=x.queries[:, :NUM_CHUNK_QUERIES])
                return attention_launches.weights_launch(
                    chunk, self.upstream, results["weights"], results["grad_scores"], tile=tile
                )
            case _:
                part = self.kernel.removeprefix("attention_backward_")
                nothing = x.values.new_empty(0)  # the gradient that this part does not write
                of_keys, of_values = results.get("keys", nothing), results.get("values", nothing)
                return attention_launches.backward_keys_launch(
                    x, self.upstream, of_keys, of_values, part=part, tile=tile
                )

    def poison(self) -> None:
        """NaN in every output, so that what a kernel leaves out shows."""
        for output in self.outputs:
            output.result.fill_(math.nan)

    def wrong(self) -> str | None:
        """Why the outputs are not acceptable; None if they are."""
        for output in self.outputs:
            error = worst_row_error(output.result, output.exact)
            if not error <= output.allowed:  # NaN is never allowed
                return f"wrong {output.name}: worst row off by {error:.2g}, allowed {output.allowed:.2g}"
        return None


def _output_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name in ("lse", "middle") else dtype


def _unknown_outputs(
    problem: Problem, inputs: tuple[Tensor, ...], sizes: tuple[int, int, int]
) -> list[Output]:
    """Places for the results, without what should come out; sizes N, M, E."""
    n, m, e = sizes
    chunk = (min(n, NUM_CHUNK_QUERIES), m)
    shapes = {"out": (1, n, e), "lse": (1, n, 1), "weights": chunk, "grad_scores": chunk}
    of = ("queries", "middle") if problem.is_external else ("queries", "keys", "values")
    shapes |= {name: tuple(t.shape) for name, t in zip(of, inputs, strict=True)}
    match problem.kernel:
        case "attention_weights_and_grads":
            names: tuple[str, ...] = ("weights", "grad_scores")
        case kernel if "forward" in kernel:
            names = ("out", "lse")
        case kernel:
            names = _written(kernel)
    dtype = inputs[0].dtype
    made = {x: inputs[0].new_empty(shapes[x], dtype=_output_dtype(x, dtype)) for x in names}
    return [Output(name, result, result, math.nan) for name, result in made.items()]


def _written(kernel: str) -> tuple[str, ...]:
    """Whose gradients a backward kernel writes."""
    if kernel == "external_backward_keys":
        return ("middle",)
    return tuple(kernel.partition("_backward_")[2].split("_and_"))


def _weights_and_slopes(
    inputs: tuple[Tensor, ...], grad_out: Tensor, scale: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """P and dS, without the scale, of the first chunk of queries, in float64 and in the inputs' dtype."""
    queries, keys, values = inputs
    rows = slice(0, NUM_CHUNK_QUERIES)
    made = []
    for dtype in (torch.float64, queries.dtype):
        q_nD, g_nE = queries[0, rows].to(dtype), grad_out[0, rows].to(dtype)
        k_MD, v_ME = keys[0].to(dtype), values[0].to(dtype)
        weights_nM = ((q_nD @ k_MD.T) * scale).softmax(dim=-1)
        grad_weights_nM = g_nE @ v_ME.T
        deltas_n1 = (weights_nM * grad_weights_nM).sum(dim=-1, keepdim=True)
        made.append((weights_nM, weights_nM * (grad_weights_nM - deltas_n1)))
    (weights, slopes), (weights_eager, slopes_eager) = made
    return {"weights": (weights, weights_eager), "grad_scores": (slopes, slopes_eager)}


def base2_log_sums(queries_BND: Tensor, keys_BMD: Tensor, scale: float) -> Tensor:
    """log2 of each row's sum of exponentials, (B, N) float64."""
    keys_BDM = keys_BMD.double().transpose(1, 2)
    rows = max(1, BLOCK_SCORES // keys_BMD.shape[1])
    blocks = [((block.double() @ keys_BDM) * scale).logsumexp(-1) for block in queries_BND.split(rows, dim=1)]
    return torch.cat(blocks, dim=1) / math.log(2)


def decoder_problems(device: torch.device) -> list[Problem]:
    """The kernels and widths of the paper's decoders in half precision, those that matter most first.

    Not float32: its exact products lose to PyTorch's, which are three of TF32, with any tile.
    """
    problems = [
        *_external(150, 16384, "forward", "backward_keys", "backward_queries"),
        *_external(19, 65536, "forward", "backward_keys", "backward_queries"),
        *_internal(256, 256, "forward", "backward_queries", "backward_keys", "backward_values"),
        *_internal(256, 150, "forward"),
        *_internal(512, 512, "forward", "weights_and_grads"),
        *_external(171, 16384, "forward", "backward_keys", "backward_queries"),
        *_internal(512, 150, "forward"),
        *_internal(256, 256, "weights_and_grads", "forward_few_keys"),
        *_internal(256, 150, "forward_few_keys"),
    ]
    return [problem for problem in problems if problem.num_keys(device)]


def _external(num_classes: int, num_pixels: int, *parts: str) -> list[Problem]:
    return [Problem(f"external_{part}", num_classes, num_classes, 2, num_pixels) for part in parts]


def _internal(width: int, value_width: int, *parts: str) -> list[Problem]:
    return [Problem(f"attention_{part}", width, value_width, 2, 16384) for part in parts]


def dtypes_of(element_bytes: int, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """What the kernels are timed in, and what their masks are checked in.

    float16 shows small errors that bfloat16's rounding hides.
    """
    if element_bytes == 4:
        return torch.float32, torch.float32
    if device.type != "cuda":
        return torch.float16, torch.float16  # the interpreter multiplies bfloat16 wrongly
    return torch.bfloat16, torch.float16
