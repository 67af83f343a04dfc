"""Draw prompts without repeats: every epoch is a new seeded permutation of all rows.

Epoch e permutes with `Generator(PCG64(SeedSequence([seed, e])))`: the order follows from the seed
and the number of rows alone. A batch that crosses into a new epoch takes the rows left of the old
one first; the new epoch then puts these rows last, so no row comes twice within an epoch or within
a batch. What is drawn does not depend on how many processes share a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qirl_fast.data.prompts import Prompt


class PromptSampler:
    """Endless iterator over batches of `per_step` different rows.

    prompts: the rows to draw from. per_step: rows per batch, 1 to len(prompts). seed: 0 or more.
    Raises ValueError for sizes outside these ranges.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> None:
        if not 1 <= per_step <= len(prompts):
            raise ValueError(
                f"data.prompts_per_step: got {per_step}; with {len(prompts)} prompts allowed: 1 to "
                f"{len(prompts)}, as no prompt comes twice in a batch"
            )
        if seed < 0:
            raise ValueError(f"seed: got {seed}; wanted 0 or more")
        self.prompts = list(prompts)
        self.per_step = per_step
        self.seed = seed
        self.epoch = 0
        self._carry: list[int] = []  # rows left of the epoch before, at the front of this one
        self._position = 0  # rows of `_order` already drawn
        self._order = self._make_order()

    def _make_order(self) -> list[int]:
        """Return what is drawn in this epoch: the rows carried over, then all rows, those last."""
        seeds = np.random.SeedSequence([self.seed, self.epoch])
        rows = np.random.Generator(np.random.PCG64(seeds)).permutation(len(self.prompts)).tolist()
        carried = set(self._carry)
        fresh = [row for row in rows if row not in carried]
        return self._carry + fresh + [row for row in rows if row in carried]

    def __iter__(self) -> PromptSampler:
        return self

    def __next__(self) -> list[Prompt]:
        """Return the next batch, `per_step` prompts."""
        if self._position + self.per_step > len(self._order):
            self._carry = self._order[self._position :]
            self._position = 0
            self.epoch += 1
            self._order = self._make_order()
        start, self._position = self._position, self._position + self.per_step
        return [self.prompts[row] for row in self._order[start : self._position]]

    def _fingerprint(self) -> str:
        ids = "\n".join(prompt.id for prompt in self.prompts)
        return hashlib.sha256(ids.encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, plain JSON, with what it depends on."""
        return {
            "epoch": self.epoch,
            "carry": list(self._carry),
            "position": self._position,
            "seed": self.seed,
            "per_step": self.per_step,
            "prompts_sha256": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises ValueError if prompts, seed or batch size are not the ones the state was taken with.
        """
        own = self.state_dict()
        for name, words in (
            ("prompts_sha256", "the training prompts have changed"),
            ("seed", "the seed has changed"),
            ("per_step", "data.prompts_per_step has changed"),
        ):
            if state.get(name) != own[name]:
                raise ValueError(
                    f"sampler state: {words} (saved {state.get(name)!r}, now {own[name]!r}); "
                    "restore it, or start a new run"
                )
        self.epoch = int(state["epoch"])
        self._carry = [int(row) for row in state["carry"]]
        self._position = int(state["position"])
        self._order = self._make_order()
