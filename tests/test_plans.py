"""Launch plans, and tiles that fit whatever a compiler makes of them. No GPU: its driver has a stand-in."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from segdeformer.errors import KernelError
from segdeformer.kernels import fitting, plans
from segdeformer.kernels.fitting import first_fitting, smaller_tiles
from segdeformer.kernels.tiles import Tile

CPU = torch.device("cpu")


def test_smaller_tiles_shrink_in_every_step_down_to_the_least():
    tiles = list(smaller_tiles(Tile(128, 64, 8, 3, tma=True, warp_specialize=True)))
    assert tiles[:4] == [
        Tile(128, 64, 8, 3, True, True),
        Tile(128, 64, 8, 3),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 1),
    ]
    assert tiles[-1] == Tile(16, 16, 4, 1)
    sizes = [(tile.block_queries * tile.block_keys, tile.stages) for tile in tiles[1:]]
    assert sizes == sorted(set(sizes), reverse=True)
    assert {tile.block_keys for tile in smaller_tiles(Tile(64, 256, 8, 2), keys_stay=True)} == {256}
    assert list(smaller_tiles(Tile(16, 16, 4, 1))) == [Tile(16, 16, 4, 1)]


class FakeLaunch(SimpleNamespace):
    """A launch whose kernel needs what the test says; `compiled` counts."""

    compiled = 0

    def compile(self):
        FakeLaunch.compiled += 1
        if isinstance(self.needs, Exception):
            raise self.needs
        return self

    def __getitem__(self, grid):
        assert len(grid) == 3
        if self.needs > 512:
            raise OutOfResources(self.needs, 512, "tensor memory")
        return lambda *arguments: None


def fakes(*needs):
    tensors, constants = {"queries": torch.zeros(1, 4, 8)}, {"D1": 16}
    tiles = list(smaller_tiles(Tile(64, 64, 4, 3)))
    return [
        FakeLaunch(needs=n, tile=t, grid=(1,), name="kernel", tensors=tensors, constants=constants)
        for n, t in zip(needs, tiles, strict=False)
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    FakeLaunch.compiled = 0
    return tmp_path / "segdeformer" / "fits" / "none.json"


def test_the_first_tile_that_fits_is_taken_and_kept_for_the_next_process(cache):
    launches = fakes(768, RuntimeError("PassManager::run failed"), 512, 16)
    assert first_fitting(launches, CPU).launch is launches[2]
    assert FakeLaunch.compiled == 3
    (kept,) = json.loads(cache.read_text())["instead"].values()
    assert kept == list(launches[2].tile)
    assert first_fitting(launches, CPU).launch is launches[2]
    assert FakeLaunch.compiled == 4


def test_what_fits_at_once_leaves_nothing_on_the_disk(cache):
    launches = fakes(512, 16)
    assert first_fitting(launches, CPU).launch is launches[0]
    assert not cache.exists()


@pytest.mark.parametrize("change", ["triton", "sources"])
def test_the_answer_of_another_compiler_or_of_other_kernels_is_found_anew(cache, change):
    launches = fakes(768, 512, 16)
    first_fitting(launches, CPU)
    table = json.loads(cache.read_text())
    cache.write_text(json.dumps({**table, change: "made up"}))
    launches[0].needs = 100
    assert first_fitting(launches, CPU).launch is launches[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"instead": 3}'])
def test_a_damaged_file_or_one_that_cannot_be_written_only_costs_time(cache, monkeypatch, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    launches = fakes(768, 512)
    assert first_fitting(launches, CPU).launch is launches[1]

    def full_disk(path, text):
        raise fitting.WriteError(path, "no space left")

    cache.unlink()
    monkeypatch.setattr(fitting, "write_text", full_disk)
    assert first_fitting(launches, CPU).launch is launches[1]


def test_where_nothing_fits_the_error_is_about_the_wanted_tile_in_one_line(cache):
    with pytest.raises(
        KernelError, match=r"kernel failed .*tensor memory, Required: 700.*64x64.*--impl"
    ) as e:
        first_fitting(fakes(700, 600), CPU)
    assert "\n" not in str(e.value)


# A made-up version of Triton, whose kernels need twice the memory, on a card that is not there.
PROGRAM = """
import json, sys
import torch, triton
triton.__version__ = "9.9.0"
from benchmarks.no_gpu import pretend
from segdeformer.kernels.tiles import ARCHITECTURES
card = pretend(architecture="sm_90", shared_bytes=ARCHITECTURES["sm_90"].shared_bytes // 2)
from segdeformer.kernels import plans
from segdeformer.kernels.attention import attention
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["repr"])
x = torch.zeros(1, 40, 256, dtype=torch.bfloat16)
for _ in range(3):
    attention(x, x.repeat(1, 30, 1), x.repeat(1, 30, 1), scale=1 / 16, impl="triton")
(plan,) = plans._plans.values()
print(json.dumps({"started": card.started, "compiled": len(compiled), "blocks": plan.values[-4:]}))
"""


def test_a_compiler_that_needs_twice_the_memory_still_launches_a_fitting_tile(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}

    def run():
        command = [sys.executable, "-c", PROGRAM]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)

    first, second = run(), run()
    assert first["started"] == second["started"] == ["attention_forward"] * 3
    assert first["compiled"] > 1
    assert second["compiled"] == 1  # the answer was kept
    assert first["blocks"] == second["blocks"]
    kept = json.loads((tmp_path / "segdeformer" / "fits" / "none.json").read_text())
    assert kept["triton"] == "9.9.0"


def test_forgetting_plans_reads_tiles_anew(monkeypatch):
    read = []
    monkeypatch.setattr(plans, "forget_tables", lambda: read.append(True))
    monkeypatch.setitem(plans._plans, "something", None)
    plans.forget_plans()
    assert not plans._plans
    assert read == [True]
