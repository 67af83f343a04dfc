"""Draw prompts without repeats: every epoch is a new seeded permutation of all rows.

Epoch e permutes with `Generator(PCG64(SeedSequence([seed, e])))`: the order follows from the seed
and the number of rows alone. A batch that crosses into a new epoch takes the rows left of the old
one first; the new epoch then puts these rows last, so no row comes twice within an epoch or within
a batch. What is drawn does not depend on how many processes share a batch.

With buckets the rows of a batch are all of one: an epoch's order is gone through once, and a batch
is drawn wherever a bucket has its rows together; what is left of each bucket is carried over.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from qirl_fast.data.prompts import Prompt


class PromptSampler:
    """Endless iterator over batches of `per_step` different rows.

    prompts: the rows to draw from. per_step: rows per batch, 1 to len(prompts). seed: 0 or more.
    buckets: of each row what the rows of a batch have in common, such as a size; None: nothing.
    dropped: numbers of rows that are not to be drawn, see `drop`; a loaded state has its own.
    Raises ValueError for sizes outside these ranges, and for a bucket of less than `per_step` rows.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        per_step: int,
        seed: int,
        buckets: Sequence[Hashable] | None = None,
        dropped: Collection[int] = (),
    ) -> None:
        if not 1 <= per_step <= len(prompts):
            raise ValueError(
                f"data.prompts_per_step: got {per_step}; with {len(prompts)} prompts allowed: 1 to "
                f"{len(prompts)}, as no prompt comes twice in a batch"
            )
        if seed < 0:
            raise ValueError(f"seed: got {seed}; wanted 0 or more")
        if buckets is not None and len(buckets) != len(prompts):
            raise ValueError(f"buckets: got {len(buckets)} for {len(prompts)} prompts; wanted one")
        self.prompts = list(prompts)
        self.per_step = per_step
        self.seed = seed
        self.buckets = None if buckets is None else list(buckets)
        self.epoch = 0
        self._dropped = frozenset(dropped)
        self._check_buckets(self._dropped)
        self._carry: list[int] = []  # rows left of the epoch before, at the front of this one
        self._rest: list[int] | None = None  # what this epoch draws, if not all: after `drop`
        self._position = 0  # rows of `_batches` already drawn
        self._plan()

    def _check_buckets(self, dropped: Collection[int]) -> None:
        rows = [row for row in range(len(self.prompts)) if row not in dropped]
        buckets = [None if self.buckets is None else self.buckets[row] for row in rows]
        for bucket, count in (Counter(buckets) or Counter({None: 0})).items():
            if count < self.per_step:
                of = "" if bucket is None else f" of bucket {bucket}"
                raise ValueError(
                    f"data.prompts_per_step: got {self.per_step}; there are {count} usable "
                    f"prompts{of}, and no prompt comes twice in a batch: add prompts, take fewer a "
                    "step, or choose other buckets"
                )

    def _plan(self) -> None:
        """Cut this epoch's order into batches; set `_batches`, and `_left` to what fills none."""
        order = self._make_order() if self._rest is None else self._rest
        waiting: dict[Hashable, list[int]] = {}
        self._batches: list[list[int]] = []
        for place, row in enumerate(order):
            places = waiting.setdefault(None if self.buckets is None else self.buckets[row], [])
            places.append(place)
            if len(places) == self.per_step:
                self._batches.append([order[each] for each in places])
                places.clear()
        left = sorted(place for places in waiting.values() for place in places)
        self._left = [order[place] for place in left]

    def _make_order(self) -> list[int]:
        """Return what is drawn in this epoch: the rows carried over, then all rows, those last."""
        seeds = np.random.SeedSequence([self.seed, self.epoch])
        drawn = np.random.Generator(np.random.PCG64(seeds)).permutation(len(self.prompts)).tolist()
        rows = [row for row in drawn if row not in self._dropped]
        carried = set(self._carry)
        fresh = [row for row in rows if row not in carried]
        return self._carry + fresh + [row for row in rows if row in carried]

    def __iter__(self) -> PromptSampler:
        return self

    def __next__(self) -> list[Prompt]:
        """Return the next batch, `per_step` prompts."""
        while self._position == len(self._batches) * self.per_step:
            self._carry, self._rest = self._left, None
            self._position = 0
            self.epoch += 1
            self._plan()
        batch = self._batches[self._position // self.per_step]
        self._position += self.per_step
        return [self.prompts[row] for row in batch]

    def peek(self) -> list[Prompt]:
        """The batch that `next` will return, if nothing is dropped before."""
        return next(copy.copy(self))

    @property
    def dropped(self) -> frozenset[int]:
        """Numbers of the rows that are never drawn again."""
        return self._dropped

    def drop(self, prompts: Collection[Prompt]) -> None:
        """Never draw these prompts again, nor rows equal to them; the state remembers it.

        What is left of the epoch goes on in its order without them. Raises ValueError, and changes
        nothing, for a prompt that is not among the rows, and where fewer than `per_step` prompts
        would be left, of the whole or of a bucket.
        """
        wanted = set(prompts)
        rows = {row for row, prompt in enumerate(self.prompts) if prompt in wanted}
        unknown = wanted - {self.prompts[row] for row in rows}
        if unknown:
            names = ", ".join(repr(prompt.prompt) for prompt in unknown)
            raise ValueError(f"drop: got prompts that are not among the rows: {names}")
        dropped = self._dropped | rows
        self._check_buckets(dropped)
        undrawn = [row for b in self._batches[self._position // self.per_step :] for row in b]
        order = self._make_order() if self._rest is None else self._rest
        self._rest = [row for row in self._undrawn(order, undrawn) if row not in dropped]
        self._dropped = dropped
        self._position = 0
        self._plan()

    def _undrawn(self, order: Sequence[int], batches: Sequence[int]) -> list[int]:
        """The part of the order still to come; a row may come twice in it, its later place last."""
        count = Counter([*batches, *self._left])
        kept = []
        for row in reversed(order):
            if count[row]:
                count[row] -= 1
                kept.append(row)
        return kept[::-1]

    @staticmethod
    def _sha256(values: Sequence[object]) -> str:
        return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, plain JSON, with what it depends on."""
        return {
            "epoch": self.epoch,
            "carry": list(self._carry),
            "position": self._position,
            "dropped": sorted(self._dropped),
            "rest": self._rest,
            "seed": self.seed,
            "per_step": self.per_step,
            "prompts_sha256": self._sha256([prompt.id for prompt in self.prompts]),
            "buckets_sha256": None if self.buckets is None else self._sha256(self.buckets),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises ValueError if prompts, seed, batch size or buckets are not the ones the state was
        taken with.
        """
        own = self.state_dict()
        for name, words in (
            ("prompts_sha256", "the training prompts have changed"),
            ("seed", "the seed has changed"),
            ("per_step", "data.prompts_per_step has changed"),
            ("buckets_sha256", "the buckets of the prompts have changed"),
        ):
            if state.get(name) != own[name]:
                raise ValueError(
                    f"sampler state: {words} (saved {state.get(name)!r}, now {own[name]!r}); "
                    "restore it, or start a new run"
                )
        self.epoch = int(state["epoch"])
        self._carry = [int(row) for row in state["carry"]]
        self._position = int(state["position"])
        # States from before rows could be dropped lack both.
        self._dropped = frozenset(state.get("dropped", ()))
        self._rest = state.get("rest")
        self._plan()
