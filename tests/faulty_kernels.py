"""What `faulty` is to any task, for those of `make gpu` and of the tuner."""

import torch
from faulty import FAULTS

from benchmarks import attention, checks
from segdeformer.kernels.launch import Launch
from segdeformer.kernels.tuning.search import measure_tiles


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


def check_with_faults(faults, part):
    """`check_group`, but the cases of these (group, case) go wrong."""
    if any(group == part.group.name for group, _ in faults):
        honest = checks.cases_of

        def cases_of(group, machine):
            for name, check in honest(group, machine):
                fault = faults.get((group.name, name))
                yield name, check if fault is None else FAULTS.get(fault) or spoiled_gpu

        checks.cases_of = cases_of
    yield from checks.check_group(part)


def spoiled_gpu():
    """As an illegal access of a kernel shows: nothing works in this process any more."""

    def fails(_device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checks.synchronize = fails
    fails(None)


def compare_with_faults(faults, row, machine, without):
    """`attention.measure`, but the contenders of these names go wrong; `` stands for the exact results."""
    honest, exact = attention.contenders, attention.expected

    def contenders(*arguments):
        for contender in honest(*arguments):
            fault = faults.get(contender.name)
            yield contender if fault is None else contender._replace(run=Fault(fault))

    def expected(*arguments):
        if "" in faults:
            FAULTS[faults[""]]()
        return exact(*arguments)

    attention.contenders, attention.expected = contenders, expected
    try:
        return attention.measure(row, machine, without)
    finally:
        attention.contenders, attention.expected = honest, exact


class Fault:
    def __init__(self, name):
        self.name = name

    def __call__(self, *_inputs):
        FAULTS[self.name]()


def quick(_row, _machine, _without):
    return {"skipped": "quick"}
