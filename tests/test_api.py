"""`segdeformer.train`, `evaluate` and `predict`: what the commands do, from Python, with own parts too."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import segdeformer
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.errors import UsageError, UserError
from segdeformer.inference.views import predict_strips
from segdeformer.models.segmenter import Segmenter
from segdeformer.training.loop import Step, Stopped, Validated
from segdeformer.training.runlog import read_metrics

DATA = segdeformer.Splits(
    SyntheticDataset("train", num_images=7, size_hw=(49, 63)),
    SyntheticDataset("val", num_images=3, size_hw=(33, 41)),
)


def recipe(**train: object) -> segdeformer.Recipe:
    base = segdeformer.change_recipe(segdeformer.load_recipe("synthetic"), iterations=4, batch_size=2)
    changes = {"validate_every": 4, "checkpoint_every": 2, **train}
    return base.model_copy(
        update={
            "augment": base.augment.model_copy(update={"crop": (32, 40)}),
            "train": base.train.model_copy(update=changes),
        }
    )


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> segdeformer.Training:
    """A finished run; its events are in `events`."""
    begun = segdeformer.train(recipe(), data=DATA, out=tmp_path_factory.mktemp("api") / "run", device="cpu")
    begun.events = list(begun)
    return begun


def test_training_is_a_stream_of_events_and_leaves_a_run(training):
    steps = [event for event in training.events if isinstance(event, Step)]
    assert [step.iteration for step in steps] == [1, 2, 3, 4]
    logged = [entry for entry in read_metrics(training.folder) if entry["kind"] == "train"]
    assert {entry["iteration"]: entry["loss"] for entry in logged} == {
        step.iteration: step.losses.total.item() for step in (steps[0], steps[3])
    }
    assert isinstance(training.events[-1], Validated)
    assert segdeformer.load(training.folder).checkpoint.iteration == 4


def test_a_run_scores_as_its_last_validation_did(training):
    report = segdeformer.evaluate(training.folder, DATA.val, device="cpu")
    validated = training.events[-1].report
    assert report.num_images == 3
    assert report.scores.miou == pytest.approx(validated.scores.miou, abs=1e-3)  # folded, but for rounding
    loaded = segdeformer.load(training.folder)
    exact = segdeformer.evaluate(loaded, DATA.val)
    assert (exact.confusion_KK == validated.confusion_KK).all()
    assert exact.loss == validated.loss


def test_a_prediction_is_the_argmax_of_the_logits_at_the_images_size(training):
    loaded = segdeformer.load(training.folder)
    image = DATA.val.read(1).image_HW3
    prediction = segdeformer.predict(loaded, image)
    config = loaded.checkpoint.recipe
    strips = predict_strips(loaded.model, image, config.evaluate, config.data, torch.device("cpu"))
    logits_KHW = torch.cat([strip.logits_KrW for strip in strips], dim=1)
    assert (prediction.ids_HW == logits_KHW.argmax(0).numpy()).all()
    np.testing.assert_allclose(prediction.confidence_HW, logits_KHW.softmax(0).amax(0).numpy(), rtol=1e-5)


def test_a_file_is_predicted_too_and_a_missing_one_is_said(training, tmp_path):
    import cv2

    image = DATA.val.read(0).image_HW3
    cv2.imwrite(str(tmp_path / "image.png"), image[..., ::-1])
    from_file = segdeformer.predict(training.folder, tmp_path / "image.png", device="cpu")
    assert (from_file.ids_HW == segdeformer.predict(training.folder, image, device="cpu").ids_HW).all()
    with pytest.raises(UserError, match=r"none\.png"):
        segdeformer.predict(training.folder, tmp_path / "none.png", device="cpu")


def test_a_stopped_run_goes_on_as_if_it_had_not_been(training, tmp_path):
    first = segdeformer.train(recipe(), data=DATA, out=tmp_path / "run", device="cpu")
    events = []
    for event in first:
        events.append(event)
        if isinstance(event, Step) and event.iteration == 2:
            first.stop()
    assert events[-1] == Stopped(2)
    for _ in segdeformer.train(data=DATA, out=tmp_path / "run", resume=True, device="cpu"):
        pass
    name = "last.safetensors"
    ours, whole = (
        segdeformer.load(folder / name).model.state_dict() for folder in (tmp_path / "run", training.folder)
    )
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


class ThreeByThree(nn.Module):
    """An encoder of one's own: four maps, each half as large."""

    channels = (8, 8, 8, 8)
    strides = (4, 8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        pairs = itertools.pairwise((3, 8, 8, 8, 8, 8))
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)

    def forward(self, images_B3HW: torch.Tensor) -> list[torch.Tensor]:
        maps, x = [], images_B3HW
        for layer in self.layers:
            x = layer(x).relu()
            maps.append(x)
        return maps[1:]


def own_model() -> Segmenter:
    torch.manual_seed(0)
    decoder = segdeformer.build_decoder(recipe().model, ThreeByThree.channels)
    return Segmenter(encoder=ThreeByThree(), decoder=decoder)


def test_a_model_of_ones_own_trains_saves_loads_and_scores(tmp_path):
    model = own_model()
    before = model.encoder.layers[0].weight.detach().clone()
    begun = segdeformer.train(recipe(), data=DATA, model=model, out=tmp_path / "run", device="cpu")
    *_, last = begun
    assert begun.model is model
    assert not torch.equal(model.encoder.layers[0].weight, before)
    loaded = segdeformer.load(tmp_path / "run", model=own_model())
    report = segdeformer.evaluate(loaded, DATA.val)
    assert (report.confusion_KK == last.report.confusion_KK).all()
    with pytest.raises(UserError, match="does not fit its own recipe"):
        segdeformer.load(tmp_path / "run")


def test_what_cannot_begin_is_refused_in_one_line(training):
    with pytest.raises(UserError, match="holds a run already"):
        segdeformer.train(recipe(), data=DATA, out=training.folder, device="cpu")
    with pytest.raises(UsageError, match="give `out` and no recipe"):
        segdeformer.train(recipe(), out=training.folder, resume=True)
    with pytest.raises(UsageError, match="device is `tpu`"):
        segdeformer.train(recipe(), data=DATA, device="tpu")
    with pytest.raises(UserError, match=r"predicts \d+ classes, landcover has 8|class 0 is"):
        segdeformer.evaluate(training.folder, "landcover", device="cpu")
