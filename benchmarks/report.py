"""The readable side of a results file: a Markdown table, and which goals are met."""

from __future__ import annotations

from typing import Any, NamedTuple

COLUMNS = {  # of `rows` and `decoder`
    "form": "form",
    "ms": "ms queued",
    "eager_ms": "ms eager",
    "tflops": "TFLOP/s",
    "share_of_matmul": "share of matmul",
    "peak_mib": "peak MiB",
    "worst_error": "worst error",
}
UPSAMPLING_COLUMNS = {
    "ms": "ms queued",
    "eager_ms": "ms eager",
    "least_gb_per_s": "GB/s at least",
    "share_of_copy": "share of copy",
    "peak_mib": "peak MiB",
    "worst_error": "worst error",
}


ATTENTION_GOALS = (  # operation, widths, training, how many times faster than SDPA
    ("external", 256, 150, False, 1.5),
    ("external", 256, 150, True, 1.3),
    ("external", 512, 150, False, 3.0),
    ("external", 512, 150, True, 2.5),
    ("external", 256, 19, False, 6.0),
    ("external", 256, 19, True, 5.0),
    ("internal", 256, 150, False, 1.0),
    ("internal", 512, 512, False, 3.0),
    ("internal", 512, 512, True, 2.0),
)


class Goal(NamedTuple):
    """A ratio in one run. measured: None where the run did not get there."""

    text: str
    needed: float
    measured: float | None
    alternative: str = ""  # the fastest of those that are asked
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured <= self.needed if self.at_most else self.measured >= self.needed
        return "met" if met else "not met"


Contenders = dict[str, dict[str, Any]]  # of a row, by name


def goals(table: dict[str, Any]) -> list[Goal]:
    """The project's goals for an H100-class GPU; half precision, batch 1 but for upsampling.

    The low-rank form through SDPA is what `auto` runs where the Triton kernels are not taken.
    """
    found = []
    for operation, width, value_width, training, needed in ATTENTION_GOALS:
        fields = {"operation": operation, "width": width, "value_width": value_width, "training": training}
        row = _contenders(table.get("rows", {}), fields | {"batch": 1})
        what = "forward + backward" if training else "forward"
        forms = ", plain or low rank" if operation == "external" else ""
        text = f"{operation} ({width}, {value_width}) {what}, times the fastest SDPA{forms}"
        found.append(Goal(text, needed, *_ratio(row, "ours (triton)", "sdpa")))
    decoder = table.get("decoder", {})
    folded = decoder.get("256, 150, inference", {}).get("contenders", {})
    for name, first_words, needed in (
        ("textbook eager", "textbook", 10.0),
        ("the faster one through SDPA, plain or low rank, unfolded", "sdpa, unfolded", 1.4),
    ):
        text = f"whole folded decoder (256, 150), times {name}"
        found.append(Goal(text, needed, *_ratio(folded, "folded", first_words)))
    peaks = decoder.get("256, 150, training memory", {}).get("contenders", {})
    ratio, _ = _ratio(peaks, "segformer", "unfolded", of="peak_mib")
    found.append(Goal("peak memory of forward + backward, times SegFormer's", 2.0, ratio, at_most=True))
    return found + _upsampling_goals(table)


def _upsampling_goals(table: dict[str, Any]) -> list[Goal]:
    """Of 150 classes in half precision, batch 16, against the two textbook lines."""
    halves = {n: row for n, row in table.get("upsampling", {}).items() if row.get("dtype") != "torch.float32"}
    loss = _contenders(halves, {"operation": "loss", "num_classes": 150, "training": True})
    argmax = _contenders(halves, {"operation": "argmax", "num_classes": 150, "training": False})
    timed = {name: c for name, c in loss.items() if "ms" in c}
    ours, compiled = "ours (triton)", "torch.compile"
    what = "upsampled loss, forward + backward, times"
    memory, _ = _ratio(timed, "eager", ours, of="peak_mib")
    return [
        Goal("upsampled loss, extra memory, times eager", 0.05, memory, at_most=True),
        Goal(f"{what} eager", 2.0, _ratio(loss, ours, "eager")[0]),
        Goal(f"{what} torch.compile", 2.0, _ratio(loss, ours, compiled)[0]),
        Goal(
            "upsampled argmax, times the faster of eager and torch.compile",
            3.0,
            _ratio(argmax, ours, ("eager", compiled))[0],
        ),
    ]


def _contenders(rows: dict[str, Any], wanted: dict[str, Any]) -> Contenders:
    """Those of the first row with these fields that was measured."""
    for row in rows.values():
        if "contenders" in row and wanted.items() <= row.items():
            return dict(row["contenders"])
    return {}


def _ratio(
    contenders: Contenders, ours: str, first_words: str | tuple[str, ...], *, of: str = "ms"
) -> tuple[float | None, str]:
    """How many times faster ours is than the fastest of those whose names begin so, and which that is."""
    numbers = {name: c[of] for name, c in contenders.items() if c.get(of)}
    alternatives = {name: number for name, number in numbers.items() if name.startswith(first_words)}
    if ours not in numbers or not alternatives:
        return None, ""
    fastest = min(alternatives, key=alternatives.__getitem__)
    return alternatives[fastest] / numbers[ours], fastest


def goals_lines(table: dict[str, Any]) -> list[str]:
    """The goals as a Markdown table."""
    lines = ["| goal | needed | measured | |", "|---|---|---|---|"]
    for goal in goals(table):
        sign = "<=" if goal.at_most else ">="
        verdict = "rehearsed" if table["hardware"]["name"] == "interpreter" else goal.verdict
        measured = "" if goal.measured is None else f"{goal.measured:.2f}"
        measured += f" ({goal.alternative})" if goal.alternative else ""
        lines.append(f"| {goal.text} | {sign} {goal.needed:g} | {measured} | {verdict} |")
    return lines


def markdown(table: dict[str, Any]) -> str:
    """Everything in a results file, to read."""
    hardware, versions = table["hardware"], table["versions"]
    lines = [
        f"# {hardware['name']}, {table['date']}",
        "",
        ", ".join(f"{name} {value}" for name, value in {**hardware, **versions}.items() if name != "name")
        + f", commit {table['commit']}, kernels {table['sources']}",
        "",
    ]
    if hardware["name"] == "interpreter":
        lines += [
            "A rehearsal of the code on a CPU with tiny shapes: **no number here is a measurement.**",
            "",
        ]
    if "ceilings" in table:
        lines += [", ".join(f"{name} {value:,}" for name, value in table["ceilings"].items()), ""]
    lines += ["## Goals", "", GOALS_NOTE, "", *goals_lines(table), ""]
    lines += ["## Checks against float64", "", checks_line(table), ""]
    for name, entry in table.get("checks", {}).items():
        lines += [f"- {name}: {failure}" for failure in entry.get("failures", [])]
    lines += ["", "## Rows", "", ROWS_NOTE, "", *_table_head(COLUMNS)]
    for section in ("rows", "decoder"):
        for name, entry in table.get(section, {}).items():
            lines += _row_lines(name, _with_shares(entry, table), COLUMNS)
    lines += ["", "## Upsampled logits", "", UPSAMPLING_NOTE, "", *_table_head(UPSAMPLING_COLUMNS)]
    for name, entry in table.get("upsampling", {}).items():
        lines += _row_lines(name, _with_shares(entry, table), UPSAMPLING_COLUMNS)
    return "\n".join(lines) + "\n"


GOALS_NOTE = "For an H100-class GPU; half precision; batch 1, of upsampled logits batch 16."
ROWS_NOTE = (
    "Medians of runs in turn, the L2 cache flushed before each. Queued: the device's time, the host ahead; "
    "eager: one call at a time until the device is done, so the host's work counts. FLOPs are of each "
    "contender's form: plain, C-wide keys and values over N x M scores; low rank, K-wide ones. Widths that "
    "SDPA or FlexAttention does not take are padded beforehand: outside of the timing, not counted. Peak "
    "memory is above the inputs."
)
UPSAMPLING_NOTE = (
    "Names have (batch, classes, side of the map -> of the image). `eager` and `torch.compile` are the two "
    "lines F.interpolate and F.cross_entropy or argmax. GB/s are of what any way must move at least: logits, "
    "labels or ids, and in training the gradient; the share is of a large copy's. Errors: of the loss or of "
    "a place's slopes, relative; of an argmax by how much of the largest logit it is too low."
)


def checks_line(table: dict[str, Any]) -> str:
    """How many checks there were and how they went."""
    entries = table.get("checks", {}).values()
    cases = sum(entry.get("num_cases", 0) for entry in entries)
    failures = sum(len(entry.get("failures", [])) for entry in entries)
    groups = f"{len(entries)} of {table.get('num_check_groups', '?')} groups"
    return f"{groups}, {cases} cases, {failures} failures."


def _table_head(columns: dict[str, str]) -> list[str]:
    titles = ["row", "contender", *columns.values()]
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]


def _row_lines(name: str, entry: dict[str, Any], columns: dict[str, str]) -> list[str]:
    if "contenders" not in entry:
        return [f"| {name} | {entry.get('skipped', '')} |" + " |" * len(columns)]
    lines = []
    for contender, c in entry["contenders"].items():
        cells = {key: _cell(c.get(key)) for key in columns}
        if "refused" in c:
            cells["ms"] = f"no: {_cell(c['refused'])}"
        lines.append(f"| {name} | {contender} | " + " | ".join(cells.values()) + " |")
    return lines


def _with_shares(entry: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """The entry with each contender's share of what the machine can do."""
    limits = table.get("ceilings", {})
    dtype = str(entry.get("dtype")).removeprefix("torch.")
    of = {
        "share_of_matmul": ("tflops", f"matmul_tflops_{dtype}"),
        "share_of_copy": ("least_gb_per_s", "copy_gb_per_s"),
    }
    contenders = {
        name: c | {share: c[x] / limits[y] for share, (x, y) in of.items() if x in c and y in limits}
        for name, c in entry.get("contenders", {}).items()
    }
    return entry | {"contenders": contenders} if contenders else entry


def _cell(content: str | float | None) -> str:
    if content is None:
        return ""
    return content.replace("|", "/")[:160] if isinstance(content, str) else f"{content:.4g}"
