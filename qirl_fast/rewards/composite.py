"""Several named judges on one batch: scores, what to do when a judge fails, and weights.

A reward is a score, failed, or missing; failed and missing are not zero. Scores come with a mask:
- a judge that raises has failed on the batch: its column is invalid, and the exception is logged
  once with the judge's name, with its traceback (the same exception again is not);
- a judge may return a numpy masked array: masked rows are missing (there was nothing to judge);
- a judge that returns NaN, infinity or another shape is broken: BadReward, which stops the step.
A judge with `state_dict()` and `load_state_dict(state)` (an object that is callable) is saved with
every checkpoint and restored on resuming.
Invalid entries hold 0.0, so that no NaN reaches arithmetic; consumers must use the mask (as
`qirl_fast.ops.group_advantage(valid=...)` does: it drops the group).

Shapes: B images, K judges.
"""

import copy
import difflib
import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qirl_fast.rewards import aesthetics, alignment

Judge = Callable[[np.ndarray, list[dict[str, Any]]], np.ndarray]


@runtime_checkable
class Stateful(Protocol):
    """A judge whose scores depend on what it has seen, such as one that keeps a running mean.

    Its state is a tree of dicts, lists, tuples, numbers, strings and tensors.
    """

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


JUDGES: dict[str, Judge] = {
    "alignment": alignment.score,
    "aesthetics": aesthetics.score,
}

# Judges that cannot score every row: each raises ValueError for one it cannot.
ROW_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {"alignment": alignment.check_row}

logger = logging.getLogger(__name__)
_logged: set[str] = set()


class BadReward(ValueError):
    """A judge returned NaN, infinity or something else than a number a row.

    `judge` is its name, `row` the first such row, `scores` [B] what it returned where those are
    numbers (masked rows NaN).
    """

    def __init__(self, judge: str, row: int, reason: str, scores: np.ndarray | None = None) -> None:
        self.judge, self.row, self.reason, self.scores = judge, row, reason, scores
        super().__init__(f"judge {judge!r}, row {row}: {reason}")


def resolve(name: str) -> Judge:
    """The judge of a name in JUDGES or of a dotted path "package.module:function".

    ValueError when there is none, naming the nearest known name or what the module lacks.
    """
    if name in JUDGES:
        return JUDGES[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        near = difflib.get_close_matches(name, JUDGES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no judge is called {name!r}: {hint}known are {', '.join(JUDGES)}, and any dotted "
            "path 'package.module:function'"
        )
    try:
        judge = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # a module may raise anything while it is imported
        raise ValueError(f"judge {name!r}: cannot import {module_name!r} ({error!r})") from error
    if not callable(judge):
        raise ValueError(f"judge {name!r}: module {module_name!r} has no function {attribute!r}")
    return judge


def judge_states(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A copy of the state of each judge that has one, by name."""
    judges: dict[str, Any] = {name: resolve(name) for name in names}
    return {n: copy.deepcopy(j.state_dict()) for n, j in judges.items() if isinstance(j, Stateful)}


def load_judge_states(states: Mapping[str, dict[str, Any]]) -> None:
    """Give judges back what `judge_states` took; ValueError for one that takes none any more."""
    for name, state in states.items():
        judge = resolve(name)
        if not isinstance(judge, Stateful):
            raise ValueError(
                f"judge {name!r} had a state when it was saved and has no load_state_dict now; "
                "resume with the judge the run was begun with"
            )
        judge.load_state_dict(copy.deepcopy(state))


def score_all(
    names: Sequence[str], images_BHW3: np.ndarray, metadata: list[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 [B, K] and valid bool [B, K] of uint8 images [B, H, W, 3].

    Raises ValueError for an unknown name, before any judge runs, and BadReward.
    """
    judges = [resolve(name) for name in names]
    b = len(images_BHW3)
    scores_BK = np.zeros((b, len(names)), np.float32)
    valid_BK = np.zeros((b, len(names)), bool)
    for k, (name, judge) in enumerate(zip(names, judges, strict=True)):
        try:
            result = judge(images_BHW3, metadata)
        except Exception as error:  # any fault of a judge is that judge's failure, not the run's
            _log_failure(name, error, b)
            continue
        scores_BK[:, k], valid_BK[:, k] = _checked(name, result, b)
    return scores_BK, valid_BK


def _checked(name: str, result: Any, b: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, valid) of one judge's result, both [B]."""
    try:
        values_B = np.ma.asarray(result)
    except Exception as error:  # e.g. a tensor on a GPU or with a gradient
        kind = type(result).__name__
        raise BadReward(name, 0, f"a {kind} is no numpy array of ({b},): {error}") from error
    if values_B.shape != (b,):
        raise BadReward(name, 0, f"the result has shape {values_B.shape}; wanted ({b},)")
    if values_B.dtype.kind not in "biuf":
        raise BadReward(name, 0, f"the result is of {values_B.dtype}; wanted numbers")
    valid_B = ~np.ma.getmaskarray(values_B)
    scores_B = np.where(valid_B, np.ma.getdata(values_B), 0.0).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores_B))
    if bad.size:
        raise BadReward(
            name,
            int(bad[0]),
            f"scored {scores_B[bad[0]]}; a judge that cannot score a row must mask it "
            "(numpy.ma) or raise",
            np.where(valid_B, scores_B, np.float32("nan")),
        )
    return scores_B, valid_B


def _log_failure(name: str, error: Exception, b: int) -> None:
    key = f"{name}: {error!r}"
    if key not in _logged:
        _logged.add(key)
        logger.error("judge %r failed on a batch of %d images", name, b, exc_info=error)


def weights_for(
    categories: Sequence[str | None],
    weights: Mapping[str, float],
    category_weights: Mapping[str, Mapping[str, float]] | None,
    names: Sequence[str],
) -> np.ndarray:
    """Weights float32 [B, K] of the judges `names`, one row a category, each row summing to 1.

    A row takes `category_weights[category]` where there is one, `weights` otherwise; a judge left
    out of the mapping used weighs 0. ValueError for a weight of no judge in `names`, a negative
    or non-finite one, or a mapping without a positive weight.
    """
    default_K = _normalised(weights, names, "weights")
    rows: dict[str | None, np.ndarray] = {
        category: _normalised(mapping, names, f"category_weights[{category!r}]")
        for category, mapping in (category_weights or {}).items()
    }
    if not categories:
        return np.zeros((0, len(names)), np.float32)
    return np.stack([rows.get(category, default_K) for category in categories])


def _normalised(mapping: Mapping[str, float], names: Sequence[str], where: str) -> np.ndarray:
    for name, weight in mapping.items():
        if name not in names:
            raise ValueError(f"{where} weighs {name!r}, which is no judge here: {', '.join(names)}")
        if not math.isfinite(weight) or weight < 0.0:
            raise ValueError(f"{where}[{name!r}] is {weight}; wanted a finite number, 0 or more")
    row_K = np.array([float(mapping.get(name, 0.0)) for name in names])
    if not row_K.sum() > 0.0:
        raise ValueError(f"{where} has no positive weight: {dict(mapping)!r}")
    return (row_K / row_K.sum()).astype(np.float32)
