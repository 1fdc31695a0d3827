"""The table of a study: mean scores, gains over the fusion alone with intervals, sharpness at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from segdeformer.ablation.results import read_image_counts
from segdeformer.files import write_text
from segdeformer.inference.statistics import ImageSums, draws, gain_intervals, image_sums, mious

BASELINE = "fusion only"


def write_table(folder: Path) -> str:
    """Write study.md and study.json of all finished trainings of a setting; the table's text.

    A gain is over the seeds that both have, its interval a bootstrap of seeds and images together.
    """
    found: dict[str, dict[int, Any]] = {}
    sums: dict[str, dict[int, ImageSums]] = {}
    for path in sorted(folder.glob("*/seed-*/results.json")):
        result = json.loads(path.read_text("utf-8"))
        found.setdefault(result["variant"], {})[result["seed"]] = result
        counts = read_image_counts(path.with_name("image_counts.npz")).counts
        sums.setdefault(result["variant"], {})[result["seed"]] = image_sums(counts[None])
    rows = [
        "| start | seeds | mIoU of each | mean | gain over fusion only (95 %) "
        "| deviation and effective keys at the end |",
        "|---|---|---|---|---|---|",
    ]
    order = sorted(found, key=lambda variant: -np.mean([r["miou"] for r in found[variant].values()]))
    for variant in order:
        results = found[variant]
        each = [100 * results[seed]["miou"] for seed in sorted(results)]
        gain = _gain(sums[variant], sums.get(BASELINE, {})) if variant != BASELINE else ""
        sharpness = "; ".join(_sharpness(results[min(results)]["curve"][-1]["sharpness"]))
        shown = ", ".join(f"{miou:.2f}" for miou in each)
        rows.append(f"| {variant} | {len(each)} | {shown} | {np.mean(each):.2f} | {gain} | {sharpness} |")
    text = "\n".join(rows) + "\n"
    write_text(folder / "study.md", text)
    everything = [results[seed] for results in found.values() for seed in sorted(results)]
    write_text(folder / "study.json", json.dumps(everything) + "\n")
    return text


def _gain(ours: dict[int, ImageSums], theirs: dict[int, ImageSums]) -> str:
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return ""
    row, baseline = (_joined([sums[seed] for seed in seeds]) for sums in (ours, theirs))
    gain = 100 * float((mious(row) - mious(baseline)).mean())
    num_seeds, num_images = row.hits_SNK.shape[:2]
    low, high = gain_intervals(row, baseline, draws(num_images, num_seeds)).miou
    return f"{gain:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def _joined(sums: list[ImageSums]) -> ImageSums:
    return ImageSums(*(np.concatenate(parts) for parts in zip(*sums, strict=True)))


def _sharpness(found: list[dict[str, Any]]) -> list[str]:
    return [
        f"{each['name']} {each['score_deviation']:.2f}, {each['effective_keys']:.0f} of {each['num_keys']}"
        for each in found
    ]
