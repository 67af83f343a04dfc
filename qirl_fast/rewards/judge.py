"""What a judge is, and the three states of a reward: scored, failed, missing.

A judge is a callable: `judge(images uint8 [B, H, W, 3], metadata: B dicts) -> result`, which is
- an array [B] of finite numbers: every row is scored; or
- a numpy masked array [B]: masked rows are missing, there was nothing to judge; or
- a `Scored`: each row has a state of its own, and a failed one its reason.
A judge that raises has failed on every row. Failed and missing are never 0.

A judge may also have
- `check_row(row)`: ValueError, with the reason, for a metadata row it can never score;
- `masks = True`: scored all the same, such a row is missing and does not fail the others;
- `state_dict()`, `load_state_dict(state)`: if its scores depend on what it has seen;
- `warnings`: list of texts a person should read before a run;
- `waits = True`: it waits for a server, which it asks again by itself: it gets a thread of its own;
- `close()`: releases what it holds.

An editing row's metadata hold the condition images under SOURCES, a list of uint8 [h, w, 3].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

SCORED, FAILED, MISSING = 0, 1, 2
SOURCES = "source_images"

Row = dict[str, Any]


class Sources(list[np.ndarray]):
    """Condition images, uint8 [h, w, 3] each, that a message which shows their row only counts."""

    def __repr__(self) -> str:
        return f"<{len(self)} images>"


@dataclass(frozen=True)
class Scored:
    """values: float32 [B], read where SCORED alone. status: int8 [B] of SCORED, FAILED, MISSING.
    reasons: why, by row, of failed rows.
    """

    values: np.ndarray
    status: np.ndarray
    reasons: Mapping[int, str] = field(default_factory=dict)


Judge = Callable[[np.ndarray, list[Row]], "np.ndarray | Scored"]


@dataclass(frozen=True)
class RowsWith:
    """A judge of the rows that have `key`; in others there is nothing for it to judge."""

    key: str
    score: Judge
    check_row: Callable[[Row], None]
    masks = True

    def __call__(self, images_BHW3: np.ndarray, metadata: list[Row]) -> np.ma.MaskedArray:
        """Scores float32 [B] of uint8 images [B, H, W, 3], masked where there are none."""
        values_B = np.ma.masked_all(len(metadata), np.float32)
        own = [i for i, row in enumerate(metadata) if self.key in row]
        values_B[own] = self.score(images_BHW3[own], [metadata[i] for i in own])
        return values_B


@runtime_checkable
class Stateful(Protocol):
    """A judge whose scores depend on what it has seen, such as one that keeps a running mean.

    Its state is a tree of dicts, lists, tuples, numbers, strings and tensors.
    """

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
