"""The judge itself, the same for both engines: asks, reads, averages, and says what failed.

A row's score depends on its image, its condition images and its prompt alone. With n > 1
reasonings each is sampled with a seed made from those and its number, and the row's score is the
mean over its reasonings; a row with a failed one has failed, so that every score means the same.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qirl_fast.rewards.judge import FAILED, SCORED, Row, Scored
from qirl_fast.rewards.sources import condition_images, picture
from qirl_fast.rewards.vlm.rubric import LEAD, question
from qirl_fast.rewards.vlm.score import CANDIDATES, Reading, Unreadable, read_text, read_tokens

LIKELY_ELSEWHERE = 0.5  # more probability than this outside the candidates is worth a warning

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """One row's question. images: uint8 [h, w, 3] each, condition images first. text: what
    stands after them. candidates: tokens whose probability is wanted, () for the text alone.
    lead: what the answer token stands right after, "" for an answer straight away. reasonings: 0,
    1 (greedy), or more, sampled with one of `seeds` each.
    """

    images: tuple[np.ndarray, ...]
    text: str
    candidates: tuple[str, ...]
    lead: str
    reasonings: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """One reasoning's outcome. text: what was written, up to the answer token where there is one.
    logprobs: natural log-probabilities at the answer token, least: that of the least likely token
    listed, None where every candidate is. closed: the reasoning did not come to its end and the
    line with the score was begun for it.
    """

    text: str
    logprobs: Mapping[str, float] = field(default_factory=dict)
    least: float | None = None
    closed: bool = False


class Engine(Protocol):
    """Where the model runs: one entry an ask, its answers or the reason why there are none."""

    def ask(self, asks: Sequence[Ask]) -> list[list[Answer] | str]: ...


@dataclass(frozen=True)
class How:
    """How a judge asks: see the settings of `local` and `openai`."""

    dimension: str
    rubric: str
    reading: str
    reasonings: int
    max_spread: float = 0.25


class Scorer:
    """Judge of one dimension (contract: `qirl_fast.rewards.judge`) on an engine.

    `last` holds what the latest call saw: `outside` (mean probability outside the candidates),
    `closed` and `reasonings` (counts), `spread` (the widest), by name. `repeats`: the readings of
    the latest call, row by row, empty for failed rows.
    """

    def __init__(self, engine: Engine, how: How) -> None:
        if how.reading == "yes_no" and how.reasonings:
            raise ValueError("reading yes_no asks for one word at once; set reasonings to 0")
        if how.reading == "integer" and not how.reasonings:
            raise ValueError("reading integer reads a written answer; set reasonings to 1 or more")
        self.engine, self.how = engine, how
        self._told = False
        self.last: dict[str, float] = {}
        self.repeats: list[tuple[Reading, ...]] = []

    def check_row(self, row: Row) -> None:
        """ValueError for a prompt, or for an edit without its source, that can never be judged."""
        self._text(row)
        self._sources(row)

    def __call__(self, images_BHW3: np.ndarray, metadata: list[Row]) -> Scored:
        """Scores in [1, 5] of uint8 images [B, H, W, 3]; failed rows carry their reason."""
        if images_BHW3.dtype != np.uint8 or images_BHW3.ndim != 4 or images_BHW3.shape[3] != 3:
            raise ValueError(
                f"got images {images_BHW3.dtype} {list(images_BHW3.shape)}; wanted uint8 "
                "[B, H, W, 3]"
            )
        if len(metadata) != len(images_BHW3):
            raise ValueError(f"got {len(images_BHW3)} images and {len(metadata)} metadata rows")
        return self.score_rows(list(images_BHW3), metadata)

    def score_rows(self, images: Sequence[np.ndarray], metadata: Sequence[Row]) -> Scored:
        """The same for images uint8 [h, w, 3] of any sizes."""
        reasons: dict[int, str] = {}
        asks: dict[int, Ask] = {}
        for i, (image, row) in enumerate(zip(images, metadata, strict=True)):
            try:
                asks[i] = self._ask(image, row)
            except ValueError as error:
                reasons[i] = str(error)
        answers = self.engine.ask(list(asks.values())) if asks else []
        values = np.zeros(len(images), np.float32)
        repeats: list[tuple[Reading, ...]] = [()] * len(images)
        closed = 0
        for i, got in zip(asks, answers, strict=True):
            if isinstance(got, str):
                reasons[i] = got
                continue
            closed += sum(answer.closed for answer in got)
            try:
                repeats[i] = tuple(self._read(answer) for answer in got)
            except Unreadable as error:
                reasons[i] = str(error)
                continue
            values[i] = np.mean([reading.value for reading in repeats[i]], dtype=np.float64)
        self.repeats = repeats
        self._note(repeats, closed)
        status = [FAILED if i in reasons else SCORED for i in range(len(images))]
        return Scored(values, np.array(status, np.int8), dict(sorted(reasons.items())))

    def _text(self, row: Row) -> str:
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise ValueError(f"the row's prompt is {prompt!r}; wanted text")
        return question(self.how.dimension, prompt, self.how.rubric, self.how.reading)

    def _sources(self, row: Row) -> list[np.ndarray]:
        """The condition images that the dimension asks for: those of an edit, else none."""
        if self.how.dimension != "instruction":
            return []
        return condition_images(row)

    def _ask(self, image: np.ndarray, row: Row) -> Ask:
        text = self._text(row)
        pictures = (*self._sources(row), picture(image))
        reading, n = self.how.reading, self.how.reasonings
        seeds = tuple(_seed(pictures, text, j) for j in range(n)) if n > 1 else ()
        lead = LEAD if reading == "expected" else ""
        return Ask(pictures, text, tuple(CANDIDATES[reading]), lead, n, seeds)

    def _read(self, answer: Answer) -> Reading:
        if self.how.reading == "integer":
            return read_text(answer.text)
        reading = read_tokens(self.how.reading, answer.logprobs, answer.least)
        if reading.spread > self.how.max_spread:
            raise Unreadable(
                f"the score is known to {reading.spread:.2f} only, more than max_spread "
                f"{self.how.max_spread:g}: too few of the score tokens are among the listed ones; "
                "raise top_logprobs"
            )
        return reading

    def _note(self, repeats: Sequence[tuple[Reading, ...]], closed: int) -> None:
        flat = [reading for row in repeats for reading in row]
        self.last = {"reasonings": float(len(flat)), "closed": float(closed)}
        if not flat:
            return
        outside = float(np.mean([reading.outside for reading in flat]))
        self.last |= {"outside": outside, "spread": max(reading.spread for reading in flat)}
        log.info(
            "%s: probability outside the answer tokens %.3g, %d of %d reasonings closed",
            self.how.dimension,
            outside,
            closed,
            len(flat),
        )
        if outside > LIKELY_ELSEWHERE and not self._told:
            self._told = True
            log.warning(
                "%s: the model gives %.0f %% of its probability to other tokens than an answer; "
                "it is not trained for this question",
                self.how.dimension,
                100.0 * outside,
            )


def _seed(images: Sequence[np.ndarray], text: str, number: int) -> int:
    """63 bits from a row's content and the number of the reasoning."""
    digest = hashlib.sha256(struct.pack("<q", number))
    for image in images:
        digest.update(struct.pack("<qq", *image.shape[:2]))
        digest.update(image.tobytes())
    digest.update(text.encode())
    return int.from_bytes(digest.digest()[:8], "little") >> 1
