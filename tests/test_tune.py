"""The tuner: what it tries, that wrong and failing kernels lose, that its file is used and gone on with."""

import functools
import json
import math
import time
from types import SimpleNamespace

import faulty_kernels
import pytest
import torch
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.errors import KernelError, UserError
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.choices import Choice, Kind, forget_choices, measured_choices
from segdeformer.kernels.launch import Launch
from segdeformer.kernels.tiles import (
    ARCHITECTURES,
    Tile,
    backward_form,
    choose_tile,
    size_class,
)
from segdeformer.kernels.tuning import search as tuner
from segdeformer.kernels.tuning import store as tuned_file
from segdeformer.kernels.tuning.candidates import Target, candidate_tiles
from segdeformer.kernels.tuning.cases import Comparison, decoder_comparisons
from segdeformer.kernels.tuning.comparison import Compared
from segdeformer.kernels.tuning.crew import Crew, Over
from segdeformer.kernels.tuning.events import OutOfTime, Settled, Skipped, Tried, describe
from segdeformer.kernels.tuning.judge import answer, largest_allowed, worst_row_error
from segdeformer.kernels.tuning.search import Place, Sizes, tune
from segdeformer.kernels.tuning.trial import Problem, Trial, decoder_problems

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SMALL = Sizes(most_pixels=48, odd=33, candidates=1)
FORWARD = Problem("attention_forward", 32, 19, 2, 48)
EXTERNAL = Problem("external_backward_keys", 19, 19, 4, 48)
COMPARISON = Comparison("attention", 32, 32, 2, True, 48)


class HereAndNow:
    """A crew without processes: the tests can change what it does."""

    def run(self, work, tasks, *, workers=1, deadline=math.inf):
        while tasks and time.monotonic() < deadline:
            task = tasks.popleft()
            yield from ((task, result) for result in work(task))
            yield task, Over()

    def close(self):
        pass


def run(path, *, problems=(FORWARD, EXTERNAL), comparisons=(COMPARISON,), seconds=100.0, **options):
    options = {"sizes": SMALL, "seconds": seconds, "crew": HereAndNow(), **options}
    return list(tune(path, DEVICE, problems=list(problems), comparisons=list(comparisons), **options))


@pytest.mark.parametrize("problem", decoder_problems(torch.device("cpu")), ids=lambda p: str(p[:4]))
def test_every_kernel_of_the_decoder_passes_its_trial_at_an_odd_size(problem):
    keys = 21 if problem.kernel.endswith("few_keys") else 33
    dtype = torch.float32 if problem.element_bytes == 4 else torch.float16
    trial = Trial(problem, 33, keys, dtype=dtype, device=DEVICE)
    launch = trial.launch(Tile(16, 32, 4, 1))
    trial.poison()
    assert trial.wrong() is not None
    launch.run()
    assert trial.wrong() is None


def test_a_kernel_that_is_wrong_or_unfinished_or_fails_is_turned_down(monkeypatch):
    trials = [Trial(FORWARD, 48, 48, dtype=torch.float16, device=DEVICE)]
    honest = Launch.run

    def one_row_off(launch):
        honest(launch)
        launch.tensors["out"][0, 17] += 0.1

    def one_element_missing(launch):
        honest(launch)
        launch.tensors["lse"][0, -1] = math.nan

    def does_not_fit(launch):
        raise KernelError("out of resources: shared memory")

    for broken, reason in [
        (one_row_off, "wrong out: worst row off by"),
        (one_element_missing, "wrong lse: worst row off by nan"),
        (does_not_fit, "out of resources: shared memory"),
    ]:
        monkeypatch.setattr(Launch, "run", broken)
        outcome = tuner.try_tile(trials, Tile(16, 16, 4, 1), DEVICE)
        assert isinstance(outcome, str)
        assert reason in outcome
    monkeypatch.setattr(Launch, "run", honest)
    assert isinstance(tuner.try_tile(trials, Tile(16, 16, 4, 1), DEVICE), float)


def test_the_fastest_right_candidate_is_settled_on(tmp_path, monkeypatch):
    tiles = [Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)]
    outcomes = {tiles[0]: 2.0, tiles[1]: "wrong out", tiles[2]: 1.5}
    monkeypatch.setattr(tuner, "candidate_tiles", lambda *case: tiles)
    monkeypatch.setattr(tuner, "try_tile", lambda trials, tile, device: outcomes[tile])
    path = tmp_path / "gpu.json"
    events = run(path, problems=[FORWARD], comparisons=[], sizes=SMALL._replace(candidates=None))
    assert [e.outcome for e in events if isinstance(e, Tried)] == [2.0, "wrong out", 1.5]
    assert next(e for e in events if isinstance(e, Settled)).tile == tiles[2]
    table = json.loads(path.read_text())
    assert table["tiles"]["attention_forward"]["32x32"]["2"] == {"6": list(tiles[2])}
    assert [row.get("reason") for row in table["candidates"]] == [None, "wrong out", None]


def test_specialised_tiles_come_after_everything_else_and_are_checked_again_and_again(tmp_path, monkeypatch):
    plain, specialized = Tile(16, 16, 4, 1), Tile(16, 32, 4, 1, True, True)
    monkeypatch.setattr(tuner, "candidate_tiles", lambda *case: [specialized, plain])
    path, checked, settled_before = tmp_path / "gpu.json", [], []
    honest = Launch.run

    def noted(launch):
        honest(launch)
        checked.append(launch.tile)
        if launch.tile == specialized:
            settled_before.append(json.loads(path.read_text())["choices"] != [])

    monkeypatch.setattr(Launch, "run", noted)
    monkeypatch.setattr(tuner, "median_ms", lambda run, device: 1.0 if checked[-1] == specialized else 2.0)
    events = run(path, problems=[FORWARD], sizes=SMALL._replace(candidates=None))
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Tried", "Settled", "Compared", "Tried", "Settled", "Compared"]
    assert [event.tile for event in events if isinstance(event, Settled)] == [plain, specialized]
    assert all(settled_before[:20])
    assert checked.count(specialized) >= 20  # ten times at each of two sizes
    assert len(json.loads(path.read_text())["choices"]) == 1


def test_a_specialised_tile_that_is_wrong_once_in_ten_times_is_turned_down(monkeypatch):
    trials = [Trial(FORWARD, 48, 48, dtype=torch.float16, device=DEVICE)]
    honest, runs = Launch.run, []

    def wrong_now_and_then(launch):
        honest(launch)
        runs.append(launch)
        if len(runs) == 7:
            launch.tensors["out"][0, 5] += 0.1

    monkeypatch.setattr(Launch, "run", wrong_now_and_then)
    assert isinstance(tuner.try_tile(trials, Tile(16, 16, 4, 1), DEVICE), float)
    assert len(runs) == 2  # checked once, timed once
    runs.clear()
    outcome = tuner.try_tile(trials, Tile(16, 16, 4, 1, False, True), DEVICE)
    assert outcome.startswith("wrong out: worst row off by")
    assert len(runs) == 7


def test_a_tile_that_is_wrong_only_when_it_is_timed_is_turned_down(monkeypatch):
    trials = [Trial(FORWARD, 48, 48, dtype=torch.float16, device=DEVICE)]

    def overtaken(run, device):
        run()
        trials[0].outputs[0].result[0, 3] += 0.1
        return 1.0

    monkeypatch.setattr(tuner, "median_ms", overtaken)
    outcome = tuner.try_tile(trials, Tile(16, 16, 4, 1), DEVICE)
    assert outcome.startswith("one run after the other: wrong out")


@pytest.mark.parametrize("problem", decoder_problems(torch.device("cpu")), ids=lambda p: str(p[:3]))
def test_what_is_compiled_ahead_is_what_is_measured(problem):
    keys = 21 if problem.kernel.endswith("few_keys") else 33
    told, untold = (
        Trial(problem, 33, keys, dtype=torch.float16, device=DEVICE, exact=exact).launch(Tile(16, 32, 4, 1))
        for exact in (True, False)
    )
    assert told.kernel is untold.kernel
    assert (told.grid, told.numbers, told.constants) == (untold.grid, untold.numbers, untold.constants)
    shapes = [
        {name: (t.shape, t.stride(), t.dtype) for name, t in launch.tensors.items()}
        for launch in (told, untold)
    ]
    assert shapes[0] == shapes[1]


def test_float32_is_not_tuned():
    assert {problem.element_bytes for problem in decoder_problems(DEVICE)} == {2}


def test_what_was_measured_is_what_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H0")
    path = tmp_path / "segdeformer" / "tuned" / "nvidia_h0.json"
    events = run(path)
    settled = {e.problem: e.tile for e in events if isinstance(e, Settled)}
    assert set(settled) == {FORWARD, EXTERNAL}
    gpu = torch.device("cuda", 0)
    for problem, tile in settled.items():
        assert choose_tile(problem.kernel, *problem.widths, problem.element_bytes, gpu) == tile
    *_, compared = (e for e in events if isinstance(e, Compared))
    assert measured_choices(gpu) == [compared.choice]
    assert isinstance(compared.choice, Choice)
    assert compared.choice.serves(Kind("attention", 32, 32, 2, True))
    form = json.loads(path.read_text())["backward"]["32x32"]["2"]
    assert form in ("fused", "chunks")
    on_gpu = SimpleNamespace(shape=(1, 48, 32), device=gpu, element_size=lambda: 2)
    assert backward_form(on_gpu, on_gpu) == form
    forget_choices()


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    path, copy = tmp_path / "gpu.json", tmp_path / "copy" / "gpu.json"
    assert run(path, seconds=0.0, copy=copy) == [OutOfTime(3)]
    first = run(path, problems=[FORWARD], comparisons=[], copy=copy)
    assert sum(isinstance(e, Tried) for e in first) == 2
    assert copy.read_text() == path.read_text()
    second = run(path)
    assert {e.problem for e in second if isinstance(e, Tried)} == {EXTERNAL}
    assert run(path) == []
    assert sum(isinstance(e, Tried) for e in run(path, again=True)) == 3
    monkeypatch.setattr(tuned_file, "kernel_sources", lambda: "other kernels")
    assert sum(isinstance(e, Tried) for e in run(path)) == 3


def test_a_tile_that_hangs_crashes_or_breaks_costs_itself_and_is_not_tried_again(tmp_path):
    place = Place(DEVICE, SMALL._replace(candidates=4))
    path = tmp_path / "gpu.json"
    target = Target(FORWARD.kernel, FORWARD.widths, 2, ARCHITECTURES["sm_90"])
    tiles = candidate_tiles(target, FORWARD.default_tile(DEVICE))
    plain = [tile for tile in tiles if not tile.warp_specialize][:4]
    special = [tile for tile in tiles if tile.warp_specialize][:1]
    faults = {plain[0]: "hangs", plain[1]: "is killed", plain[3]: "raises", special[0]: "hangs"}
    measure = functools.partial(faulty_kernels.measure_with_faults, place, faults)
    options = {"problems": [FORWARD], "comparisons": [COMPARISON], "sizes": place.sizes, "measure": measure}
    with Crew(patience_s=10) as crew:
        events = run(path, crew=crew, **options)
    outcomes = {event.tile: event.outcome for event in events if isinstance(event, Tried)}
    assert outcomes[plain[0]] == outcomes[special[0]] == "hangs: no progress for 10 s"
    assert outcomes[plain[1]] == "its process was ended by SIGKILL"
    assert outcomes[plain[3]] == "IndexError: list index out of range"
    assert isinstance(outcomes[plain[2]], float)
    settled = [event for event in events if isinstance(event, Settled)]
    assert {(event.tile, event.default_ms) for event in settled[:1]} == {(plain[2], None)}
    assert "the default tile is not usable" in describe(settled[0])
    assert any(isinstance(event, Compared) and event.choice for event in events)
    assert run(path, **options) == []
    reasons = [row.get("reason") for row in json.loads(path.read_text())["candidates"]]
    assert reasons[:2] == ["hangs: no progress for 10 s", "its process was ended by SIGKILL"]


def test_a_problem_without_inputs_is_skipped_and_the_rest_is_measured(tmp_path):
    with Crew() as crew:
        measure = functools.partial(faulty_kernels.without_inputs, Place(DEVICE, SMALL), FORWARD)
        events = run(tmp_path / "gpu.json", comparisons=[], crew=crew, measure=measure)
    assert Skipped(FORWARD, "start: OutOfMemoryError: CUDA out of memory") in events
    assert {event.problem for event in events if isinstance(event, Settled)} == {EXTERNAL}


@pytest.mark.parametrize("text", ["{", "[1"])
def test_a_damaged_file_is_one_line(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"gpu\.json: not valid JSON .* delete it, or measure with --again"):
        run(path)
    assert run(path, problems=[FORWARD], comparisons=[], again=True)


def test_a_comparison_without_an_alternative_is_no_choice(tmp_path, monkeypatch):
    def refuse(*inputs, impl, **options):
        if impl == "sdpa":
            raise RuntimeError("no available kernel")
        return attention(*inputs, impl=impl, **options)

    monkeypatch.setattr("segdeformer.kernels.tuning.cases.attention", refuse)
    (compared,) = run(tmp_path / "gpu.json", problems=[])
    assert compared.choice is None
    assert json.loads((tmp_path / "gpu.json").read_text())["choices"] == []


def test_comparisons_are_found_by_what_auto_asks_for():
    places = [(*comparison.key[:5], size_class(comparison.size)) for comparison in decoder_comparisons()]
    assert len(set(places)) == len(places)
    assert ("external_attention", 150, 150, 2, True, 15) in places
    assert all(
        comparison.element_bytes == 2 or comparison.is_upsampling for comparison in decoder_comparisons()
    )


@pytest.mark.parametrize(("n", "m", "d", "e"), [(1, 1, 19, 19), (63, 17, 32, 19), (17, 200, 19, 64)])
def test_the_oracle_in_blocks_is_the_reference(n, m, d, e, monkeypatch):
    monkeypatch.setattr("segdeformer.kernels.tuning.judge.BLOCK_SCORES", 4 * m)
    inputs = [torch.randn(2, *shape, dtype=torch.float64) for shape in ((n, d), (m, d), (m, e))]
    leaves = [t.clone().requires_grad_() for t in inputs]
    upstream = torch.randn(2, n, e, dtype=torch.float64)
    out = attention_reference(*leaves, scale=0.3)
    out.backward(upstream)
    blocks = answer(attention_reference, inputs, scale=0.3, grad_out=upstream, exact=True)
    torch.testing.assert_close(blocks.out, out.detach(), rtol=1e-12, atol=1e-14)
    for mine, leaf in zip(blocks.grads, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-11, atol=1e-13)
    assert answer(attention_reference, inputs, scale=0.3, exact=False).grads == ()


def test_one_wrong_row_among_many_shows():
    exact = torch.randn(1, 1000, 64, dtype=torch.float64)
    rounded = exact.half()
    assert worst_row_error(rounded, exact) < 1e-3
    rounded[0, 500] = rounded[0, 501]
    assert worst_row_error(rounded, exact) > largest_allowed(1e-3, torch.float16)
    rounded[0, 0, 0] = math.nan
    assert not worst_row_error(rounded, exact) <= largest_allowed(1e-3, torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: nothing to measure: give --params, --fps or --tune"),
        (["--tune"], "error: bench --tune measures Triton kernels on a CUDA GPU, and PyTorch sees none here"),
        (["--tune", "--device", "cuda:3"], "error: bench --tune measures Triton kernels on a CUDA GPU, and"),
    ],
)
def test_bench_says_in_one_line_what_is_missing(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
