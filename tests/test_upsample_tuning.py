"""Comparisons, checks and goals of the operations on upsampled logits: the right counts, the wrong shows."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import checks, report
from benchmarks.checks import check_groups
from benchmarks.machine import this_machine
from benchmarks.upsampling import UpsamplingRow, measure
from segdeformer.kernels.choices import Choice, agree, forget_choices
from segdeformer.kernels.impl import choose_upsampling
from segdeformer.kernels.launch import Launch
from segdeformer.kernels.tuning.cases import UPSAMPLING, Comparison, decoder_comparisons, make_loss_task
from segdeformer.kernels.tuning.comparison import run_comparison
from segdeformer.kernels.tuning.events import describe
from segdeformer.kernels.tuning.judge import LossTask, argmax_error, confidence_error, loss_answer, loss_error
from segdeformer.kernels.upsample.argmax import upsample_argmax_reference

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
LOSS = Comparison("upsample_cross_entropy", 19, 19, 4, True, 4)
ARGMAX = Comparison("upsample_argmax", 19, 19, 4, False, 4)


def test_auto_takes_what_was_faster(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H0")
    comparisons = [comparison for comparison in decoder_comparisons() if comparison.operation in UPSAMPLING]
    assert {comparison.operation for comparison in comparisons} == set(UPSAMPLING)
    for comparison in comparisons:
        on_gpu = SimpleNamespace(
            shape=(comparison.batch, comparison.width, *comparison.sides[0]),
            device=torch.device("cuda", 0),
            element_size=lambda size=comparison.element_bytes: size,
        )
        for times, expected in (((1.0, 2.0), "triton"), ((2.0, 1.0), "strips")):
            agree(on_gpu.device, [Choice(*comparison.key, *times)])
            assert choose_upsampling("auto", comparison.operation, on_gpu, comparison.sides[1]) == expected
    forget_choices()


@pytest.mark.parametrize("comparison", [LOSS, ARGMAX, LOSS._replace(element_bytes=2)])
def test_a_comparison_of_both_sides_is_a_choice_against_the_strips(comparison):
    compared = run_comparison(comparison, DEVICE)
    assert compared.refusals == {}
    assert compared.choice[:6] == comparison.key
    assert compared.choice.triton_ms > 0
    assert describe(compared).endswith(f"strips {compared.choice.alternative_ms:.3f} ms")


def test_a_kernel_that_is_wrong_loses_its_comparison_and_fails_its_checks(monkeypatch):
    honest = Launch.run

    def one_loss_off(launch):
        honest(launch)
        if "losses" in launch.tensors:
            launch.tensors["losses"][0, 1, 1] += 0.1

    def one_slope_missing(launch):
        honest(launch)
        if "grad_logits" in launch.tensors:
            launch.tensors["grad_logits"][0, 1, -1, -1] = math.nan

    def one_id_swapped(launch):
        honest(launch)
        if launch.tensors.get("ids") is not None:
            ids = launch.tensors["ids"]
            ids[0, 1, 1] = (ids[0, 1, 1] + 1) % 2

    machine = this_machine()
    group = checks.UpsamplingGroup((2, 2), (8, 8), torch.float32, (2,), checks.CASES[:2])
    assert [case.failure for case in checks.check_group(checks.Part(group)) if case.failure] == []
    for broken, comparison, reason, case in [
        (one_loss_off, LOSS, "wrong loss: off by", "loss, 2 classes"),
        (one_slope_missing, LOSS, "wrong gradient: off by nan", "loss, 2 classes"),
        (one_id_swapped, ARGMAX, "wrong argmax", "argmax, 2 classes"),
    ]:
        monkeypatch.setattr(Launch, "run", broken)
        compared = run_comparison(comparison, DEVICE)
        assert compared.choice.triton_ms == math.inf
        assert not compared.choice.triton_wins
        assert reason in compared.refusals["triton"]
        assert f"no comparison (triton: {reason}" in describe(compared)
        failed = [checked.name for checked in checks.check_group(checks.Part(group)) if checked.failure]
        assert any(name.startswith(case) for name in failed)
        row = UpsamplingRow(
            "loss" if comparison.training else "argmax", 1, 19, 2, 8, machine.halves[0], comparison.training
        )
        contenders = measure(row, machine, {})["contenders"]
        assert reason in contenders["ours (triton)"]["refused"]
        assert "ms" in contenders["ours (strips)"]
        assert "ms" in contenders["eager"]


def test_the_oracle_is_the_textbook_mean_in_float64():
    task = make_loss_task(2, 7, (3, 4), (13, 9), dtype=torch.float64, device=torch.device("cpu"))
    weights = torch.linspace(0.5, 2.0, 7)
    for options in (LossTask(*task[:2]), LossTask(*task[:2], weights, 0.2, "valid")):
        leaf = options.logits_BKhw.clone().requires_grad_()
        full = torch.nn.functional.interpolate(leaf, (13, 9), mode="bilinear", align_corners=False)
        expected = torch.nn.functional.cross_entropy(
            full,
            options.labels_BHW,
            weight=None if options.class_weights_K is None else weights.double(),
            label_smoothing=options.label_smoothing,
            ignore_index=255,
        )
        (options.upstream * expected).backward()
        loss, gradient_BKhw = loss_answer(options, exact=True)
        assert loss_error(expected.detach(), loss) < 1e-12
        torch.testing.assert_close(gradient_BKhw, leaf.grad, rtol=1e-10, atol=1e-12)
    ids, confidence = upsample_argmax_reference(task.logits_BKhw, (13, 9), confidence=True)
    assert argmax_error(ids, task.logits_BKhw) < 1e-6
    assert confidence_error(confidence, task.logits_BKhw) < 1e-5
    assert argmax_error((ids + 1) % 7, task.logits_BKhw) > 0.1
    assert argmax_error(ids + 7, task.logits_BKhw) == math.inf


def a_gpu():
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return this_machine()._replace(
        device=torch.device("cuda", 0), dtypes=dtypes, halves=dtypes[:2], most_pixels=None
    )


def test_the_checks_cover_all_that_was_promised():
    first, further = check_groups(a_gpu())
    assert {group.dtype for group in first} == {torch.bfloat16}
    groups = [*first, *further]
    assert len({group.name for group in groups}) == len(groups)
    upsampling = [group for group in groups if isinstance(group, checks.UpsamplingGroup)]
    for dtype in a_gpu().dtypes:
        of_dtype = [group for group in upsampling if group.dtype == dtype]
        usual = [group for group in of_dtype if group.full[1] / group.size[1] in (4.0, 683 / 171)]
        assert len(usual) == 2
        assert all(set(group.classes) == {2, 19, 150, 171} for group in usual)
        scales = {group.full[1] / group.size[1] for group in of_dtype if group.size != (1, 1)}
        assert {4.0, 683 / 171} <= scales
        if dtype != torch.float16:
            assert {16.0, 1.0, 0.5} <= scales
            assert any(group.size == (1, 1) for group in of_dtype)
        for group in usual:
            assert {case.layout for case in group.cases} == set(checks.LAYOUTS)
            assert {case.labels_dtype for case in group.cases} == {torch.uint8, torch.int64}
            assert {case.weighted for case in group.cases} == {True, False}
            assert {case.options.get("average", "valid") for case in group.cases} == {"valid", "all"}
            assert {bool(case.options.get("label_smoothing")) for case in group.cases} == {True, False}
        attentions = [group for group in groups if group not in upsampling and group.dtype == dtype]
        assert {("attention", 256, 256), ("attention", 256, 150), ("external", 150, 150)} <= {
            (group.operation, group.width, group.value_width) for group in attentions
        }
    for group in groups:
        names = [name for name, _ in checks.cases_of(group, a_gpu())]
        assert len(set(names)) == len(names)  # a case that is lost is found by its name


def test_the_goals_are_ratios_against_the_two_textbook_lines():
    def row(operation, training, ours, eager, compiled):
        contenders = {
            "ours (triton)": {"ms": ours, "peak_mib": 40.0},
            "ours (strips)": {"ms": 0.1, "peak_mib": 1.0},
            "eager": {"ms": eager, "peak_mib": 1000.0},
            "torch.compile": {"ms": compiled, "peak_mib": 500.0},
        }
        return {
            "operation": operation,
            "num_classes": 150,
            "dtype": "torch.bfloat16",
            "training": training,
            "contenders": contenders,
        }

    wide = row("loss", True, 1.0, 1.0, 1.0) | {"dtype": "torch.float32"}
    rows = {"0": wide, "1": row("loss", True, 2.0, 5.0, 3.0), "2": row("argmax", False, 2.0, 8.0, 7.0)}
    goals = {goal.text: goal for goal in report.goals({"upsampling": rows})[-4:]}
    verdicts = [(goal.measured, goal.verdict) for goal in goals.values()]
    assert verdicts == [(0.04, "met"), (2.5, "met"), (1.5, "not met"), (3.5, "met")]
    del rows["1"]["contenders"]["ours (triton)"]["ms"]
    unmeasured = report.goals({"upsampling": rows})[-4:]
    assert [goal.verdict for goal in unmeasured] == ["not measured"] * 3 + ["met"]
