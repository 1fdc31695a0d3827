"""Parts of one's own, outside the tree, through the command line, as docs/extending.md has them."""

import json
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import segdeformer
from segdeformer.cli.main import app
from segdeformer.config import load_recipe, parse_recipe
from segdeformer.data.loader import training_batch
from segdeformer.errors import UsageError
from segdeformer.training.runlog import read_metrics

RUNNER = CliRunner(env={"COLUMNS": "200"})
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
REST = """
name = "mine"
description = "every part of one's own"

[model]
num_classes = 2
{encoder}
{fusion}
[model.context.internal]
[model.context.external]
{data}
[augment]
ratio_range = [1.0, 1.0]
crop = [32, 40]
max_class_share = 1.0
photometric = false
{transforms}
[train]
iterations = 6
batch_size = 2
learning_rate = 1e-3
decoder_lr_multiplier = 1.0
warmup_iterations = 0
validate_every = 3
checkpoint_every = 3
{losses}
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def module_text() -> str:
    return "\n\n".join(block for block in blocks("python") if block.startswith("# mine.py"))


def recipe_text(**changes: str) -> str:
    """The page's recipe; changes: of its tables and lists, by their names."""
    losses, data, encoder, fusion, transforms = blocks("toml")
    parts = {"losses": losses, "data": data, "encoder": encoder, "fusion": fusion, "transforms": transforms}
    return REST.format(**(parts | changes))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with `mine.py` and `mine.toml`, in which the command runs."""
    (tmp_path / "mine.py").write_text(module_text())
    (tmp_path / "mine.toml").write_text(recipe_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("mine", None)


def run(*words: object) -> str:
    result = RUNNER.invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output + result.stderr
    return result.output


def refusal(*words: object) -> str:
    result = RUNNER.invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_all_six_train_resume_evaluate_and_predict(folder):
    printed = run("train", "mine.toml", "--out", "run", "--device", "cpu", "--logger", "mine:TextLog")
    assert "loss seg + 0.4 attn + 0.5 dice, averaged over valid pixels" in printed
    log = [line.split() for line in Path("run/log.txt").read_text().splitlines()]
    assert [(kind, number) for kind, number, _ in log] == [
        *(("step", str(n)) for n in (1, 2, 3)),
        ("validated", "3"),
        *(("step", str(n)) for n in (4, 5, 6)),
        ("validated", "6"),
    ]
    entries = read_metrics(Path("run"))
    first = next(entry for entry in entries if entry["kind"] == "train")
    assert float(log[0][2]) == first["loss_dice"]
    total = first["loss_seg"] + 0.4 * first["loss_attn"] + 0.5 * first["loss_dice"]
    assert first["loss"] == pytest.approx(total, rel=1e-6)

    # Stopped after three iterations and resumed, it ends with the same weights.
    shutil.copytree("run", "half")
    for path in Path("half/checkpoints").iterdir():
        if path.name != "iteration-3" and "3" not in path.name:
            shutil.rmtree(path)
    run("train", "--resume", "--out", "half", "--device", "cpu")
    files = (Path(name) / "last.safetensors" for name in ("half", "run"))
    ours, whole = (segdeformer.load(file).model.state_dict() for file in files)
    assert all(torch.equal(ours[name], whole[name]) for name in whole)

    run("eval", "run/last.safetensors", "--device", "cpu", "--no-fold", "--json", "scores.json")
    scores = json.loads(Path("scores.json").read_text())["scores"]
    last = [entry for entry in entries if entry["kind"] == "validation"][-1]
    assert (scores["miou"], scores["loss"]) == (last["miou"], last["loss"])
    assert [c["name"] for c in scores["classes"]] == ["ground", "disc"]

    import mine

    image_HW3 = mine.Discs(root="", split="val").read(0).image_HW3
    cv2.imwrite("disc.png", image_HW3[..., ::-1])
    run("predict", "run", "disc.png", "--out", "maps", "--device", "cpu")
    ids_HW = cv2.imread("maps/disc.png", cv2.IMREAD_UNCHANGED)
    assert (ids_HW == segdeformer.predict("run", image_HW3, device="cpu").ids_HW).all()


def test_the_loss_is_one_minus_dice(folder):
    sys.path.append(str(folder))
    import mine

    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 5, 7), dtype=torch.uint8)
    labels[0, :2] = 255
    valid = labels != 255
    shares = logits.softmax(1).movedim(1, -1)[valid]
    truth = torch.eye(3, dtype=torch.float64)[labels[valid].long()]
    overlap, total = (truth * shares).sum(0), (truth + shares).sum(0)
    expected = 1 - ((2 * overlap + 0.5) / (total + 0.5)).mean()
    torch.testing.assert_close(mine.dice(logits, labels, smooth=0.5), expected)


def test_the_transform_and_its_options_reach_every_crop_and_are_repeatable(folder):
    sys.path.append(str(folder))
    recipe = load_recipe("mine.toml")
    data = segdeformer.data.datasets.open_dataset(recipe.data, "train")
    assert (len(data), data.split) == (6, "train")
    first, again = (training_batch(data, recipe, 3) for _ in range(2))
    assert torch.equal(first.images_B3HW, again.images_B3HW)
    grey = (127 - torch.tensor(recipe.data.mean)) / torch.tensor(recipe.data.std)
    squares = (first.images_B3HW - grey[:, None, None]).abs().amax(1) < 1e-5
    assert squares.sum((1, 2)).tolist() == [100, 100]  # 10 px a side
    assert (first.labels_BHW[squares] == 255).all()


def test_weights_are_handed_to_the_encoder_and_a_checkpoint_is_read_without_their_file(folder):
    with open("mine.py", "a") as file:
        file.write(PRETRAINED)
    Path("old.toml").write_text(recipe_text(encoder='[model.encoder]\nname = "mine:Pretrained"'))
    torch.save(torch.full((8,), 2.5), "start.pt")
    words = ("--weights", "start.pt", "--iterations", "1", "--out", "run", "--device", "cpu")
    run("train", "old.toml", *words, "--logger", "mine:scale_after_step")
    assert float(Path("run/scale.txt").read_text()) == pytest.approx(2.5, abs=2e-3)  # one step of 1e-3
    Path("start.pt").unlink()
    scale = segdeformer.load("run").model.encoder.scale
    assert scale.mean().item() == pytest.approx(2.5, abs=2e-3)
    run("eval", "run", "--device", "cpu")


PRETRAINED = """

import torch

class Pretrained(Strided):
    def __init__(self, *, weights=None):
        super().__init__(width=8)
        self.scale = nn.Parameter(torch.ones(8) if weights is None else torch.load(weights))

    def forward(self, images):
        first, *others = super().forward(images)
        return [first * self.scale[:, None, None], *others]

def scale_after_step(event, run):
    (run.folder / "scale.txt").write_text(str(run.model.encoder.scale.mean().item()))
"""


def test_data_of_the_command_line_replaces_data_of_ones_own_and_its_options(folder):
    printed = run("train", "mine.toml", "--data", "synthetic", "--out", "run", "--device", "cpu", "--dry-run")
    assert "data synthetic: 64 training" in printed


def test_a_loss_of_ones_own_gets_float32_whatever_the_precision(folder):
    losses = """
precision = "bfloat16"
losses = [{ name = "seg", kind = "cross_entropy" }, { name = "own", kind = "mine:told" }]
"""
    with open("mine.py", "a") as file:
        file.write("""
TOLD = []

def told(logits, labels):
    TOLD.append((str(logits.dtype), str(labels.dtype)))
    return logits.mean()
""")
    Path("half.toml").write_text(recipe_text(losses=losses))
    run("train", "half.toml", "--out", "run", "--iterations", "1", "--device", "cpu")
    import mine

    assert mine.TOLD == [("torch.float32", "torch.uint8")] * 2  # tried, and one step


def test_options_of_a_transform_may_be_lists_and_a_wrong_one_leaves_no_run_behind(folder):
    with open("mine.py", "a") as file:
        file.write("""
def grey(image, labels, rng, *, levels):
    return np.full_like(image, levels[1]), labels

def smaller(image, labels, rng):
    return image[1:], labels
""")
    listed = 'transforms = [{ path = "mine:grey", options = { levels = [3, 5] } }]'
    recipe = parse_recipe(recipe_text(transforms=listed), "mine.toml")
    sys.path.append(str(folder))
    batch = training_batch(segdeformer.data.datasets.open_dataset(recipe.data, "train"), recipe, 0)
    grey = (5 - torch.tensor(recipe.data.mean)) / torch.tensor(recipe.data.std)
    expected = grey[:, None, None].expand_as(batch.images_B3HW)
    torch.testing.assert_close(batch.images_B3HW, expected, rtol=0, atol=1e-6)
    Path("bad.toml").write_text(recipe_text(transforms='transforms = [{ path = "mine:smaller" }]'))
    assert "transform `mine:smaller` gives" in refusal("train", "bad.toml", "--out", "run", "--device", "cpu")
    assert not Path("run/recipe.toml").exists()


def test_where_the_module_is_missing_it_is_said_what_to_install(folder, tmp_path_factory, monkeypatch):
    run("train", "mine.toml", "--out", "run", "--device", "cpu", "--iterations", "1")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree("run", elsewhere / "run")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(folder)])
    del sys.modules["mine"]
    expected = "encoder `mine:Strided`: no module `mine`; install the package that has `mine`, or start in"
    assert expected in refusal("eval", "run", "--device", "cpu")
    cv2.imwrite("any.png", np.zeros((8, 8, 3), np.uint8))
    assert expected in refusal("predict", "run", "any.png", "--out", "maps", "--device", "cpu")
    with pytest.raises(UsageError, match="no module `mine`"):
        segdeformer.load("run")


BAD = """
import numpy as np
import torch
from torch import nn
import mine

number = 5

def floats(logits, labels):
    return 1.0

def per_pixel(logits, labels):
    return logits.mean(1)

def breaks(logits, labels):
    raise KeyError("oh")

class NoStrides(nn.Module):
    channels = (8, 8, 8, 8)

class Three(mine.Strided):
    def forward(self, images):
        return super().forward(images)[:3]

class Floors(mine.Strided):
    strides = (2, 4, 8, 16)

class PlainFusion(mine.SumFusion):
    def forward(self, maps):
        return super().forward(maps).pixels_BNC

class Narrow(mine.SumFusion):
    def __init__(self, *, channels, strides, width):
        super().__init__(channels=channels, strides=strides, width=8)

class NoRead:
    name = split = classes = label_map = "x"
    def __init__(self, **_): pass
    def __len__(self): return 1

class FloatImages(mine.Discs):
    def read(self, index):
        return super().read(index)._replace(image_HW3=np.zeros((48, 64, 3)))

def smaller(image, labels, rng):
    return image[1:], labels
"""


def loss(path: str) -> tuple[str, str]:
    return "losses", f'losses = [{{ name = "x", kind = "{path}" }}]'


def table(name: str, path: str, more: str = "") -> tuple[str, str]:
    header, key = {"fusion": ("model.fusion", "kind"), "encoder": ("model.encoder", "name")}.get(
        name, ("data", "name")
    )
    return name, f'[{header}]\n{key} = "{path}"\n{more}'


WRONG = {
    loss("bad:nothing"): "loss `bad:nothing`: bad has no `nothing`",
    loss("bad:number"): "loss `bad:number` is int; expected a function or a class",
    loss("bad:floats"): "loss `bad:floats` gives float; expected a differentiable scalar",
    loss("bad:per_pixel"): "gives a tensor of shape (2, 4, 6), with gradient; expected a differentiable",
    loss("bad:breaks"): "loss `bad:breaks` failed: KeyError: 'oh'",
    loss("gone.losses:dice"): "loss `gone.losses:dice`: no module `gone`; install the package that has",
    table("encoder", "bad:NoStrides"): "encoder `bad:NoStrides` has no `strides`; it needs channels, strides",
    table("encoder", "bad:Three"): "encoder `bad:Three` gives [(1, 16, 16, 24), ",
    table("encoder", "bad:Floors"): "for an image of 32x48 px; expected [(1, 16, 16, 24), (1, 16, 8, 12), ",
    table("encoder", "mine:Strided", "options = { depth = 3 }"): "encoder `mine:Strided` failed: TypeError: ",
    table("fusion", "bad:PlainFusion", "width = 24"): "gives Tensor; expected Tokens of shape (1, height",
    table("fusion", "bad:Narrow", "width = 24"): "gives (1, 384, 8) with a map of 16x24; expected Tokens of",
    table("data", "bad:NoRead"): "data set `bad:NoRead` has no `read`; it needs name, split, classes",
    table("data", "bad:FloatImages"): "gives float64 (48, 64, 3) and uint8 (48, 64); expected a uint8 image",
    ("transforms", 'transforms = [{ path = "bad:smaller" }]'): (
        "transform `bad:smaller` gives uint8 (31, 40, 3) and uint8 (32, 40); expected uint8 and the sizes"
    ),
}


@pytest.mark.parametrize(("wrong", "complaint"), WRONG.items())
def test_a_part_that_is_not_what_it_should_be_is_refused_in_one_line(folder, wrong, complaint):
    part, text = wrong
    Path("bad.py").write_text(BAD)
    Path("bad.toml").write_text(recipe_text(**{part: text}))
    try:
        said = refusal("train", "bad.toml", "--out", "run", "--device", "cpu")
    finally:
        sys.modules.pop("bad", None)
    assert complaint in said


def test_a_path_must_be_one_and_options_are_for_paths_only(folder):
    for wrong, complaint in (
        ('[data]\nname = "landcove"', "`data.name`: Input should be 'landcover', 'folder'"),
        ('[data]\nname = "landcover"\noptions = { a = 1 }', "`options` are for a Python path as `name`"),
        ('[data]\nname = "mine:Discs"\noptions = { a = { b = 1 } }', "`a` is {'b': 1}; expected a number"),
    ):
        with pytest.raises(UsageError, match=re.escape(complaint)):
            parse_recipe(recipe_text(data=wrong), "mine.toml")


def test_a_logger_that_is_none_is_refused_before_anything_is_made(folder):
    assert "logger `mine:Nope`: mine has no `Nope`" in refusal(
        "train", "mine.toml", "--out", "run", "--device", "cpu", "--logger", "mine:Nope"
    )
    assert not Path("run").exists()
