"""Encoder weights: every naming style, what the report lists, resampling, and refusals."""

import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from segdeformer.config import EncoderConfig
from segdeformer.errors import UsageError, UserError
from segdeformer.models.encoders import build_encoder
from segdeformer.models.mit import MIT_SIZES, MiT
from segdeformer.weights.encoder import export_encoder_weights, load_encoder_weights
from segdeformer.weights.names import STYLES


def random_mit(seed: int, name: str = "mit_nano") -> MiT:
    torch.manual_seed(seed)
    mit = MiT(MIT_SIZES[name])
    for parameter in mit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return mit


def assert_same(ours: nn.Module, reference: nn.Module) -> None:
    for (name, value), (_, expected) in zip(
        ours.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert torch.equal(value, expected), name


def vit(**options):
    torch.manual_seed(options.pop("seed", 0))
    return build_encoder(EncoderConfig(name="vit_tiny_patch16_224", **options))


def timm_names(encoder: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("backbone."): value for name, value in encoder.state_dict().items()}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_comes_back_equal_to_the_bit(style, tmp_path):
    source, target = random_mit(0), random_mit(1)
    save_file(export_encoder_weights(source, style), tmp_path / "mit.safetensors")
    report = load_encoder_weights(target, tmp_path / "mit.safetensors")
    assert_same(target, source)
    assert report.source_format == style
    assert report.loaded == len(source.state_dict())
    assert (report.missing, report.unexpected, report.resampled) == ((), (), ())


# What each project's files look like around the names.
@pytest.mark.parametrize(
    ("style", "prefix", "container"),
    [
        ("nvlabs", "", None),
        ("nvlabs", "module.", "model"),
        ("mmseg", "backbone.", "state_dict"),
        ("mmseg", "module.backbone.", "state_dict"),
        ("huggingface", "segformer.", None),
        ("transformers5", "segformer.", None),
        ("nvlabs", "backbone.", "teacher"),
    ],
)
def test_containers_and_prefixes_are_looked_through(style, prefix, container, tmp_path):
    source, target = random_mit(0), random_mit(1)
    content = {prefix + name: value for name, value in export_encoder_weights(source, style).items()}
    content[f"{prefix}head.weight"] = torch.zeros(2, 2)
    content["decode_head.conv_seg.bias"] = torch.zeros(2)
    torch.save({container: content, "meta": {"epoch": 3}} if container else content, tmp_path / "mit.pth")
    report = load_encoder_weights(target, tmp_path / "mit.pth")
    assert_same(target, source)
    assert report.unexpected == (f"{prefix}head.weight", "decode_head.conv_seg.bias")


def test_our_own_checkpoint_names_are_read_from_a_whole_model(tmp_path):
    source, target = random_mit(0), random_mit(1)
    content = {f"encoder.{name}": value for name, value in source.state_dict().items()}
    save_file(content | {"decoder.head.bias": torch.zeros(3)}, tmp_path / "run.safetensors")
    report = load_encoder_weights(target, tmp_path / "run.safetensors")
    assert_same(target, source)
    assert report.source_format == "segdeformer"
    assert report.unexpected == ("decoder.head.bias",)


def test_fused_projections_hold_query_key_value_in_this_order():
    mit = random_mit(0)
    attention = mit.stages[3].blocks[1].attention
    mmseg = export_encoder_weights(mit, "mmseg")
    nvlabs = export_encoder_weights(mit, "nvlabs")
    # mmsegmentation runs PyTorch's own module, so that one defines what its rows mean.
    reference = nn.MultiheadAttention(128, 8, batch_first=True)
    prefix = "layers.3.1.1.attn.attn."
    reference.load_state_dict({k.removeprefix(prefix): v for k, v in mmseg.items() if k.startswith(prefix)})
    x = torch.randn(2, 6, 128)
    expected = reference(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(
        attention(x.unflatten(1, (2, 3))).flatten(1, 2), expected, atol=1e-5, rtol=1e-5
    )
    # NVlabs reshapes its output rows to (2, heads, D) and takes index 0 as keys.
    assert torch.equal(nvlabs["block4.1.attn.kv.weight"][:128], attention.key.weight)
    assert torch.equal(nvlabs["block4.1.attn.kv.bias"][128:], attention.value.bias)


def test_published_names_and_shapes_are_exported():
    mit = random_mit(0)
    mmseg, nvlabs = export_encoder_weights(mit, "mmseg"), export_encoder_weights(mit, "nvlabs")
    assert mmseg["layers.0.0.projection.weight"].shape == (16, 3, 7, 7)
    assert mmseg["layers.1.1.0.attn.attn.in_proj_weight"].shape == (96, 32)
    assert mmseg["layers.1.1.0.attn.attn.in_proj_bias"].shape == (96,)
    assert mmseg["layers.1.1.0.ffn.layers.0.weight"].shape == (128, 32, 1, 1)
    assert mmseg["layers.1.1.0.ffn.layers.1.weight"].shape == (128, 1, 3, 3)
    assert mmseg["layers.1.1.0.ffn.layers.4.weight"].shape == (32, 128, 1, 1)
    assert mmseg["layers.1.1.0.attn.sr.weight"].shape == (32, 32, 4, 4)
    assert mmseg["layers.3.2.bias"].shape == (128,)
    assert nvlabs["patch_embed2.proj.weight"].shape == (32, 16, 3, 3)
    assert nvlabs["block2.0.attn.kv.weight"].shape == (64, 32)
    assert nvlabs["block2.0.mlp.fc1.weight"].shape == (128, 32)
    assert nvlabs["norm4.bias"].shape == (128,)
    huggingface = export_encoder_weights(mit, "huggingface")
    assert huggingface["encoder.block.0.1.attention.self.sr.weight"].shape == (16, 16, 8, 8)
    assert huggingface["encoder.block.0.1.mlp.dense2.weight"].shape == (16, 64)


def test_missing_tensors_are_listed_and_stay_as_they_were(tmp_path):
    source, target = random_mit(0), random_mit(1)
    before = target.stages[1].blocks[0].attention.value.weight.clone()
    content = export_encoder_weights(source, "nvlabs")
    del content["block2.0.attn.kv.weight"], content["norm1.bias"]
    save_file(content, tmp_path / "mit.safetensors")
    report = load_encoder_weights(target, tmp_path / "mit.safetensors")
    assert report.missing == (
        "stages.0.norm.bias",
        "stages.1.blocks.0.attention.key.weight",
        "stages.1.blocks.0.attention.value.weight",
    )
    assert torch.equal(target.stages[1].blocks[0].attention.value.weight, before)
    assert report.lines()[1].startswith("  missing in the file, left as initialised: stages.0.norm.bias, ")


def test_half_precision_files_fill_float32_encoders(tmp_path):
    source, target = random_mit(0), random_mit(1)
    content = {name: value.half() for name, value in export_encoder_weights(source, "huggingface").items()}
    save_file(content, tmp_path / "mit.safetensors")
    load_encoder_weights(target, tmp_path / "mit.safetensors")
    assert_same(target, source.half().float())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_timm_files_fill_timm_encoders_and_list_the_head(name, tmp_path):
    torch.manual_seed(5)
    whole = timm.create_model(name)
    torch.save(whole.state_dict(), tmp_path / "timm.pth")
    encoder = build_encoder(EncoderConfig(name=name))
    report = load_encoder_weights(encoder, tmp_path / "timm.pth")
    state = whole.state_dict()
    for key, value in timm_names(encoder).items():
        assert torch.equal(value, state[key]), key
    assert report.source_format == "timm"
    assert report.missing == ()
    head = {"vit_tiny_patch16_224": "head.", "resnet18": "fc.", "swin_tiny_patch4_window7_224": "head.fc."}[
        name
    ]
    assert {head + "weight", head + "bias"} <= set(report.unexpected)
    assert set(report.unexpected) == set(state) - set(timm_names(encoder))


def test_norms_on_the_maps_are_listed_as_missing(tmp_path):
    save_file(timm_names(vit()), tmp_path / "vit.safetensors")
    report = load_encoder_weights(vit(feature_norm=True), tmp_path / "vit.safetensors")
    assert report.missing == tuple(f"norms.{i}.{kind}" for i in range(4) for kind in ("weight", "bias"))


@pytest.mark.parametrize("image_size", [(96, 160), (448, 320)])
def test_position_grids_are_resampled_bicubically(image_size, tmp_path):
    source, target = vit(), vit(seed=1, image_size=image_size)
    save_file(timm_names(source), tmp_path / "vit.safetensors")
    report = load_encoder_weights(target, tmp_path / "vit.safetensors")
    grid_14 = source.backbone.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    height, width = image_size[0] // 16, image_size[1] // 16
    expected = (
        F.interpolate(grid_14, (height, width), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(target.backbone.pos_embed[:, 1:], expected)
    assert torch.equal(target.backbone.pos_embed[:, :1], source.backbone.pos_embed[:, :1])
    count = height * width + 1
    assert report.resampled == (f"pos_embed (1, 197, 192) -> (1, {count}, 192)",)


def test_a_square_grid_is_not_mistaken_for_an_oblong_one_of_the_same_length(tmp_path):
    source, target = vit(image_size=(256, 256)), vit(seed=1, image_size=(128, 512))
    assert source.backbone.pos_embed.shape == target.backbone.pos_embed.shape
    save_file(timm_names(source), tmp_path / "vit.safetensors")
    report = load_encoder_weights(target, tmp_path / "vit.safetensors")
    assert len(report.resampled) == 1
    grid_16 = source.backbone.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
    expected = F.interpolate(grid_16, (8, 32), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(target.backbone.pos_embed[:, 1:], expected)
    # Our own files hold the grid that they were trained with.
    save_file(dict(target.state_dict()), tmp_path / "ours.safetensors")
    again = vit(seed=2, image_size=(128, 512))
    assert load_encoder_weights(again, tmp_path / "ours.safetensors").resampled == ()
    assert_same(again, target)


def test_tables_of_relative_positions_follow_the_window(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    torch.manual_seed(0)
    source = timm.create_model(name, window_size=8, img_size=256)
    offsets = torch.arange(-7.0, 8.0)
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    state = source.state_dict()
    state[table] = offsets.repeat_interleave(15)[:, None].repeat(1, 3)  # rises with the vertical offset only
    torch.save({"model": state}, tmp_path / "swin.pth")
    encoder = build_encoder(EncoderConfig(name=name))
    report = load_encoder_weights(encoder, tmp_path / "swin.pth")
    assert len(report.resampled) == 12
    resampled = encoder.backbone.get_parameter(table)[:, 0].reshape(13, 13)
    torch.testing.assert_close(resampled, resampled[:, :1].expand(13, 13))
    assert (resampled[1:, 0] > resampled[:-1, 0]).all()
    torch.testing.assert_close(resampled, -resampled.flip(0))


def refused(encoder, path) -> str:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_encoder_weights(encoder, path)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_another_size_of_mit_is_named_with_the_shapes(tmp_path):
    path = tmp_path / "mit.pth"
    torch.save({"state_dict": export_encoder_weights(random_mit(0, "mit_b0"), "nvlabs")}, path)
    message = refused(random_mit(1), path)
    assert "`patch_embed1.proj.weight` has shape (32, 3, 7, 7), the encoder needs (16, 3, 7, 7)" in message
    assert message.endswith("the file looks like `mit_b0` in nvlabs names")


@pytest.mark.parametrize(
    ("other", "looks"),
    [
        ("test_vit", "a ViT: `blocks.0.attn.qkv.weight` has shape (192, 64)"),
        ("resnet18", "a ResNet: `layer1.0.conv1.weight`"),
        ("convnext_atto", "a ConvNeXt: `stages.0.blocks.0.conv_dw.weight`"),
    ],
)
def test_a_file_of_another_model_is_named(other, looks, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(timm.create_model(other).state_dict(), path)
    message = refused(random_mit(0), path)
    assert "% of this encoder's parameters; the file looks like" in message
    assert looks in message


def test_a_file_with_less_than_half_of_the_encoder_is_refused(tmp_path):
    content = export_encoder_weights(random_mit(0), "mmseg")
    part = {name: value for name, value in content.items() if not name.startswith("layers.3.1")}
    save_file(part, tmp_path / "part.safetensors")
    message = refused(random_mit(1), tmp_path / "part.safetensors")
    assert "% of this encoder's parameters; its first tensors are `layers.0.0." in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept_bytes", [0, 7, 1000, 100_000])
def test_truncated_files_are_refused_in_one_line(suffix, kept_bytes, tmp_path):
    path = tmp_path / f"mit{suffix}"
    content = export_encoder_weights(random_mit(0), "nvlabs")
    torch.save(content, path) if suffix == ".pth" else save_file(content, path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert "damaged or no" in refused(random_mit(1), path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>not found</html>", "is a web page, so the download failed"),
        ("version https://git-lfs", "is a Git LFS pointer"),
        ("hello\n", "damaged or no PyTorch file"),
    ],
)
def test_text_under_a_weights_name_is_refused(text, message, tmp_path):
    (tmp_path / "mit.pth").write_text(text)
    assert message in refused(random_mit(0), tmp_path / "mit.pth")


class Foreign:
    def __setstate__(self, state):
        raise AssertionError("code of the file was run")


def test_pickled_objects_are_passed_over_and_named_not_run(tmp_path):
    source = random_mit(0)
    foreign = Foreign()
    foreign.log = [1, 2]
    torch.save({"state_dict": export_encoder_weights(source, "nvlabs"), "hub": foreign}, tmp_path / "run.pth")
    target = random_mit(1)
    report = load_encoder_weights(target, tmp_path / "run.pth")
    assert report.passed_over == (f"{Foreign.__module__}.Foreign",)
    assert f"  objects in the file that were not read: {report.passed_over[0]}" in report.lines()
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    (tmp_path / "old.bin").write_bytes(pickle.dumps([1, 2], protocol=2))
    refused(random_mit(0), tmp_path / "old.bin")


def test_files_that_hold_no_weights_are_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert "holds a list, not a dict" in refused(random_mit(0), tmp_path / "list.pt")
    torch.save({"state_dict": {}}, tmp_path / "empty.pt")
    assert "there is no tensor in the file" in refused(random_mit(0), tmp_path / "empty.pt")
    assert "no such file or folder" in refused(random_mit(0), tmp_path / "absent.pth")
    assert "is a folder" in refused(random_mit(0), tmp_path)
    (tmp_path / "mit.onnx").touch()
    with pytest.raises(UsageError, match=r"must be a \.safetensors, \.pth, \.pt, \.bin or \.ckpt file"):
        load_encoder_weights(random_mit(0), tmp_path / "mit.onnx")
