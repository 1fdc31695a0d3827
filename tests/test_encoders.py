"""Encoders of timm through the adapter: values against timm's own, sizes, counts, and refusals."""

import math
import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from segdeformer.config import EncoderConfig
from segdeformer.errors import UsageError, UserError
from segdeformer.models.encoders import TimmEncoder, build_encoder
from segdeformer.models.mit import MiT

# (name, size at which timm's own feature extractor needs no padding and no resampling)
PYRAMIDS = [
    ("convnext_atto", 64),
    ("efficientnet_b0", 64),
    ("mobilenetv3_small_100", 64),
    ("resnet18", 64),
    ("regnety_002", 64),
    ("davit_tiny", 64),
    ("pvt_v2_b0", 64),
    ("twins_svt_small", 64),
    ("edgenext_xx_small", 64),
    ("fastvit_t8", 64),
    ("poolformer_s12", 64),
    ("mobilevitv2_050", 64),
    ("test_resnet", 64),
    # Windows of 7 and four stages: only from 448 on has timm no smaller window in the last.
    ("swin_tiny_patch4_window7_224", 448),
]
FLAT = [
    ("vit_tiny_patch16_224", 224),
    ("deit_tiny_distilled_patch16_224", 224),
    ("deit3_small_patch16_224", 224),
    ("vit_small_patch14_reg4_dinov2", 224),
    ("eva02_tiny_patch14_224", 224),
    ("xcit_nano_12_p16_224", 224),
    ("cait_xxs24_224", 224),
    ("test_vit", 160),
]


def build(name: str, **options) -> TimmEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name=name, **options)).eval()
    assert isinstance(encoder, TimmEncoder)
    return encoder


@pytest.mark.parametrize(("name", "size"), PYRAMIDS + FLAT)
def test_maps_equal_timms_own_features(name, size):
    other_grid = "swin" in name or "dinov2" in name
    encoder = build(name, image_size=(size, size) if other_grid else None)
    options = {"img_size": size} if other_grid else {}
    torch.manual_seed(0)  # timm draws the same weights again
    theirs = timm.create_model(name, features_only=True, out_indices=encoder.levels, **options).eval()
    own = encoder.backbone.state_dict()
    if theirs.state_dict().keys() <= own.keys():  # some have an extractor that draws in another order
        theirs.load_state_dict({name: own[name] for name in theirs.state_dict()})
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        maps, expected = encoder(images), theirs(images)
    for ours, reference, channels, stride in zip(
        maps, expected, encoder.channels, encoder.strides, strict=True
    ):
        if reference.shape[1] != channels:
            reference = reference.permute(0, 3, 1, 2)  # NHWC models
        assert ours.shape == (1, channels, size // stride, size // stride)
        assert ours.std() > 0
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "size"), PYRAMIDS + FLAT)
def test_an_odd_size_is_padded_with_zeros_and_cropped_back(name, size):
    encoder = build(name)
    images = torch.randn(1, 3, 65, 97)
    height, width = encoder.padded_size(65, 97)
    padded = torch.zeros(1, 3, height, width)
    padded[:, :, :65, :97] = images
    with torch.no_grad():
        maps, whole = encoder(images), encoder(padded)
    for ours, reference, channels, stride in zip(maps, whole, encoder.channels, encoder.strides, strict=True):
        h, w = math.ceil(65 / stride), math.ceil(97 / stride)
        assert ours.shape == (1, channels, h, w)
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, reference[:, :, :h, :w])


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "resnet18", "vit_tiny_patch16_224", "pvt_v2_b0"]
)
def test_every_parameter_is_used(name):
    encoder = build(name, feature_norm=True).train()
    sum(m.square().mean() for m in encoder(torch.randn(2, 3, 64, 96))).backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"name": "deit_small_patch16_224", "image_size": (512, 512)}, 21_982_848),
        ({"name": "swin_small_patch4_window7_224"}, 48_835_722),
        ({"name": "swin_small_patch4_window7_224", "feature_norm": True}, 48_838_602),
    ],
)
def test_parameter_counts_are_those_of_the_papers_baselines(options, count):
    assert sum(p.numel() for p in build(**options).parameters()) == count


def test_feature_norm_normalises_every_map_over_its_channels():
    torch.manual_seed(0)
    plain, normed = build("resnet18"), build("resnet18", feature_norm=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for raw, ours in zip(plain(images), normed(images), strict=True):
            torch.testing.assert_close(ours.mean(1), torch.zeros_like(ours.mean(1)), atol=1e-5, rtol=0)
            centred = raw - raw.mean(1, keepdim=True)
            expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_flat_encoder_takes_the_blocks_asked_for():
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        spread = build("vit_tiny_patch16_224")(images)
        chosen = build("vit_tiny_patch16_224", out_indices=(0, 2, 5, 8))(images)
    for ours, reference in zip(chosen[1:], spread[:3], strict=True):
        torch.testing.assert_close(ours, reference)
    assert build("test_vit").levels == (0, 2, 3, 5)


def test_swin_shifts_its_windows_at_any_size():
    """A pixel reaches beyond its own window, also where the map is not larger than one."""
    encoder = build("swin_tiny_patch4_window7_224")
    images = torch.randn(1, 3, 224, 224)
    changed = images.clone()
    changed[:, :, :4, :4] += 1
    with torch.no_grad():
        difference = (encoder(changed)[0] - encoder(images)[0]).abs().amax(1)[0]
    assert difference[:11, :11].max() > 0
    assert difference[8, 8] > 0
    assert difference[12:, 12:].max() == 0


def test_image_size_sets_the_position_grid_and_no_limit():
    encoder = build("vit_tiny_patch16_224", image_size=(96, 160))
    assert encoder.backbone.pos_embed.shape == (1, 6 * 10 + 1, 192)
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 70, 200))[0].shape == (1, 192, 5, 13)


def test_a_model_of_fixed_size_refuses_larger_images_in_one_line():
    encoder = build("beit_base_patch16_224", image_size=(64, 96))
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 60, 70))[0].shape == (1, 768, 4, 5)
    with pytest.raises(
        UserError, match=r"takes at most 64x96 px, got 65x96; set encoder.image_size"
    ) as error:
        encoder(torch.randn(1, 3, 65, 96))
    assert "\n" not in str(error.value)


def test_a_model_that_breaks_its_stated_sizes_is_refused():
    with pytest.raises(UserError, match=r"`inception_v4` does not keep to the sizes that timm states"):
        build("inception_v4")(torch.randn(1, 3, 128, 160))


def test_drop_path_reaches_the_model_and_zero_means_none():
    def rates(encoder: nn.Module) -> list[float]:
        return [m.drop_prob for m in encoder.modules() if hasattr(m, "drop_prob")]

    assert max(rates(build("swin_tiny_patch4_window7_224", drop_path=0.3))) == pytest.approx(0.3)
    assert rates(build("swin_tiny_patch4_window7_224")) == []  # timm's default is 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "swin_tinny_patch4"},
            "called `swin_tinny_patch4`; did you mean `swin_tiny_patch4_window7_224`",
        ),
        ({"name": "mit_b9"}, "did you mean `mit_b5`"),
        ({"name": "resnet18.no_such_tag"}, "did you mean `resnet18."),
        ({"name": "xyzzy"}, "timm.list_models"),
        ({"name": "vgg11_bn", "drop_path": 0.1}, "`vgg11_bn` has no drop path; set it to 0"),
        ({"name": "resnet18", "out_indices": (0, 1, 2, 3)}, "`resnet18` is a pyramid"),
        ({"name": "test_vit", "out_indices": (1, 2, 3, 6)}, "must ascend and stay below the 6 blocks"),
        ({"name": "test_vit", "out_indices": (3, 2, 1, 0)}, "must ascend"),
        ({"name": "mit_nano", "feature_norm": True}, "normalises its maps already"),
        ({"name": "mit_nano", "out_indices": (0, 1, 2, 3)}, "`mit_nano` is a pyramid"),
    ],
)
def test_wrong_recipes_are_refused_with_the_remedy(options, message):
    with pytest.raises(UsageError) as error:
        build_encoder(EncoderConfig(**options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "levit_128s"}, "`levit_128s` gives 3 maps, at strides [16, 32, 64], and four are needed"),
        (
            {"name": "mit_b0", "weights": "timm"},
            "timm has no weights for `mit_b0`; set encoder.weights to a file",
        ),
        ({"name": "hrnet_w18_small_v3", "weights": "timm"}, "did you mean"),
    ],
)
def test_models_that_cannot_serve_are_refused_by_name(options, message):
    with pytest.raises(UserError) as error:
        build_encoder(EncoderConfig(**options))
    assert message in str(error.value)


def test_a_download_that_fails_is_one_line_with_the_remedy(monkeypatch):
    def offline(*args, **kwargs):
        raise FileNotFoundError("many\nlines about hosts")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError) as error:
        build_encoder(EncoderConfig(name="resnet18", weights="timm"))
    assert str(error.value).startswith(
        "the weights of `resnet18` could not be downloaded (FileNotFoundError)"
    )
    assert "set encoder.weights to a .safetensors or .pth file" in str(error.value)
    assert "\n" not in str(error.value)


def test_mit_is_built_by_its_name():
    encoder = build_encoder(EncoderConfig(name="mit_nano", drop_path=0.1))
    assert isinstance(encoder, MiT)
    assert encoder.strides == (4, 8, 16, 32)


def test_the_module_imports_without_timm():
    script = "import sys, segdeformer.models.encoders; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=os.environ, check=False).returncode == 0
