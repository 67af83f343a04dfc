"""Exponential moving average of the trained weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qirl_fast.models.sharding import own_part, spread_as


class Ema:
    """average <- decay average + (1 - decay) weights, once every `every` optimizer steps.

    The average starts as a copy of the weights. `applied()` swaps it in for evaluation and export.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, every: int):
        self.parameters = list(parameters)
        self.decay, self.every = decay, every
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after optimizer step number `step`, counted from 1."""
        if step % self.every == 0:
            average, weights = map(own_parts, (self.average, self.parameters))
            torch._foreach_lerp_(average, weights, 1 - self.decay)

    def load(self, values: Sequence[Tensor]) -> None:
        """Take these averages, whole or spread as the parameters are."""
        for held, value in zip(self.average, values, strict=True):
            own_part(held).copy_(own_part(spread_as(value, held)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside, their own values again after."""
        with exchanged(self.parameters, self.average):
            yield


@contextmanager
def exchanged(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """The parameters hold these values inside, their own again after."""
    held, there = map(own_parts, (parameters, values))
    own = [t.clone() for t in held]
    with torch.no_grad():
        torch._foreach_copy_(held, there)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(held, own)


def own_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of each."""
    return [own_part(t) for t in tensors]
