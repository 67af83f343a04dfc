"""Exponential moving average of the trained weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


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
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside, their own values again after."""
        own = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, own)
