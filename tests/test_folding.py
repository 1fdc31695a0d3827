"""Folded models against the unfolded ones: every parameter and statistic random, odd sizes, all variants."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from segdeformer import build_decoder, build_model
from segdeformer.config import (
    AuxiliaryConfig,
    ContextConfig,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    ExternalConfig,
    InternalConfig,
    MLPFusionConfig,
    ModelConfig,
)
from segdeformer.errors import UsageError
from segdeformer.inference.views import predict_strips
from segdeformer.models import context, folding
from segdeformer.models.batch_norms import fused_encoder
from segdeformer.models.encoders import TimmEncoder, build_encoder

BOTH = {"internal": InternalConfig(), "external": ExternalConfig()}
CONTEXTS = {
    "no context": None,
    "both": ContextConfig(**BOTH),
    "internal only": ContextConfig(internal=InternalConfig()),
    "external only": ContextConfig(external=ExternalConfig()),
    "heads": ContextConfig(internal=InternalConfig(heads=4), external=ExternalConfig()),
    "shared tokens, no attention loss": ContextConfig(
        external=ExternalConfig(decouple=False, attention_loss=False)
    ),
    "no second stage": ContextConfig(internal=InternalConfig(), external=ExternalConfig(second_stage=False)),
    "reduction": ContextConfig(reduction=4, **BOTH),
    "reduction and heads": ContextConfig(reduction=2, internal=InternalConfig(heads=2)),
    "reduction, no second stage": ContextConfig(reduction=4, external=ExternalConfig(second_stage=False)),
}


def randomise(module, seed=1):
    """Move every parameter and statistic off its initial value; zeros and ones would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            # enough to matter, not so much that a deep random encoder loses float32's digits
            spread = 0.3 if tensor.ndim < 2 else 0.02
            tensor.data += spread * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(
                tensor
            )
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d) and child.track_running_stats:
            child.running_var.abs_().add_(0.5)
    return module.eval()


def model_config(
    context=CONTEXTS["both"],
    *,
    encoder="mit_nano",
    width=32,
    num_classes=5,
    projection="conv_bn_relu",
    **changes,
):
    return ModelConfig(
        num_classes=num_classes,
        encoder=EncoderConfig(name=encoder),
        fusion=MLPFusionConfig(width=width, projection=projection),
        context=context,
        **changes,
    )


def random_model(*arguments, **changes):
    torch.manual_seed(0)
    return randomise(build_model(model_config(*arguments, **changes)))


def images(height=65, width=97, *, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(ours, expected, relative):
    """Nearer than `relative` to the largest expected value."""
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert expected.std() > 0
    assert (ours - expected).abs().max() <= relative * expected.abs().max()


@torch.no_grad()
def assert_same_outputs(folded, model, x, relative):
    ours, expected = folded(x), model(x)
    assert_close(ours.logits_BKhw, expected.logits_BKhw, relative)
    assert (ours.class_logits_BKhw is None) == (expected.class_logits_BKhw is None)
    if expected.class_logits_BKhw is not None:
        assert_close(ours.class_logits_BKhw, expected.class_logits_BKhw, relative)
    assert ours.auxiliary_logits_BKhw is None


# The same values.


@pytest.mark.parametrize("num_classes", [2, 19, 45])  # fewer and more than the 32 channels
@pytest.mark.parametrize("context", CONTEXTS)
def test_folded_outputs_equal_the_unfolded_ones_in_float64_and_float32(context, num_classes):
    model = random_model(
        CONTEXTS[context],
        num_classes=num_classes,
        projection="linear" if num_classes == 19 else "conv_bn_relu",
        auxiliary=AuxiliaryConfig(width=8),
    )
    assert_same_outputs(model.fold(), model, images(batch=2), 1e-5)
    model.double()
    assert_same_outputs(model.fold(), model, images(batch=2, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("width", [256, 512])
@pytest.mark.parametrize(
    ("encoder", "num_classes"),
    [("mit_b0", 150), ("deit_tiny_patch16_224", 19), ("swin_tiny_patch4_window7_224", 171)],
)
def test_folded_logits_equal_the_unfolded_ones_for_the_papers_encoders_and_widths(
    encoder, num_classes, width
):
    model = random_model(encoder=encoder, width=width, num_classes=num_classes)
    assert_same_outputs(model.fold(), model, images(), 1e-5)


@pytest.mark.parametrize("impl", ["sdpa", "blocks", "reference"])
@pytest.mark.parametrize("form", ["plain", "low_rank"])
def test_every_implementation_can_be_folded(impl, form):
    model = randomise(build_model(model_config(), impl=impl, external_form=form))
    assert model.fold().decoder.internal.impl == model.fold().decoder.external.impl == impl
    assert_same_outputs(model.fold(), model, images(), 1e-5)


def test_folded_bfloat16_is_no_worse_than_unfolded_bfloat16():
    model = random_model(num_classes=19)
    x = images()
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        exact = half.double()(x.bfloat16().double()).logits_BKhw
        half = half.bfloat16()
        unfolded, folded = half(x.bfloat16()), half.fold()(x.bfloat16())
    assert folded.class_logits_BKhw.dtype == torch.float32
    error, allowed = ((y.logits_BKhw.double() - exact).abs().max() for y in (folded, unfolded))
    assert error <= 2 * allowed


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_sliding_windows_scales_and_flip_give_the_same_strips(mode):
    protocol = EvalConfig(mode=mode, window=(48, 48), stride=(32, 40), scales=(0.75, 1.25), flip=True)
    pixels = np.random.default_rng(0).integers(0, 256, (65, 97, 3), dtype=np.uint8)
    model = random_model(num_classes=19)
    strips = [
        torch.cat(
            [
                strip.logits_KrW
                for strip in predict_strips(
                    m, pixels, protocol, DataConfig(name="synthetic"), torch.device("cpu")
                )
            ],
            dim=1,
        )
        for m in (model.fold(), model)
    ]
    assert strips[0].shape == (19, 65, 97)
    assert_close(*strips, 1e-5)


def test_a_decoder_alone_can_be_folded():
    torch.manual_seed(0)
    decoder = randomise(build_decoder(model_config(), channels=(8, 16, 24, 40)))
    maps = [torch.randn(1, 8 * i, 34 // i, 48 // i) for i in (1, 2, 3, 5)]
    with torch.no_grad():
        assert_close(decoder.fold()(maps).logits_BKhw, decoder(maps).logits_BKhw, 1e-5)


# What is left of the model.


@pytest.mark.parametrize(("num_classes", "value_width"), [(19, 19), (45, 32)])
def test_one_linear_layer_feeds_both_attentions_with_aligned_views(num_classes, value_width, monkeypatch):
    folded = random_model(num_classes=num_classes).fold()
    project, calls = folded.decoder.project, []

    def watched(queries, keys, values, **options):
        calls.append((queries, keys, values))
        return attend(queries, keys, values, **options)

    def watched_external(scores, middle, **options):
        calls.append((scores, middle))
        return attend_external(scores, middle, **options)

    attend, attend_external = context.attention, context.external_attention
    monkeypatch.setattr(context, "attention", watched)
    monkeypatch.setattr(context, "external_attention", watched_external)
    with torch.no_grad():
        apart = folded(images()).logits_BKhw  # as on a CPU, part by part
        calls.clear()
        monkeypatch.setattr(folding, "made_together", lambda device: True)
        assert_close(folded(images()).logits_BKhw, apart, 1e-5)
    views = [view for call in calls for view in call]
    assert [view.shape[-1] for view in views] == [32, 32, value_width, num_classes, num_classes]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1  # one tensor, nothing copied
    assert all(view.storage_offset() % 16 == view.stride(1) % 16 == 0 for view in views)

    used = torch.zeros(project.out_features, dtype=torch.bool)
    for span in project.spans:
        used[span] = True
    assert used.sum() == 2 * 32 + value_width + 3 * num_classes
    assert project.weight[~used].abs().sum() == project.bias[~used].abs().sum() == 0
    layers = [m for name, m in folded.decoder.named_modules() if not name.startswith("fusion")]
    linears = [(m.in_features, m.out_features) for m in layers if isinstance(m, nn.Linear)]
    external = (num_classes, num_classes)
    after = [] if value_width == num_classes else [(32, num_classes)]
    assert linears == [(32, project.out_features), *after, external]


def test_folding_leaves_the_original_as_it_was_and_a_second_folding_changes_nothing():
    model = random_model(auxiliary=AuxiliaryConfig(width=8)).train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    folded = model.fold()
    assert torch.equal(torch.get_rng_state(), random_state)  # a dropout after it draws the same
    assert model.training
    assert not model.is_folded
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    folded.load_state_dict({name: torch.zeros_like(t) for name, t in folded.state_dict().items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert folded.is_folded
    assert folded.fold() is folded


def test_a_folded_model_has_no_gradients_and_cannot_be_put_into_training():
    folded = random_model().fold()
    assert not any(module.training for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not folded(images()).logits_BKhw.requires_grad
    assert folded.eval() is folded
    for module in (folded, folded.decoder, nn.Sequential(folded)):
        with pytest.raises(ValueError, match="a folded model cannot be trained; train the unfolded one"):
            module.train()
    assert not any(module.training for module in folded.modules())


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (
            ContextConfig(projection="conv_bn_relu", external=ExternalConfig()),
            'context.projection = "conv_bn_relu", whose ReLU is not linear; only "affine" can be',
        ),
        (ContextConfig(projection="conv_bn_relu", internal=InternalConfig()), 'context.projection = "conv_'),
        (
            ContextConfig(internal=InternalConfig(depth=2)),
            "context.internal.depth = 2, whose blocks build on",
        ),
        (ContextConfig(internal=InternalConfig(mlp=True)), "context.internal.mlp = true, whose GELU is not"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_setting(context, reason):
    model = random_model(context)
    assert model.folding_obstacle.startswith(reason)
    with pytest.raises(UsageError, match="this model cannot be folded for inference: ") as caught:
        model.fold()
    assert reason in str(caught.value)
    assert random_model().folding_obstacle is random_model().fold().folding_obstacle is None


# BatchNorms.


def batch_norms(module):
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18", 0),
        ("regnety_002", 0),  # norms with an activation inside
        ("tf_efficientnet_b0", 0),  # convolutions that pad by the input's size
        ("densenet121", 62),  # most norms come before their convolutions
        ("mobilevit_xxs", 32),  # branches on sizes: left alone
    ],
)
def test_batch_norms_of_encoders_go_into_the_convolutions_before_them(name, left):
    torch.manual_seed(0)
    encoder = randomise(build_encoder(EncoderConfig(name=name))).double()
    fused = fused_encoder(encoder)
    assert batch_norms(fused) == left
    x = images(dtype=torch.float64)
    with torch.no_grad():
        for ours, expected in zip(fused(x), encoder(x), strict=True):
            assert_close(ours, expected, 1e-12)


def test_a_whole_model_on_a_resnet_is_folded_without_a_batch_norm_left():
    model = random_model(encoder="resnet18")
    assert batch_norms(model) > 0
    folded = model.fold()
    assert batch_norms(folded) == 0
    assert_same_outputs(folded, model, images(), 1e-5)


class Branching(nn.Module):
    """A backbone in which only the last of seven norms may go into its convolution."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(6))
        self.batch_norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward_intermediates(self, x, indices, intermediates_only):
        y = self.convs[0](x)
        y = self.norms[0](y) + y  # the convolution's output is used twice
        y = self.norms[1](self.convs[1](self.convs[1](y)))  # the convolution runs twice
        y = self.norms[2](self.norms[2](self.convs[2](y)))  # the norm runs twice
        y = self.norms[3](self.convs[3](y)) + self.convs[3].weight.mean()  # its weight is read
        y = self.batch_norm(self.convs[4](y)) + self.norms[4](y)  # statistics of the batch; no convolution
        y = self.norms[5](self.convs[5](y))
        return [y] * len(indices)


def test_a_convolution_that_is_used_otherwise_too_keeps_its_batch_norm():
    encoder = TimmEncoder(
        Branching(),
        name="branching",
        levels=(0, 1, 2, 3),
        channels=(3, 3, 3, 3),
        strides=(1, 1, 1, 1),
        multiple=1,
        fixed_size=None,
        feature_norm=False,
    )
    randomise(encoder).double()
    fused = fused_encoder(encoder)
    assert (batch_norms(fused), batch_norms(encoder)) == (6, 7)
    assert isinstance(fused.backbone.norms[0], nn.BatchNorm2d)
    assert not isinstance(fused.backbone.norms[5], nn.BatchNorm2d)
    x = images(7, 9, dtype=torch.float64)
    with torch.no_grad():
        assert_close(fused(x)[0], encoder(x)[0], 1e-12)
