"""Two processes on the CPU (gloo) learn and score what one does with the joined batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import joined
import pytest
import torch
from safetensors.torch import load_file

from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.samples import Splits
from segdeformer.errors import LocalError, UsageError, UserError
from segdeformer.inference.evaluate import evaluate
from segdeformer.runtime import Runtime, choose_runtime, default_workers
from segdeformer.runtime.distributed import Processes, own_device
from segdeformer.training.loop import Options, start_run
from segdeformer.training.runlog import read_metrics
from segdeformer.training.saves import newest, read_state
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import LAST

ALONE, TOGETHER = "alone", "together"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Path]:
    """Folders of the same work done by one process and by two."""
    folders = {name: tmp_path_factory.mktemp(name) for name in (ALONE, TOGETHER)}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, joined.__file__, str(folders[TOGETHER])],
            env={
                **os.environ,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    joined.everything(folders[ALONE])
    for child in children:
        stderr = child.communicate(timeout=120)[1]
        assert child.returncode == 0, stderr
    return folders


def values(results: dict[str, Path]) -> tuple[dict, dict]:
    return (
        json.loads((results[ALONE] / "results-1.json").read_text()),
        json.loads((results[TOGETHER] / "results-2.json").read_text()),
    )


def test_losses_of_twenty_steps_are_those_of_the_joined_batch(results):
    alone, together = values(results)
    assert len(together["losses"]) == 20
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-6)


def test_weights_and_running_statistics_after_twenty_steps_are_those_of_the_joined_batch(results):
    alone, together = (load_file(results[name] / "run" / LAST) for name in (ALONE, TOGETHER))
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-5, msg=name)


def test_optimiser_and_averaged_weights_are_saved_alike(results):
    alone, together = (read_state(newest(results[name] / "run")) for name in (ALONE, TOGETHER))
    assert alone["optimizer"].keys() == together["optimizer"].keys()
    for name, ours in alone["optimizer"].items():
        for key, value in ours.items():
            torch.testing.assert_close(together["optimizer"][name][key], value, rtol=1e-3, atol=1e-6)
    for name, value in alone["ema"].items():
        torch.testing.assert_close(together["ema"][name], value, rtol=0, atol=1e-5, msg=name)


def test_a_model_in_shares_learns_and_is_saved_as_a_whole_one(results):
    alone, together = values(results)
    assert together["sharded"] == pytest.approx(alone["sharded"], abs=1e-6)
    one, shares = (load_file(results[name] / "sharded" / LAST) for name in (ALONE, TOGETHER))
    for name in one:
        torch.testing.assert_close(shares[name], one[name], rtol=0, atol=1e-5, msg=name)
    state = read_state(newest(results[TOGETHER] / "sharded"))["optimizer"]
    assert all(state[name]["exp_avg"].shape == one[name].shape for name in state)


@pytest.mark.parametrize("protocol", joined.PROTOCOLS)
def test_evaluation_tables_are_identical_to_the_last_digit(results, protocol):
    alone, together = values(results)
    assert together["scores"][protocol]["images"] == len(joined.VAL_DATA)
    assert together["scores"][protocol] == alone["scores"][protocol]


def test_the_diary_is_written_once(results):
    entries = read_metrics(results[TOGETHER] / "run")
    assert [(e["kind"], e["iteration"]) for e in entries] == [
        ("train", 1),
        ("train", 10),
        ("train", 20),
        ("validation", 20),
    ]


# What cannot be.


def test_a_batch_that_cannot_be_shared_evenly_says_what_can(tmp_path):
    with pytest.raises(UsageError) as caught:
        start_run(
            joined.recipe(iterations=1),
            tmp_path,
            Splits(joined.TRAIN_DATA, joined.VAL_DATA),
            runtime=Runtime(processes=Processes(0, 2)),
            options=Options(accumulate=3),
        )
    assert str(caught.value) == (
        "train.batch_size is 4, which 2 processes with --accumulate 3 cannot share evenly; "
        "make it a multiple of 6"
    )


def test_shares_of_a_model_need_more_processes(tmp_path):
    with pytest.raises(UsageError, match="--shard shares a model between processes, and there is one"):
        start_run(
            joined.recipe(iterations=1),
            tmp_path,
            Splits(joined.TRAIN_DATA, joined.VAL_DATA),
            options=Options(shard=True),
        )


def test_every_image_is_one_process_s(tmp_path):
    for size in (1, 2, 3, 7):
        shares = [Processes(rank, size).own_indices(11) for rank in range(size)]
        assert sorted(index for share in shares for index in share) == list(range(11))


def test_an_image_that_one_process_cannot_score_is_an_error_of_its_own(monkeypatch):
    def read(_dataset: object, index: int) -> None:
        raise UserError(f"image {index} cannot be read")

    monkeypatch.setattr(SyntheticDataset, "read", read)
    config = joined.recipe(iterations=1)
    with pytest.raises(LocalError, match="image 1 cannot be read"):
        evaluate(
            build_model(config.model),
            joined.VAL_DATA,
            protocol=config.evaluate,
            data=config.data,
            runtime=Runtime(processes=Processes(1, 2)),
        )


def test_several_processes_cannot_have_one_gpu(monkeypatch):
    for name, value in (
        ("MASTER_ADDR", "localhost"),
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "1"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="2 processes take a GPU each; use --device cuda"):
        own_device(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="there are 1; start as many processes as there are GPUs"):
        own_device(torch.device("cuda"))


def test_loader_processes_are_shared_too(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32), raising=False)
    assert default_workers(1) == choose_runtime("cpu").workers == 8
    assert default_workers(8) == 2
    assert choose_runtime("cpu", workers=5).workers == 5
