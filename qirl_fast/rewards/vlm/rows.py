"""What holds between the rows of a training file: splits, leaks, tiers (see `data.py`)."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qirl_fast.rewards.vlm.images import BadImage, read_image

SHOWN = 10  # problems of one sort that are listed; the rest are counted


class DataError(ValueError):
    """A training file that cannot be used; one line a problem, each naming file:line."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = len(problems) - SHOWN
        lines = [*problems[:SHOWN], *([f"... and {more} more"] if more > 0 else [])]
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Judgement:
    """One row. images: files, result last. score in [1, 5]. where: file:line.
    pixels: SHA-256 of each image's decoded pixels.
    """

    images: tuple[Path, ...]
    text: str
    dimension: str
    rationale: str
    score: float
    category: str | None
    split: str
    where: str
    tier_scores: tuple[tuple[str, float], ...] = ()
    pixels: tuple[str, ...] = ()

    @property
    def cluster(self) -> str:
        """Hash of the normalised prompt: rows of one prompt are not independent."""
        return prompt_hash(self.text)


@dataclass(frozen=True)
class Tiers:
    """The tier rule: `order`, highest first, () for none. See `data.py`."""

    order: tuple[str, ...] = ()
    failed_below: float = 2.5
    cap: float = 2.5
    cap_labels: bool = False


def normalised(text: str) -> str:
    """The text that splits and the leak check go by."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_hash(text: str) -> str:
    """SHA-256 of the normalised text, hexadecimal."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


def split_of(text: str, heldout_share: float) -> str:
    """The split of a prompt that names none."""
    return "heldout" if int(prompt_hash(text)[:16], 16) < heldout_share * 2.0**64 else "train"


def hashed(rows: list[Judgement]) -> list[Judgement]:
    """Decode every image once: unreadable ones are found before training, equal ones by pixels."""
    first: dict[Path, str] = {}
    for row in rows:
        for path in row.images:
            first.setdefault(path, row.where)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(first, pool.map(_digest, first), strict=True))
    problems = [
        f"{first[path]}: image {path}: {error}"
        for path, error in found.items()
        if isinstance(error, BadImage)
    ]
    if problems:
        raise DataError(problems)
    return [replace(row, pixels=tuple(str(found[path]) for path in row.images)) for row in rows]


def _digest(path: Path) -> str | BadImage:
    try:
        image = read_image(path)
    except BadImage as error:
        return error
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def leaks(rows: Sequence[Judgement]) -> Iterator[str]:
    seen: dict[tuple[str, str], dict[str, Judgement]] = defaultdict(dict)
    for row in rows:
        keys = [("prompt", row.cluster), *(("image", digest) for digest in row.pixels)]
        for key in keys:
            seen[key].setdefault(row.split, row)
    for (kind, _), by_split in seen.items():
        if len(by_split) > 1:
            train, heldout = by_split["train"], by_split["heldout"]
            what = f"prompt {train.text[:60]!r}" if kind == "prompt" else "image (by its pixels)"
            yield (
                f"{heldout.where}: the same {what} is in heldout here and in train at "
                f"{train.where}; give both rows one split"
            )


def capped(rows: Sequence[Judgement], tiers: Tiers) -> list[Judgement]:
    scores: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        own = scores[row.cluster, row.pixels]
        for name, score in (*row.tier_scores, (row.dimension, row.score)):
            own[name] = min(score, own.get(name, score))
    kept, problems = [], []
    for row in rows:
        place = tiers.order.index(row.dimension) if row.dimension in tiers.order else 0
        own = scores[row.cluster, row.pixels]
        higher = tiers.order[:place]
        failed = [name for name in higher if own.get(name, 5.0) < tiers.failed_below]
        if failed and row.score > tiers.cap:
            problems.append(
                f"{row.where}: score {row.score:g} in {row.dimension} though {failed[0]} failed "
                f"with {own[failed[0]]:g}; at most {tiers.cap:g}: mend the labels or set "
                "data.tiers.cap_labels"
            )
            row = replace(row, score=tiers.cap)
        kept.append(row)
    if problems and not tiers.cap_labels:
        raise DataError(problems)
    return kept
