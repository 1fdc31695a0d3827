"""What `faulty` is to any task, for those of the tuner and of the checks."""

import torch
from faulty import FAULTS

from segdeformer.kernels.launch import Launch
from segdeformer.kernels.tune import measure_tiles


def measure_with_faults(place, faults, task):
    """`measure_tiles`, but launches of these tiles go wrong."""
    honest = Launch.run

    def run(launch):
        if launch.tile in faults:
            FAULTS[faults[launch.tile]]()
        honest(launch)

    Launch.run = run
    yield from measure_tiles(place, task)


def without_inputs(place, problem, task):
    """`measure_tiles`, but there is no memory for this problem."""
    if task.problem == problem:
        raise torch.OutOfMemoryError("CUDA out of memory")
    yield from measure_tiles(place, task)
