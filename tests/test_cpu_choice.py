"""What a command's `auto` takes on a CPU: measured once for each machine, kept, and said."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from segdeformer.kernels import cpu
from segdeformer.kernels.attention.blocks import BLOCK_COLUMNS
from segdeformer.kernels.impl import choose_impl
from segdeformer.measure.implementation import settle_impl
from segdeformer.runtime import ON_CPU


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    """A machine of which nothing is known, and in which nothing is measured unless a test says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_say", None)
    cpu._read.cache_clear()
    yield
    cpu._read.cache_clear()


def timed(monkeypatch, speedup):
    """What is measured from now on, and how often it was."""
    calls = []
    monkeypatch.setattr(cpu, "_speedup", lambda *call: calls.append(call) or speedup)
    return calls


def choice(width=8, value_width=4, num_keys=2**12, num_queries=2**12):
    with torch.inference_mode():
        q, k = torch.empty(1, num_queries, width), torch.empty(1, num_keys, width)
        return choose_impl("auto", q, k, torch.empty(1, num_keys, value_width))


def test_a_library_measures_nothing_and_takes_blocks_for_large_maps(monkeypatch):
    calls = timed(monkeypatch, 0.1)
    assert choice() == "blocks"
    assert choice(num_queries=16) == "sdpa"
    assert calls == []


@pytest.mark.parametrize(("speedup", "winner"), [(1.25, "blocks"), (0.5, "sdpa")])
def test_a_command_measures_a_kind_once_says_it_and_keeps_it(monkeypatch, speedup, winner, tmp_path):
    calls, said = timed(monkeypatch, speedup), []
    settle_impl(ON_CPU, lambda: pytest.fail("no pass through the model is needed"), about={}, say=said.append)
    assert said == calls == []
    assert [choice() for _ in range(3)] == [winner] * 3
    assert calls == [(8, 4, 2**12)]
    times = {1.25: "1.25", 0.5: "2.00"}[speedup]
    loser = {"blocks": "sdpa", "sdpa": "blocks"}[winner]
    assert said == [
        f"auto: attention, 8 and 4 wide, many keys: {winner}, {times} times as fast as {loser} on this CPU"
    ]
    choice(num_keys=BLOCK_COLUMNS, num_queries=2**13)  # few keys are another kind
    assert len(calls) == len(said) == 2
    kept = json.loads((tmp_path / "segdeformer" / "cpu.json").read_text())
    assert kept["torch"] == torch.__version__
    assert kept["threads"] == torch.get_num_threads()
    assert kept["speedups"] == {"8 and 4 wide, many keys": speedup, "8 and 4 wide, few keys": speedup}
    cpu._read.cache_clear()  # as another process
    assert choice() == winner
    assert len(calls) == 2


def test_another_torch_measures_anew_and_a_damaged_file_is_made_again(monkeypatch, tmp_path):
    calls = timed(monkeypatch, 0.5)
    cpu.measure_when_asked(lambda line: None)
    choice()
    cpu._read.cache_clear()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert choice() == "sdpa"
    assert len(calls) == 2
    (tmp_path / "segdeformer" / "cpu.json").write_text("{")
    cpu._read.cache_clear()
    choice()
    assert len(calls) == 3


def test_a_cache_that_cannot_be_written_is_said_and_the_answer_used(monkeypatch, tmp_path):
    calls, said = timed(monkeypatch, 0.5), []
    (tmp_path / "segdeformer").write_text("a file where the folder should be")
    cpu.measure_when_asked(said.append)
    assert [choice(), choice()] == ["sdpa", "sdpa"]
    assert len(calls) == 1
    assert "(not kept for the next time: " in said[0]


def test_nothing_is_measured_where_only_shapes_are_followed(monkeypatch):
    calls = timed(monkeypatch, 0.5)
    cpu.measure_when_asked(lambda line: None)
    with FakeTensorMode():
        assert choice() == "blocks"
    assert calls == []


def test_a_real_measurement_is_a_ratio():
    assert 0.001 < cpu._speedup(16, 8, 5000) < 1000
