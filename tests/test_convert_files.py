"""Every tensor of a file of another project is accounted for, and no code in it is run."""

import os
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch

from segdeformer.config import recipe_text
from segdeformer.data.classes import CLASS_TABLES, load_classes
from segdeformer.errors import UserError
from segdeformer.weights.imports import Imported, import_model


def unused(imported: Imported) -> dict[str, str]:
    return {item.name: item.reason for item in imported.unused}


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(UserError) as error:
        import_model(path, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("container", ["state_dict", "model", "ema_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "ema.", "model.module.", "_orig_mod."])
def test_containers_and_prefixes_do_not_matter(container, prefix, tmp_path):
    tensors = {prefix + name: value for name, value in foreign.mmseg_segformer().items()}
    path = tmp_path / "model.pth"
    torch.save({container: tensors, "epoch": 3} if container else tensors, path)
    imported = import_model(path)
    assert (imported.used, imported.unused, imported.source.prefix) == (len(tensors), (), prefix)


def test_known_extras_are_listed_with_their_reason(tmp_path):
    tensors = foreign.mmseg_segformer()
    extras = {
        "backbone.head.weight": torch.zeros(1000, 128),
        "data_preprocessor.mean": torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
        "data_preprocessor.std": torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1),
        "ema_decode_head_conv_seg_bias": torch.zeros(7),
        "auxiliary_head.convs.0.conv.weight": torch.zeros(8, 64, 3, 3),
        "auxiliary_head.convs.1.conv.weight": torch.zeros(8, 8, 3, 3),
        "steps": torch.tensor(3),
    }
    imported = import_model(foreign.written(tmp_path / "model.pth", tensors | extras))
    assert set(unused(imported)) == set(extras)
    assert "training only" in unused(imported)["auxiliary_head.convs.1.conv.weight"]
    assert (imported.recipe.data.mean, imported.recipe.data.std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


def test_of_two_copies_the_one_that_is_no_average_is_taken_unless_named(tmp_path):
    tensors = foreign.mmseg_segformer()
    averaged = {f"ema_model.{name}": value + 1 for name, value in tensors.items()}
    path = foreign.written(tmp_path / "two.pth", {f"model.{n}": v for n, v in tensors.items()} | averaged)
    plain, average = import_model(path), import_model(path, prefix="ema_model")
    assert set(unused(plain)) == set(averaged)
    assert set(unused(plain).values()) == {"another copy of the model"}
    bias = tensors["decode_head.conv_seg.bias"]
    assert torch.equal(plain.model.decoder.head.classify.bias, bias)
    assert torch.equal(average.model.decoder.head.classify.bias, bias + 1)
    assert "has `model.`, `ema_model.` before `decode_head.`" in refusal(path, prefix="teacher")


def test_a_tensor_too_many_too_few_or_of_another_shape_is_one_line(tmp_path):
    tensors, path = foreign.mmseg_segformer(), tmp_path / "model.pth"
    message = refusal(foreign.written(path, tensors | {"decode_head.extra.weight": torch.zeros(2)}))
    assert "`decode_head.extra.weight` has no place in MiT-nano + SegFormer" in message
    lacking = {name: value for name, value in tensors.items() if name != "decode_head.convs.2.bn.bias"}
    message = refusal(foreign.written(path, lacking))
    assert "lacks `decode_head.convs.2.bn.bias`, which MiT-nano + SegFormer needs" in message
    wrong = tensors | {"decode_head.convs.2.conv.weight": torch.zeros(24, 65, 1, 1)}
    message = refusal(foreign.written(path, wrong))
    assert "has shape (24, 65, 1, 1), MiT-nano + SegFormer needs (24, 64, 1, 1)" in message
    broken = tensors | {"decode_head.conv_seg.bias": torch.full((7,), torch.nan)}
    assert "`decode_head.conv_seg.bias` holds NaN" in refusal(foreign.written(path, broken))
    assert "--from nvlabs, but its names are those of mmsegmentation" in refusal(path, project="nvlabs")


def test_counters_of_batch_norms_may_be_missing(tmp_path):
    tensors = foreign.mmseg_segformer()
    without = {name: value for name, value in tensors.items() if "num_batches" not in name}
    imported = import_model(foreign.written(tmp_path / "old.pth", without))
    assert len(imported.missing) == 5
    assert imported.used == len(without)
    assert imported.model.state_dict()["decoder.fusion.fuse.1.num_batches_tracked"] == 0


def test_another_order_of_relative_positions_is_refused(tmp_path):
    tensors = foreign.swin(foreign.SWIN_T)
    name = "backbone.stages.2.blocks.3.attn.w_msa.relative_position_index"
    tensors[name] = tensors[name].T.contiguous()
    assert f"`{name}` orders the relative positions" in refusal(
        foreign.written(tmp_path / "swin.pth", tensors)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.ln1.weight": torch.ones(384)}, "normalises the last map alone (`final_norm=True`)"),
        (
            {"backbone.pos_embed": torch.zeros(1, 13, 384)},
            "has 12 places and the class token's, which is no square",
        ),
        (
            {"backbone.layers.12.ln1.weight": torch.ones(384)},
            "a ViT of width 384, 13 blocks and patches of 16 px",
        ),
        ({"decode_head.psp_modules.4.1.conv.weight": torch.zeros(1)}, "UperNet has 5 pools"),
        ({"decode_head.conv_seg.weight": torch.zeros(300, 16, 1, 1)}, "predicts 300 classes; 2 to 255"),
        ({"decode_head.conv_seg.weight": torch.tensor(1.0)}, "predicts 1 class; 2 to 255"),
        (
            {"backbone.patch_embed.projection.weight": torch.zeros(2, 3)},
            "has shape (2, 3), expected 4 dimensions",
        ),
        ({"decode_head.fpn_bottleneck.conv.weight": torch.zeros(())}, "has shape (), expected 4 dimensions"),
    ],
)
def test_models_that_we_cannot_build_are_refused_with_the_reason(changes, message, tmp_path):
    assert message in refusal(foreign.written(tmp_path / "deit.pth", foreign.vit(neck=False) | changes))


def test_a_recipe_tells_what_a_file_does_not(tmp_path):
    tensors = foreign.random_tensors(
        foreign.mmseg_vit(384, 12, (2, 6)) | foreign.mmseg_upernet((384,) * 4, 16, 150, auxiliary=None)
    )
    path = foreign.written(tmp_path / "oblong.pth", tensors)
    text = recipe_text("ade20k-upernet-deit-s").replace("image_size = [512, 512]", "image_size = [32, 96]")
    (tmp_path / "mine.toml").write_text(text.replace("width = 512", "width = 16"))
    imported = import_model(path, recipe_name=str(tmp_path / "mine.toml"))
    assert imported.recipe.model.encoder.image_size == (32, 96)
    assert imported.recipe.model.encoder.weights == "none"
    assert imported.recipe.model.auxiliary is None
    assert (imported.used, imported.unused) == (len(tensors), ())
    message = refusal(foreign.written(tmp_path / "nano.pth", foreign.mmseg_segformer()), recipe_name="folder")
    assert "for which mmsegmentation's files have no name; the file holds MiT-nano + SegFormer" in message
    assert "is for 150 classes, the model in" in refusal(
        tmp_path / "nano.pth", recipe_name="ade20k-segformer-b1"
    )
    message = refusal(path, recipe_name="ade20k-segformer-b1")
    assert "lacks `backbone.layers.0.0.projection.weight` and" in message


@pytest.mark.parametrize("style", ["0.x", "1.x"])
def test_classes_and_iteration_are_read_from_mmsegmentations_meta(style, tmp_path):
    names, palette = list("abcdefg"), [[10 * i, 0, 255] for i in range(7)]
    meta = {"CLASSES": tuple(names), "PALETTE": palette, "iter": 160000}
    if style == "1.x":
        meta = {"dataset_meta": {"classes": names, "palette": palette}, "iter": 160000}
    imported = import_model(foreign.written(tmp_path / "model.pth", foreign.mmseg_segformer(), meta=meta))
    assert imported.classes.table.names == tuple(names)
    assert imported.classes.table.colors[2] == (20, 0, 255)
    assert imported.source.iteration == 160000
    assert imported.recipe.data.name == "folder"


def test_a_known_data_set_is_found_by_its_class_names_however_they_are_spelled(tmp_path):
    names = [f"{name.title()} " for name in load_classes(CLASS_TABLES / "ade20k.toml").names]
    tensors = foreign.mmseg_segformer(num_classes=150)
    meta = {"dataset_meta": {"classes": names, "palette": [[0, 0, 0]] * 150}}
    imported = import_model(foreign.written(tmp_path / "ade.pth", tensors, meta=meta))
    assert (imported.recipe.data.name, imported.classes.table.names[7]) == ("ade20k", "bed")
    names[:20] = [f"other {index}" for index in range(20)]
    imported = import_model(foreign.written(tmp_path / "own.pth", tensors, meta=meta))
    assert (imported.recipe.data.name, imported.classes.table.names[7]) == ("folder", "other 7")


class HistoryBuffer:
    """What mmengine's checkpoints hold in `message_hub`."""

    def __init__(self) -> None:
        self._log_history = np.arange(3.0)
        self._statistics_methods = {"mean": HistoryBuffer.mean}

    def mean(self) -> float:
        return float(self._log_history.mean())


class Hostile:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


class HostileEval(Hostile):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.folder!r})",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_with_logs_in_it_is_read_without_running_them(zipped, tmp_path):
    tensors, path = foreign.mmseg_segformer(), tmp_path / "iter_160000.pth"
    content = {"state_dict": tensors, "meta": {}, "message_hub": {"log_scalars": {"loss": HistoryBuffer()}}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    imported = import_model(path)
    assert imported.used == len(tensors)
    assert any(name.endswith("HistoryBuffer") for name in imported.source.passed_over)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [Hostile, HostileEval])
def test_code_in_a_file_is_never_run(kind, zipped, tmp_path):
    hostile = kind()
    hostile.folder = str(tmp_path / "made")
    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": {}, "hook": hostile}, path, _use_new_zipfile_serialization=zipped)
    assert str(path) in refusal(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "is a web page, so the download failed"),
        (b"", "damaged or no PyTorch file"),
        ([1, 2], "holds a list, not a dict"),
        (torch.nn.Linear(1, 1), "holds an object of `torch.nn.modules.linear.Linear`, not a dict of tensors"),
        ({"state_dict": {}}, "there is no tensor in the file"),
        ({"patch_embed1.proj.weight": torch.zeros(2)}, "no whole segmentation model"),
        ({"decode_head.convs.0.weight": torch.zeros(2)}, "is neither SegFormer's"),
    ],
)
def test_files_without_a_model_are_one_line(content, message, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert message in refusal(path)
