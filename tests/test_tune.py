"""The tuner: what it tries, that wrong and failing kernels lose, that its file is used and gone on with."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.errors import KernelError, UserError
from segdeformer.kernels import tune as tuner
from segdeformer.kernels import tuned_file
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.choices import Choice, forget_choices, measured_choices
from segdeformer.kernels.launch import Launch
from segdeformer.kernels.oracle import answer, largest_allowed, worst_row_error
from segdeformer.kernels.races import Fought, Race, decoder_races
from segdeformer.kernels.tiles import (
    ARCHITECTURES,
    Tile,
    backward_form,
    choose_tile,
    default_tile,
    size_class,
)
from segdeformer.kernels.tune import OutOfTime, Settled, Sizes, Tried, tune
from segdeformer.kernels.tune_candidates import candidate_tiles, needs
from segdeformer.kernels.tune_problems import Problem, Trial, decoder_problems

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SMALL = Sizes(most_pixels=48, odd=33, candidates=2)
FORWARD = Problem("attention_forward", 32, 19, 2, 48)
EXTERNAL = Problem("external_backward_keys", 19, 19, 4, 48)
RACE = Race("attention", 32, 32, 2, True, 48)


def run(path, *, problems=(FORWARD, EXTERNAL), races=(RACE,), seconds=100.0, **options):
    options = {"sizes": SMALL, "seconds": seconds, **options}
    return list(tune(path, DEVICE, problems=list(problems), races=list(races), **options))


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a.name)
def test_candidates_start_with_the_default_and_may_fit_the_card(architecture):
    for problem in decoder_problems(torch.device("cpu")):
        case = problem.kernel, *problem.widths, problem.element_bytes
        default = default_tile(*case, architecture)
        tiles = candidate_tiles(problem.kernel, problem.widths, problem.element_bytes, architecture, default)
        assert tiles[0] == default
        assert 1 < len(tiles) <= 18 or problem.kernel.endswith("few_keys")
        assert len(set(tiles)) == len(tiles)
        for tile in tiles[1:]:
            q, k = tile.block_queries, tile.block_keys
            need = needs(problem.kernel, q, k, *problem.widths, problem.element_bytes)
            least = (need.resident + need.streamed) * problem.element_bytes
            assert least <= architecture.shared_bytes
            assert not tile.tma or architecture.name in ("sm_90", "sm_100")
            if problem.kernel.endswith("few_keys"):
                assert k == default.block_keys


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
    events = run(path, problems=[FORWARD], races=[], sizes=SMALL._replace(candidates=None))
    assert [e.outcome for e in events if isinstance(e, Tried)] == [2.0, "wrong out", 1.5]
    assert next(e for e in events if isinstance(e, Settled)).tile == tiles[2]
    table = json.loads(path.read_text())
    assert table["tiles"]["attention_forward"]["32x32"]["2"] == {"6": list(tiles[2])}
    assert [row.get("reason") for row in table["candidates"]] == [None, "wrong out", None]


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
    fought = next(e for e in events if isinstance(e, Fought))
    assert measured_choices(gpu) == [fought.choice]
    assert isinstance(fought.choice, Choice)
    assert fought.choice.serves("attention", 32, 32, 2, training=True)
    form = json.loads(path.read_text())["backward"]["32x32"]["2"]
    assert form in ("fused", "chunks")
    on_gpu = SimpleNamespace(shape=(1, 48, 32), device=gpu, element_size=lambda: 2)
    assert backward_form(on_gpu, on_gpu) == form
    forget_choices()


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    path, copy = tmp_path / "gpu.json", tmp_path / "copy" / "gpu.json"
    assert run(path, seconds=0.0, copy=copy) == [OutOfTime(3)]
    first = run(path, problems=[FORWARD], races=[], copy=copy)
    assert sum(isinstance(e, Tried) for e in first) == 2
    assert copy.read_text() == path.read_text()
    second = run(path)
    assert {e.problem for e in second if isinstance(e, Tried)} == {EXTERNAL}
    assert run(path) == []
    assert sum(isinstance(e, Tried) for e in run(path, again=True)) == 4
    monkeypatch.setattr(tuned_file, "kernel_sources", lambda: "other kernels")
    assert sum(isinstance(e, Tried) for e in run(path)) == 4


def test_a_candidate_that_ended_its_process_is_not_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"

    left_behind = tmp_path / "left_behind.json"

    def while_it_is_tried(trials, tile, device):
        shutil.copyfile(path, left_behind)
        return 1.0

    monkeypatch.setattr(tuner, "try_tile", while_it_is_tried)
    run(path, problems=[FORWARD], races=[], sizes=SMALL._replace(candidates=1))
    monkeypatch.undo()
    events = run(left_behind, problems=[FORWARD], races=[])
    assert sum(isinstance(e, Tried) for e in events) == 1
    assert json.loads(left_behind.read_text())["candidates"][0]["reason"] == tuned_file.ENDED


@pytest.mark.parametrize("text", ["{", "[1"])
def test_a_damaged_file_is_one_line(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"gpu\.json: not valid JSON .* delete it, or measure with --again"):
        run(path)
    assert run(path, problems=[FORWARD], races=[], again=True)


def test_a_race_without_a_rival_is_no_choice(tmp_path, monkeypatch):
    def refuse(*inputs, impl, **options):
        if impl == "sdpa":
            raise RuntimeError("no available kernel")
        return attention(*inputs, impl=impl, **options)

    monkeypatch.setattr("segdeformer.kernels.race_steps.attention", refuse)
    (fought,) = run(tmp_path / "gpu.json", problems=[])
    assert fought.choice is None
    assert json.loads((tmp_path / "gpu.json").read_text())["choices"] == []


def test_races_are_found_by_what_auto_asks_for():
    places = [(*race.key[:5], size_class(race.size)) for race in decoder_races(DEVICE)]
    assert len(set(places)) == len(places)
    assert ("external_attention", 150, 150, 2, True, 15) in places
    assert all(race.element_bytes == 2 or race.is_upsampling for race in decoder_races(DEVICE))


@pytest.mark.parametrize(("n", "m", "d", "e"), [(1, 1, 19, 19), (63, 17, 32, 19), (17, 200, 19, 64)])
def test_the_oracle_in_blocks_is_the_reference(n, m, d, e, monkeypatch):
    monkeypatch.setattr("segdeformer.kernels.oracle.BLOCK_SCORES", 4 * m)
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
