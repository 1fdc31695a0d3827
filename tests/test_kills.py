"""A run that is killed again and again ends as the one that was left alone (`benchmarks/kills.py`)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.kills import differences, go_on

ROOT = Path(__file__).parents[1]


def test_five_kills_change_no_bit_and_leave_nothing_half_written(tmp_path):
    report = tmp_path / "kills.json"
    options = ("--kills", "5", "--iterations", "18", "--json", str(report))
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads(report.read_text())
    assert found["kills"] == len(found["lives"]) == 5
    assert found["faults"] == []


def test_the_comparison_sees_every_difference(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    go_on(unbroken, iterations=3, workers=0)
    shutil.copytree(unbroken, broken)
    assert differences(broken, unbroken) == []
    for name in ("checkpoints/.writing-000003-9", ".best.safetensors.9.tmp"):
        (broken / name).touch()
    best = broken / "best.safetensors"
    best.write_bytes(best.read_bytes()[:-1] + b"\x01")
    (broken / "metrics.jsonl").write_text("")
    assert sorted(differences(broken, unbroken)) == sorted(
        [
            f"{broken}/checkpoints/.writing-000003-9 is left",
            f"{broken}/.best.safetensors.9.tmp is left",
            f"{best} differs from {unbroken}/best.safetensors",
            f"{broken}: another diary",
        ]
    )
