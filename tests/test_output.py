"""Output that a stream, a disk or a folder does not take: characters, space, permissions."""

import errno
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from segdeformer.cli.errors import one_line_errors, os_error_message
from segdeformer.cli.main import app
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.files import write_text

ROOT = Path(__file__).parents[1]
NO_UTF8 = b"caf\xe9.png".decode("utf-8", "surrogateescape")
FULL = "error: the output cannot be written (No space left on device); free space, or send it elsewhere\n"
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")


def segdeformer(*arguments: object, cwd: Path = ROOT, encoding: str = "utf-8:strict", **options):
    """The command as a process; stdout and stderr are bytes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "COLUMNS": "120"}
    env |= options.pop("env", {})
    command = [sys.executable, "-m", "segdeformer", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, stderr=subprocess.PIPE, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two pairs a split of five classes; one is `Straße`, and one image's name is no UTF-8."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for index, name in enumerate(("a.png", NO_UTF8)):
            for kind, shape in (("images", (40, 48, 3)), ("labels", (40, 48))):
                path = root / kind / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(cv2.imencode(".png", np.full(shape, index, np.uint8))[1].tobytes())
    names = ["Straße", *SyntheticDataset("val").classes.names[1:]]
    (root / "classes.toml").write_text(f"names = {names}\n", "utf-8")
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ("--iterations", 1, "--batch", 2, "--workers", 0, "--out", out)
    done = segdeformer(
        "train", "synthetic", "--data", data, *options, encoding="ascii", stdout=subprocess.PIPE
    )
    return out, done


def test_train_ends_well_where_a_class_name_cannot_be_encoded(trained):
    out, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert b"Stra?e" in done.stdout
    assert tomllib.loads((out / "recipe.toml").read_text("utf-8"))["name"] == "synthetic"


def test_eval_and_predict_print_names_that_cannot_be_encoded(trained, data, tmp_path):
    out, _ = trained
    done = segdeformer("eval", out, encoding="ascii", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Stra?e" in done.stdout
    image = data / "images/val" / NO_UTF8
    done = segdeformer("predict", out, image, "--out", tmp_path / "p", "--overlay", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "p/caf?.png" in done.stdout.decode("utf-8")
    assert (tmp_path / "p" / NO_UTF8).is_file()


def test_data_check_names_a_file_whose_name_is_no_utf8(data, tmp_path):
    (tmp_path / "data").symlink_to(data)
    done = segdeformer(
        *("data", "check", tmp_path / "data", "--json", tmp_path / "report.json"), stdout=subprocess.PIPE
    )
    assert b"Traceback" not in done.stderr
    assert "Straße" in done.stdout.decode("utf-8")
    assert (tmp_path / "report.json").read_text("utf-8").startswith("{")


def test_an_error_line_has_a_replacement_for_what_stderr_cannot_encode():
    done = segdeformer("recipes", "Straße-é", encoding="ascii", stdout=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith(rb"error: no recipe `Stra\xdfe-\xe9`: ")  # Python's own for stderr


def test_a_handler_of_the_users_is_kept(trained):
    out, _ = trained
    done = segdeformer("eval", out, encoding="ascii:xmlcharrefreplace", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Stra&#223;e" in done.stdout


def test_text_files_are_utf8_whatever_is_written(tmp_path):
    write_text(tmp_path / "a.toml", f'name = "Straße {NO_UTF8}"\n')
    assert (tmp_path / "a.toml").read_text("utf-8") == 'name = "Straße caf?.png"\n'


@needs_full
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipes"], ["recipes", "synthetic"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_stdout_is_one_line(arguments, unbuffered):
    with open("/dev/full", "wb") as full:
        done = segdeformer(*arguments, stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr.decode()) == (1, FULL)


@needs_full
def test_a_full_disk_under_both_streams_still_ends_the_command():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "segdeformer", "recipes", "nothing"]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=full, stderr=full)
    assert done.returncode == 2


@pytest.mark.parametrize("arguments", [["recipes"], ["--help"]])
def test_a_reader_that_went_away_is_no_error_to_speak_of(arguments):
    read, write = os.pipe()
    os.close(read)
    done = segdeformer(*arguments, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def guarded(error: OSError) -> str:
    """What a command that fails so prints; exit code 1."""
    failing = typer.Typer()

    @failing.command()
    @one_line_errors
    def command() -> None:
        raise error

    result = CliRunner().invoke(failing, [])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EACCES, "change its permissions, or choose another place (--out)"),
        (errno.EROFS, "start in a folder that can be written, or choose another place (--out)"),
        (errno.ENOSPC, "free space, or choose another place (--out)"),
        (errno.EMFILE, "raise the limit (ulimit -n), or take fewer --workers"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ENOTDIR, "a part of this path is a file where a folder was expected; choose another path"),
        (errno.ENXIO, "check the path and what the system says about it"),
    ],
)
def test_what_the_system_refuses_is_path_reason_and_remedy(code, remedy):
    assert guarded(OSError(code, os.strerror(code), "a/b")) == f"error: a/b: {os.strerror(code)}; {remedy}\n"


def test_errors_of_two_paths_of_none_and_of_a_library_are_one_line():
    two = OSError(errno.EXDEV, "Invalid cross-device link", b"a", None, "b")
    assert os_error_message(two).startswith("a -> b: Invalid cross-device link; ")
    assert os_error_message(OSError(errno.ENOSPC, "No space")).startswith("No space; free space")
    assert guarded(OSError("made up\nof lines")) == "error: made up of lines\n"
    worker = OSError(
        "Caught OSError in worker 0.\nOriginal Traceback (most recent\n  x\nOSError: [Errno 24] files"
    )
    assert guarded(worker) == "error: OSError: [Errno 24] files\n"


def test_train_where_no_run_folder_can_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")
    arguments = ["train", "synthetic", "--iterations", "1", "--batch", "2", "--workers", "0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr == "error: runs: File exists; move it away, or choose another path\n"
    Path("runs").unlink()

    def refuse(*_arguments, **_options) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "runs")

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: runs: Permission denied; change its permissions, or choose another"
    )
