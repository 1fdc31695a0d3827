"""Choices by the size of the problem: classes, the nearest one, compiled graphs, old and damaged files."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from segdeformer.kernels import choices, tiles
from segdeformer.kernels import impl as impl_module
from segdeformer.kernels.choices import (
    Choice,
    Kind,
    agree,
    answers_by_class,
    auto_path,
    forget_choices,
    least_size,
    measured_choices,
    switches,
)
from segdeformer.kernels.impl import calls_noted, choose_impl, choose_upsampling
from segdeformer.kernels.tiles import Tile, choose_tile, size_class
from segdeformer.kernels.tuning.cases import decoder_comparisons

GPU = torch.device("cuda", 0)
KIND = Kind("attention", 256, 256, 2, True)


def choice(size, *, wins, kind=KIND):
    return Choice(*kind, size, 1.0 if wins else 2.0, 1.5)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU of which nothing is known."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Card")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_choices()
    yield tmp_path / "segdeformer" / "tuned"
    forget_choices()


def queries(batch, num_pixels, width=256):
    return SimpleNamespace(
        shape=(batch, num_pixels, width), device=GPU, dtype=torch.bfloat16, element_size=lambda: 2
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *[(0, 0), (1, 0), (2, 1), (4, 1), (7, 1), (8, 2), (31, 2), (32, 3)],
        *[(1024 * 1024, 10), (16384 * 1024, 12), (16384 * 16384, 14), (65536 * 65536, 16)],
        *[(2**27 - 1, 13), (2**27, 14), (2**29 - 1, 14), (2**29, 15)],
    ],
)
def test_a_size_class_is_the_rounded_logarithm_to_base_four(size, expected):
    assert size_class(size) == expected
    if size:
        assert abs(math.log(size, 4) - expected) <= 0.5 + 1e-9
    assert least_size(expected) <= size
    assert size_class(least_size(expected)) == expected


def test_a_comparison_serves_its_class_and_those_beside_it_that_have_none():
    few_and_many = [choice(2**20, wins=False), choice(2**28, wins=True)]  # classes 10 and 14
    assert answers_by_class(few_and_many, KIND) == {
        9: False,
        10: False,
        11: False,
        13: True,
        14: True,
        15: True,
    }
    # Between two, the smaller one's; and of two in one class the first.
    close = [choice(2**24, wins=False), choice(2**28, wins=True), choice(2**28, wins=False)]
    assert answers_by_class(close, KIND)[13] is False
    assert answers_by_class(close, KIND)[14] is True
    assert answers_by_class(close, Kind("attention", 256, 256, 2, False)) == {}
    assert answers_by_class(close, Kind("attention", 250, 256, 2, True))[14] is True  # the same after padding


def test_auto_asks_for_the_size_of_the_problem_and_not_for_widths_alone(gpu):
    agree(GPU, [choice(2**20, wins=False), choice(2**28, wins=True)])

    def chosen(batch, num_pixels, num_keys):
        q, k = queries(batch, num_pixels), queries(batch, num_keys)
        return choose_impl("auto", q, k, k)

    assert chosen(1, 16384, 16384) == "triton"
    assert chosen(4, 16384, 16384) == "triton"  # one class up
    assert chosen(16, 16384, 16384) == "sdpa"  # two: nothing is known
    assert chosen(1, 16384, 1024) == "sdpa"  # class 12 lies two away from both
    assert chosen(1, 1024, 1024) == "sdpa"
    with torch.no_grad():
        assert chosen(1, 16384, 16384) == "sdpa"  # measured in training only
    assert switches(str(GPU), KIND) == (2**25, 2**31)


def test_upsampling_is_asked_for_by_its_output(gpu):
    kind = ("upsample_argmax", 150, 150, 4, False)
    agree(GPU, [choice(150 * 512 * 512, wins=True, kind=kind)])
    logits = SimpleNamespace(shape=(1, 150, 128, 128), device=GPU, element_size=lambda: 4)
    assert choose_upsampling("auto", "upsample_argmax", logits, (512, 512)) == "triton"
    assert choose_upsampling("auto", "upsample_argmax", logits, (32, 32)) == "strips"
    assert choose_upsampling("auto", "upsample_cross_entropy", logits, (512, 512)) == "strips"


def test_the_decoder_s_comparisons_leave_no_common_batch_without_an_answer():
    """Maps of a 512x512 image at 1/4, also with keys reduced 4 times, and at 1/16; batches of a GPU."""
    measured = [Choice(*comparison.key, 1.0, 2.0) for comparison in decoder_comparisons()]
    for num_pixels, num_keys in ((16384, 16384), (16384, 1024), (1024, 1024)):
        for batch in (2, 4, 8, 16):
            place = size_class(batch * num_pixels * num_keys)
            assert place in answers_by_class(measured, KIND), (num_pixels, num_keys, batch)
        for kind in (("attention", 256, 256, 2, False), ("attention", 256, 150, 2, False)):
            assert size_class(num_pixels * num_keys) in answers_by_class(measured, Kind(*kind))
    for batch in (1, 2, 4, 8, 16):
        place = size_class(batch * 16384**2)
        assert place in answers_by_class(measured, Kind("external_attention", 150, 150, 2, True))
        place = size_class(batch * 150 * 512 * 512)
        assert place in answers_by_class(measured, Kind("upsample_cross_entropy", 150, 150, 2, True))


def test_a_compiled_graph_is_made_anew_only_where_the_answer_changes(gpu):
    agree(GPU, [choice(2**10, wins=False), choice(2**12, wins=True)])

    def chosen(x, kind=KIND):
        size = x.shape[0] * x.shape[1] * x.shape[1]
        return x + 1 if impl_module._faster_on_gpu(str(GPU), kind, size) else x - 1

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(chosen, fullgraph=True, backend=counter)
    graphs = []
    for n in (8, 9, 20, 60, 100, 125, 30):  # triton from 2^11 to 2^15, N from 32 to 127
        assert compiled(torch.zeros(2, n)).unique().item() == (1.0 if n >= 32 else -1.0)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 3, 3, 3, 3]
    unknown = torch.compile(lambda x: chosen(x, ("attention", 64, 64, 2, True)), backend=counter)
    for n in (8, 9, 60, 3000):
        unknown(torch.zeros(2, n))
    assert counter.frame_count == 5  # fixed sizes, then any size


def test_calls_are_noted_in_this_context_only():
    q, k, v = torch.zeros(6, 30, 8), torch.zeros(6, 7, 8), torch.zeros(6, 7, 5)
    with calls_noted() as outer:
        choose_impl("auto", q, k, v)
        choose_impl("sdpa", q, k, v)
        with torch.no_grad(), calls_noted() as inner:
            choose_impl("auto", q.half(), q.half(), q.half(), operation="external_attention")
        choose_upsampling("auto", "upsample_argmax", torch.zeros(2, 5, 3, 4), (12, 17))
    choose_impl("auto", q, k, v)
    assert outer == [
        ("attention", 8, 5, 4, True, 6, (30,), (7,)),
        ("upsample_argmax", 5, 5, 4, False, 2, (3, 4), (12, 17)),
    ]
    assert inner == [("external_attention", 8, 8, 2, False, 6, (30,), (30,))]


def test_choices_of_older_files_say_nothing_and_damaged_ones_are_made_again(gpu):
    old = dict(zip(("operation", "width", "value_width", "element_bytes", "training"), KIND, strict=True))
    old |= {"triton_ms": 1.0, "alternative_ms": 2.0}
    gpu.mkdir(parents=True)
    refused = choice(2**28, wins=True)._replace(triton_ms=math.inf)
    (gpu / "some_card.json").write_text(json.dumps({"choices": [old, refused.row()]}))
    auto_path("Some Card").write_text("{")
    assert measured_choices(GPU) == [refused]
    assert json.loads(json.dumps(refused.row()))["triton_ms"] is None
    assert choose_impl("auto", *[queries(1, 16384)] * 3) == "sdpa"
    auto_path("Some Card").write_text(json.dumps({"choices": [choice(2**20, wins=True).row()]}))
    forget_choices()
    assert measured_choices(GPU) == [refused, choice(2**20, wins=True)]


def test_a_file_of_the_version_before_says_sdpa_ms_and_is_read(gpu):
    new = choice(2**20, wins=True)
    old = new.row()
    old["sdpa_ms"] = old.pop("alternative_ms")
    gpu.mkdir(parents=True)
    (gpu / "some_card.json").write_text(json.dumps({"choices": [old]}))
    assert measured_choices(GPU) == [new]
    assert new.row()["alternative_ms"] == new.alternative_ms
    forget_choices()


def test_tiles_are_taken_by_size_too(gpu):
    gpu.mkdir(parents=True)
    by_class = {"14": [128, 128, 8, 3], "10": [64, 64, 4, 2]}
    table = {"attention_forward": {"256x256": {"2": by_class, "4": [32, 32, 4, 1]}}}
    (gpu / "some_card.json").write_text(json.dumps({"tiles": table}))

    def tile(num_scores, element_bytes=2):
        return choose_tile("attention_forward", 256, 256, element_bytes, GPU, num_scores=num_scores)

    large, small = Tile(128, 128, 8, 3), Tile(64, 64, 4, 2)
    assert [tile(2**n) for n in (2, 20, 23, 24, 25, 28, 40)] == [*[small] * 4, *[large] * 3]
    assert tile(None) == large
    assert tile(2**20, element_bytes=4) == tile(None, element_bytes=4) == Tile(32, 32, 4, 1)
    tiles.forget_tables()
    choices.forget_choices()
