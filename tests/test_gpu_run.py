"""`make gpu`: whatever goes wrong is named, and everything else is measured."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import faulty_kernels
import pytest
import torch

from benchmarks import attention, checks, gpu, phases, report
from benchmarks import machine as machine_module
from benchmarks.machine import Machine, this_machine, timings
from benchmarks.phases import Session
from benchmarks.records import open_records

ROOT = Path(__file__).parents[1]
OPTIONAL = ("pydantic", "tomli_w", "typer", "rich", "timm", "cv2", "safetensors", "PIL", "torchvision")


@pytest.fixture
def session(tmp_path):
    machine = this_machine()
    return Session(open_records(tmp_path, machine), machine, time.monotonic() + 300, patience_s=15)


def outcome(session, wanted, groups):
    """How the phases end, and the exit code."""
    endings = gpu.run_phases(wanted, session.records, session.machine, session.deadline)
    return endings, gpu.summary(session.records, endings, groups, rehearsal=True)


def test_a_phase_that_breaks_does_not_keep_the_others_from_running(session, capsys):
    def breaks(session):
        raise KeyError("a mistake of ours")

    def right(session):
        session.records.add("checks", "a group", {"num_cases": 1, "failures": []})
        return 0

    wanted = [gpu.Phase("rows", 0.1, breaks), gpu.Phase("checks", 0.1, right)]
    endings, code = outcome(session, wanted, ["a group"])
    assert endings == {"rows": "broke (KeyError: 'a mistake of ours')", "checks": "done"}
    assert code == gpu.INCOMPLETE
    assert "Traceback" in capsys.readouterr().err
    assert outcome(session, wanted[1:], ["a group"])[1] == gpu.RIGHT
    assert outcome(session, wanted[1:], ["a group", "another"])[1] == gpu.INCOMPLETE
    session.records.add("checks", "a group", {"num_cases": 1, "failures": ["17 x 33: wrong"]})
    assert outcome(session, wanted[:1], ["a group"])[1] == gpu.WRONG


def test_without_time_nothing_is_begun_and_the_run_is_not_complete(session):
    late = session._replace(deadline=time.monotonic())
    endings, code = outcome(late, gpu.phases(session.machine), ["a group"])
    assert set(endings.values()) == {"not begun"}
    assert code == gpu.INCOMPLETE


def test_a_case_that_kills_hangs_or_spoils_its_process_is_named_and_the_rest_is_checked(session):
    small = ((3, 5),)
    groups = [checks.Group("attention", 16, width, torch.float16, small) for width in (16, 17, 18, 19)]
    killed, hanging, spoiled, fine = (group.name for group in groups)
    faults = {
        (killed, "3 x 5, plain"): "is killed",
        (hanging, "3 x 5, strided"): "hangs",
        (spoiled, "3 x 5, strided"): "spoils the GPU",
    }
    check = functools.partial(faulty_kernels.check_with_faults, faults)
    assert checks.run(session, groups, check=check) == 0
    entries = json.loads(session.records.path.read_text())["checks"]
    assert {name: entry["failures"] for name, entry in entries.items()} == {
        killed: ["3 x 5, plain: its process was ended by SIGKILL"],
        hanging: ["3 x 5, strided: hangs: no progress for 15 s"],
        spoiled: ["3 x 5, strided: RuntimeError: CUDA error: an illegal memory access was encountered"],
        fine: [],
    }
    assert {entry["num_cases"] for entry in entries.values()} == {4}
    assert all(0 < entry["worst_share_of_allowed"] <= 1 for entry in entries.values())
    assert gpu.summary(session.records, {"checks": "done"}, [killed], rehearsal=True) == gpu.WRONG
    assert checks.run(session, groups) == 0  # what failed is checked again, and all is well
    assert gpu.summary(session.records, {"checks": "done"}, [killed], rehearsal=True) == gpu.RIGHT


def test_a_contender_that_goes_wrong_is_named_and_the_others_are_timed_without_it(session):
    (row,) = attention.first_rows(session.machine)[2:3]
    row = row._replace(width=16, value_width=16)
    faults = {"ours (triton)": "hangs", "sdpa math": "is killed", "textbook eager": "raises"}
    measure = functools.partial(faulty_kernels.compare_with_faults, faults)
    left = phases.measure_rows(session, "rows", {row.name: row}, measure)
    assert left == 0
    entry = json.loads(session.records.path.read_text())["rows"][row.name]
    refused = {name: c["refused"] for name, c in entry["contenders"].items() if "refused" in c}
    assert refused["ours (triton)"] == "hangs: no progress for 15 s"
    assert refused["sdpa math"] == "its process was ended by SIGKILL"
    assert refused["textbook eager"] == "IndexError: list index out of range"
    flash = entry["contenders"]["sdpa flash"]
    assert flash["ms"] > 0
    assert flash["eager_ms"] > 0


def test_a_row_that_breaks_is_tried_once_more_in_the_next_run_after_the_others(session, capsys):
    rows = {row.name: row for row in attention.first_rows(session.machine)[2:4]}
    bad, good = rows
    found = session.records.section("rows")
    broken = functools.partial(faulty_kernels.compare_with_faults, {"": "exits"})
    run = functools.partial(phases.measure_rows, session, "rows", describe=lambda name, entry: name)
    assert run({bad: rows[bad]}, broken) == 0
    assert found[bad] == {"skipped": "exact results: its process ended with code 3", "tries": 1}
    capsys.readouterr()
    assert run(rows, broken) == 0
    assert capsys.readouterr().out.splitlines() == [good, bad]
    assert (found[good]["tries"], found[bad]["tries"]) == (1, 2)
    assert run(rows, faulty_kernels.quick) == 0
    assert capsys.readouterr().out.splitlines() == [good]
    assert found[good] == {"skipped": "quick"}
    assert found[bad]["tries"] == 2


def test_a_row_is_measured_again_when_its_tiles_have_changed(session, capsys):
    rows = {row.name: row for row in attention.first_rows(session.machine)[2:4]}
    run = functools.partial(
        phases.measure_rows, session, "rows", rows, faulty_kernels.quick, describe=lambda name, entry: name
    )
    old, new = (dict.fromkeys(rows.values(), "tiles") for _ in range(2))
    changed = list(rows)[1]
    new[rows[changed]] = "other tiles"
    for tiles, measured in ((old, list(rows)), (old, []), (new, [changed])):
        assert run(tiles_of=tiles.__getitem__) == 0
        assert capsys.readouterr().out.splitlines() == measured
    assert session.records.section("rows")[changed]["tiles"] == "other tiles"


def test_a_whole_rehearsal_needs_nothing_but_torch_triton_and_numpy(tmp_path):
    for name in OPTIONAL:
        (tmp_path / "absent" / name).mkdir(parents=True)
        text = f"raise ModuleNotFoundError('{name} is not installed', name='{name}')\n"
        (tmp_path / "absent" / name / "__init__.py").write_text(text)
    paths = os.pathsep.join([str(tmp_path / "absent"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--interpret", "--out", str(tmp_path)]
    missing = subprocess.run([sys.executable, "-c", "import pydantic"], env=environment, capture_output=True)
    assert missing.returncode != 0
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == gpu.RIGHT, answer.stdout + answer.stderr
    names = [phase.name for phase in gpu.phases(this_machine())]
    assert ", ".join(f"{name}: done" for name in names) in answer.stdout
    records = open_records(tmp_path, this_machine())
    table = records.table
    assert len(table["checks"]) == table["num_check_groups"]
    entries = {name: e for section in ("rows", "decoder", "upsampling") for name, e in table[section].items()}
    assert {name: e for name, e in entries.items() if "contenders" not in e} == {}
    timed = [c for entry in entries.values() for c in entry["contenders"].values() if "ms" in c]
    assert len(timed) > 20
    assert all(contender["eager_ms"] > 0 for contender in timed)
    ours = [row["contenders"]["ours (triton)"] for row in table["rows"].values()]
    assert all("ms" in contender for contender in ours)
    assert {"folded", "unfolded"} <= set(table["decoder"]["32, 19, inference"]["contenders"])
    assert json.loads(records.path.with_name("tuned.json").read_text())["choices"]
    assert "ms queued | ms eager" in records.path.with_suffix(".md").read_text()
    before = records.path.read_text()
    wanted = [phase for phase in gpu.phases(this_machine()) if phase.name != "tuning"]
    endings = gpu.run_phases(wanted, records, this_machine(), time.monotonic() + 100)
    assert set(endings.values()) == {"done"}
    assert records.path.read_text() == before  # nothing is measured twice


def test_flex_attention_is_compiled_for_every_shape(monkeypatch):
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    for place in range(10):  # PyTorch gives up after eight
        compiled = attention.compiled_flex(backend)
        q = torch.randn(1, 1, 8 + 8 * place, 16)
        assert compiled(q, q, q).shape == q.shape
        assert len(seen) == place + 1


class SimulatedGpu:
    """A host and a device with their own clocks, in seconds; a launch costs both."""

    def __init__(self):
        self.host = self.device = 0.0

    def launch(self, host_s, device_s):
        self.host += host_s
        self.device = max(self.device, self.host) + device_s

    def synchronize(self, _device=None):
        self.host = max(self.host, self.device)

    def torch(self):
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.device = max(gpu.device, gpu.host)

            def elapsed_time(self, other):
                return 1000 * (other.at - self.at)

        flush = SimpleNamespace(zero_=lambda: gpu.launch(5e-6, 100e-6))
        return SimpleNamespace(cuda=SimpleNamespace(Event=Event), empty=lambda *a, **k: flush, int8=None)


def test_queued_is_the_devices_time_and_eager_has_the_hosts_too(monkeypatch):
    simulated = SimulatedGpu()
    monkeypatch.setattr(machine_module, "torch", simulated.torch())
    monkeypatch.setattr(machine_module, "synchronize", simulated.synchronize)
    monkeypatch.setattr(machine_module.time, "perf_counter", lambda: simulated.host)
    machine = Machine(torch.device("cuda", 0), "simulated", (), (), None)
    runs = {
        "slow host": lambda: simulated.launch(420e-6, 50e-6),
        "slow device": lambda: simulated.launch(10e-6, 900e-6),
    }
    found = timings(runs, machine, seconds=0.05)
    assert found["slow host"].ms == pytest.approx(0.05)
    assert found["slow host"].eager_ms == pytest.approx(0.47)
    assert found["slow device"].ms == pytest.approx(0.9)
    assert found["slow device"].eager_ms == pytest.approx(0.91)


def test_the_alternative_of_a_goal_is_the_fastest_sdpa_of_either_form():
    def row(low_rank_ms):
        names = {"ours (triton)": 1.0, "sdpa flash": 2.0, "sdpa cudnn, low rank": low_rank_ms}
        return {
            "operation": "external",
            "width": 256,
            "value_width": 150,
            "training": False,
            "batch": 1,
            "contenders": {name: {"form": "", "ms": ms} for name, ms in names.items()},
        }

    for low_rank_ms, alternative, verdict in (
        (1.25, "sdpa cudnn, low rank", "not met"),
        (3.0, "sdpa flash", "met"),
    ):
        goal = report.goals({"rows": {"row": row(low_rank_ms)}})[0]
        assert (goal.alternative, goal.measured, goal.verdict) == (
            alternative,
            min(low_rank_ms, 2.0),
            verdict,
        )
        table = {"rows": {"row": row(low_rank_ms)}, "hardware": {"name": "a GPU"}}
        assert f"| {goal.measured:.2f} ({alternative}) | {verdict} |" in report.goals_lines(table)[2]
    decoder = {"folded": 1.0, "sdpa, unfolded": 2.0, "sdpa, unfolded, low rank": 1.5}
    entries = {name: {"ms": ms} for name, ms in decoder.items()}
    found = report.goals({"decoder": {"256, 150, inference": {"contenders": entries}}})
    (goal,) = (goal for goal in found if "SDPA, plain or low rank, unfolded" in goal.text)
    assert (goal.measured, goal.alternative) == (1.5, "sdpa, unfolded, low rank")


def test_there_are_rows_for_few_keys_and_for_small_maps():
    halves = (torch.bfloat16, torch.float16)
    machine = Machine(torch.device("cuda", 0), "a GPU", (*halves, torch.float32), halves, None)
    found = {
        (row.width, row.value_width, row.num_pixels, row.num_keys, row.training)
        for row in attention.first_rows(machine)
    }
    for keys in (1024, 256):
        assert (256, 256, 16384, keys, False) in found
        assert (256, 256, 16384, keys, True) in found
        assert (256, 150, 16384, keys, False) in found
    assert {(256, 256, 1024, 1024, training) for training in (False, True)} <= found
    names = [row.name for row in [*attention.first_rows(machine), *attention.further_rows(machine)]]
    assert len(set(names)) == len(names)
