"""What several judges said of a batch of images, and whether one of them is broken.

Shapes: B images, K judges.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from qirl_fast.rewards.judge import FAILED, SCORED, Scored

Span = tuple[float, float]  # begin, end: seconds of time.perf_counter
STATE_ARRAYS = ("scores", "status")


class BadReward(ValueError):
    """A judge returned NaN, infinity or something else than a number a row.

    `judge` is its name, `row` the first such row, `scores` [B] what it returned where those are
    numbers (rows that are not scored NaN).
    """

    def __init__(self, judge: str, row: int, reason: str, scores: np.ndarray | None = None) -> None:
        self.judge, self.row, self.reason, self.scores = judge, row, reason, scores
        super().__init__(f"judge {judge!r}, row {row}: {reason}")

    def verdict(self, names: Sequence[str], rows: int) -> "Verdict":
        """What is known of the batch: this judge's numbers, everything else failed."""
        scores = np.zeros((rows, len(names)), np.float32)
        status = np.full(scores.shape, FAILED, np.int8)
        if self.scores is not None:
            k = list(names).index(self.judge)
            scores[:, k] = self.scores
            status[:, k] = SCORED
        return Verdict(scores, status, {})


@dataclass(frozen=True)
class Verdict:
    """scores float32 [B, K], 0.0 where not scored; status int8 [B, K]; reasons of failed entries,
    by (row, judge's name).
    """

    scores: np.ndarray
    status: np.ndarray
    reasons: dict[tuple[int, str], str]

    @property
    def valid(self) -> np.ndarray:
        """Bool [B, K]: scored. Arithmetic must use the mask."""
        return self.status == SCORED

    @staticmethod
    def of(parts: Sequence["Verdict"]) -> "Verdict":
        """The parts of a batch, in order, as one."""
        starts = np.cumsum([0, *(len(part.scores) for part in parts)]).tolist()
        reasons = {
            (start + row, name): reason
            for start, part in zip(starts, parts, strict=False)
            for (row, name), reason in part.reasons.items()
        }
        scores, status = (np.concatenate([getattr(p, n) for p in parts]) for n in STATE_ARRAYS)
        return Verdict(scores, status, reasons)

    def as_json(self) -> list[Any]:
        """What `from_json` makes the same verdict of."""
        reasons = [[row, name, reason] for (row, name), reason in self.reasons.items()]
        return [self.scores.tolist(), self.status.tolist(), reasons]

    @staticmethod
    def from_json(told: list[Any], judges: int) -> "Verdict":
        """Of this many judges."""
        scores, status, reasons = told
        shape = (len(scores), judges)
        return Verdict(
            np.array(scores, np.float32).reshape(shape),
            np.array(status, np.int8).reshape(shape),
            {(row, name): reason for row, name, reason in reasons},
        )


@dataclass
class Pending:
    """Scores of some rows on their way: one future a judge."""

    names: Sequence[str]
    futures: Sequence[Future[Scored]]
    rows: int

    def result(self) -> Verdict:
        """Wait for all of them. Raises BadReward, of the first such judge."""
        found = [future.result() for future in self.futures]
        reasons = {
            (row, name): reason
            for name, one in zip(self.names, found, strict=True)
            for row, reason in one.reasons.items()
        }
        scores = np.zeros((self.rows, len(found)), np.float32)
        status = np.zeros(scores.shape, np.int8)
        for i, one in enumerate(found):
            scores[:, i], status[:, i] = one.values, one.status
        return Verdict(scores, status, reasons)


def covered(spans: Sequence[Span], within: Sequence[Span] | None = None) -> float:
    """Seconds that the spans cover, each once; within: and that these cover as well."""
    if within is not None:
        both = [(max(a, c), min(b, d)) for a, b in spans for c, d in within]
        return covered([(a, b) for a, b in both if b > a])
    total, end = 0.0, -math.inf
    for a, b in sorted(spans):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total
