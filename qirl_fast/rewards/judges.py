"""Several named judges on one batch of images: built, checked, asked, asked again.

A name is one of JUDGES, a dotted path "package.module:function", or one the recipe's `judges`
section describes (`kinds.py`). What a judge gives back is checked:
- failed rows (the judge raised, or said so) are asked again `reask` times, each by itself, so that
  one bad row does not fail the others, then stay FAILED; those of a judge that waits (below) are
  not, as it asks again by itself until its deadline;
- a judge that returns NaN, infinity or another shape is broken: BadReward, which stops the step.
The first exception of each wording is logged with its traceback.

Judges that only wait, such as a remote one (attribute `waits = True`), have a thread each; the
others share one, in order, since they may draw from global generators. Chunks are judged in the
order in which they were submitted.

Shapes: B images, K judges.
"""

import copy
import difflib
import importlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from qirl_fast.rewards import aesthetics, alignment, editing, geneval, monitors
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, Judge, Row, RowsWith, Scored, Stateful
from qirl_fast.rewards.kinds import JudgeSettings, build
from qirl_fast.rewards.verdict import BadReward, Pending, Span, Verdict

JUDGES: dict[str, Judge] = {
    "alignment": RowsWith("include", alignment.score, alignment.check_row),
    "aesthetics": aesthetics.score,
    "geneval": RowsWith("include", geneval.score, alignment.check_row),
    "edit_accuracy": RowsWith("target", editing.score, editing.check_row),
    "sharpness": monitors.sharpness,
    "grid_artefacts": monitors.grid_artefacts,
}

MONITORS = ("sharpness", "grid_artefacts")  # to be watched: noise and blur would satisfy them

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


def resolve(name: str, specs: Mapping[str, JudgeSettings] | None = None) -> Judge | None:
    """The judge of a name in JUDGES or of a dotted path; None for a name in `specs`, unbuilt.

    ValueError when there is none, naming the nearest known name or what the module lacks.
    """
    specs = specs or {}
    if name in specs:
        return None
    if name in JUDGES:
        return JUDGES[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        known = [*JUDGES, *specs]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no judge is called {name!r}: {hint}known are {', '.join(known)}, any dotted path "
            "'package.module:function', and what the section `judges` describes"
        )
    try:
        judge = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # a module may raise anything while it is imported
        raise ValueError(f"judge {name!r}: cannot import {module_name!r} ({error!r})") from error
    if not callable(judge):
        raise ValueError(f"judge {name!r}: module {module_name!r} has no function {attribute!r}")
    return judge


@dataclass
class Judges:
    """names: in the order of the columns. specs: the recipe's judges by name.

    reask: times a failed row is asked again. Since `begin`: `busy`, when each of them worked;
    `seconds`, how long by name; `queue`, at each submission how many before it were not through.
    Raises ValueError for an unknown name, and what a judge raises while it is built.
    """

    names: Sequence[str]
    specs: Mapping[str, JudgeSettings] = field(default_factory=dict)
    device: str = "cpu"
    reask: int = 0

    def __post_init__(self) -> None:
        for name in self.names:
            resolve(name, self.specs)  # every name before any model is loaded
        self.judges: dict[str, Any] = {
            name: resolve(name, self.specs) or build(self.specs[name], self.device)
            for name in self.names
        }
        self.busy: list[Span] = []
        self.seconds: dict[str, float] = {}
        self.queue: list[int] = []
        self._asked: deque[list[Future[Scored]]] = deque()
        self._closed = False
        self._shared = ThreadPoolExecutor(1, thread_name_prefix="judges")
        self._threads = {
            name: ThreadPoolExecutor(1, thread_name_prefix=f"judge-{name}")
            if getattr(judge, "waits", False)
            else self._shared
            for name, judge in self.judges.items()
        }

    def begin(self) -> None:
        """Measure anew."""
        self.busy.clear()
        self.seconds.clear()
        self.queue.clear()

    def submit(self, images_BHW3: np.ndarray, metadata: list[Row]) -> Pending:
        """Begin to score; earlier submissions come first."""
        futures = [
            self._threads[name].submit(self._ask, name, images_BHW3, metadata)
            for name in self.names
        ]
        while self._asked and all(future.done() for future in self._asked[0]):
            self._asked.popleft()
        self.queue.append(len(self._asked))
        self._asked.append(futures)
        return Pending(self.names, futures, len(metadata))

    def score(self, images_BHW3: np.ndarray, metadata: list[Row]) -> Verdict:
        """Scores of uint8 images [B, H, W, 3]. Raises BadReward."""
        return self.submit(images_BHW3, metadata).result()

    def _ask(self, name: str, images_BHW3: np.ndarray, metadata: list[Row]) -> Scored:
        begin = time.perf_counter()
        try:
            found = self._once(name, images_BHW3, metadata)
            reasons = dict(found.reasons)
            patient = getattr(self.judges[name], "waits", False)
            for _ in range(0 if patient else self.reask):
                for i in np.flatnonzero(found.status == FAILED).tolist():
                    again = self._once(name, images_BHW3[i : i + 1], [metadata[i]])
                    found.values[i], found.status[i] = again.values[0], again.status[0]
                    if again.status[0] == FAILED:
                        reasons[i] = again.reasons.get(0, reasons.get(i, "no reason given"))
                    else:
                        reasons.pop(i, None)
            for reason in dict.fromkeys(reasons.values()):
                _log_failure(name, reason, "%r failed on an image: %s", reason)
            return Scored(found.values, found.status, reasons)
        finally:
            end = time.perf_counter()
            self.busy.append((begin, end))
            self.seconds[name] = self.seconds.get(name, 0.0) + end - begin  # a name, one thread

    def _once(self, name: str, images_BHW3: np.ndarray, metadata: list[Row]) -> Scored:
        b = len(images_BHW3)
        try:
            result = self.judges[name](images_BHW3, metadata)
        except Exception as error:  # any fault of a judge is that judge's failure, not the run's
            if not self._closed:
                text = "%r failed on a batch of %d images"
                _log_failure(name, repr(error), text, b, exc_info=error)
            failed = np.full(b, FAILED, np.int8)
            return Scored(np.zeros(b, np.float32), failed, dict.fromkeys(range(b), repr(error)))
        return _checked(name, result, b)

    def check_row(self, row: Row, weights: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """(judge, why) for each that can never score a metadata row like this one.

        A judge that masks such rows (`masks`) is passed over where it weighs nothing; weights: of
        the judges for the row, those left out weighing 0.
        """
        for name, judge in self.judges.items():
            check = getattr(judge, "check_row", None)
            if check is None or (getattr(judge, "masks", False) and not weights.get(name, 0)):
                continue
            fault = _fault(check, row)
            if fault is not None:
                yield name, str(fault)

    def useless(self, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
        """(judge, why) for each that can score none of these metadata rows; why: of the first."""
        for name, judge in self.judges.items():
            check = getattr(judge, "check_row", None)
            faults = (
                [] if check is None else list(takewhile(bool, (_fault(check, r) for r in rows)))
            )
            if rows and len(faults) == len(rows):
                yield name, str(faults[0])

    def warnings(self) -> list[str]:
        """What a person should know before these judges are optimised."""
        found = {name: getattr(judge, "warnings", ()) for name, judge in self.judges.items()}
        return [f"judge {name!r}: {text}" for name, texts in found.items() for text in texts]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """A copy of the state of each judge that has one, by name."""
        return {
            name: copy.deepcopy(judge.state_dict())
            for name, judge in self.judges.items()
            if isinstance(judge, Stateful)
        }

    def load_state_dict(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Give judges back what `state_dict` took; ValueError for one that takes none any more."""
        for name, state in states.items():
            judge = self.judges.get(name)
            if not isinstance(judge, Stateful):
                raise ValueError(
                    f"judge {name!r} had a state when it was saved and has no load_state_dict now; "
                    "resume with the judge the run was begun with"
                )
            judge.load_state_dict(copy.deepcopy(state))

    def abandon(self) -> None:
        """Give up what was submitted: the queue is emptied, and judges of this machine, whose state
        may be saved next, have come to rest. One that waits for a server is not waited for.
        """
        for future in (future for futures in self._asked for future in futures):
            future.cancel()
        self._asked.clear()
        self._shared.submit(lambda: None).result()

    def close(self) -> None:
        """Empty the queue, end the threads, let judges release what they hold."""
        self._closed = True
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        ordered = sorted(self.judges.values(), key=lambda j: not getattr(j, "waits", False))
        for judge in ordered:
            if not getattr(judge, "waits", False):
                self._shared.shutdown(wait=True)  # it may be at work on an image
            if hasattr(judge, "close"):
                judge.close()  # of one that waits: ends what is in flight
        for threads in self._threads.values():
            threads.shutdown(wait=True)


def _fault(check: Callable[[Row], None], row: Row) -> ValueError | None:
    try:
        check(row)
    except ValueError as error:
        return error
    return None


def _checked(name: str, result: Any, b: int) -> Scored:
    """One judge's result as a Scored of its own arrays, each entry finite."""
    if isinstance(result, Scored):
        values_B, status_B = result.values, np.asarray(result.status)
        reasons = dict(result.reasons)
        if status_B.shape != (b,) or not np.isin(status_B, (SCORED, FAILED, MISSING)).all():
            raise BadReward(name, 0, f"the states are {status_B!r}; wanted ({b},) of 0, 1, 2")
    else:
        values_B, status_B, reasons = result, None, {}
    try:
        values_B = np.ma.asarray(values_B)
    except Exception as error:  # e.g. a tensor on a GPU or with a gradient
        kind = type(values_B).__name__
        raise BadReward(name, 0, f"a {kind} is no numpy array of ({b},): {error}") from error
    if values_B.shape != (b,):
        raise BadReward(name, 0, f"the result has shape {values_B.shape}; wanted ({b},)")
    if values_B.dtype.kind not in "biuf":
        raise BadReward(name, 0, f"the result is of {values_B.dtype}; wanted numbers")
    if status_B is None:
        status_B = np.where(np.ma.getmaskarray(values_B), MISSING, SCORED)
    scored_B = status_B == SCORED
    scores_B = np.where(scored_B, np.ma.getdata(values_B), 0.0).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores_B))
    if bad.size:
        raise BadReward(
            name,
            int(bad[0]),
            f"scored {scores_B[bad[0]]}; a judge that cannot score a row must mask it "
            "(numpy.ma), say that it failed (Scored), or raise",
            np.where(scored_B, scores_B, np.float32("nan")),
        )
    return Scored(scores_B, status_B.astype(np.int8), reasons)


def _log_failure(name: str, reason: str, text: str, *values: Any, exc_info: Any = None) -> None:
    """Once for each judge and reason; text: with places for the name and the values."""
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        logger.error("judge " + text, name, *values, exc_info=exc_info)
