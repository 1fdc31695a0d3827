"""What a user sees of the package before any model is built."""

import json
import os
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import segdeformer
from segdeformer.config import recipe_names, recipe_text

COMMANDS = ("train", "eval", "predict", "recipes")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "80"}  # a narrow terminal
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment
    )


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh process that ran the code."""
    told = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = python("-c", f"{code}\n{told}")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def after_command(*arguments: str) -> str:
    """Code that runs the command line in its process and goes on."""
    return (
        "from segdeformer.cli.main import app\n"
        f"try:\n    app({list(arguments)})\nexcept SystemExit as end:\n    assert end.code == 0"
    )


@pytest.mark.parametrize(
    "code",
    ["import segdeformer", after_command("--help"), after_command("train", "--help")],
    ids=["import", "help", "train help"],
)
def test_import_and_help_load_no_heavy_library(code):
    loaded = modules_after(code)
    assert "segdeformer" in loaded
    assert not loaded & {"torch", "timm", "cv2", "numpy", "safetensors", "triton"}


def test_help_takes_less_than_half_a_second_of_cpu_time_and_lists_the_commands():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-m", "segdeformer", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert done.returncode == 0
    assert done.stderr == ""
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\s", done.stdout, re.MULTILINE), command


def test_version_is_that_of_the_package_and_of_its_metadata():
    done = python("-m", "segdeformer", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"segdeformer {segdeformer.__version__}\n", "")
    assert metadata.version("segdeformer") == segdeformer.__version__


def test_every_public_name_resolves_to_something_of_that_name():
    assert len(set(segdeformer.__all__)) == len(segdeformer.__all__)
    for name in segdeformer.__all__:
        assert getattr(segdeformer, name).__name__ == name


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'segdeformer' has no attribute 'lode'"):
        _ = segdeformer.lode


def test_the_package_says_that_it_is_typed_and_carries_its_linked_folders():
    package = Path(segdeformer.__file__).parent
    assert (package / "py.typed").is_file()
    for folder in ("kernels", "cli"):
        assert (package / folder / "__init__.py").is_file()


def test_recipes_lists_every_name_whole_in_a_narrow_terminal_and_prints_one_as_it_is():
    done = python("-m", "segdeformer", "recipes")
    assert done.returncode == 0
    first_words = [line.split()[0] for line in done.stdout.splitlines() if line[1:2].strip()]
    assert first_words == ["recipe", *recipe_names()]
    assert python("-m", "segdeformer", "recipes", "folder").stdout == recipe_text("folder")


def test_public_functions_build_and_run_a_model():
    import torch

    model = segdeformer.build_model(segdeformer.load_recipe("synthetic").model).eval()
    assert isinstance(model, segdeformer.Segmenter)
    assert isinstance(model.decoder, segdeformer.SegDeformer)
    with torch.inference_mode():
        logits_BKhw = model(torch.randn(1, 3, 63, 45)).logits_BKhw
    assert logits_BKhw.shape == (1, 5, 16, 12)
    assert logits_BKhw.std() > 0
