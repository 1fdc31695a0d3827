"""What the data doctor says: kinds of findings, how bad each is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

Level = Literal["error", "warning", "note"]

NUM_SHOWN = 3  # files


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


REMEDIES: dict[Level, dict[str, str]] = {  # the worst level first
    "error": {  # Training would stop, or learn or report something wrong.
        "no data": "put images and label maps there, or name the right folder",
        "missing label map": "add the label map, or remove the image",
        "missing image": "add the image, or remove the label map",
        "label map of another format": "save label maps as 8-bit grey PNG; JPEG would change ids",
        "duplicate names": "keep one of the files that differ in their endings only",
        "unreadable image": "copy it again from its source, or remove the pair",
        "unreadable label map": "copy it again from its source, or remove the pair",
        "colours in label map": "save one class id per pixel (8-bit grey PNG), not a coloured picture",
        "lossy label map": "write PNG files from the original ids; JPEG has changed them",
        "sizes differ": "every pixel needs its label; if the edges are swapped, turn one of the two",
        "ids out of range": "write ids of the classes, and 255 for pixels to ignore",
        "all labels look turned": "turn them back, all alike; look at a page of samples (--picture)",
        "zero label": "write id - 1 for the classes and 255 for what is to be ignored",
        "0/255 masks": "write the class id (1, say) instead of 255, which means `ignore`",
        "palettes disagree": "write ids by colour: these indices differ in meaning from file to file",
        "train/val duplicates": "take them out of one split; the score would be too good",
        "same folder": "name a validation split with images of its own",
        "nothing labelled": "check how the label maps were made",
        "one class in all of train": "check how the label maps were made: two classes are needed",
    },
    "warning": {  # Training works, perhaps not as meant.
        "only 0 and 255": "if these are 0/255 masks, write the class id instead of 255",
        "all ignored": "label them, or leave them out: nothing can be learnt from them",
        "labels look misplaced": "look whether the image or its labels were turned or shifted",
        "turned by EXIF": "images are turned when read: labels must be drawn on the turned image",
        "class not in train": "add examples, or take the class out of the table",
        "class only in val": "move examples to train: the class is scored but never learnt",
        "class not in val": "move examples to val: the class would have no score",
        "class that means no label": "write 255 for it, unless it is to be learnt and scored",
        "duplicates in a split": "keep one of each, unless it shall count more",
        "same image, other labels": "keep the right label map",
        "almost the same in train and val": "if these are copies or neighbouring frames, keep each "
        "group in one split",
        "blank images": "copy them again from their source, or remove the pairs",
        "some images are grey": "fine if the model will meet grey images; else find the originals",
        "alpha channel": "alpha is dropped: what is transparent shows its hidden colour",
        "16-bit images": "65536 levels become 256: convert them to 8 bits the way you want",
        "dark 16-bit images": "they use under 4096 of 65536 levels and become black: scale them",
        "other format than the ending": "they can be read; rename them if others shall, too",
        "files left out": "convert them if they belong to the data",
        "some palettes": "indices are taken as ids, not the colours: check one of them",
        "mostly one class": "check the label maps; crops of one class teach little",
    },
    "note": {  # Good to know.
        "one class": "fine if true",
        "all images are grey": "fine: grey becomes three equal channels",
    },
}


def finding(kind: str, split: str, what: str, files: Sequence[object] = (), *, remedy: str = "") -> Finding:
    """A finding of a known kind, with its level, and its remedy unless another is given."""
    level = next(level for level, kinds in REMEDIES.items() if kind in kinds)
    names = tuple(_printable(str(file)) for file in files)
    return Finding(kind, level, split, _printable(what), _printable(remedy) or REMEDIES[level][kind], names)


def findings_of(
    kind: str, split: str, files: Sequence[object], what: str, *, remedy: str = ""
) -> Iterator[Finding]:
    """A finding if there are files with the fault, else none."""
    if files:
        yield finding(kind, split, what, files, remedy=remedy)


def _printable(name: str) -> str:
    """The name with a question mark for what is no text: file names may be any bytes."""
    return name.encode("utf-8", "replace").decode()


def sorted_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, otherwise in the order they were made."""
    return tuple(sorted(findings, key=lambda found: list(REMEDIES).index(found.level)))
