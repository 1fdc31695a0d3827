"""What the data doctor says: kinds of findings, how bad each is, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Level = Literal["error", "warning", "note"]

LEVELS: tuple[Level, ...] = ("error", "warning", "note")
NUM_SHOWN = 3


class Advice(NamedTuple):
    """How bad a kind of finding is, and what to do about it."""

    level: Level
    remedy: str


class Finding(NamedTuple):
    """One kind of fault in one split (or across both): what came and what was expected, where, what to do."""

    kind: str
    level: Level
    split: str
    what: str
    remedy: str
    files: tuple[str, ...]

    def shown_files(self) -> str:
        """The first few, and how many more; nothing when the one file is named already."""
        if len(self.files) == 1 and self.files[0] in self.what:
            return ""
        more = len(self.files) - NUM_SHOWN
        return ", ".join(self.files[:NUM_SHOWN]) + (f" and {more:,} more" if more > 0 else "")

    def line(self) -> str:
        """All of it in one line."""
        where = f": {shown}" if (shown := self.shown_files()) else ""
        return f"{self.split}: {self.what}{where}; {self.remedy}"


ADVICE: dict[str, Advice] = {
    # Training would stop, or learn or report something wrong.
    "no data": Advice("error", "put images and label maps there, or name the right folder"),
    "missing label map": Advice("error", "add the label map, or remove the image"),
    "missing image": Advice("error", "add the image, or remove the label map"),
    "label map of another format": Advice(
        "error", "save label maps as 8-bit grey PNG; JPEG would change ids"
    ),
    "duplicate names": Advice("error", "keep one of the files that differ in their endings only"),
    "unreadable image": Advice("error", "copy it again from its source, or remove the pair"),
    "unreadable label map": Advice("error", "copy it again from its source, or remove the pair"),
    "colours in label map": Advice(
        "error", "save one class id per pixel (8-bit grey PNG), not a coloured picture"
    ),
    "lossy label map": Advice("error", "write PNG files from the original ids; JPEG has changed them"),
    "sizes differ": Advice(
        "error", "every pixel needs its label; if the edges are swapped, turn one of the two"
    ),
    "ids out of range": Advice("error", "write ids of the classes, and 255 for pixels to ignore"),
    "all labels look turned": Advice(
        "error", "turn them back, all alike; look at a page of samples (--picture)"
    ),
    "zero label": Advice("error", "write id - 1 for the classes and 255 for what is to be ignored"),
    "0/255 masks": Advice("error", "write the class id (1, say) instead of 255, which means `ignore`"),
    "palettes disagree": Advice(
        "error", "write ids by colour: these indices differ in meaning from file to file"
    ),
    "train/val duplicates": Advice("error", "take them out of one split; the score would be too good"),
    "same folder": Advice("error", "name a validation split with images of its own"),
    "nothing labelled": Advice("error", "check how the label maps were made"),
    "one class in all of train": Advice(
        "error", "check how the label maps were made: two classes are needed"
    ),
    # Training works, perhaps not as meant.
    "only 0 and 255": Advice("warning", "if these are 0/255 masks, write the class id instead of 255"),
    "all ignored": Advice("warning", "label them, or leave them out: nothing can be learnt from them"),
    "labels look misplaced": Advice("warning", "look whether the image or its labels were turned or shifted"),
    "turned by EXIF": Advice(
        "warning", "images are turned when read: labels must be drawn on the turned image"
    ),
    "class not in train": Advice("warning", "add examples, or take the class out of the table"),
    "class only in val": Advice("warning", "move examples to train: the class is scored but never learnt"),
    "class not in val": Advice("warning", "move examples to val: the class would have no score"),
    "class that means no label": Advice("warning", "write 255 for it, unless it is to be learnt and scored"),
    "duplicates in a split": Advice("warning", "keep one of each, unless it shall count more"),
    "same image, other labels": Advice("warning", "keep the right label map"),
    "almost the same in train and val": Advice(
        "warning", "if these are copies or neighbouring frames, keep each group in one split"
    ),
    "blank images": Advice("warning", "copy them again from their source, or remove the pairs"),
    "some images are grey": Advice(
        "warning", "fine if the model will meet grey images; else find the originals"
    ),
    "alpha channel": Advice("warning", "alpha is dropped: what is transparent shows its hidden colour"),
    "16-bit images": Advice("warning", "65536 levels become 256: convert them to 8 bits the way you want"),
    "dark 16-bit images": Advice(
        "warning", "they use under 4096 of 65536 levels and become black: scale them"
    ),
    "other format than the ending": Advice("warning", "they can be read; rename them if others shall, too"),
    "files left out": Advice("warning", "convert them if they belong to the data"),
    "some palettes": Advice("warning", "indices are taken as ids, not the colours: check one of them"),
    "mostly one class": Advice("warning", "check the label maps; crops of one class teach little"),
    # Good to know.
    "one class": Advice("note", "fine if true"),
    "all images are grey": Advice("note", "fine: grey becomes three equal channels"),
}


def finding(kind: str, split: str, what: str, files: Sequence[object] = (), *, remedy: str = "") -> Finding:
    """A finding of a known kind, with its level, and its remedy unless another is given."""
    advice = ADVICE[kind]
    names = tuple(printable(str(file)) for file in files)
    return Finding(kind, advice.level, split, printable(what), printable(remedy) or advice.remedy, names)


def printable(name: str) -> str:
    """The name with a question mark for what is no text: file names may be any bytes."""
    return name.encode("utf-8", "replace").decode()


def sorted_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The worst first, otherwise in the order they were made."""
    return tuple(sorted(findings, key=lambda found: LEVELS.index(found.level)))
