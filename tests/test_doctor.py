"""The data doctor: every planted fault is found by its kind and file, and good data is left in peace."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from planted import (
    COLORS,
    ERRORS,
    FOLLOWS,
    NUM_CLASSES,
    WARNINGS,
    binary,
    encode,
    image,
    labels,
    make_folder,
    pixels,
    plant,
    with_palette,
)
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.config import CrossEntropyConfig, DataConfig
from segdeformer.data.check.doctor import Checkup, Doctor, quick_check, refuse_errors
from segdeformer.data.check.findings import Finding
from segdeformer.data.datasets import open_dataset
from segdeformer.errors import UserError

RUNNER = CliRunner(env={"COLUMNS": "160"})


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("clean"), train=12, val=4)


@pytest.fixture
def data(clean, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(clean, tmp_path / "data")


def check(root: Path, **changes: str) -> Checkup:
    doctor = Doctor(DataConfig(name="folder", root=str(root), **changes))
    assert len(list(doctor.examine(workers=2))) == len(doctor)
    return doctor.checkup()


def found(checkup: Checkup) -> dict[tuple[str, str], set[str]]:
    """The names of the files by kind and split; of equations, those of the first."""
    return {
        (finding.kind, finding.split): {Path(file.split(" = ")[0]).name for file in finding.files}
        for finding in checkup.findings
    }


def test_good_data_is_left_in_peace(clean):
    assert check(clean).findings == ()


def test_the_data_that_ships_is_left_in_peace():
    doctor = Doctor(DataConfig(name="synthetic"))
    list(doctor.examine(workers=2))
    assert doctor.checkup().findings == ()
    assert quick_check(DataConfig(name="landcover")) == ()


@pytest.mark.parametrize("kind", [*ERRORS, *WARNINGS, "one class"])
def test_a_planted_fault_is_found_by_kind_and_file(kind, data):
    named = {plant(data, kind, 3)}
    checkup = check(data)
    kinds = found(checkup)
    split = "both" if (kind, "both") in kinds else "train"
    assert named <= kinds[kind, split] or kind == "train/val duplicates"
    others = {other for other, _ in kinds} - {kind}
    assert others <= FOLLOWS.get(kind, set())
    level = next(finding.level for finding in checkup.findings if finding.kind == kind)
    assert level == ("error" if kind in ERRORS else "note" if kind == "one class" else "warning")
    assert checkup.spoils_training == (kind in ERRORS)


def relabel(root: Path, change, split: str = "*") -> None:
    for path in root.glob(f"labels/{split}/*.png"):
        encode(path, change(pixels(path)).astype(np.uint8))


def kinds(checkup: Checkup) -> set[tuple[str, str]]:
    return {(finding.kind, finding.level) for finding in checkup.findings}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # 0 is background to ignore, the classes are 1 ... K
        (lambda ids: np.where(ids == 255, 0, ids + 1), "0 occurs in 12 of 12 maps"),
        (lambda ids: np.where(ids == 255, 255, ids + 1), "0 never occurs"),
        (lambda ids: np.where(ids == 255, 254, ids), "was 1 subtracted from 255, too?"),
    ],
)
def test_a_shifted_zero_label_is_suspected(data, change, expected):
    relabel(data, change)
    checkup = check(data)
    assert {("zero label", "error"), ("ids out of range", "error")} <= kinds(checkup)
    first = next(finding for finding in checkup.findings if finding.kind == "zero label")
    assert expected in first.what and len(first.files) == 12


def test_ids_shifted_within_range_leave_class_0_unused(data):
    relabel(data, lambda ids: np.where((ids == 255) | (ids == 0), 1, ids))
    finding = next(f for f in check(data).findings if f.kind == "class not in train")
    assert finding.files == ("background",)
    assert "the ids may be shifted by one" in finding.remedy


def test_masks_of_0_and_255_throughout_are_an_error(data):
    relabel(data, binary)
    assert ("0/255 masks", "error") in kinds(check(data))


def test_class_0_with_as_many_ignored_pixels_as_elsewhere_is_a_warning_only(data):
    def with_border(ids_HW: np.ndarray) -> np.ndarray:
        ids_HW = np.where(ids_HW == 255, 0, ids_HW)
        ids_HW[:, :15] = 255
        return ids_HW

    relabel(data, with_border)
    encode(labels(data, 2), with_border(np.zeros_like(pixels(labels(data, 2)))))
    checkup = check(data)
    assert kinds(checkup) == {("only 0 and 255", "warning")}
    assert not checkup.spoils_training


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (np.fliplr, "mirrored left-right"),
        (lambda ids: ids[::-1], "mirrored top-bottom"),
        (lambda ids: ids[::-1, ::-1], "turned by 180 degrees"),
    ],
)
def test_labels_that_are_all_turned_alike_are_an_error(turn, words, data):
    relabel(data, turn, "train")
    finding = next(f for f in check(data).findings if f.kind == "all labels look turned")
    assert (finding.level, finding.split) == ("error", "train")
    assert f"over 12 pairs, the labels' outlines meet the images better when {words}" == finding.what


def test_a_split_without_any_label_is_an_error(data):
    relabel(data, lambda ids: np.full_like(ids, 255), "val")
    assert ("nothing labelled", "error") in kinds(check(data))


def test_a_validation_split_that_is_the_training_split_is_an_error(data):
    assert ("same folder", "error") in kinds(check(data, val_split="train"))
    for kind in ("images", "labels"):
        shutil.rmtree(data / kind / "val")
        shutil.copytree(data / kind / "train", data / kind / "val")
    finding = check(data).findings[0]
    assert finding.kind == "train/val duplicates"
    assert "every validation image is in train, too" in finding.what


def test_an_empty_and_a_missing_split_are_errors(data):
    shutil.rmtree(data / "images/val")
    finding = check(data).findings[0]
    assert (finding.kind, finding.level, finding.split) == ("no data", "error", "val")
    assert "images/val: no such folder; expected images/val and labels/val" in finding.what
    (data / "images/val").mkdir()
    assert "no images there" in check(data).findings[0].what


def test_classes_of_one_split_only_and_of_none_are_named(data):
    relabel(data, lambda ids: np.where(ids == 3, 0, ids), "train")
    relabel(data, lambda ids: np.where(ids == 2, 0, ids), "val")
    relabel(data, lambda ids: np.where(ids == 4, 0, ids))
    findings = {finding.kind: finding.files for finding in check(data).findings}
    assert findings == {
        "class not in train": ("shape 4",),
        "class only in val": ("shape 3",),
        "class not in val": ("shape 2",),
    }


def test_a_class_named_void_is_suspected(data):
    table = (data / "classes.toml").read_text()
    (data / "classes.toml").write_text(table.replace("background", "Void"))
    assert kinds(check(data)) == {("class that means no label", "warning")}


def test_palettes_that_change_from_file_to_file_are_an_error(data):
    for path in data.glob("labels/*/*.png"):
        with_palette(path, COLORS)
    assert check(data).findings == ()
    swapped = [COLORS[0], COLORS[2], COLORS[1], *COLORS[3:]]
    with_palette(labels(data, 5), swapped)
    assert found(check(data)) == {("palettes disagree", "train"): {labels(data, 5).name}}


def test_the_nearest_name_is_offered_for_a_missing_label_map(data):
    labels(data, 1).rename(labels(data, 1).with_stem("train0001_mask"))
    finding = next(f for f in check(data).findings if f.kind == "missing label map")
    assert "train0001_mask.png? names must be equal but for the ending" in finding.remedy


def test_reduced_ade20k_is_recognised(clean, tmp_path):
    for split, folder in (("train", "training"), ("val", "validation")):
        shutil.copytree(clean / f"labels/{split}", tmp_path / f"annotations/{folder}")
        (tmp_path / f"images/{folder}").mkdir(parents=True)
        for path in clean.glob(f"images/{split}/*.png"):
            encode(tmp_path / f"images/{folder}/{path.stem}.jpg", pixels(path))
    doctor = Doctor(DataConfig(name="ade20k", root=str(tmp_path)))
    list(doctor.examine(workers=2))
    assert ("zero label", "error") in kinds(doctor.checkup())


def test_five_hundred_pairs_with_every_kind_of_fault(tmp_path):
    data = make_folder(tmp_path, train=440, val=60)
    planted: dict[str, set[str]] = {}
    for number, kind in enumerate([*ERRORS, *WARNINGS, "one class"]):
        if kind in ("labels look misplaced", "turned by EXIF"):
            continue  # seen in most pairs only
        for copy in range(3):
            planted.setdefault(kind, set()).add(plant(data, kind, 4 + 10 * number + 3 * copy))
    checkup = check(data)
    named: dict[str, set[str]] = {}
    for finding in checkup.findings:
        names = {Path(part).name for file in finding.files for part in file.split(" = ")}
        named.setdefault(finding.kind, set()).update(names)
    for kind, names in planted.items():
        assert names <= named[kind], kind
    assert set(named) - {"labels look misplaced"} == set(planted)
    for kind in set(planted) - {"duplicates in a split", "same image, other labels"}:
        exactly = [finding for finding in checkup.findings if finding.kind == kind]
        extra = {"missing label map": 3, "16-bit images": 3, "other format than the ending": 3}
        assert sum(len(finding.files) for finding in exactly) == 3 + extra.get(kind, 0), kind


# Numbers.


def test_weights_mean_and_deviation_are_those_of_the_pixels(data):
    plant(data, "unreadable label map", 0)
    checkup = check(data)
    train = open_dataset(DataConfig(name="folder", root=str(data)), "train")
    images = [cv2.imread(str(p))[:, :, ::-1].reshape(-1, 3) for p in sorted(data.glob("images/train/*.png"))]
    levels = np.concatenate(images).astype(float)
    np.testing.assert_allclose(checkup.color_scale.mean, levels.mean(axis=0), atol=6e-4)
    np.testing.assert_allclose(checkup.color_scale.std, levels.std(axis=0), atol=6e-4)
    maps = [train.read(index).labels_HW for index in range(1, len(train))]
    frequency = []
    for label in range(NUM_CLASSES):
        holding = [ids_HW for ids_HW in maps if (ids_HW == label).any()]
        hits = sum((ids_HW == label).sum() for ids_HW in holding)
        frequency.append(hits / sum((ids_HW != 255).sum() for ids_HW in holding))
    np.testing.assert_allclose(checkup.class_weights, np.median(frequency) / frequency, rtol=5e-4)
    assert CrossEntropyConfig(name="seg", class_weights=checkup.class_weights).kind == "cross_entropy"


def test_results_do_not_depend_on_the_number_of_threads(data):
    for number, kind in enumerate(ERRORS):
        plant(data, kind, number)
    doctors = [Doctor(DataConfig(name="folder", root=str(data))) for _ in range(2)]
    for doctor, workers in zip(doctors, (1, 5), strict=True):
        list(doctor.examine(workers=workers))
    first, second = (doctor.checkup() for doctor in doctors)
    assert first.findings == second.findings
    assert (first.class_weights, first.color_scale) == (second.class_weights, second.color_scale)


# Before training, and the command.


def test_the_quick_check_refuses_what_would_spoil_training(data):
    plant(data, "ids out of range", 1)
    findings = quick_check(DataConfig(name="folder", root=str(data)))
    message = f"{labels(data, 1)}: label ids 77 are not among 0 to 4 and 255"
    with pytest.raises(UserError, match="train: 1 of 12, ") as caught:
        refuse_errors(findings)
    assert message in str(caught.value)
    refuse_errors([finding for finding in findings if finding.level != "error"])


def test_the_quick_check_names_every_bad_image_and_every_reason(data):
    for index in (1, 3, 4, 7):
        image(data, index).write_bytes(b"no image")
    encode(image(data, 5), np.ones((64, 80, 3), np.float32), ".tiff")
    findings = quick_check(DataConfig(name="folder", root=str(data)))
    with pytest.raises(UserError) as caught:
        refuse_errors(findings)
    bad = [str(image(data, index)) for index in (1, 3, 4, 5, 7)]
    assert str(caught.value).startswith(
        f"train: 5 of 12, {bad[0]}: not a readable image (damaged, cut off or another format) | "
        f"{bad[3]}: 3 bands of float32; expected 1, 3 or 4 bands of uint8 or uint16: "
        f"{', '.join(bad)}; copy or convert it again from its source"
    )


def test_a_line_lists_eight_files_and_counts_the_others():
    files = tuple(f"{index}.png" for index in range(10))
    line = Finding("blank images", "warning", "train", "10 images", "look at them", files).line()
    first = ", ".join(files[:8])
    assert line == f"train: 10 images: {first} and 2 more; look at them"


def test_the_command_prints_a_table_and_writes_json_and_picture(data, tmp_path):
    plant(data, "alpha channel", 1)
    report, picture = tmp_path / "report.json", tmp_path / "page.png"
    result = RUNNER.invoke(
        app, ["data", "check", str(data), "--json", str(report), "--picture", str(picture)]
    )
    assert result.exit_code == 0, result.stderr
    assert "alpha is dropped" in result.stdout
    values = json.loads(report.read_text())
    assert not values["spoils_training"]
    assert f"class_weights = {values['recipe']['class_weights']}" in result.stdout
    assert values["findings"][0] | {"what": ""} == {
        "kind": "alpha channel",
        "level": "warning",
        "split": "train",
        "what": "",
        "remedy": "alpha is dropped: what is transparent shows its hidden colour",
        "files": [str(image(data, 1))],
        "count": 1,
    }
    page = pixels(picture)
    assert page.ndim == 3 and (page == 255).mean() < 0.7
    plant(data, "sizes differ", 2)
    result = RUNNER.invoke(app, ["data", "check", str(data), "--json", str(report)])
    assert (result.exit_code, result.stderr) == (1, "error: 1 kind of fault would spoil training\n")
    assert json.loads(report.read_text())["spoils_training"]


def test_file_names_may_be_any_bytes(data, tmp_path):
    """OpenCV's lettering and a terminal would both fail on them."""
    for path in (image(data, 1), labels(data, 1)):
        os.rename(path, os.fsencode(path.parent) + b"/\xff.png")
    encode(labels(data, 2), np.full_like(pixels(labels(data, 2)), 9))
    os.rename(labels(data, 2), os.fsencode(labels(data, 2).parent) + b"/\xfe.png")
    picture, report = tmp_path / "page.png", tmp_path / "report.json"
    command = [sys.executable, "-m", "segdeformer", "data", "check", data]
    done = subprocess.run([*command, "--picture", picture, "--json", report], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "/?.png" in json.loads(report.read_text())["findings"][1]["files"][0]
    assert picture.exists()


def test_wrong_arguments_are_one_line(tmp_path):
    result = RUNNER.invoke(app, ["data", "check", str(tmp_path / "nothing")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    make_folder(tmp_path, train=1, val=1)
    (tmp_path / "classes.toml").unlink()
    result = RUNNER.invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 1 and "classes.toml: no such file" in result.stderr


def test_ctrl_c_ends_the_check_at_once(clean, tmp_path):
    command = [sys.executable, "-m", "segdeformer", "data", "check", "landcover"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(3)
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=20)[1].startswith("error: stopped by Ctrl-C")
    # By SIGINT itself the interpreter ends if it came while a library's C code was running Python.
    assert process.returncode in (1, -signal.SIGINT)
