"""TOML files as editors save them: byte-order marks, ends of lines, and encodings that are refused."""

import codecs
from pathlib import Path

import pytest
from planted import make_folder
from typer.testing import CliRunner

from segdeformer.ablation.plan import file_rows, read_ablation
from segdeformer.cli.main import app
from segdeformer.config import load_recipe, parse_recipe, recipe_text
from segdeformer.config.toml import read_toml
from segdeformer.data.classes import load_classes
from segdeformer.errors import UsageError, UserError

CLASSES = 'names = ["Straße", "car"]\ncolors = [[1, 2, 3], [4, 5, 6]]\n'
ABLATION = 'base = "synthetic"\n[[rows]]\nname = "a"\n[[rows]]\nname = "b"\ntrain.learning_rate = 0.5\n'
UTF_16 = "it is UTF-16, as PowerShell's `>` writes; save it as UTF-8 in an editor"


def as_windows(text: str) -> bytes:
    """UTF-8 with a byte-order mark and CRLF."""
    return codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode()


READABLE = {
    "plain": str.encode,
    "mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "mark and crlf": as_windows,
}
UTF_16S = {
    "little": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "without a mark": lambda text: text.encode("utf-16-le"),
}


@pytest.mark.parametrize("how", READABLE)
def test_classes_recipes_and_ablations_are_read_however_an_editor_saved_them(how, tmp_path):
    encode = READABLE[how]
    path = tmp_path / "file.toml"
    path.write_bytes(encode(CLASSES))
    assert load_classes(path).names == ("Straße", "car")
    assert load_classes(path).colors == ((1, 2, 3), (4, 5, 6))
    path.write_bytes(encode(recipe_text("synthetic")))
    assert load_recipe(str(path)) == load_recipe("synthetic")
    path.write_bytes(encode(ABLATION))
    rows = file_rows(read_ablation(path), load_recipe("synthetic"))
    assert [row.recipe.train.learning_rate for row in rows][1] == 0.5


def test_a_text_with_a_mark_is_a_recipe_too():
    assert parse_recipe("\ufeff" + recipe_text("synthetic"), "mine") == load_recipe("synthetic")


@pytest.mark.parametrize("how", UTF_16S)
def test_utf_16_is_refused_with_what_to_do(how, tmp_path):
    encode = UTF_16S[how]
    path = tmp_path / "file.toml"
    path.write_bytes(encode(CLASSES))
    with pytest.raises(UserError) as caught:
        load_classes(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as TOML ({UTF_16}); expected a line like")
    path.write_bytes(encode(recipe_text("synthetic")))
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert str(caught.value) == f"{path}: cannot be read as a TOML text file ({UTF_16})"
    path.write_bytes(encode(ABLATION))
    with pytest.raises(UsageError) as caught:
        read_ablation(path)
    assert str(caught.value) == f"{path}: cannot be read as TOML ({UTF_16})"


def test_other_encodings_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "classes.toml"
    path.write_bytes(CLASSES.encode("cp1252"))
    with pytest.raises(UserError, match=r"can't decode byte 0xdf in position 14.*; save it as UTF-8\)"):
        load_classes(path)


def test_the_command_says_it_in_one_line(tmp_path):
    root = make_folder(tmp_path / "data", train=1, val=1)
    table = root / "classes.toml"
    table.write_bytes(UTF_16S["little"](table.read_text()))
    result = CliRunner().invoke(app, ["data", "check", str(root)])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f"{table}: cannot be read as TOML ({UTF_16})" in result.stderr


def test_all_toml_is_read_by_one_function():
    root = Path(__file__).parents[1]
    readers = [
        path.relative_to(root).as_posix()
        for folder in ("segdeformer", "cli", "kernels")
        for path in sorted((root / folder).rglob("*.py"))
        if "tomllib.load" in path.read_text("utf-8")
    ]
    assert readers == ["segdeformer/config/toml.py"]


def test_an_empty_file_is_an_empty_table(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_bytes(b"")
    assert read_toml(path) == {}
