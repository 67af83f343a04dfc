"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch

from qirl_fast.models.ema import Ema


def test_the_average_follows_its_formula_every_so_many_steps() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = Ema([p], decay=0.75, every=2)
    expected = p.detach().double()
    for step in range(1, 8):
        with torch.no_grad():
            p.add_(step)
        ema.update(step)
        if step % 2 == 0:
            expected = 0.75 * expected + 0.25 * p.detach().double()
        # float32 of values up to 30: one rounding of 2e-6 a step, three updates
        assert torch.allclose(ema.average[0].double(), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(ema.average[0], p.detach())


def test_applied_swaps_and_swaps_back_even_after_an_error() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0]))
    ema = Ema([p], decay=0.5, every=1)
    with torch.no_grad():
        p.fill_(3.0)
    with ema.applied():
        assert p.item() == 1.0
    assert p.item() == 3.0
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert p.item() == 3.0 and ema.average[0].item() == 1.0
