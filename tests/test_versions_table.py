"""The table of tested versions: what pytest says is counted, and rows that were not run again stay."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture
def tool(tmp_path, monkeypatch):
    path = Path(__file__).parent.parent / "tools" / "tested_versions.py"
    spec = importlib.util.spec_from_file_location("tested_versions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TABLE", tmp_path / "versions.md")
    return module


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("....\n2279 passed, 3 skipped in 431.20s (0:07:11)\n", (2279, 0, 3)),
        ("= 1 failed, 12 passed, 2 errors in 3.00s =\n", (12, 3, 0)),
        ("make: *** [test] Error 1\n", None),
    ],
)
def test_passed_failed_and_skipped_tests_are_counted(tool, log, expected):
    counts = tool.outcomes(log)
    assert (counts and tuple(counts[name] for name in ("passed", "failed", "skipped"))) == expected


def test_a_row_is_replaced_and_the_others_stay(tool):
    tool.write_table({"newest": "| newest | 3.12 |", "oldest": "| oldest | 3.11 |"})
    tool.write_table({"oldest": "| oldest | 3.13 |"})
    rows = [line for line in tool.TABLE.read_text().splitlines() if line.startswith(("| old", "| new"))]
    assert rows == ["| oldest | 3.13 |", "| newest | 3.12 |"]
