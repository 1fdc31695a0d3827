"""Evaluation protocols in strips against the same thing done whole, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segdeformer.config import DataConfig, EvalConfig
from segdeformer.data.classes import ClassTable
from segdeformer.data.samples import Sample
from segdeformer.data.transforms import resize_for_eval
from segdeformer.inference import views as inference
from segdeformer.inference.evaluate import Tally, evaluate_images
from segdeformer.inference.predict import predict_image
from segdeformer.inference.views import Window, predict_strips, sliding_windows
from segdeformer.kernels.upsample import rows as rows_module
from segdeformer.models.segmenter import SegOutput
from segdeformer.runtime import Runtime

DATA = DataConfig(name="synthetic")
CPU = torch.device("cpu")


class Quarter(nn.Module):
    """A model whose logits depend on position: a strided convolution to K maps at 1/4."""

    def __init__(self, num_classes=7):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, num_classes, 7, stride=4, padding=3)

    def forward(self, images):
        return SegOutput(self.conv(images), None, None)


def image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalised(pixels):
    x = (pixels.astype(np.float64) - DATA.mean) / DATA.std
    return torch.from_numpy(x).permute(2, 0, 1)[None]


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def whole_logits(model, pixels, protocol, size):
    """One view, done in one go: what the strips must equal."""
    x = normalised(pixels)
    if protocol.mode == "whole":
        return resize(model(x).logits_BKhw, size)
    total, count = 0, 0
    for w in sliding_windows(pixels.shape[:2], protocol.window, protocol.stride):
        inside = np.s_[:, :, w.top : w.top + w.height, w.left : w.left + w.width]
        part = resize(model(x[inside]).logits_BKhw, (w.height, w.width))
        padding = (w.left, x.shape[3] - w.left - w.width, w.top, x.shape[2] - w.top - w.height)
        total = total + F.pad(part, padding)
        count = count + F.pad(torch.ones_like(part), padding)
    return resize(total / count, size)


@pytest.mark.parametrize("size", [(65, 97), (128, 64), (31, 33)])
@pytest.mark.parametrize(
    "protocol",
    [
        EvalConfig(),
        EvalConfig(resize_to=(120, 48)),
        EvalConfig(mode="slide", window=(32, 40), stride=(20, 24)),
        EvalConfig(mode="slide", window=(32, 32), stride=(32, 32), resize_to=(90, 70)),
        EvalConfig(scales=(0.5, 1.0, 1.75), flip=True),
        EvalConfig(mode="slide", window=(32, 40), stride=(20, 24), scales=(0.75, 1.0), flip=True),
    ],
    ids=["whole", "whole-resized", "slide", "slide-resized", "multi-scale-flip", "slide-multi-scale-flip"],
)
def test_strips_equal_the_protocol_done_whole_in_float64(size, protocol, monkeypatch):
    monkeypatch.setattr(rows_module, "STRIP_BYTES", 7 * 4 * size[1] * 5)  # strips of five rows
    model, pixels = Quarter(), image(*size)
    with torch.no_grad():
        strips = list(predict_strips(model, pixels, protocol, DATA, CPU))
        assert [s.top for s in strips] == list(range(0, size[0], 5))
        ours = torch.cat([s.logits_KrW for s in strips], 1)
        model.double()
        views = []
        for scale in protocol.scales:
            scaled = resize_for_eval(pixels, protocol, scale=scale)
            views.append(whole_logits(model, scaled, protocol, size))
            if protocol.flip:
                views.append(whole_logits(model, scaled[:, ::-1].copy(), protocol, size).flip(-1))
    mean = torch.stack([v.softmax(1) for v in views]).mean(0)[0]
    expected = views[0][0] if len(views) == 1 else mean.log()
    torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=0)
    confidence = torch.cat([s.confidence() for s in strips], 0)
    torch.testing.assert_close(confidence.double(), expected.softmax(0).amax(0), atol=1e-5, rtol=0)
    ids = torch.cat([s.ids() for s in strips], 0)
    assert (ids != expected.argmax(0)).double().mean() < 1e-3


def test_windows_cover_the_image_and_the_last_one_shifts_inwards():
    windows = sliding_windows((1024, 2048), (1024, 1024), (768, 768))
    assert windows == [Window(0, left, 1024, 1024) for left in (0, 768, 1024)]
    assert sliding_windows((100, 60), (128, 128), (96, 96)) == [Window(0, 0, 100, 60)]
    covered = np.zeros((70, 101), int)
    for w in sliding_windows((70, 101), (32, 40), (21, 33)):
        assert (w.height, w.width) == (32, 40)
        covered[w.top : w.top + w.height, w.left : w.left + w.width] += 1
    assert covered.min() >= 1


def test_memory_holds_strips_not_full_logits(monkeypatch):
    """No tensor as large as the full-resolution logits is ever made."""
    monkeypatch.setattr(rows_module, "STRIP_BYTES", 2**20)
    largest = 0
    mix = rows_module.mix_rows

    def watched(values, source, width):
        nonlocal largest
        out = mix(values, source, width)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(rows_module, "mix_rows", watched)
    monkeypatch.setattr(inference, "mix_rows", watched)
    model = Quarter(num_classes=150)
    with torch.no_grad():
        for strip in predict_strips(model, image(256, 512), EvalConfig(), DATA, CPU):
            assert strip.logits_KrW.shape[0] == 150
    assert 0 < largest * 4 <= 2**20
    assert largest * 20 < 150 * 256 * 512


@pytest.mark.parametrize("size", [(65, 97), (31, 33)])
def test_fused_upsampling_counts_and_sums_as_strips_do(size):
    """impl `triton` upsamples, picks and counts in one kernel (here in Triton's interpreter)."""
    model, pixels = Quarter().eval(), image(*size)
    labels = np.random.default_rng(1).integers(0, 8, size).astype(np.uint8)
    labels[labels == 7] = 255
    data = OneImage(pixels, labels)
    tallies, predictions = {}, {}
    for impl in ("sdpa", "triton"):
        tallies[impl] = Tally(data.classes)
        options = {"protocol": EvalConfig(), "data": DATA, "runtime": Runtime(impl=impl)}
        (result,) = evaluate_images(model, data, tallies[impl], **options)
        assert result.ids.dtype == np.uint8
        predictions[impl] = predict_image(model, pixels, **options)
        assert (predictions[impl].ids_HW == result.ids).all()
    differing = (predictions["sdpa"].ids_HW != predictions["triton"].ids_HW).sum()
    assert differing <= 2  # ties within rounding
    reports = [tally.report() for tally in tallies.values()]
    assert np.abs(reports[0].confusion_KK - reports[1].confusion_KK).sum() <= 2 * differing
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-5)
    assert reports[1].confusion_KK.sum() == (labels != 255).sum()
    np.testing.assert_allclose(
        predictions["sdpa"].confidence_HW, predictions["triton"].confidence_HW, atol=1e-5
    )
    several = {"protocol": EvalConfig(flip=True), "data": DATA}
    runtimes = Runtime(impl="sdpa"), Runtime(impl="triton")
    mirrored = [predict_image(model, pixels, runtime=runtime, **several) for runtime in runtimes]
    assert (mirrored[0].ids_HW == mirrored[1].ids_HW).all()  # nothing to fuse: both in strips


class OneImage:
    """A data set of one image."""

    split = "val"
    name = "one"

    def __init__(self, pixels, labels):
        self.sample = Sample(pixels, labels, "one")
        self.classes = ClassTable(tuple("abcdefg"), ((0, 0, 0),) * 7)

    def __len__(self):
        return 1

    def read(self, index):
        return self.sample
