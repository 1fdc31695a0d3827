"""A score with everything that it depends on, as JSON."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from segdeformer.config import DataConfig, EvalConfig
from segdeformer.data.samples import LabelMap
from segdeformer.files import write_json
from segdeformer.inference.evaluate import Report, protocol_notes, report_values
from segdeformer.version import __version__
from segdeformer.weights.checkpoint import Checkpoint, file_sha256


def versions() -> dict[str, str]:
    """What a score was made with."""
    return {"segdeformer": __version__, "torch": torch.__version__, "python": platform.python_version()}


def write_scorecard(
    path: Path,
    report: Report,
    *,
    protocol: EvalConfig,
    data: DataConfig,
    label_map: LabelMap,
    checkpoint: Checkpoint,
    **more: object,
) -> None:
    """Write scores, protocol, data, the checkpoint's hash and versions, and what more is given, as JSON."""
    values = {
        "scores": report_values(report),
        "protocol": {**protocol.model_dump(mode="json"), "notes": protocol_notes(protocol)},
        "data": data.model_dump(mode="json"),
        "label_map": {str(in_file): class_id for in_file, class_id in sorted(label_map.items())},
        "checkpoint": {
            "file": str(checkpoint.path),
            "sha256": file_sha256(checkpoint.path),
            "recipe": checkpoint.recipe.name,
            "iteration": checkpoint.iteration,
            "license": checkpoint.license,
        },
        "versions": versions(),
        **more,
    }
    write_json(path, values)
