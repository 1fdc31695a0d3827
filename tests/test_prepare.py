"""Published data sets become folders of class ids: the ids, the counts, and going on after a stop."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import DataConfig
from segdeformer.data.datasets import open_dataset
from segdeformer.data.images import read_labels, write_png
from segdeformer.data.published import prepare

RUNNER = CliRunner(env={"COLUMNS": "200"})


def put_labels(path: Path, rows: list[list[int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, np.array(rows, np.uint8))
    return path


def put_image(path: Path, height: int, width: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
    return path


def run(*arguments: object, code: int = 0) -> str:
    """What the command prints, or the line it is refused with."""
    result = RUNNER.invoke(app, ["data", "prepare", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def ade20k(root: Path) -> Path:
    for folder in ("training", "validation"):
        for index in (1, 2):
            put_labels(root / f"annotations/{folder}/ADE_{index}.png", [[0, 1, 150]])
            put_image(root / f"images/{folder}/ADE_{index}.jpg", 1, 3)
    return root


def square(label: str, low: int, high: int, **more: int) -> dict:
    corners = [[low, low], [high, low], [high, high], [low, high]]
    return {"label": label, "polygon": corners, **more}


def cityscapes(root: Path, objects: list[dict]) -> Path:
    for split in ("train", "val"):
        put_image(root / f"leftImg8bit/{split}/ulm/ulm_000000_000019_leftImg8bit.png", 8, 10)
        path = root / f"gtFine/{split}/ulm/ulm_000000_000019_gtFine_polygons.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"imgHeight": 8, "imgWidth": 10, "objects": objects}))
    return root


def test_ade20k_becomes_a_folder_that_trains(tmp_path):
    source = ade20k(tmp_path / "src" / "ADEChallengeData2016").parent
    out = run("ade20k", source, tmp_path / "dst", "--partial")
    assert "train: 2 pairs, 2 label maps made now; published are 20,210" in out
    assert f"segdeformer train ade20k-segdeformer-b1 --data {tmp_path / 'dst'}" in out
    np.testing.assert_array_equal(read_labels(tmp_path / "dst/labels/val/ADE_1.png"), [[255, 0, 149]])
    dataset = open_dataset(DataConfig(name="folder", root=str(tmp_path / "dst")), "train")
    assert (len(dataset), len(dataset.classes.names)) == (2, 150)
    assert dataset.read(1).image_HW3.shape == (1, 3, 3)
    assert (tmp_path / "dst/images/train/ADE_1.jpg").is_symlink()


def test_fewer_pairs_than_published_are_an_error_that_keeps_what_is_made(tmp_path):
    message = run("ade20k", ade20k(tmp_path / "src"), tmp_path / "dst", code=1)
    assert message == (
        "error: train has 2 pairs, ade20k was published with 20,210; unpack the rest and run again "
        "(what is made stays), or accept them with --partial\n"
    )
    assert len(list((tmp_path / "dst/labels").rglob("*.png"))) == 4


def test_the_published_counts_are_accepted(tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.COUNTS, "ade20k", {"train": 2, "val": 2})
    assert "is ready" in run("ade20k", ade20k(tmp_path / "src"), tmp_path / "dst", "--copy")
    assert not (tmp_path / "dst/images/train/ADE_1.jpg").is_symlink()


def test_a_missing_partner_is_named_before_anything_is_written(tmp_path):
    source = ade20k(tmp_path / "src")
    (source / "annotations/training/ADE_2.png").unlink()
    message = run("ade20k", source, tmp_path / "dst", "--partial", code=1)
    assert f"{source}/images/training/ADE_2.jpg has no label map" in message
    assert not (tmp_path / "dst").exists()


def test_a_second_run_makes_only_what_is_missing_damaged_or_outdated(tmp_path):
    source, labels = ade20k(tmp_path / "src"), tmp_path / "dst/labels"
    run("ade20k", source, tmp_path / "dst", "--partial")
    kept, gone, damaged, outdated = (
        labels / name for name in ("train/ADE_1.png", "train/ADE_2.png", "val/ADE_1.png", "val/ADE_2.png")
    )
    before = kept.stat().st_mtime_ns
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-5])
    changed = put_labels(source / "annotations/validation/ADE_2.png", [[3, 3, 3]])
    os.utime(changed, (later := outdated.stat().st_mtime + 10, later))
    out = run("ade20k", source, tmp_path / "dst", "--partial")
    assert "train: 2 pairs, 1 label map made now" in out
    assert "val: 2 pairs, 2 label maps made now" in out
    assert kept.stat().st_mtime_ns == before
    for path, expected in ((gone, [255, 0, 149]), (damaged, [255, 0, 149]), (outdated, [2, 2, 2])):
        np.testing.assert_array_equal(read_labels(path), [expected])


def test_a_label_map_with_a_wrong_id_is_named_and_the_others_are_made(tmp_path):
    source = ade20k(tmp_path / "src")
    bad = put_labels(source / "annotations/training/ADE_1.png", [[151, 0, 0]])
    message = run("ade20k", source, tmp_path / "dst", "--partial", code=1)
    assert message.startswith(f"error: 1 of 4 pairs could not be made; the first: {bad}: label ids 151 are")
    assert len(list((tmp_path / "dst/labels").rglob("*.png"))) == 3


def test_label_maps_of_another_source_are_noticed(tmp_path):
    put_labels(tmp_path / "dst/labels/train/other.png", [[0]])
    message = run("ade20k", ade20k(tmp_path / "src"), tmp_path / "dst", "--partial", code=1)
    assert f"{tmp_path}/dst/labels/train holds 3 label maps, SRC has 2" in message


def test_cityscapes_polygons_are_drawn_in_order_as_train_ids(tmp_path):
    objects = [
        square("road", 0, 7),
        square("cargroup", 1, 4),
        square("license plate", 2, 3),
        square("sky", 0, 7, deleted=1),
        square("ego vehicle", 6, 7),
        square("train", 4, 5),
    ]
    run("cityscapes", cityscapes(tmp_path / "src", objects), tmp_path / "dst", "--partial")
    expected = np.full((8, 10), 255)
    expected[:8, :8] = 0  # outlines belong to the polygon
    expected[1:5, 1:5] = 13
    expected[6:8, 6:8] = 255
    expected[4:6, 4:6] = 16
    drawn = read_labels(tmp_path / "dst/labels/val/ulm/ulm_000000_000019.png")
    np.testing.assert_array_equal(drawn, expected)


def test_cityscapes_label_ids_are_preferred_to_polygons(tmp_path):
    source = cityscapes(tmp_path / "src", [square("road", 0, 7)])
    ids = np.full((8, 10), 26)
    ids[0, :4] = (0, 7, 33, 9)
    for split in ("train", "val"):
        put_labels(source / f"gtFine/{split}/ulm/ulm_000000_000019_gtFine_labelIds.png", ids.tolist())
    run("cityscapes", source, tmp_path / "dst", "--partial")
    drawn = read_labels(tmp_path / "dst/labels/train/ulm/ulm_000000_000019.png")
    np.testing.assert_array_equal(drawn[0, :5], [255, 0, 18, 255, 13])


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([square("roda", 0, 7)], "unknown label 'roda'; expected those of Cityscapes"),
        ([{"label": "road"}], "cannot be read as Cityscapes polygons (KeyError('polygon')); unpack it again"),
    ],
)
def test_wrong_polygons_are_named(tmp_path, objects, message):
    source = cityscapes(tmp_path / "src", objects)
    assert message in run("cityscapes", source, tmp_path / "dst", "--partial", code=1)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images/{}2017", "annotations/{}2017"),
        ("{}2017", "stuffthingmaps/{}2017"),
        ("{}2017", "{}2017"),
    ],
)
def test_coco_stuff_closes_the_gaps_of_its_ids(tmp_path, images, labels):
    for split in ("train", "val"):
        put_image(tmp_path / "src" / images.format(split) / "000000000009.jpg", 1, 5)
        put_labels(tmp_path / "src" / labels.format(split) / "000000000009.png", [[0, 10, 12, 181, 255]])
    run("coco_stuff", tmp_path / "src", tmp_path / "dst", "--partial")
    made = read_labels(tmp_path / "dst/labels/train/000000000009.png")
    np.testing.assert_array_equal(made, [[0, 10, 11, 170, 255]])


def test_wrong_arguments_say_what_is_expected(tmp_path):
    message = run("ade", tmp_path, tmp_path / "dst", code=2)
    assert message == ("error: ade: not a data set to prepare; expected ade20k, cityscapes, coco_stuff\n")
    assert "DST is SRC" in run("ade20k", tmp_path, tmp_path, code=2)
    assert "images/training: no such folder" in run("ade20k", tmp_path, tmp_path / "dst", code=1)
