"""What commands compare at their start where `auto` knows nothing yet; GPU and times are stand-ins."""

import json
import math
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from segdeformer.config import EvalConfig, load_recipe
from segdeformer.kernels.attention import attention
from segdeformer.kernels.choices import Choice, auto_path, forget_choices, measured_choices
from segdeformer.kernels.impl import Call, choose_impl
from segdeformer.kernels.tuning import cases
from segdeformer.kernels.tuning import comparison as comparing
from segdeformer.kernels.tuning.comparison import Compared, Comparison
from segdeformer.kernels.tuning.crew import Over
from segdeformer.measure import implementation
from segdeformer.measure.implementation import inference_calls, open_comparisons, settle_impl, training_calls
from segdeformer.runtime import Runtime
from segdeformer.weights.build import build_model

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
CALL = Call("attention", 256, 256, 2, False, 1, (16384,), (1024,))
OTHER = Call("external_attention", 150, 150, 2, False, 1, (16384,), (16384,))


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU of which nothing is known; `answers` says what comparing gives, `compared` what was compared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Card")
    monkeypatch.setattr(implementation, "can_compare", lambda device: True)
    state = SimpleNamespace(compared=[], answers={}, path=auto_path("Some Card"))

    def compare(comparisons, device):
        state.compared.append([comparison.operation for comparison in comparisons])
        return {
            comparison: state.answers[comparison.operation](comparison)
            for comparison in comparisons
            if comparison.operation in state.answers
        }

    monkeypatch.setattr(implementation, "_compare", compare)
    forget_choices()
    yield state
    forget_choices()


def times(triton_ms, alternative_ms):
    return lambda comparison: Compared(comparison, Choice(*comparison.key, triton_ms, alternative_ms), {})


def refused(reason):
    return lambda comparison: Compared(comparison, Choice(*comparison.key, math.inf, 1.0), {"triton": reason})


def settle(calls, *, about="a model", impl="auto", device=GPU):
    said = []
    settle_impl(Runtime(device, impl), lambda: calls, about={"model": about}, say=said.append)
    return said


def chosen(call):
    queries, keys = (
        SimpleNamespace(
            shape=(call.batch, rows, call.width), device=GPU, dtype=torch.bfloat16, element_size=lambda: 2
        )
        for rows in (call.source[0], call.target[0])
    )
    with torch.inference_mode():
        return choose_impl("auto", queries, keys, keys, operation=call.operation)


def test_what_was_never_measured_is_compared_said_used_and_kept(card):
    assert chosen(CALL) == chosen(OTHER) == "sdpa"
    card.answers = {"attention": times(1.0, 2.0), "external_attention": times(2.0, 1.0)}
    said = settle([CALL, OTHER, CALL])
    assert said[0].startswith("auto: 2 operations of this model were never measured on Some Card; comparing")
    assert said[1].startswith("auto: triton for attention of 1 x 16384 x 1024, 256 wide")
    assert "PyTorch for external attention of 1 x 16384 x 16384, 150 wide" in said[1]
    assert (chosen(CALL), chosen(OTHER)) == ("triton", "sdpa")
    assert card.compared == [["attention", "external_attention"]]
    forget_choices()  # as in the next process
    assert settle([CALL, OTHER]) == []
    assert (chosen(CALL), chosen(OTHER)) == ("triton", "sdpa")
    assert len(card.compared) == 1


def test_a_settled_model_is_not_even_asked_for_its_calls(card):
    card.answers = {"attention": times(1.0, 2.0)}
    settle([CALL])

    def fail():
        raise AssertionError("asked")

    settle_impl(Runtime(GPU), fail, about={"model": "a model"}, say=print)
    with pytest.raises(AssertionError):
        settle_impl(Runtime(GPU), fail, about={"model": "another"}, say=print)


@pytest.mark.parametrize(("impl", "device"), [("sdpa", GPU), ("triton", GPU), ("auto", CPU)])
def test_nothing_is_compared_where_nothing_is_to_be_decided(card, impl, device):
    assert settle([CALL], impl=impl, device=device) == []
    assert card.compared == []
    assert not card.path.exists()


def test_a_kernel_that_fails_stays_pytorchs_and_is_said_with_its_reason(card):
    card.answers = {"attention": refused("wrong: worst row off by 0.1, allowed 0.01")}
    said = settle([CALL])
    assert "PyTorch for attention" in said[1]
    assert "(triton: wrong: worst row off by 0.1, allowed 0.01)" in said[1]
    assert chosen(CALL) == "sdpa"
    (row,) = json.loads(card.path.read_text())["choices"]
    assert (row["triton_ms"], row["reason"]) == (None, "wrong: worst row off by 0.1, allowed 0.01")
    forget_choices()
    assert settle([CALL]) == []  # not tried again


def test_what_had_no_time_left_is_compared_the_next_time(card):
    card.answers = {"attention": times(1.0, 2.0)}
    said = settle([CALL, OTHER])
    assert (
        "external attention of 1 x 16384 x 16384, 150 wide, half precision (not compared: no time" in said[1]
    )
    card.answers = {"external_attention": times(1.0, 2.0)}
    forget_choices()
    settle([CALL, OTHER])
    assert card.compared == [["attention", "external_attention"], ["external_attention"]]
    assert chosen(OTHER) == "triton"


def test_the_answers_of_other_kernels_or_versions_do_not_count(card):
    card.answers = {"attention": times(1.0, 2.0)}
    settle([CALL])
    table = json.loads(card.path.read_text())
    card.path.write_text(json.dumps({**table, "triton": "0.0"}))
    forget_choices()
    settle([CALL])
    assert len(card.compared) == 2


def test_a_cache_that_cannot_be_written_is_said_and_costs_nothing_else(card, tmp_path):
    card.answers = {"attention": times(1.0, 2.0)}
    (tmp_path / "segdeformer").write_text("a file where a folder should be")
    said = settle([CALL])
    assert said[2].startswith("auto: this is not kept for the next time (")
    assert chosen(CALL) == "triton"


def test_a_choice_of_the_tuner_comes_first(card):
    card.path.parent.mkdir(parents=True)
    tuned = Choice(*Comparison.of(CALL).key, 3.0, 1.0)
    (card.path.parent / "some_card.json").write_text(json.dumps({"choices": [tuned.row()]}))
    card.answers = {"attention": times(1.0, 2.0)}
    assert settle([CALL]) == []
    assert measured_choices(GPU) == [tuned]
    assert chosen(CALL) == "sdpa"


def test_float32_attention_and_widths_without_a_kernel_are_not_compared():
    calls = [CALL._replace(element_bytes=4), CALL._replace(width=600), CALL]
    assert [comparison.element_bytes for comparison in open_comparisons(calls, [])] == [2]
    loss = Call("upsample_cross_entropy", 19, 19, 4, True, 2, (16, 16), (64, 64))
    assert len(open_comparisons([loss, loss._replace(batch=3)], [])) == 1  # of one size class


@pytest.mark.parametrize("fold", [False, True])
def test_the_calls_of_a_model_are_those_of_its_own_shapes(fold):
    recipe = load_recipe("synthetic")
    model = build_model(recipe.model).eval()
    model = model.fold() if fold else model
    protocol = EvalConfig(mode="slide", window=(64, 96), stride=(32, 32))
    calls = inference_calls(model, recipe, protocol, device=CPU)
    pixels = 16 * 24
    assert {call.operation for call in calls} == {"attention", "external_attention"}
    for call in calls:
        assert (call.batch, call.source, call.training) == (1, (pixels,), False)
        assert call.target == (pixels,)
        if call.operation == "external_attention":
            assert call.width == call.value_width == recipe.model.num_classes
        elif fold:
            assert call.value_width == recipe.model.num_classes


def test_the_calls_of_a_training_step_have_its_batch_its_gradients_and_its_loss():
    recipe = load_recipe("synthetic")
    calls = training_calls(recipe, 3)
    height, width = recipe.augment.crop
    losses = [call for call in calls if call.operation == "upsample_cross_entropy"]
    assert {call.batch for call in losses} == {3, 1}  # of the step and of a validation
    assert {call.target for call in losses} == {(height, width)}
    steps = [call for call in calls if call.training and call not in losses]
    assert {call.operation for call in steps} == {"attention", "external_attention"}
    assert {(call.batch, call.source) for call in steps} == {(3, (height // 4 * (width // 4),))}
    validation = [call for call in calls if not call.training]
    assert {call.operation for call in validation} == {"attention", "external_attention", "upsample_argmax"}
    assert {call.batch for call in validation} == {1}


class HereAndNow:
    """A crew without processes, whose clock the test sets."""

    def __init__(self):
        self.now = 0.0

    def run(self, work, tasks, *, workers=1, deadline=math.inf):
        tasks = deque(tasks)
        while tasks and self.now < deadline - time.monotonic():
            task = tasks.popleft()
            yield from ((task, result) for result in work(task))
            yield task, Over()
            self.now += 4.0

    def close(self):
        pass


SMALL = [Comparison("attention", 32, 19, 2, False, 40, keys) for keys in (30, 20, 10)]


def test_the_longest_comparisons_come_first_and_stop_in_time():
    compared = list(comparing.compare(SMALL[::-1], CPU, seconds=10.0, crew=HereAndNow()))
    assert [f.comparison for f in compared] == SMALL[:2]  # the first four seconds went into compiling
    for result in compared:
        assert result.refusals == {}
        assert result.choice.size == 40 * result.comparison.num_keys
        assert 0 < result.choice.triton_ms < math.inf


def test_a_wrong_kernel_loses_its_comparison(monkeypatch):
    def one_row_off(*inputs, impl, **options):
        out = attention(*inputs, impl=impl, **options)
        if impl == "triton":
            out = out.clone()
            out[0, 3] += 1
        return out

    monkeypatch.setattr(cases, "attention", one_row_off)
    (compared,) = comparing.compare(SMALL[:1], CPU, seconds=100.0, crew=HereAndNow())
    assert compared.refusals["triton"].startswith("wrong output: worst row off by")
    assert not compared.choice.triton_wins
