"""What reaches a terminal, a pipe or a file: whole at any width."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.cli.show import Grid, make_table, print_grid

LONG = "a_folder_whose_name_is_longer_than_any_terminal_is_wide_by_quite_a_number_of_letters"
NUMBERS = ("1,234,567.125", "7,654,321.875", "1,111,222.333")


def printed(width: int, *renderables: object) -> str:
    console = Console(width=width, markup=False, highlight=False, soft_wrap=True)
    with console.capture() as captured:
        for renderable in renderables:
            if isinstance(renderable, Grid):
                print_grid(console, renderable)
            else:
                console.print(renderable, soft_wrap=False)
    return captured.get()


def column(text: str, letters: str) -> str:
    """What is left of a text of these characters alone: a folded cell in one piece."""
    return "".join(re.findall(f"[{letters}]", text))


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_long_name_in_a_table_is_folded_and_numbers_stay_whole(width):
    table = make_table("row", "n", "m")
    table.add_row(LONG, "1234", "56.78")
    shown = printed(width, table)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert LONG in column(shown, "a-z_")
    assert " 1234 " in shown and "56.78" in shown


def test_numbers_that_are_too_wide_together_are_folded_with_every_digit():
    for num_left in (0, 1):
        grid = Grid("title", ["x", "y", "z"][: 3 - num_left], [NUMBERS[num_left:]], num_left=num_left)
        digits = column(printed(14, grid), "0-9")
        assert sorted(digits) == sorted("".join(column(n, "0-9") for n in NUMBERS[num_left:]))


def test_names_are_folded_before_numbers():
    shown = printed(40, Grid("title", ["name", "x", "y"], [[LONG, *NUMBERS[:2]]]))
    assert NUMBERS[0] in shown and NUMBERS[1] in shown
    assert LONG in column(shown.split("y \n", 1)[1], "a-z_")


@pytest.fixture(scope="module")
def faulty_data(tmp_path_factory) -> Path:
    """Two pairs a split under a long path, with a label map that is no image and a class with a long name."""
    root = tmp_path_factory.mktemp("data") / LONG
    for split in ("train", "val"):
        for index in range(2):
            for kind in ("images", "labels"):
                path = root / kind / split / f"{LONG}_{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(
                    str(path), np.full((40, 48, 3)[: 3 if kind == "images" else 2], index, np.uint8)
                )
    (root / f"labels/train/{LONG}_1.png").write_bytes(b"no image")
    (root / "classes.toml").write_text(f'names = ["{LONG}", "Straße"]\n', "utf-8")
    return root


@pytest.mark.parametrize("width", [40, 80])
def test_data_check_names_files_and_classes_whole_at_any_width(faulty_data, width):
    result = CliRunner(env={"COLUMNS": str(width)}).invoke(app, ["data", "check", str(faulty_data)])
    assert result.exit_code == 1
    assert "…" not in result.stdout and "..." not in result.stdout
    for line in result.stdout.split("train: ")[1].split("for a recipe")[0].splitlines():
        assert len(line) <= width, line
    # a file's name in its column, which other columns stand beside; and the class's, in its own
    words = set("".join(result.stdout.split()).lower())
    assert set(LONG) <= words
    classes = result.stdout[result.stdout.rindex("\n class") :]
    assert LONG in column(classes.split("ignored")[0].replace("Straße", ""), "a-z_").replace("class", "", 1)


def test_the_recipes_are_whole_in_a_narrow_terminal():
    wide = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["recipes"]).stdout
    narrow = CliRunner(env={"COLUMNS": "40"}).invoke(app, ["recipes"]).stdout
    assert "…" not in narrow
    assert sorted(column(narrow, r"\S")) == sorted(column(wide, r"\S"))
