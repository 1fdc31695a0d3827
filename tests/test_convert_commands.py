"""`segdeformer convert`: into our checkpoints and back, to the same bits."""

import json

import cv2
import foreign
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import EncoderConfig
from segdeformer.models.encoders import build_encoder
from segdeformer.weights.checkpoint import load
from segdeformer.weights.encoder import load_encoder_weights
from segdeformer.weights.exports import export_model

RUNNER = CliRunner(env={"COLUMNS": "200"})


def converted(*arguments: object) -> str:
    result = RUNNER.invoke(app, ["convert", *map(str, arguments)])
    assert (result.exit_code, result.stderr) == (0, ""), result
    return result.stdout


def failed(*arguments: object) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.exit_code, result.stderr


def same_tensors(ours: foreign.Tensors, theirs: foreign.Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_converted_models_encoder_can_be_trained_on(tmp_path):
    ours, target = tmp_path / "ours.safetensors", build_encoder(EncoderConfig(name="mit_nano"))
    converted(foreign.written(tmp_path / "mmseg.pth", foreign.mmseg_segformer()), "--out", ours)
    report = load_encoder_weights(target, ours)
    assert report.missing == ()
    same_tensors(target.state_dict(), load(ours).model.encoder.state_dict())


def test_mmsegmentations_models_come_back_to_the_bit(tmp_path):
    released = foreign.mmseg_segformer() | foreign.random_tensors(foreign.released_segdeformer_context(24, 7))
    for tensors in (
        foreign.mmseg_segformer(),
        released,
        foreign.swin(foreign.SWIN_T),
        foreign.vit(neck=True),
    ):
        path, ours, back = (tmp_path / name for name in ("in.pth", "ours.safetensors", "back.pth"))
        converted(foreign.written(path, tensors), "--out", ours)
        converted(ours, "--to", "mmseg", "--out", back, "--no-check")
        same_tensors(torch.load(back, weights_only=True)["state_dict"], tensors)


def test_nvlabs_to_hugging_face_and_back(tmp_path):
    tensors = foreign.nvlabs_segformer()
    source = foreign.written(tmp_path / "b0.pth", tensors, meta={"iter": 80000})
    names = tmp_path / "names.toml"
    names.write_text('names = ["a", "b", "c", "d", "e", "f", "g"]\n')
    ours, folder, again = (tmp_path / name for name in ("ours.safetensors", "hf", "again.safetensors"))
    text = converted(source, "--out", ours, "--classes", names, "--json", tmp_path / "report.json")
    assert "not used: decode_head.conv_seg.weight and 1 more (NVlabs' code never calls it)" in text
    assert "warning: the weights may not be used commercially" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["project"], report["used"], len(report["unused"])) == ("nvlabs", len(tensors) - 2, 2)
    assert report["recipe"]["model"]["fusion"]["projection"] == "linear"
    text = converted(ours, "--to", "huggingface", "--out", folder)
    assert "checked: logits differ from those of transformers" in text
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"]["6"] == "g"
    converted(folder, "--out", again, "--license", "CC0-1.0")
    first, second = load(ours), load(again)
    same_tensors(second.model.state_dict(), first.model.state_dict())
    assert second.checkpoint.classes == first.checkpoint.classes
    assert first.checkpoint.iteration == 80000
    assert (first.checkpoint.license, second.checkpoint.license) == (
        "NVIDIA Source Code License for SegFormer (non-commercial)",
        "CC0-1.0",
    )
    back = tmp_path / "back.safetensors"
    converted(again, "--to", "nvlabs", "--out", back)
    del tensors["decode_head.conv_seg.weight"], tensors["decode_head.conv_seg.bias"]
    same_tensors(load_file(back), tensors)


def test_transformers_reads_what_we_write(tmp_path):
    from transformers import SegformerForSemanticSegmentation

    ours, folder = tmp_path / "ours.safetensors", tmp_path / "hf"
    converted(foreign.written(tmp_path / "nvlabs.pth", foreign.nvlabs_segformer()), "--out", ours)
    export_model(load(ours), "huggingface", folder, license_text="none", check=False)
    theirs, about = SegformerForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    images = foreign.random_images(65, 33)
    with torch.inference_mode():
        expected = theirs.double().eval()(pixel_values=images).logits
    with torch.inference_mode():
        logits = load(ours).model.double()(images).logits_BKhw
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)


def test_what_cannot_be_converted_or_written_ends_in_one_line(tmp_path):
    mmseg, ours = (
        foreign.written(tmp_path / "mmseg.pth", foreign.mmseg_segformer()),
        tmp_path / "ours.safetensors",
    )
    converted(mmseg, "--out", ours)
    code, line = failed(ours, "--to", "huggingface", "--out", tmp_path / "hf")
    assert (code, 'this is mit_nano with an MLP of depth 2 with "conv_bn_relu"' in line) == (2, True)
    assert not (tmp_path / "hf").exists()
    assert "already; to write it for another project, add --to" in failed(ours, "--out", ours)[1]
    assert "a checkpoint is a .safetensors file" in failed(mmseg, "--out", tmp_path / "x.pth")[1]
    assert (
        "--classes is for files of other projects"
        in failed(ours, "--to", "mmseg", "--out", "x.pth", "--classes", "ade20k")[1]
    )
    assert "has 150 classes, the model in" in failed(mmseg, "--out", ours, "--classes", "ade20k")[1]
    assert (
        "neither ade20k, cityscapes, coco_stuff nor" in failed(mmseg, "--out", ours, "--classes", "none")[1]
    )
    assert "no such file or folder" in failed(tmp_path / "absent.pth", "--out", ours)[1]
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "no whole segmentation model" in failed(tmp_path / "x.safetensors", "--out", ours)[1]


def test_a_converted_checkpoint_predicts_like_any_other(tmp_path):
    ours = tmp_path / "ours.safetensors"
    converted(foreign.written(tmp_path / "mmseg.pth", foreign.mmseg_segformer()), "--out", ours)
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    arguments = ["predict", ours, tmp_path / "photo.png", "--out", tmp_path / "out"]
    result = RUNNER.invoke(app, list(map(str, arguments)))
    assert (result.exit_code, result.stderr) == (0, ""), result
    labels = cv2.imread(str(tmp_path / "out" / "photo.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (37, 53)
    assert labels.max() < 7
