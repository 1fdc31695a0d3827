"""The gate of the kernels' compiled code: a sample here, all of it with every Triton version in .ci/run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segdeformer.kernels.tiles import ARCHITECTURES, default_tile
from segdeformer.kernels.tuning.resources import Resources

ROOT = Path(__file__).parent.parent
SAMPLE = [
    ("attention_forward", 256, 150),
    ("external_forward", 19, 19),
    ("external_backward_keys", 150, 150),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the installed Triton makes of some default tiles for sm_90, and of small ones."""
    card = ARCHITECTURES["sm_90"]
    cases = [
        [kernel, d, e, 2, card.name, default_tile(kernel, *padded, 2, card), True]
        for (kernel, d, e), padded in zip(SAMPLE, [(256, 160), (32, 32), (160, 160)], strict=True)
    ]
    cases.append(["external_forward", 19, 19, 2, card.name, [64, 64, 4, 2, False, False], True])
    cases.append(["external_forward", 150, 150, 2, card.name, [64, 128, 4, 2, False, False], True])
    folder = tmp_path_factory.mktemp("aot")
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.versions", folder / "cases.json", folder / "answers.json"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
        check=True,
    )
    _, answers, errors = json.loads((folder / "answers.json").read_text())
    assert errors == []
    return [Resources(*resources) for _, resources in answers]


def test_default_tiles_fit_the_card_and_use_its_matrix_instruction(compiled):
    for resources in compiled:
        assert resources.resident_blocks(ARCHITECTURES["sm_90"]) >= 1, resources
        assert resources.instruction.startswith("wgmma"), resources


def test_small_tiles_share_a_multiprocessor(compiled):
    """Where 128x128 runs alone. By today's compilers five and two; their registers may differ a little."""
    *_, few_classes, many_classes = (r.resident_blocks(ARCHITECTURES["sm_90"]) for r in compiled)
    assert few_classes >= 4
    assert many_classes >= 2


def test_the_gate_refuses_to_pass_in_the_interpreter():
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stderr.strip() == "error: TRITON_INTERPRET=1 is set, so nothing compiles; unset it"
