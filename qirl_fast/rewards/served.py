"""A judge behind a queue: requests of `wire`, one after the other, on a thread of its own.

A sound answer is kept for a while under its question, so that a question asked again, because its
answer was lost or took too long, is not computed again. Images of one size are judged together;
rows that fail together are asked again alone, so that one bad row does not fail its neighbours.
"""

import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from qirl_fast.rewards import wire_answer
from qirl_fast.rewards.judge import FAILED, SCORED, Row, Scored
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.verdict import BadReward
from qirl_fast.rewards.wire import Limits, Question, decode

KEPT = 256
STATE_ARRAYS = ("values", "status")


@dataclass(frozen=True)
class Answer:
    """body: of `wire_answer`; rows: how many were scored, failed, missing; seconds: it took."""

    body: bytes
    rows: Counter[str]
    seconds: float


def read(body: bytes | bytearray, limits: Limits) -> tuple[str, Question]:
    """(key, question): equal keys are one question. WireError as in `wire.decode`."""
    question = decode(memoryview(body), limits)
    return f"{question.request} {hashlib.sha256(body).hexdigest()}", question


def score_rows(judges: Judges, images: Sequence[np.ndarray], rows: Sequence[Row]) -> Scored:
    """Scores of images uint8 [h, w, 3], whose sizes may differ, by the one judge in `judges`."""
    values, status = np.zeros(len(rows), np.float32), np.full(len(rows), FAILED, np.int8)
    reasons: dict[int, str] = {}
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, (image, row) in enumerate(zip(images, rows, strict=True)):
        refused = [why for _, why in judges.check_row(row, {})]
        if refused:
            reasons[i] = refused[0]
        else:
            by_size.setdefault(image.shape, []).append(i)
    for which in by_size.values():
        got = _together(judges, [images[i] for i in which], [rows[i] for i in which])
        values[which], status[which] = got.values, got.status
        reasons.update({which[i]: reason for i, reason in got.reasons.items()})
    return Scored(values, status, reasons)


def _together(judges: Judges, images: list[np.ndarray], rows: list[Row]) -> Scored:
    """Scores of images of one size; those that a broken judge spoils, alone."""
    try:
        verdict = judges.score(np.stack(images), rows)
    except BadReward as error:
        if len(rows) == 1:
            return Scored(np.zeros(1, np.float32), np.full(1, FAILED, np.int8), {0: error.reason})
        alone = [_together(judges, [image], [row]) for image, row in zip(images, rows, strict=True)]
        reasons = {i: one.reasons[0] for i, one in enumerate(alone) if one.reasons}
        values, status = (np.concatenate([getattr(a, n) for a in alone]) for n in STATE_ARRAYS)
        return Scored(values, status, reasons)
    reasons = {row: reason for (row, _), reason in verdict.reasons.items()}
    return Scored(verdict.scores[:, 0], verdict.status[:, 0], reasons)


class Served:
    """judges: of one judge. For one event loop: `ask` is not for several threads."""

    def __init__(self, judges: Judges, kept: int = KEPT) -> None:
        self._judges, self._kept = judges, kept
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="served")
        self._answers: OrderedDict[str, Future[Answer]] = OrderedDict()

    def ask(self, key: str, question: Question) -> tuple[Future[Answer], bool]:
        """The answer, on its way or there, and whether it is computed for this very call.

        The future raises WireError where an image's pixels are damaged.
        """
        known = self._answers.get(key)
        if known is not None and not (known.done() and known.exception()):
            self._answers.move_to_end(key)
            return known, False
        future = self._answers[key] = self._thread.submit(self._answer, question)
        done = [key for key, one in self._answers.items() if one.done()]
        for old in done[: max(0, len(done) - self._kept)]:
            del self._answers[old]
        return future, True

    @property
    def busy(self) -> bool:
        """Whether an answer is being computed, or waits to be."""
        return not all(future.done() for future in self._answers.values())

    def close(self) -> None:
        """Wait for the answer under way, and let the judge release what it holds."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._judges.close()

    def _answer(self, question: Question) -> Answer:
        images, rows = question.unpack()
        begin = time.perf_counter()
        scored = score_rows(self._judges, images, rows)
        seconds = time.perf_counter() - begin
        counts = Counter(wire_answer.WORDS[state] for state in scored.status.tolist())
        assert np.isfinite(scored.values[scored.status == SCORED]).all()
        return Answer(wire_answer.encode(question.request, question.ids, scored), counts, seconds)
