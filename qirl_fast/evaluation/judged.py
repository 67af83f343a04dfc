"""One judged image, as agreement.py compares it with people, and the check of what came."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

LOW, HIGH = 1.0, 5.0
SUM_TOLERANCE = 1e-3  # of probabilities rounded to float16 or to a few decimals


@dataclass(frozen=True)
class Judged:
    """One judged image in one dimension.

    truth: mean of the people's ratings. predicted: the judge's expected score. Both in [1, 5].
    dimension: what was rated. category: of the prompt, or None. cluster: the prompt's hash.
    repeats: scores of other judgements of the same image (other seeds, other reasonings), in
    [1, 5]; two or more say how far the judge agrees with itself. probs: of the scores 1..5, sum 1.
    """

    truth: float
    predicted: float
    dimension: str
    category: str | None
    cluster: str
    repeats: tuple[float, ...] = ()
    probs: tuple[float, ...] | None = None


def what_is_wrong(item: Judged) -> str | None:
    """Return what is wrong with the item and how to mend it, or None."""
    scores = {"truth": item.truth, "predicted": item.predicted}
    scores |= {f"repeats[{k}]": score for k, score in enumerate(item.repeats)}
    for name, score in scores.items():
        if not LOW <= score <= HIGH:  # also true of NaN
            return (
                f"{name} is {score}; wanted a finite score in [1, 5]: rescale other scales, and "
                "leave failed judgements out, counted by whoever judged"
            )
    for name, text in (("dimension", item.dimension), ("cluster", item.cluster)):
        if not text:
            return f"{name} is {text!r}; wanted a name"
    if item.category == "":
        return "category is ''; wanted a name, or None where there is none"
    if item.probs is None:
        return None
    probs = item.probs
    if len(probs) != 5 or not all(0 <= p <= 1 for p in probs):
        return f"probs are {probs}; wanted 5 probabilities, of the scores 1 to 5"
    if not math.isclose(sum(probs), 1, abs_tol=SUM_TOLERANCE):
        return f"probs sum to {sum(probs):.6g}; wanted 1: renormalise over the five scores"
    return None


def sort_key(item: Judged) -> tuple[Any, ...]:
    """Sums are taken in this order, so that the order of the items does not reach the result."""
    probs, category = item.probs or (), item.category or ""
    return item.cluster, item.dimension, category, item.truth, item.predicted, item.repeats, probs
