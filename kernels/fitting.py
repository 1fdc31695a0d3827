"""A tile that fits the card, whatever the installed compiler makes of it.

Compilers differ in the shared memory, tensor memory and threads that a tile needs. So the wanted tile is
compiled, and where the card refuses it the next smaller one, until one fits. Such answers are kept in
`fits/<gpu>.json` of the user's cache, for these kernels and this Triton, so that they are found once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.errors import TritonError

from segdeformer.errors import KernelError
from segdeformer.files import WriteError, write_text
from segdeformer.kernels.launch import Launch, failure, kernel_sources
from segdeformer.kernels.tiles import Tile, gpu_slug, read_table, user_cache

LEAST_BLOCK = 16  # of the matrix instructions
FEW_SCORES = 2048  # of a program: four warps have enough of them


class Fitted(NamedTuple):
    """A launch whose kernel fits the card, loaded and ready to start."""

    launch: Launch
    start: Callable[..., None]  # of the kernel's arguments in their order, constants too


def smaller_tiles(tile: Tile, *, keys_stay: bool = False) -> Iterator[Tile]:
    """The tile, then ever smaller ones, down to 16 x 16: plain copies, a shallower pipeline, halved blocks.

    keys_stay: the block of keys holds all of them, so only that of the queries is halved.
    """
    yield tile
    plain = Tile(*tile[:4])
    if plain != tile:
        yield plain
    queries, keys, warps, stages = plain[:4]
    while True:
        for fewer in range(stages - 1, 0, -1):
            yield Tile(queries, keys, warps, fewer)
        if queries > LEAST_BLOCK and (keys_stay or queries >= keys):
            queries //= 2
        elif keys > LEAST_BLOCK and not keys_stay:
            keys //= 2
        else:
            return
        warps = min(warps, 4) if queries * keys <= FEW_SCORES else warps
        stages = min(stages, 2)
        yield Tile(queries, keys, warps, stages)


def first_fitting(launches: Sequence[Launch], device: torch.device) -> Fitted:
    """The first of these launches whose kernel fits the device; they differ in their tiles.

    Raises `KernelError`, with what stands against the first one, if none does.
    """
    answers = _Answers(device)
    kept = answers.get(launches[0])
    tiles = [launch.tile for launch in launches]
    against: Exception | None = None
    for launch in launches[tiles.index(kept) if kept in tiles else 0 :]:
        try:
            grid = (*launch.grid, 1, 1)[:3]
            fitted = Fitted(launch, launch.compile()[grid])  # loading is where a card refuses
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError) as error:
            against = against or error
            continue
        if launch.tile not in (launches[0].tile, kept):
            answers.keep(launches[0], launch.tile)
        return fitted
    assert against is not None
    raise KernelError(failure(launches[0], against)) from against


class _Answers:
    """Which tile to take instead of one that does not fit this GPU, from earlier processes."""

    def __init__(self, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
        self.path = user_cache() / "fits" / f"{gpu_slug(name)}.json"
        self.header = {"triton": triton.__version__, "sources": kernel_sources()}

    def _read(self) -> dict[str, list[Any]]:
        return dict(read_table(self.path, self.header).get("instead", {}))

    def get(self, wanted: Launch) -> Tile | None:
        found = self._read().get(_question(wanted))
        return None if found is None else Tile(*found)

    def keep(self, wanted: Launch, tile: Tile) -> None:
        instead = {**self._read(), _question(wanted): list(tile)}
        with contextlib.suppress(WriteError):  # a full or read-only home costs the next process some seconds
            write_text(self.path, json.dumps({**self.header, "instead": instead}, indent=1) + "\n")


def _question(launch: Launch) -> str:
    """All that the compiler's answer depends on."""
    dtypes = ",".join(
        sorted({str(tensor.dtype).removeprefix("torch.") for tensor in launch.tensors.values()})
    )
    constants = ",".join(f"{name}={value}" for name, value in sorted(launch.constants.items()))
    return f"{launch.name} {dtypes} {constants}, {launch.tile}"
