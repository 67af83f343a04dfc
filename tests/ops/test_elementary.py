"""csrc/math/elementary.h: exp, log, tanh, sigmoid within 2 ulp, exact limits, one set of bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qirl_fast import _cpu

EXACT = {"exp": torch.exp, "log": torch.log, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1.18e-38, 88.7, 88.8, -87.4]
SPECIAL += [-103.9, -104.1, 3e38, -3e38, 1.0, -1.0, 0.55, 0.5499999, 9.0, 17.0, -17.0]


def run(function: str, x: Tensor, scalar: bool = False) -> Tensor:
    y = torch.full_like(x, math.nan)
    _cpu.elementary(function, x, y, scalar)
    return y


def every_exponent() -> Tensor:
    """About a million floats: every 4099th bit pattern, so every exponent and both signs."""
    bits = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32)
    return torch.cat((bits.view(torch.float32), torch.tensor(SPECIAL)))


def in_ulps(y: Tensor, exact: Tensor) -> Tensor:
    ulp = torch.exp2(exact.abs().clamp(min=2.0**-126).log2().floor() - 23)
    return (y.double() - exact).abs() / ulp


@pytest.mark.parametrize("function", EXACT)
def test_within_two_ulp_everywhere(function, isa):
    x = every_exponent()
    y, exact = run(function, x), EXACT[function](x.double())
    assert _cpu.last_isa() == isa
    assert torch.equal(y.isnan(), exact.isnan())
    finite = exact.abs() <= torch.finfo(torch.float32).max
    assert float(in_ulps(y, exact)[finite].max()) <= 2.0
    beyond = ~finite & ~exact.isnan()
    assert torch.equal(y[beyond], exact[beyond].float())


def test_limits_are_exact(isa):
    infinity = torch.tensor([-math.inf, math.inf])
    assert run("exp", infinity).tolist() == [0.0, math.inf]
    assert run("sigmoid", infinity).tolist() == [0.0, 1.0]
    assert run("tanh", infinity).tolist() == [-1.0, 1.0]
    assert run("log", torch.tensor([0.0, -0.0, math.inf])).tolist() == [
        -math.inf,
        -math.inf,
        math.inf,
    ]
    assert run("exp", torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert run("log", torch.ones(1)).tolist() == [0.0]
    assert math.copysign(1.0, float(run("tanh", torch.tensor([-0.0])))) == -1.0


@pytest.mark.parametrize("function", EXACT)
def test_one_set_of_bits(function):
    """Vectors of every instruction set and the one-number form, which the device compiles."""
    x = every_exponent()
    expected = run(function, x).view(torch.int32)
    nan = run(function, x).isnan()
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        try:
            for scalar in (False, True):
                got = run(function, x, scalar)
                assert torch.equal(got.isnan(), nan)
                assert torch.equal(got.view(torch.int32)[~nan], expected[~nan])
        finally:
            _cpu.unforce_isa()


def test_unknown_function():
    with pytest.raises(ValueError, match="no function 'sin'"):
        run("sin", torch.ones(3))
