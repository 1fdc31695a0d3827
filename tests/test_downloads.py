"""Downloads of weights: announced, tried a few times, and one line where they fail."""

import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from segdeformer.cli.main import app
from segdeformer.errors import UserError
from segdeformer.models.downloads import explained_download

ROOT = Path(__file__).parents[1]
CLIENT = logging.getLogger("huggingface_hub.utils._http")
FAILED = (
    "the weights of `resnet18` could not be downloaded (ConnectionError); without a network, set "
    "encoder.weights to a .safetensors or .pth file in timm's names"
)


def stand_in(tries: list[int]) -> None:
    """What the hub's client does without a network, but for its naps."""
    for number in range(1, 6):
        tries.append(number)
        CLIENT.warning("'no route' thrown while requesting HEAD https://huggingface.co/x")
        CLIENT.warning(f"Retrying in {number}s [Retry {number}/5].")
    raise OSError("gave up")


def test_a_download_ends_at_the_third_try_with_one_line(capfd):
    logger = logging.getLogger("huggingface_hub")
    before = (logger.level, logger.handlers, logger.propagate)
    tries: list[int] = []
    with pytest.raises(UserError) as refused, explained_download("resnet18"):
        stand_in(tries)
    assert tries == [1, 2, 3]
    assert str(refused.value) == FAILED
    assert (logger.level, logger.handlers, logger.propagate) == before
    assert capfd.readouterr() == ("", "")


def test_a_download_that_works_at_the_second_try_is_silent_and_errors_are_heard():
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    try:
        with explained_download("resnet18"):
            CLIENT.warning("Retrying in 1s [Retry 1/5].")
            CLIENT.error("a real error")
    finally:
        logger.removeHandler(handler)
    assert heard == ["a real error"]


def test_train_says_what_it_downloads_first(tmp_path, monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *_arguments, **_options: stand_in([]))
    recipe = tmp_path / "mine.toml"
    shown = CliRunner().invoke(app, ["recipes", "folder-pretrained"]).stdout
    recipe.write_text(shown)
    name = tomllib.loads(shown)["model"]["encoder"]["name"]
    monkeypatch.chdir(tmp_path)
    options = ["--data", "synthetic", "--weights", "timm", "--workers", "0", "--out", "run"]
    result = CliRunner().invoke(app, ["train", str(recipe), *options])
    line = f"encoder weights: `{name}` of timm, downloaded unless they are on this machine already"
    assert line in result.stdout
    assert result.exit_code == 1
    assert result.stderr == f"error: {FAILED.replace('resnet18', name)}\n"


@pytest.mark.parametrize(("own", "expected"), [({}, "5"), ({"HF_HUB_ETAG_TIMEOUT": "17"}, "17")])
def test_the_hubs_client_waits_briefly_unless_the_user_says_otherwise(own, expected):
    env = (
        {k: v for k, v in os.environ.items() if k != "HF_HUB_ETAG_TIMEOUT"} | {"PYTHONPATH": str(ROOT)} | own
    )
    code = (
        "import sys, segdeformer.cli.main; assert 'huggingface_hub' not in sys.modules;"
        "from huggingface_hub import constants; print(constants.HF_HUB_ETAG_TIMEOUT)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"
