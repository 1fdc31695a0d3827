"""Where tensors lie in a file, which of several dicts is taken, and files that are something else."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.errors import UserError
from segdeformer.models.mit import MIT_SIZES, MiT
from segdeformer.weights.checkpoint import read_checkpoint
from segdeformer.weights.encoder import export_encoder_weights, load_encoder_weights
from segdeformer.weights.files import read_weights

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"
PAGES = ["<!DOCTYPE html>\n<title>404</title>", "\n <html>gone</html>", "\ufeff<?xml version='1.0'?><Error/>"]
POINTER = "is a Git LFS pointer, not the file that it stands for; fetch that with `git lfs pull`"
PAGE = "is a web page, so the download failed; download the file itself again"


def weights(value: float, count: int = 2) -> dict[str, torch.Tensor]:
    return {f"w{index}": torch.full((2,), value) for index in range(count)}


def read(content: object, folder: Path):
    torch.save(content, folder / "x.pth")
    return read_weights(folder / "x.pth")


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (weights(7), None),
        ({"model_ema": weights(7)}, "model_ema"),
        ({"ema": {"module": weights(7)}}, "ema.module"),
        ({"state_dict": {}, "model": weights(7)}, "model"),
        ({"state_dict": {"note": "none"}, "a": {"b": {"c": weights(7)}}}, "a.b.c"),
        ({"model_ema": weights(1), "model": weights(7)}, "model"),
        ({"ema_state_dict": weights(1), "state_dict": weights(7)}, "state_dict"),
        ({"ema": weights(1), "model_ema": weights(7)}, "model_ema"),
        ({"params": weights(7, 3), "optim": {"state": {0: weights(1), 1: weights(1)}}}, "params"),
        ({"optim": {"state": {0: weights(1)}}, "net_g": {"params": weights(7, 3)}}, "net_g.params"),
        ({"step": torch.zeros(1), "params": weights(7)}, "params"),
        ({"model": {"state_dict": weights(7)}, "epoch": 3}, "model.state_dict"),
    ],
)
def test_tensors_are_found_in_any_dict_and_it_is_said_which(content, container, tmp_path):
    found = read(content, tmp_path)
    assert found.container == container
    assert {name: value.tolist() for name, value in found.tensors.items()} == {
        name: value.tolist() for name, value in weights(7, len(found.tensors)).items()
    }


def test_an_encoder_is_filled_from_a_nested_dict_and_the_report_names_it(tmp_path):
    torch.manual_seed(0)
    source, target = MiT(MIT_SIZES["mit_b0"]), MiT(MIT_SIZES["mit_b0"])
    exported = export_encoder_weights(source, "nvlabs")
    torch.save({"epoch": 3, "shadow": {"params": exported}}, tmp_path / "x.pth")
    report = load_encoder_weights(target, tmp_path / "x.pth")
    assert f"from {tmp_path / 'x.pth'} (`shadow.params`, nvlabs names)" in report.lines()[0]
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize(
    ("content", "has"),
    [
        ({}, "its dict is empty"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "its keys are `epoch`, `args`"),
        ({f"k{i}": i for i in range(8)}, "its keys are `k0`, `k1`, `k2`, `k3`, `k4`, `k5`, ..."),
    ],
)
def test_a_file_without_tensors_is_told_by_its_keys(content, has, tmp_path):
    with pytest.raises(UserError) as refused:
        read(content, tmp_path)
    remedy = "save a state_dict of the model, and use that"
    assert str(refused.value) == f"{tmp_path / 'x.pth'}: there is no tensor in the file, {has}; {remedy}"


def test_a_dict_that_holds_itself_is_no_endless_search(tmp_path):
    content: dict[str, object] = {}
    content["model"] = content["again"] = content
    with pytest.raises(UserError, match="there is no tensor in the file, its keys are `model`, `again`"):
        read(content, tmp_path)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(("text", "told"), [(LFS, POINTER), *((page, PAGE) for page in PAGES)])
def test_what_was_not_downloaded_is_named_by_both_readers(ending, text, told, tmp_path):
    path = tmp_path / f"x.{ending}"
    path.write_text(text, "utf-8")
    for reader, colon in ((read_weights, ":"), (read_checkpoint, "")):
        with pytest.raises(UserError) as refused:
            reader(path)
        assert str(refused.value) == f"{path}{colon} {told}"


@pytest.mark.parametrize("name", ["plain.pth", "other.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_file_as_checkpoint_is_pointed_to_convert_and_weights(name, zipped, tmp_path):
    path = tmp_path / name
    torch.save(weights(1), path, _use_new_zipfile_serialization=zipped)
    line = (
        f"error: {path} is a PyTorch file, no checkpoint of segdeformer; make one of another project's whole "
        f"model by `segdeformer convert {path} --out FILE`, start from an encoder's weights by "
        f"`segdeformer train --weights {path}`\n"
    )
    (tmp_path / "img").mkdir()
    (tmp_path / "img/a.png").write_bytes(b"")
    for command in (
        ["eval", path],
        ["predict", path, tmp_path / "img", "--out", tmp_path / "out"],
        ["bench", "--params", path],
    ):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert (result.exit_code, result.stderr) == (1, line), command


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_safetensors_file_is_known_by_its_bytes_under_any_name(name, tmp_path):
    note = ""
    while not (start := (tmp_path / name)).is_file() or start.read_bytes()[0] != 0x80:  # as a pickle's first
        save_file(weights(1), start, {"note": note})
        note += " "
    with pytest.raises(UserError, match="is a safetensors file, but no checkpoint of segdeformer"):
        read_checkpoint(start)
