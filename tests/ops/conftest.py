"""Fixtures for the op tests. Helpers are fixtures: tests are imported by path, not as a package."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from qirl_fast import _cpu


@pytest.fixture(params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this CPU has, forced for the test."""
    _cpu.force_isa(request.param)
    yield request.param
    _cpu.unforce_isa()
    if os.environ.get("QIRL_CPU_ISA"):
        _cpu.force_isa(os.environ["QIRL_CPU_ISA"])


@pytest.fixture
def threads() -> Iterator[Callable[[int], object]]:
    """`with threads(n):` sets torch's thread count inside the block."""

    @contextmanager
    def use(count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    yield use


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output an op allocates starts as NaN (all ones): an element left unwritten shows."""
    real = Tensor.new_empty

    def new_nan(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = real(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(1)

    monkeypatch.setattr(Tensor, "new_empty", new_nan)


def max_error(result: Tensor, truth: Tensor) -> float:
    assert result.shape == truth.shape
    assert bool(torch.isfinite(result).all())
    return float((result.double() - truth.double()).abs().max())


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """no_worse(result, same_dtype, truth): error at most 2x that of the same-dtype PyTorch version.

    Both errors are against the float64 truth. One unit in the last place of the largest true value
    is allowed in any case: rounding the truth itself to the dtype costs half of that, and a PyTorch
    result that happens to be exact would leave no room.
    """

    def check(result: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
        ulp = torch.finfo(result.dtype).eps * float(truth.abs().max())
        assert max_error(result, truth) <= max(2.0 * max_error(same_dtype, truth), ulp)

    return check
