"""Every fusion, encoder family and context: a training step, a score, folding and JSON; Tables 4 to 6."""

import json
import tomllib
from importlib import resources
from itertools import cycle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segdeformer.config import (
    IGNORE_INDEX,
    AuxiliaryConfig,
    ContextConfig,
    EncoderConfig,
    ExternalConfig,
    FaPNConfig,
    FPNConfig,
    InternalConfig,
    MLPFusionConfig,
    ModelConfig,
    UperNetConfig,
    load_recipe,
    parse_recipe,
    recipe_toml,
    validate_recipe,
)
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.data.samples import Sample, identity_map
from segdeformer.inference.evaluate import evaluate, report_values
from segdeformer.inference.scorecard import write_scorecard
from segdeformer.models.momentum import class_sums
from segdeformer.training.losses import build_terms, training_losses
from segdeformer.training.optimizer import build_optimizer, parameter_groups
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import Checkpoint

K = 5
SIZES = [(64, 64), (65, 97)]
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

FUSIONS = {
    "mlp": MLPFusionConfig(width=16),
    "mlp, linear, deep": MLPFusionConfig(width=16, depth=4, projection="linear"),
    "upernet": UperNetConfig(width=16),
    "fpn": FPNConfig(width=16, pyramid_width=8),
    "fapn": FaPNConfig(width=16, pyramid_width=8),
}
NECKS = {f"{n}, neck": c.model_copy(update={"neck": True}) for n, c in FUSIONS.items() if n[0] != "m"}
BOTH = {"internal": InternalConfig(), "external": ExternalConfig()}
MOMENTUM = ExternalConfig(tokens="momentum", momentum=0.5, decouple=False)
CONTEXTS = {
    "none": None,
    "both": ContextConfig(**BOTH),
    "both, reduced": ContextConfig(reduction=4, **BOTH),
    "both, released style": ContextConfig(projection="conv_bn_relu", **BOTH),
    "internal, 2 heads, 2 blocks, mlp": ContextConfig(internal=InternalConfig(heads=2, depth=2, mlp=True)),
    "internal": ContextConfig(internal=InternalConfig()),
    "external": ContextConfig(external=ExternalConfig()),
    "external, one stage, one table": ContextConfig(
        external=ExternalConfig(second_stage=False, decouple=False)
    ),
    "momentum": ContextConfig(external=MOMENTUM),
    "momentum, both, no attention loss": ContextConfig(
        internal=InternalConfig(), external=MOMENTUM.model_copy(update={"attention_loss": False})
    ),
}
FOLDABLE = CONTEXTS.keys() - {"both, released style", "internal, 2 heads, 2 blocks, mlp"}
FAMILIES = {
    "MiT": "mit_nano",
    "DeiT": "deit_tiny_patch16_224",
    "ViT": "test_vit",
    "Swin": "swin_tiny_patch4_window7_224",
    "Twins": "twins_svt_small",
    "ResNet": "resnet18",
    "ConvNeXt": "convnext_atto",
}
contexts = cycle(CONTEXTS)
COMBINATIONS = [("MiT", "mlp", context) for context in CONTEXTS]
COMBINATIONS += [("MiT", fusion, next(contexts)) for fusion in FUSIONS]
ONE_OF_EACH = [fusion for fusion in FUSIONS if fusion != "mlp, linear, deep"]
COMBINATIONS += [(f, fusion, next(contexts)) for fusion in ONE_OF_EACH for f in list(FAMILIES)[1:]]
COMBINATIONS += [("ViT", fusion, next(contexts)) for fusion in NECKS]


class TwoImages:
    """One image of either size."""

    name, split = "two", "val"
    classes, label_map = SyntheticDataset("val").classes, identity_map(K)

    def __len__(self):
        return 2

    def read(self, index):
        rng = np.random.default_rng(index)
        image_HW3 = rng.integers(0, 256, (*SIZES[index], 3), np.uint8)
        return Sample(image_HW3, rng.integers(0, K, SIZES[index]).astype(np.uint8), f"image{index}")


def up(logits_BKhw, size):
    return F.interpolate(logits_BKhw.double(), size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize(("family", "fusion", "context"), COMBINATIONS)
def test_every_combination_trains_a_step_scores_folds_and_exports(family, fusion, context, tmp_path):
    torch.manual_seed(0)
    recipe = load_recipe("synthetic").model_copy(
        update={
            "model": ModelConfig(
                num_classes=K,
                encoder=EncoderConfig(name=FAMILIES[family]),
                fusion=(FUSIONS | NECKS)[fusion],
                context=CONTEXTS[context],
                auxiliary=AuxiliaryConfig(width=8),
            )
        }
    )
    assert_recipe_survives_toml_and_json(recipe)
    model = build_model(recipe.model).train()
    optimizer = build_optimizer(parameter_groups(model, recipe.train), recipe.train)
    for size in SIZES:
        assert_a_step_is_right(model, recipe, optimizer, size)
    assert_score_is_right(model, recipe, tmp_path)
    assert (model.folding_obstacle is None) == (context in FOLDABLE)
    if context in FOLDABLE:
        images_B3HW = torch.randn(2, 3, *SIZES[1])
        with torch.no_grad():
            ours, expected = model.fold()(images_B3HW), model(images_B3HW)
        torch.testing.assert_close(ours.logits_BKhw, expected.logits_BKhw, atol=1e-5, rtol=1e-5)


def assert_recipe_survives_toml_and_json(recipe):
    assert parse_recipe(recipe_toml(recipe), "resolved") == recipe
    exported = json.loads(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    assert validate_recipe(exported, "exported") == recipe


def assert_a_step_is_right(model, recipe, optimizer, size):
    """The loss is that of full-size float64 logits, every parameter moves, and tokens are class means."""
    images_B3HW, labels_BHW = torch.randn(2, 3, *size), torch.randint(0, K, (2, *size))
    labels_BHW[torch.rand(labels_BHW.shape) < 0.1] = IGNORE_INDEX
    output = model(images_B3HW)
    external = None if recipe.model.context is None else recipe.model.context.external
    assert (output.class_logits_BKhw is None) == (external is None or not external.attention_loss)
    terms = build_terms(recipe.train.losses, K, device=torch.device("cpu"))
    losses = training_losses(output, labels_BHW, terms)
    maps = [output.logits_BKhw, output.class_logits_BKhw, output.auxiliary_logits_BKhw]
    weights = [term.weight for term in terms]
    expected = sum(
        weight * F.cross_entropy(up(logits, size), labels_BHW, ignore_index=IGNORE_INDEX)
        for weight, logits in zip(weights, maps, strict=True)
        if logits is not None
    )
    assert losses.total.isfinite()
    torch.testing.assert_close(losses.total.double(), expected, atol=1e-6, rtol=1e-5)
    optimizer.zero_grad()
    losses.total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    tokens = model.momentum_tokens
    assert (tokens is None) == (external is None or external.tokens == "learned")
    if tokens is not None:
        assert_tokens_are_class_means(tokens, output.fused_BChw, labels_BHW)
    optimizer.step()


def assert_tokens_are_class_means(tokens, fused_BChw, labels_BHW):
    before, seen = tokens.tokens_KC.double(), bool(tokens.seen_K.all())
    tokens.update(class_sums(fused_BChw, labels_BHW, num_classes=K, ignore_index=IGNORE_INDEX))
    small_Bhw = F.interpolate(labels_BHW[:, None].double(), fused_BChw.shape[2:], mode="nearest")[:, 0]
    pixels_NC = fused_BChw.permute(0, 2, 3, 1)
    for k in small_Bhw.unique().long().tolist():
        if k == IGNORE_INDEX:
            continue
        mean_C = pixels_NC[small_Bhw == k].double().mean(0)
        expected = 0.5 * before[k] + 0.5 * mean_C if seen else mean_C
        torch.testing.assert_close(tokens.tokens_KC[k].double(), expected, atol=1e-6, rtol=1e-5)


def assert_score_is_right(model, recipe, folder):
    """The report is that of full-size float64 logits, and its JSON reads back."""
    data, images = recipe.data.model_copy(update={"mean": MEAN, "std": STD}), TwoImages()
    report = evaluate(model, images, protocol=recipe.evaluate, data=data)
    loss = wrong = 0
    for index, size in enumerate(SIZES):
        sample = images.read(index)
        image_HW3 = (torch.tensor(sample.image_HW3) - torch.tensor(MEAN)) / torch.tensor(STD)
        labels_HW = torch.tensor(sample.labels_HW).long()
        with torch.no_grad():
            logits_1KHW = up(model(image_HW3.permute(2, 0, 1)[None]).logits_BKhw, size)
        loss += F.cross_entropy(logits_1KHW, labels_HW[None], reduction="sum")
        wrong += int((logits_1KHW[0].argmax(0) != labels_HW).sum())
    num_pixels = sum(height * width for height, width in SIZES)
    assert report.loss == pytest.approx(loss.item() / num_pixels, rel=1e-5)
    # Where two classes tie to the last bit, float32 may choose the other.
    assert report.pixel_accuracy == pytest.approx(1 - wrong / num_pixels, abs=2.5 / num_pixels)
    file = folder / "weights"
    file.write_bytes(b"")
    checkpoint = Checkpoint(file, recipe, images.classes, 2, None, validation_due=False, folded=False)
    write_scorecard(
        folder / "scores.json",
        report,
        protocol=recipe.evaluate,
        data=data,
        label_map=images.label_map,
        checkpoint=checkpoint,
    )
    assert json.loads((folder / "scores.json").read_text())["scores"] == report_values(report)


# Tables 4, 5 and 6: every switch is a plain field of the recipe.

PAPER = tomllib.loads(resources.files("segdeformer.paper").joinpath("paper.toml").read_text("utf-8"))
ROWS = [(t["number"], row) for t in PAPER["tables"] if t["number"] in (4, 5, 6) for row in t["rows"]]
B1 = load_recipe("ade20k-segformer-b1").model_copy(update={"reported": None})
WIDTH, CLASSES = 256, 150


def context_of(number, row):
    """The `[model.context]` of a row, as a recipe would have it; none for the baseline."""
    switches = {k: v for k, v in row.items() if k not in ("miou", "gain", "recipes")}
    match number:
        case 4:
            return {"internal": switches} if row["heads"] else None
        case 5:
            return {"external": switches} if "tokens" in row else None
        case _:
            return {part: {} for part in ("internal", "external") if row[part]} or None


def added_parameters(context):
    """By hand, from Eqs. 5 to 7 and 10: C x C matrices with bias, and K x C tables."""
    matrix, total = WIDTH * WIDTH + WIDTH, 0
    if "internal" in context:
        internal = {"depth": 1, "mlp": False} | context["internal"]
        norm, mlp = 2 * WIDTH, 8 * WIDTH * WIDTH + 5 * WIDTH
        total += internal["depth"] * (3 * matrix + internal["mlp"] * (norm + mlp))
    if "external" in context:
        external = {"tokens": "learned", "second_stage": True, "decouple": True} | context["external"]
        tables = (1 + external["decouple"]) * (external["tokens"] == "learned")
        total += 3 * matrix * (1 + external["second_stage"]) + tables * CLASSES * WIDTH
    return total


@pytest.fixture(scope="module")
def baseline():
    with torch.device("meta"):
        model = build_model(B1.model.model_copy(update={"encoder": EncoderConfig(name="mit_b1")}))
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 3) == 13.717
    return count


@pytest.mark.parametrize(("number", "row"), ROWS)
def test_every_row_of_tables_4_to_6_is_a_recipe_with_the_parameters_counted_by_hand(number, row, baseline):
    context = context_of(number, row)
    values = B1.model_dump(mode="json", exclude_none=True)
    values["model"]["encoder"]["weights"] = "none"
    if context is not None:
        values["model"]["context"] = context
    recipe = validate_recipe(values, f"Table {number}")
    assert_recipe_survives_toml_and_json(recipe)
    with torch.device("meta"):
        model = build_model(recipe.model)
    expected = 0 if context is None else added_parameters(context)
    assert sum(p.numel() for p in model.parameters()) - baseline == expected
    supervised = context is not None and context.get("external", {"attention_loss": False}).get(
        "attention_loss", True
    )
    built = model.decoder.context
    assert (built is not None and built.supervised) == supervised
    if number == 4 and context is not None:
        assert [block.attention.heads for block in built.internal] == [row["heads"]] * row["depth"]
    assert (model.momentum_tokens is not None) == (row.get("tokens") == "momentum")
