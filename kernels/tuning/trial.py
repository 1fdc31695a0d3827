"""One kernel on random inputs, to be run with any tile and checked: what the tuner measures.

B batch, N queries, M keys, D key width, E value width, K classes; n queries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from segdeformer.kernels.attention import launch as attention_launches
from segdeformer.kernels.attention.launch import Operands, Upstream, pad_operands
from segdeformer.kernels.external_attention import launch as external_launches
from segdeformer.kernels.external_attention.operator import external_operands
from segdeformer.kernels.launch import Launch, padded_rows
from segdeformer.kernels.tiles import Tile, architecture_of, default_tile, padded_width, size_class
from segdeformer.kernels.tuning import judge as judging
from segdeformer.kernels.tuning.cases import MAP_PX, AttentionInputs, attention_inputs
from segdeformer.kernels.tuning.judge import Expected, answer, worst_row_error

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
    def operation(self) -> str:
        return "external_attention" if self.kernel.startswith("external") else "attention"

    def default_tile(self, device: torch.device) -> Tile:
        """What runs where nothing was measured."""
        return default_tile(self.kernel, *self.widths, self.element_bytes, architecture_of(device))

    def num_keys(self, device: torch.device) -> int:
        if self.kernel == "attention_forward_few_keys":
            return self.default_tile(device).block_keys  # the most that it takes; 0: it is not used
        return self.num_pixels


def decoder_problems(device: torch.device) -> list[Problem]:
    """The kernels and widths of the paper's decoders in half precision, those that matter most first.

    Not float32: its exact products lose to PyTorch's, which are three of TF32, with any tile.
    """
    found = []
    for operation, d, e, parts in (
        ("external", 150, 150, ("forward", "backward_keys", "backward_queries")),
        ("external", 19, 19, ("forward", "backward_keys", "backward_queries")),
        ("attention", 256, 256, ("forward", "backward_queries", "backward_keys", "backward_values")),
        ("attention", 256, 150, ("forward",)),
        ("attention", 512, 512, ("forward", "weights_and_grads")),
        ("external", 171, 171, ("forward", "backward_keys", "backward_queries")),
        ("attention", 512, 150, ("forward",)),
        ("attention", 256, 256, ("weights_and_grads", "forward_few_keys")),
        ("attention", 256, 150, ("forward_few_keys",)),
    ):
        num_pixels = MAP_PX[d if operation == "external" else 150] ** 2
        found += [Problem(f"{operation}_{part}", d, e, 2, num_pixels) for part in parts]
    return [problem for problem in found if problem.num_keys(device)]


class Output(NamedTuple):
    """A tensor that a kernel writes, and what should be in it."""

    result: Tensor
    expected: Expected


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
        self.kernel = problem.kernel
        self.names = written(problem.kernel)
        widths, sizes = (problem.width, problem.value_width), (1, num_queries, num_keys)
        inputs = attention_inputs(
            problem.operation,
            widths,
            sizes,
            dtype=dtype,
            device=device,
            training=True,
            peak=2.0 if problem.operation == "attention" else 1.0,
        )
        grad_out = inputs.grad_out
        assert grad_out is not None
        inputs = inputs._replace(tensors=tuple(t.detach() for t in inputs.tensors))
        if problem.operation == "attention":
            queries, keys, values = inputs.tensors
            self.class_logits = None
            self.operands = pad_operands(queries, keys, values, inputs.scale)
        else:
            scores, self.class_logits = inputs.tensors
            self.operands = external_operands(scores, self.class_logits, inputs.scale)
        row = torch.zeros(1, num_queries, device=device)
        self.upstream = Upstream(padded_rows(grad_out, self.operands.values.shape[2]), row, row)
        expected = self._expected(inputs) if exact else []
        shapes = result_shapes(inputs.tensors, problem.value_width)
        self.outputs = []
        for place, name in enumerate(self.names):
            made = torch.empty(shapes[name], dtype=_result_dtype(name, dtype), device=device)
            self.outputs.append(Output(made, expected[place] if exact else Expected(name, made, math.nan)))

    def _expected(self, inputs: AttentionInputs) -> list[Expected]:
        """What should come out, in float64, and by how much the textbook form misses it in this dtype."""
        tensors, scale, grad_out = inputs.tensors, inputs.scale, inputs.grad_out
        assert grad_out is not None
        upstream = None if "out" in self.names else grad_out
        exact, eager = (
            answer(inputs.reference, tensors, scale=scale, grad_out=upstream, exact=precise)
            for precise in (True, False)
        )
        lse = base2_log_sums(self.operands.queries, self.operands.keys, scale)
        self.upstream = self.upstream._replace(lse=lse.float(), deltas=(exact.out * grad_out).sum(-1).float())
        pairs = {"out": (exact.out, eager.out), "lse": (lse[..., None], lse[..., None].float())}
        of = ("queries", "class_logits") if self.class_logits is not None else ("queries", "keys", "values")
        if "weights" in self.names:
            pairs |= _weights_and_slopes(tensors, grad_out, scale)
        elif upstream is not None:
            pairs |= dict(zip(of, zip(exact.grads, eager.grads, strict=True), strict=True))
        dtypes = {name: torch.float32 if name == "lse" else tensors[0].dtype for name in self.names}
        return [
            Expected(name, precise, worst_row_error(rounded, precise), dtype=dtypes[name])
            for name, (precise, rounded) in ((name, pairs[name]) for name in self.names)
        ]

    def launch(self, tile: Tile) -> Launch | None:
        """The kernel's call with this tile; None where the tile is not for these sizes."""
        x = self.operands
        if "weights" in self.names:
            x = x._replace(queries=x.queries[:, :NUM_CHUNK_QUERIES])
        results = {output.expected.name: output.result for output in self.outputs}
        return launch_of(self.kernel, x, self.upstream, results, tile, class_logits=self.class_logits)

    def poison(self) -> None:
        """NaN in every output, so that what a kernel leaves out shows."""
        for output in self.outputs:
            output.result.fill_(math.nan)

    def wrong(self) -> str | None:
        """Why the outputs are not acceptable; None if they are."""
        results, expected = zip(*self.outputs, strict=True)
        return judging.judge(results, expected).wrong


def launch_of(
    kernel: str,
    x: Operands,
    upstream: Upstream,
    results: Mapping[str, Tensor],
    tile: Tile,
    *,
    class_logits: Tensor | None,
) -> Launch | None:
    """A kernel's call, by its name, that writes these results; None where the tile is not for these sizes."""
    is_external = kernel.startswith("external")
    if "forward" in kernel:
        out, lse = results["out"], results["lse"].flatten(1)
        if kernel == "attention_forward_few_keys":
            return attention_launches.few_keys_launch(x, out, lse, tile=tile)
        if is_external:
            return external_launches.external_forward_launch(x, out, lse, tile=tile)
        return attention_launches.forward_launch(x, out, lse, tile=tile)
    if kernel == "attention_weights_and_grads":
        return attention_launches.weights_launch(
            x, upstream, results["weights"], results["grad_scores"], tile=tile
        )
    if kernel == "external_backward_keys":
        assert class_logits is not None
        return external_launches.external_backward_keys_launch(
            x, upstream, class_logits, results["class_logits"], tile=tile
        )
    if kernel.endswith("backward_queries"):
        return attention_launches.backward_queries_launch(
            x, upstream, results["queries"], keys_are_values=is_external, tile=tile
        )
    nothing = x.values.new_empty(0)  # the gradient that this part does not write
    of_keys, of_values = results.get("keys", nothing), results.get("values", nothing)
    part = kernel.removeprefix("attention_backward_")
    return attention_launches.backward_keys_launch(x, upstream, of_keys, of_values, part=part, tile=tile)


def written(kernel: str) -> tuple[str, ...]:
    """The results of a kernel, in the order of its arguments; gradients by their inputs' names."""
    if kernel == "external_backward_keys":
        return ("class_logits",)
    if kernel == "attention_weights_and_grads":
        return "weights", "grad_scores"
    return ("out", "lse") if "forward" in kernel else tuple(kernel.partition("_backward_")[2].split("_and_"))


def result_shapes(inputs: tuple[Tensor, ...], value_width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all that kernels write of these inputs, an attention's or an external one's."""
    (b, n, _), m = inputs[0].shape, inputs[1].shape[1]
    chunk = (min(n, NUM_CHUNK_QUERIES), m)
    of = ("queries", "class_logits") if len(inputs) == 2 else ("queries", "keys", "values")
    shapes = {name: tuple(t.shape) for name, t in zip(of, inputs, strict=True)}
    return shapes | {"out": (b, n, value_width), "lse": (b, n, 1), "weights": chunk, "grad_scores": chunk}


def _result_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name in ("lse", "class_logits") else dtype


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
    rows = max(1, judging.BLOCK_SCORES // keys_BMD.shape[1])
    blocks = [((block.double() @ keys_BDM) * scale).logsumexp(-1) for block in queries_BND.split(rows, dim=1)]
    return torch.cat(blocks, dim=1) / math.log(2)
