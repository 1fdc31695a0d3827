"""A score with everything that it depends on, as JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

import segdeformer
from segdeformer.config import DataConfig, EvalConfig
from segdeformer.engine.checkpoint import Checkpoint, file_sha256
from segdeformer.engine.evaluate import PROTOCOL_NOTES, Report, report_values
from segdeformer.files import write_text


def write_scorecard(
    path: Path, report: Report, *, protocol: EvalConfig, data: DataConfig, checkpoint: Checkpoint
) -> None:
    """Write scores, protocol, data, the checkpoint's hash and versions to a JSON file."""
    values = {
        "scores": report_values(report),
        "protocol": {**protocol.model_dump(mode="json"), "notes": PROTOCOL_NOTES},
        "data": data.model_dump(mode="json"),
        "checkpoint": {
            "file": str(checkpoint.path),
            "sha256": file_sha256(checkpoint.path),
            "recipe": checkpoint.recipe.name,
            "iteration": checkpoint.iteration,
        },
        "versions": {
            "segdeformer": segdeformer.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    write_text(path, json.dumps(values, indent=2) + "\n")
