"""One kernel on random inputs, to be run with any tile and checked: what the tuner measures.

B batch, N queries, M keys, D key width, E value width, K classes; n queries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from segdeformer.kernels.attention.launch import Operands, Upstream, attention_launch, pad_operands
from segdeformer.kernels.external_attention.launch import external_launch
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
        self.class_logits = {}
        if problem.operation == "attention":
            queries, keys, values = inputs.tensors
            self.operands = pad_operands(queries, keys, values, inputs.scale)
        else:
            scores, class_logits = inputs.tensors
            self.operands = external_operands(scores, class_logits, inputs.scale)
            if problem.kernel == "external_backward_keys":
                self.class_logits = {"class_logits": class_logits}
        row = torch.zeros(1, num_queries, device=device)
        padded = padded_rows(grad_out, self.operands.values.shape[2])
        self.operands = self.operands._replace(upstream=Upstream(padded, row, row))
        results = results_of(problem.kernel, (num_queries, num_keys), widths, dtype, device)
        if exact:
            expected = self._expected(inputs)
        else:
            expected = [Expected(name, made, math.nan) for name, made in results.items()]
        self.outputs = [Output(*pair) for pair in zip(results.values(), expected, strict=True)]

    def _expected(self, inputs: AttentionInputs) -> list[Expected]:
        """What should come out, in float64, and by how much the textbook form misses it in this dtype."""
        tensors, scale, grad_out = inputs.tensors, inputs.scale, inputs.grad_out
        x = self.operands
        assert grad_out is not None
        assert x.upstream is not None
        names = written(self.kernel)
        upstream = None if "out" in names else grad_out
        exact, eager = (
            answer(inputs.reference, tensors, scale=scale, grad_out=upstream, exact=precise)
            for precise in (True, False)
        )
        lse = base2_log_sums(x.queries, x.keys, scale)
        deltas = (exact.out * grad_out).sum(-1).float()
        self.operands = x._replace(upstream=x.upstream._replace(lse=lse.float(), deltas=deltas))
        pairs = {"out": (exact.out, eager.out), "lse": (lse[..., None], lse[..., None].float())}
        of = ("queries", "class_logits") if len(tensors) == 2 else ("queries", "keys", "values")
        if "weights" in names:
            pairs |= _weights_and_slopes(tensors, grad_out, scale)
        elif upstream is not None:
            grads = zip(exact.grads, eager.grads, strict=True)
            pairs |= dict(zip((f"grad_{name}" for name in of), grads, strict=True))
        dtypes = {name: torch.float32 if name == "lse" else tensors[0].dtype for name in names}
        return [
            Expected(name, precise, worst_row_error(rounded, precise), dtype=dtypes[name])
            for name, (precise, rounded) in ((name, pairs[name]) for name in names)
        ]

    def launch(self, tile: Tile) -> Launch | None:
        """The kernel's call with this tile; None where the tile is not for these sizes."""
        x = self.operands
        if self.kernel == "attention_weights_and_grads":
            x = x._replace(queries=x.queries[:, :NUM_CHUNK_QUERIES])
        results = dict(zip(written(self.kernel), (output.result for output in self.outputs), strict=True))
        return launch_of(self.kernel, x, {**results, **self.class_logits}, tile)

    def poison(self) -> None:
        """NaN in every output, so that what a kernel leaves out shows."""
        for output in self.outputs:
            output.result.fill_(math.nan)

    def wrong(self) -> str | None:
        """Why the outputs are not acceptable; None if they are."""
        results, expected = zip(*self.outputs, strict=True)
        return judging.judge(results, expected).wrong


def launch_of(kernel: str, x: Operands, results: Mapping[str, Tensor], tile: Tile) -> Launch | None:
    """A kernel's call, by its name, that writes these results; None where the tile is not for these sizes."""
    is_external = kernel.startswith("external")
    return (external_launch if is_external else attention_launch)(kernel, x, results, tile)


def written(kernel: str) -> tuple[str, ...]:
    """The results of a kernel, by the names of its arguments."""
    if kernel == "external_backward_keys":
        return ("grad_class_logits",)
    if kernel == "attention_weights_and_grads":
        return "weights", "grad_scores"
    if "forward" in kernel:
        return "out", "lse"
    return tuple(f"grad_{name}" for name in kernel.partition("_backward_")[2].split("_and_"))


def results_of(
    kernel: str, sizes: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """What a kernel writes of one image, empty. sizes: N, M; widths: D, E."""
    (n, m), (d, e) = sizes, widths
    chunk = (min(n, NUM_CHUNK_QUERIES), m)
    shapes: dict[str, tuple[int, ...]] = {"out": (1, n, e), "lse": (1, n, 1)}
    shapes |= {"grad_queries": (1, n, d), "grad_keys": (1, m, d), "grad_values": (1, m, e)}
    shapes |= {"grad_class_logits": (1, n, d), "weights": chunk, "grad_scores": chunk}
    in_float32 = ("lse", "grad_class_logits")
    dtypes = {name: torch.float32 if name in in_float32 else dtype for name in written(kernel)}
    return {name: torch.empty(shapes[name], dtype=of, device=device) for name, of in dtypes.items()}


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
