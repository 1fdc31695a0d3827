"""Readers of damaged files, a few hundred of them; `python -m benchmarks.fuzz` takes ten thousand."""

import numpy as np
import pytest

from benchmarks import fuzz
from benchmarks.fuzz import Reader, faults, mutated
from segdeformer.errors import UserError


def test_no_damaged_file_is_a_traceback_a_hang_or_a_lot_of_memory(tmp_path):
    assert list(faults(1800, 1, tmp_path / "kept")) == []
    assert not (tmp_path / "kept").exists()


def test_a_reader_that_fails_is_found_and_its_file_kept(tmp_path, monkeypatch):
    def read(path):
        data = path.read_bytes()
        if data == b"good":
            return
        raise UserError("one line") if len(data) % 2 else ValueError("a traceback")

    monkeypatch.setattr(fuzz, "readers", lambda folder: {"a": Reader(read, {"f.bin": b"good"})})
    found = list(faults(40, 0, tmp_path / "kept"))
    assert found
    assert {fault.what for fault in found} == {"ValueError: a traceback"}
    for fault in found:
        with pytest.raises(ValueError, match="a traceback"):
            read(fault.file)


def test_a_mutation_is_a_function_of_its_random_numbers_and_changes_something():
    seed = bytes(range(256))
    first, again, other = (mutated(seed, np.random.default_rng(key)) for key in (3, 3, 4))
    assert first == again != other
    assert first != seed
    assert mutated(b"", np.random.default_rng(0)) is not None
