"""Every kernel compiles for every kind of card, on a machine without any."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segdeformer.kernels.tiles import ARCHITECTURES

AOT = Path(__file__).parent.parent / "benchmarks" / "aot.py"
PRODUCTS = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "gfx942": "v_mfma",
}


@pytest.mark.parametrize("architecture", PRODUCTS)
def test_the_decoders_own_widths_compile_within_the_card(architecture, tmp_path):
    """The whole gate, all widths and float32, is `make aot`, which .ci/run calls."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, AOT, "--only", architecture, "--main", "--json", tmp_path / "aot.json"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())
    assert len(rows) >= 25
    for row in rows:
        assert row["architecture"] == architecture
        assert row["shared_bytes"] <= ARCHITECTURES[architecture].shared_bytes
        assert row["spill_bytes"] <= 64
        if row["kernel"] == "attention_forward_few_keys":
            assert row["instruction"] != "fma", row  # small blocks may use the older ones
        elif row["kernel"].startswith(("attention", "external")):
            assert row["instruction"].startswith(PRODUCTS[architecture]), row


def test_the_gate_refuses_to_pass_in_the_interpreter():
    finished = subprocess.run(
        [sys.executable, AOT],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stderr.strip() == "error: TRITON_INTERPRET=1 is set, so nothing compiles; unset it"
