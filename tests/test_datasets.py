"""Data sets: which files belong together, what their ids mean, and what is said when they do not fit."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from segdeformer.config import DataConfig
from segdeformer.data.classes import CLASS_TABLES, default_colors, load_classes
from segdeformer.data.datasets import (
    ADE20K_MAP,
    CITYSCAPES_MAP,
    COCO_STUFF_MAP,
    map_labels,
    open_dataset,
    parse_data_spec,
)
from segdeformer.data.images import write_png
from segdeformer.errors import UsageError, UserError

THREE_CLASSES = 'names = ["road", "car", "sky"]\n'


def put(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, pixels)
    return path


def put_pair(image: Path, labels: Path, ids_HW: np.ndarray) -> None:
    """A label map and an image whose three channels repeat it."""
    put(image, np.stack([ids_HW] * 3, axis=-1).astype(np.uint8))
    put(labels, ids_HW.astype(np.uint8))


def folder_of_three(root: Path) -> DataConfig:
    """Two training pairs, one in a subfolder, and one for validation."""
    for name, label in (("train/b", 0), ("train/a/x.y", 1), ("val/c", 2)):
        put_pair(root / f"images/{name}.png", root / f"labels/{name}.png", np.full((5, 7), label))
    (root / "classes.toml").write_text(THREE_CLASSES)
    return DataConfig(name="folder", root=str(root))


def refusal(config: DataConfig, split="train") -> str:
    """The one line that opening the split, or reading its first sample, is refused with."""
    with pytest.raises(UserError) as caught:
        open_dataset(config, split).read(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Classes


@pytest.mark.parametrize(("name", "num_classes"), [("ade20k", 150), ("cityscapes", 19), ("coco_stuff", 171)])
def test_published_class_tables_are_complete(name, num_classes):
    classes = load_classes(CLASS_TABLES / f"{name}.toml")
    assert len(set(classes.names)) == len(classes.colors) == num_classes


def test_published_class_tables_have_the_right_names_at_the_right_ids():
    ade = load_classes(CLASS_TABLES / "ade20k.toml")
    assert (ade.names[0], ade.names[12], ade.names[149]) == ("wall", "person", "flag")
    assert ade.colors[0] == (120, 120, 120)
    city = load_classes(CLASS_TABLES / "cityscapes.toml")
    assert (city.names[13], city.colors[13], city.names[18]) == ("car", (0, 0, 142), "bicycle")
    coco = load_classes(CLASS_TABLES / "coco_stuff.toml")
    assert (coco.names[79], coco.names[80], coco.names[170]) == ("toothbrush", "banner", "wood")


def test_classes_without_colours_get_distinct_ones(tmp_path):
    (tmp_path / "classes.toml").write_text(THREE_CLASSES)
    classes = load_classes(tmp_path / "classes.toml")
    assert classes.names == ("road", "car", "sky")
    assert classes.colors == default_colors(3)


@pytest.mark.parametrize(("num_classes", "least_distance"), [(11, 80), (64, 30), (255, 20)])
def test_default_colours_stay_apart(num_classes, least_distance):
    colors = np.array([(0, 0, 0), (255, 255, 255), *default_colors(num_classes)], float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
    assert distances[~np.eye(len(colors), dtype=bool)].min() > least_distance


def test_default_colours_of_few_classes_begin_those_of_many():
    assert default_colors(200)[:19] == default_colors(19)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names = [", r"cannot be read as TOML .*expected a line like names = \["),
        ('name = ["a", "b"]', "unknown key `name`; did you mean `names`?"),
        ('names = ["a", "b"]\npalette = 1', "unknown key `palette`; known here: names, colors"),
        ('names = "a"', "`names` must be a list of class names"),
        ('names = ["a", ""]', "`names` must be a list of class names"),
        ("", "`names` must be a list of class names"),
        ('names = ["a"]', "`names` has 1 class; it must have 2 to 255"),
        ('names = ["a", "b", "a"]', "`names` says 'a' more than once"),
        ('names = ["a", "b"]\ncolors = [[1, 2, 3]]', "`colors` has 1 entries for 2 names"),
        ('names = ["a", "b"]\ncolors = [[1, 2, 3], [1, 2]]', r"`colors\[1\]` is \[1, 2\]; it must be"),
        ('names = ["a", "b"]\ncolors = [[1, 2, 256], [1, 2, 3]]', r"`colors\[0\]` is \[1, 2, 256\]"),
        ('names = ["a", "b"]\ncolors = [[true, 2, 3], [1, 2, 3]]', r"`colors\[0\]` is \[True, 2, 3\]"),
    ],
)
def test_a_wrong_class_table_is_explained(tmp_path, text, message):
    (tmp_path / "classes.toml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_classes(tmp_path / "classes.toml")
    assert str(caught.value).startswith(str(tmp_path / "classes.toml"))
    assert "\n" not in str(caught.value)


# Label ids


def test_ade20k_ignores_zero_and_subtracts_one():
    raw = np.array([[0, 1, 2, 150, 255]], np.uint8)
    np.testing.assert_array_equal(map_labels(raw, ADE20K_MAP, Path("a.png")), [[255, 0, 1, 149, 255]])
    with pytest.raises(UserError, match="label ids 151 are not among 0 to 150"):
        map_labels(np.array([[151]], np.uint8), ADE20K_MAP, Path("a.png"))


def test_coco_stuff_closes_every_gap():
    # Runs of present raw ids, and the class id at which each run begins.
    runs = [(0, 10, 0), (12, 24, 11), (26, 27, 24), (30, 43, 26), (45, 64, 40)]
    runs += [(66, 66, 60), (69, 69, 61), (71, 81, 62), (83, 89, 73), (91, 181, 80)]
    expected = {255: 255}
    for first, last, label in runs:
        expected |= {raw: label + raw - first for raw in range(first, last + 1)}
    assert expected == COCO_STUFF_MAP
    assert sorted(expected.values()) == [*range(171), 255]
    absent = sorted(set(range(182)) - set(COCO_STUFF_MAP))
    assert absent == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    with pytest.raises(UserError, match=r"label ids 11, 182 are not among 0 to 181 \(with gaps\) and 255"):
        map_labels(np.array([[11, 0, 182]], np.uint8), COCO_STUFF_MAP, Path("a.png"))


def test_cityscapes_ids_become_train_ids():
    names_of_ids = {7: "road", 8: "sidewalk", 11: "building", 21: "vegetation", 26: "car", 33: "bicycle"}
    names = load_classes(CLASS_TABLES / "cityscapes.toml").names
    assert {label: names[CITYSCAPES_MAP[label]] for label in names_of_ids} == names_of_ids
    ignored = [label for label, train_id in CITYSCAPES_MAP.items() if train_id == 255]
    assert sorted(ignored) == [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255]


# Folders of one's own


def test_a_folder_pairs_files_by_name_in_sorted_order(tmp_path):
    config = folder_of_three(tmp_path)
    train, val = open_dataset(config, "train"), open_dataset(config, "val")
    assert (len(train), len(val)) == (2, 1)
    assert [train.read(index).name for index in range(2)] == ["a/x.y", "b"]
    assert (train.name, train.split, train.classes.names) == ("folder", "train", ("road", "car", "sky"))
    sample = val.read(0)
    np.testing.assert_array_equal(sample.labels_HW, np.full((5, 7), 2))
    np.testing.assert_array_equal(sample.image_HW3, np.full((5, 7, 3), 2))
    assert sample.labels_HW.dtype == sample.image_HW3.dtype == np.uint8


def test_splits_may_have_other_names(tmp_path):
    config = folder_of_three(tmp_path).model_copy(update={"val_split": "train"})
    assert len(open_dataset(config, "val")) == 2


def test_hidden_files_are_no_images(tmp_path):
    config = folder_of_three(tmp_path)
    (tmp_path / "images/train/._b.png").write_bytes(b"macOS leaves such files")
    assert len(open_dataset(config, "train")) == 2


def test_a_missing_class_table_says_what_to_write(tmp_path):
    config = folder_of_three(tmp_path)
    (tmp_path / "classes.toml").unlink()
    assert refusal(config) == (
        f"{tmp_path}/classes.toml: no such file; write the class names there, in the order of their ids: "
        'names = ["road", "car"], or name another file with --classes'
    )


def test_a_missing_folder_is_named_with_the_layout(tmp_path):
    config = DataConfig(name="folder", root=str(tmp_path))
    assert refusal(config) == (
        f"{tmp_path}/images/train: no such folder; expected images/train and labels/train in {tmp_path}"
    )
    gone = DataConfig(name="ade20k", root=str(tmp_path / "gone"))
    assert refusal(gone, "val").startswith(f"{tmp_path}/gone: no such folder; expected images/validation")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "images/train").mkdir(parents=True)
    (tmp_path / "labels/train").mkdir(parents=True)
    assert refusal(DataConfig(name="folder", root=str(tmp_path))).startswith(
        f"{tmp_path}/images/train: no images there (*.jpg, *.jpeg, *.png"
    )


def test_images_without_labels_are_counted_and_the_first_is_named(tmp_path):
    config = folder_of_three(tmp_path)
    for name in ("d", "e"):
        put(tmp_path / f"images/train/{name}.png", np.zeros((5, 7, 3), np.uint8))
    assert refusal(config) == (
        f"{tmp_path}/images/train/d.png has no label map {tmp_path}/labels/train/d.png "
        "(2 of 4 images have none)"
    )


def test_labels_without_images_are_counted_and_the_first_is_named(tmp_path):
    config = folder_of_three(tmp_path)
    put(tmp_path / "labels/train/z.png", np.zeros((5, 7), np.uint8))
    assert refusal(config).startswith(
        f"{tmp_path}/labels/train/z.png has no image in {tmp_path}/images/train (1 of 3 label maps has none)"
    )


def test_two_images_of_one_name_are_refused(tmp_path):
    config = folder_of_three(tmp_path)
    (tmp_path / "images/train/b.jpg").write_bytes(b"")
    assert "b.jpg" in (message := refusal(config))
    assert "b.png differ in their endings only; keep one of them" in message


def test_labels_of_another_size_name_both_files_and_sizes(tmp_path):
    config = folder_of_three(tmp_path)
    put(tmp_path / "labels/val/c.png", np.zeros((5, 8), np.uint8))
    assert refusal(config, "val") == (
        f"{tmp_path}/images/val/c.png is 7x5 px but {tmp_path}/labels/val/c.png is 8x5 px; "
        "every pixel needs its label"
    )
    put(tmp_path / "labels/val/c.png", np.zeros((7, 5), np.uint8))
    assert refusal(config, "val").endswith("is 5x7 px; turn the labels as the image's EXIF says")


def test_ids_out_of_range_are_listed_sorted_and_at_most_ten(tmp_path):
    config = folder_of_three(tmp_path)
    put(tmp_path / "labels/val/c.png", np.arange(250, 215, -1, dtype=np.uint8).reshape(5, 7))
    assert refusal(config, "val") == (
        f"{tmp_path}/labels/val/c.png: label ids 216, 217, 218, 219, 220, 221, 222, 223, 224, 225, ... "
        "are not among 0 to 2 and 255 (ignored) of 3 classes; "
        "is it a 0/255 mask or a grey picture? write one class id per pixel"
    )


def test_a_jpeg_named_png_is_never_read_as_labels(tmp_path):
    config = folder_of_three(tmp_path)
    path = tmp_path / "labels/val/c.png"
    path.write_bytes(cv2.imencode(".jpg", np.full((5, 7), 2, np.uint8))[1].tobytes())
    assert refusal(config, "val") == (
        f"{path}: JPEG inside, which changes ids; save label maps as PNG from their source"
    )


def test_ids_from_one_get_the_zero_label_hint(tmp_path):
    config = folder_of_three(tmp_path)
    put(tmp_path / "labels/val/c.png", np.arange(35, dtype=np.uint8).reshape(5, 7) % 3 + 1)
    assert refusal(config, "val").endswith(
        "label ids 3 are not among 0 to 2 and 255 (ignored) of 3 classes; if 3 means unlabelled, "
        "write 255 for it; if the ids run from 1, subtract 1 and write 255 for 0"
    )


def test_sixteen_bit_ids_are_checked_too(tmp_path):
    config = folder_of_three(tmp_path)
    ids = np.full((5, 7), 2, np.uint16)
    np.testing.assert_array_equal(open_dataset(config, "val").read(0).labels_HW, ids)
    ids[0, 0] = 258  # 2, if it were cut to 8 bits
    put(tmp_path / "labels/val/c.png", ids)
    assert "label ids 258 are not among" in refusal(config, "val")


# Published layouts


def test_ade20k_layout(tmp_path):
    ids = np.array([[0, 1, 150]])
    for folder in ("training", "validation"):
        image, labels = f"images/{folder}/ADE_1.jpg", f"annotations/{folder}/ADE_1.png"
        put(tmp_path / labels, ids.astype(np.uint8))
        (tmp_path / image).parent.mkdir(parents=True)
        put(tmp_path / "x.png", np.zeros((1, 3, 3), np.uint8)).rename(tmp_path / image)  # OpenCV looks inside
    for split in ("train", "val"):
        dataset = open_dataset(DataConfig(name="ade20k", root=str(tmp_path)), split)
        np.testing.assert_array_equal(dataset.read(0).labels_HW, [[255, 0, 149]])
        assert len(dataset.classes.names) == 150


def test_cityscapes_layout_with_train_ids_or_raw_ids(tmp_path):
    image = tmp_path / "leftImg8bit/val/ulm/ulm_000000_leftImg8bit.png"
    put_pair(image, tmp_path / "gtFine/val/ulm/ulm_000000_gtFine_labelIds.png", np.array([[0, 7, 26, 33]]))
    config = DataConfig(name="cityscapes", root=str(tmp_path))
    sample = open_dataset(config, "val").read(0)
    assert sample.name == "ulm/ulm_000000"
    np.testing.assert_array_equal(sample.labels_HW, [[255, 0, 13, 18]])
    put(
        tmp_path / "gtFine/val/ulm/ulm_000000_gtFine_labelTrainIds.png", np.array([[255, 1, 2, 18]], np.uint8)
    )
    np.testing.assert_array_equal(open_dataset(config, "val").read(0).labels_HW, [[255, 1, 2, 18]])


def test_coco_stuff_layout_with_train_ids_or_raw_ids(tmp_path):
    put(tmp_path / "annotations/train2017/000000000009.png", np.array([[0, 12, 181, 255]], np.uint8))
    (tmp_path / "images/train2017").mkdir(parents=True)
    put(tmp_path / "x.png", np.zeros((1, 4, 3), np.uint8)).rename(
        tmp_path / "images/train2017/000000000009.jpg"
    )
    config = DataConfig(name="coco_stuff", root=str(tmp_path))
    np.testing.assert_array_equal(open_dataset(config, "train").read(0).labels_HW, [[0, 11, 170, 255]])
    put(
        tmp_path / "annotations/train2017/000000000009_labelTrainIds.png",
        np.array([[12, 170, 0, 255]], np.uint8),
    )
    np.testing.assert_array_equal(open_dataset(config, "train").read(0).labels_HW, [[12, 170, 0, 255]])


# What --data says


@pytest.mark.parametrize(
    ("text", "name", "root"),
    [
        ("landcover", "landcover", ""),
        ("synthetic", "synthetic", ""),
        ("ade20k:/data/ade", "ade20k", "/data/ade"),
        ("cityscapes:/a:b/city", "cityscapes", "/a:b/city"),
        ("coco_stuff:coco", "coco_stuff", str(Path("coco").resolve())),  # to be found from anywhere
        ("folder:/mine", "folder", "/mine"),
    ],
)
def test_data_specs_name_a_data_set_and_its_folder(text, name, root):
    assert parse_data_spec(text) == DataConfig(name=name, root=root)


def test_a_bare_folder_is_data_of_ones_own(tmp_path):
    assert parse_data_spec(str(tmp_path)) == DataConfig(name="folder", root=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("landcovr", "--data landcovr: neither a data set nor a folder; did you mean `landcover`?"),
        (
            "citiscapes:/x",
            "--data citiscapes:/x: neither a data set nor a folder; did you mean `cityscapes`?",
        ),
        (
            "/no/such/place",
            "--data /no/such/place: neither a data set nor a folder; known: landcover, folder",
        ),
        ("ade20k", "--data ade20k: `ade20k` needs its folder; write --data ade20k:FOLDER"),
        ("synthetic:/x", "--data synthetic:/x: `synthetic` takes no folder; write --data synthetic"),
    ],
)
def test_a_wrong_data_spec_is_a_usage_error(text, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse_data_spec(text)
    assert caught.value.exit_code == 2


def test_data_without_its_root_is_a_usage_error():
    with pytest.raises(
        UsageError, match=r"data `ade20k` needs a folder: `data\.root`, or --data ade20k:FOLDER"
    ):
        open_dataset(DataConfig(name="ade20k"), "train")
