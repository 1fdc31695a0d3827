"""Models of segmentation_models_pytorch in our frame: their own logits, any image size, one-line refusals."""

import json
import sys

import cv2
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import (
    AuxiliaryConfig,
    EncoderConfig,
    ModelConfig,
    ThirdPartyConfig,
    load_recipe,
    parse_recipe,
    recipe_toml,
    validate_recipe,
)
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.datasets import open_dataset
from segdeformer.errors import UsageError, UserError
from segdeformer.models.segmenter import build_decoder
from segdeformer.models.third_party import cropped
from segdeformer.training.optimizer import parameter_groups
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import load, save_checkpoint

RUNNER = CliRunner(env={"COLUMNS": "200"})


def config(decoder="FPN", encoder="resnet18", *, stage=None, options=None, **fields):
    return ModelConfig(
        num_classes=5,
        encoder=EncoderConfig(name=encoder, **fields),
        fusion=ThirdPartyConfig(decoder=decoder, options=options or {}),
        auxiliary=None if stage is None else AuxiliaryConfig(stage=stage, width=8),
    )


def recipe_of(model):
    return load_recipe("synthetic").model_copy(update={"model": model})


# In the recipe, where the package is not needed.


def test_a_recipe_with_a_third_party_model_reads_back_equal_and_is_exported_to_json():
    options = {"encoder_depth": 5, "psp_dropout": 0.1, "decoder_use_norm": "batchnorm", "rates": [1, 2]}
    recipe = recipe_of(config("PSPNet", stage=3, options=options))
    assert parse_recipe(recipe_toml(recipe), "resolved") == recipe
    values = json.loads(json.dumps(recipe.model_dump(mode="json")))
    assert values["model"]["fusion"] == {"kind": "third_party", "decoder": "PSPNet", "options": options}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fusion": {"kind": "third_party"}}, "key `model.fusion.decoder` is missing"),
        (
            {"fusion": {"kind": "third_party", "decoder": "FPN", "options": {"a": {"b": 1}}}},
            "`model.fusion.options`: `a` is {'b': 1}; expected a number, a text, true or false, or a list",
        ),
        (
            {"fusion": {"kind": "third_party", "decoder": "FPN", "width": 3}},
            "unknown key `model.fusion.width`; did you mean `kind`?",
        ),
        (
            {"fusion": {"kind": "third_party", "decoder": "FPN"}, "context": {"internal": {}}},
            '`model`: fusion.kind is "third_party", which takes no `context`; leave it out',
        ),
    ],
)
def test_a_recipe_that_no_third_party_model_can_follow_is_refused_in_one_line(changes, told):
    values = load_recipe("synthetic").model_dump(exclude_none=True)
    values["model"].pop("context")
    values["model"] |= changes
    with pytest.raises(UsageError) as refusal:
        validate_recipe(values, "mine.toml")
    assert str(refusal.value).startswith(f"mine.toml: {told}")


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"needs segmentation_models_pytorch.*pip install segm") as refusal:
        build_model(config())
    assert refusal.value.exit_code == 1


def test_a_third_party_decoder_alone_is_refused():
    with pytest.raises(UsageError, match="a whole model; use `build_model`"):
        build_decoder(config(), (64, 128, 256, 512))


@pytest.mark.parametrize(
    ("size", "padded", "cells", "kept"),
    [
        ((65, 97), (96, 128), (24, 32), (17, 25)),
        ((64, 64), (64, 64), (8, 8), (8, 8)),
        ((1, 33), (32, 64), (2, 4), (1, 3)),
    ],
)
def test_cropping_keeps_every_cell_that_the_image_touches(size, padded, cells, kept):
    assert cropped(torch.zeros(1, 2, *cells), size, padded).shape[2:] == kept


# With the package.


@pytest.fixture(scope="module")
def smp():
    return pytest.importorskip(
        "segmentation_models_pytorch",
        reason="the extra `third-party` is not installed",
    )


SMALL_DPT = {"decoder_fusion_channels": 16, "decoder_intermediate_channels": [8, 8, 8, 8]}
# decoder, encoder, options, auxiliary stage, the logits' stride
MODELS = [
    ("FPN", "resnet18", {"decoder_pyramid_channels": 16}, 3, 4),
    ("UPerNet", "convnext_atto", {"decoder_channels": 16}, 3, 4),
    ("PSPNet", "resnet18", {"encoder_depth": 5, "output_stride": 8}, 4, 8),
    ("PSPNet", "mit_b0", {}, 2, 8),
    ("DeepLabV3Plus", "resnet18", {"decoder_channels": 16}, 3, 4),
    ("DeepLabV3", "resnet18", {"decoder_channels": 16}, None, 8),
    ("PAN", "mobilenetv3_small_050", {}, 1, 4),
    ("Segformer", "mit_b0", {}, 3, 4),
    ("Unet", "resnet18", {"decoder_channels": [16, 8, 8, 8, 4]}, 3, 1),
    ("DPT", "test_vit", SMALL_DPT, 3, 2),
]


@pytest.mark.parametrize(("decoder", "encoder", "options", "stage", "stride"), MODELS)
def test_every_model_trains_a_step_and_evaluates_at_any_size(smp, decoder, encoder, options, stage, stride):
    torch.manual_seed(0)
    model = build_model(config(decoder, encoder, stage=stage, options=options)).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for size in [(64, 64), (65, 97)]:
        images, labels = torch.randn(2, 3, *size), torch.randint(0, 5, (2, *size))
        output = model(images)
        assert output.logits_BKhw.shape == (2, 5, -(-size[0] // stride), -(-size[1] // stride))
        assert (output.auxiliary_logits_BKhw is None) == (stage is None)
        if stage is not None:
            at = model.encoder.strides[stage - 1]
            assert output.auxiliary_logits_BKhw.shape[2:] == (-(-size[0] // at), -(-size[1] // at))
        maps = [logits for logits in output if logits is not None]
        loss = sum(F.cross_entropy(F.interpolate(m, size, mode="bilinear"), labels) for m in maps)
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    with torch.no_grad():
        model.eval()
        assert model(images).auxiliary_logits_BKhw is None
        both, first = model(images).logits_BKhw, model(images[:1]).logits_BKhw
    torch.testing.assert_close(both[:1], first, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("decoder", "encoder"), [("FPN", "resnet18"), ("DeepLabV3Plus", "resnet18"), ("UPerNet", "mit_b0")]
)
def test_logits_are_those_of_the_package_on_the_padded_image(smp, decoder, encoder):
    torch.manual_seed(0)
    ours = build_model(config(decoder, encoder)).eval()
    theirs = getattr(smp, decoder)(encoder, encoder_weights=None, classes=5).eval()
    theirs.encoder.load_state_dict(ours.encoder.backbone.state_dict())
    theirs.decoder.load_state_dict(ours.decoder.fusion.state_dict())
    theirs.segmentation_head.load_state_dict(ours.decoder.head.state_dict())
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        height, width = ours.encoder.padded_size(65, 97)
        padded = F.pad(images, (0, width - 97, 0, height - 65))
        expected = theirs(padded)
        logits = ours(images).logits_BKhw
        assert logits.shape[2:] == (17, 25)
        whole = ours(padded).logits_BKhw
    torch.testing.assert_close(logits, whole[:, :, :17, :25], atol=1e-5, rtol=1e-5)
    resized = F.interpolate(whole, scale_factor=4, mode="bilinear", align_corners=True)
    torch.testing.assert_close(resized, expected, atol=1e-5, rtol=1e-5)


def test_parameters_are_those_that_the_model_uses(smp):
    torch.manual_seed(0)
    shallow = build_model(config("PSPNet", "resnet18"))  # three of five stages
    names = {name.split(".")[1] for name, _ in shallow.encoder.named_parameters()}
    assert names == {"conv1", "bn1", "layer1", "layer2"}
    deep = build_model(config("FPN", "resnet18"))
    package = smp.FPN("resnet18", encoder_weights=None, classes=5)
    assert sum(p.numel() for p in deep.parameters()) == sum(p.numel() for p in package.parameters())
    assert all(p.grad is None for p in deep.parameters())
    assert not deep.encoder.backbone.bn1.num_batches_tracked  # tried out without leaving a trace


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_third_party_model_is_built_the_same_where_gradients_are_off(smp, mode):
    torch.manual_seed(0)
    expected = build_model(config("PSPNet")).state_dict()
    torch.manual_seed(0)
    with mode():
        model = build_model(config("PSPNet"))
        assert model(torch.randn(1, 3, 33, 50)).logits_BKhw.isfinite().all()
    assert model.state_dict().keys() == expected.keys()
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in model.eval().state_dict().items()
        if "weight" in name
    )
    assert all(p.requires_grad for p in model.parameters())


def test_encoder_and_decoder_get_the_learning_rates_of_every_model(smp):
    model = build_model(config(stage=3))
    groups = parameter_groups(model, load_recipe("synthetic").train)
    assert [g.name for g in groups] == ["encoder", "encoder norms, positions", "decoder"]
    norms = sum(
        p.numel() for m in model.encoder.modules() if "Norm" in type(m).__name__ for p in m.parameters()
    )
    assert [g.num_scalars for g in groups] == [
        sum(p.numel() for p in model.encoder.parameters()) - norms,
        norms,
        sum(p.numel() for part in (model.decoder, model.auxiliary) for p in part.parameters()),
    ]


@pytest.mark.parametrize(
    ("decoder", "encoder", "options"), [("PSPNet", "resnet18", {}), ("DPT", "test_vit", SMALL_DPT)]
)
def test_checkpoint_gives_the_same_logits(smp, tmp_path, decoder, encoder, options):
    torch.manual_seed(0)
    model_config = config(decoder, encoder, stage=2, options=options)
    model, file = build_model(model_config).eval(), tmp_path / "last.safetensors"
    classes = SyntheticDataset("val").classes
    save_checkpoint(file, model, recipe=recipe_of(model_config), classes=classes, iteration=1, best_miou=None)
    loaded = load(file)
    assert loaded.checkpoint.recipe.model == model_config
    images = torch.randn(1, 3, 33, 50)
    with torch.no_grad():
        assert torch.equal(loaded.model(images).logits_BKhw, model(images).logits_BKhw)


def test_a_third_party_model_is_not_folded_and_says_why(smp):
    model = build_model(config())
    assert model.folding_obstacle == 'fusion.kind = "third_party", whose decoder is another package\'s'
    with pytest.raises(UsageError, match=r'inference: fusion\.kind = "third_party"'):
        model.fold()
    assert model.momentum_tokens is None


def test_a_third_party_model_compiles_as_one_graph(smp):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, images = build_model(config("PSPNet")).eval(), torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        ours = torch.compile(model, fullgraph=True, backend="eager")(images)
        torch.testing.assert_close(ours.logits_BKhw, model(images).logits_BKhw)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_encoder_weights_are_read_from_a_file_in_timms_names(smp, tmp_path, prefix):
    import timm

    torch.manual_seed(0)
    given = {
        prefix + name: tensor for name, tensor in timm.create_model("convnext_atto").state_dict().items()
    }
    torch.save(given, tmp_path / "weights.pth")
    model = build_model(config("FPN", "convnext_atto", weights=str(tmp_path / "weights.pth")))
    report = model.weights_report
    assert report.source_format == "timm"
    assert report.missing == ()
    assert {name.removeprefix(prefix) for name in report.unexpected} == {
        "head.norm.weight",
        "head.norm.bias",
        "head.fc.weight",
        "head.fc.bias",
    }
    ours = model.encoder.state_dict()
    assert torch.equal(
        ours["backbone.model.stages_2.blocks.1.conv_dw.weight"],
        given[f"{prefix}stages.2.blocks.1.conv_dw.weight"],
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"decoder": "DeepLabV3+"}, "has no `DeepLabV3+`; did you mean `DeepLabV3`, `DeepLabV3Plus`?"),
        ({"decoder": "upernet"}, "has no `upernet`; did you mean `UPerNet`"),
        (
            {"encoder": "resnet1"},
            "neither segmentation_models_pytorch nor timm has an encoder `resnet1`; did you",
        ),
        (
            {"options": {"encoder_dept": 3}},
            "`FPN` has no option `encoder_dept`; did you mean `encoder_depth`",
        ),
        ({"options": {"classes": 3}}, "`FPN` has no option `classes`; known: encoder_depth, decoder_pyramid"),
        (
            {"options": {"encoder_depth": 9}},
            "cannot join `FPN` and `resnet18` with these options: ResNetEncoder",
        ),
        (
            {"encoder": "deit_tiny_patch16_224"},
            "cannot join `FPN` and `deit_tiny_patch16_224` with these options",
        ),
        (
            {"drop_path": 0.1},
            "`resnet18` of segmentation_models_pytorch has neither drop path nor image size",
        ),
        ({"encoder": "tu-resnet18", "feature_norm": True}, "`model.encoder.feature_norm` is not for"),
        (
            {"out_indices": (0, 1, 2, 3)},
            "`model.encoder.out_indices` is for flat (ViT) encoders; `FPN` takes a pyramid",
        ),
        (
            {"decoder": "PSPNet", "stage": 3},
            "`model.auxiliary.stage`: this encoder has no stage 3; take an earlier",
        ),
    ],
)
def test_what_the_package_does_not_have_is_refused_in_one_line(smp, changes, told):
    with pytest.raises(UsageError) as refusal:
        build_model(config(**changes))
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_weights_that_cannot_be_downloaded_are_one_line(smp, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", offline)
    with pytest.raises(
        UserError, match=r"weights of `resnet18` could not be downloaded \(ConnectionError\)"
    ) as no:
        build_model(config(weights="timm"))
    assert "\n" not in str(no.value)
    assert no.value.exit_code == 1


def test_timms_options_reach_the_encoder(smp):
    model = build_model(config("FPN", "tu-resnet18", drop_path=0.2))
    rates = [m.drop_prob for m in model.encoder.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)
    vit = build_model(
        config("DPT", "test_vit", options=SMALL_DPT, out_indices=(0, 2, 3, 5), image_size=(32, 64))
    )
    assert vit.encoder.backbone._output_indices == [0, 2, 3, 5]
    assert vit.encoder.backbone.model.patch_embed.img_size == (32, 64)


def test_the_commands_train_score_time_and_predict_with_a_third_party_model(smp, tmp_path):
    drawn, data, run = SyntheticDataset("val"), tmp_path / "data", tmp_path / "run"
    for split, indices in (("train", (0, 1)), ("val", (2, 3))):
        for kind in ("images", "labels"):
            (data / kind / split).mkdir(parents=True)
        for index in indices:
            sample = drawn.read(index)
            cv2.imwrite(str(data / "images" / split / f"{index}.png"), sample.image_HW3)
            cv2.imwrite(str(data / "labels" / split / f"{index}.png"), sample.labels_HW)
    (data / "classes.toml").write_text(f"names = {json.dumps(drawn.classes.names)}\n")
    recipe = recipe_of(config("FPN", "mobilenetv3_small_050", stage=3))
    train = recipe.train.model_copy(update={"iterations": 2, "warmup_iterations": 1})
    (tmp_path / "third_party.toml").write_text(recipe_toml(recipe.model_copy(update={"train": train})))
    fps_options = ["--size", "64", "64", "--rounds", "1", "--warmup", "1", "--no-memory"]
    for arguments in (
        ["train", tmp_path / "third_party.toml", "--data", data, "--out", run],
        ["eval", run, "--json", tmp_path / "scores.json"],
        ["bench", "--fps", run, *fps_options, "--json", tmp_path / "fps.json"],
        ["predict", run, data / "images" / "val" / "2.png", "--out", tmp_path / "out"],
    ):
        result = RUNNER.invoke(app, [*map(str, arguments), "--device", "cpu"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert 'not folded: fusion.kind = "third_party"' in result.output
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["images"] == 2
    (timed,) = json.loads((tmp_path / "fps.json").read_text())["models"].values()
    assert timed["flops_by_part"]["head"] == 2 * 128 * 5 * 16 * 16  # a 1x1 convolution, at stride 4
    assert timed["p50_ms"] > 0
    model = load(run).model
    sample = open_dataset(load(run).checkpoint.recipe.data, "val").read(0)
    predicted = cv2.imread(str(tmp_path / "out" / "2.png"), cv2.IMREAD_UNCHANGED)
    image_3HW = torch.tensor(sample.image_HW3).permute(2, 0, 1).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (recipe.data.mean, recipe.data.std))
    with torch.no_grad():
        logits = model(((image_3HW - mean) / std)[None]).logits_BKhw.double()
    ids = F.interpolate(logits, predicted.shape, mode="bilinear")[0].argmax(0)
    assert (torch.tensor(predicted) != ids).float().mean() < 1e-3  # ties may fall otherwise
