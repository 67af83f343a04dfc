"""Guidance: when it is on, how branches combine, which modes there are."""

from __future__ import annotations

import pytest
import torch

from qirl_fast.rollout.guidance import RATIO_MODES, Guidance


def test_scale_one_is_off_and_needs_no_mode() -> None:
    assert not Guidance().on and not Guidance(1.0, ratio_mode="full").in_objective
    assert Guidance(1.5).on and Guidance(0.0).on


def test_the_interval_holds_both_its_ends() -> None:
    guidance = Guidance(2.0, interval=(0.25, 0.75))
    assert [guidance.at(s) for s in (0.2, 0.25, 0.5, 0.75, 0.8)] == [False, True, True, True, False]
    assert Guidance(2.0).at(0.0) and Guidance(2.0).at(1.0)
    assert not Guidance(1.0, interval=(0.0, 1.0)).at(0.5)


def test_only_full_enters_the_objective() -> None:
    assert RATIO_MODES == ("frozen_offset", "conditional", "full")
    inside = [m for m in RATIO_MODES if Guidance(2.0, ratio_mode=m).in_objective]
    assert inside == ["full"]


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"ratio_mode 'frozen': use one of frozen_offset, cond"):
        Guidance(2.0, ratio_mode="frozen")


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 7.0])
@pytest.mark.parametrize("rescale", [False, True])
def test_combine_is_the_formula(scale: float, rescale: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 3, 5, 8, generator=generator).unbind(0)
    ours = Guidance(scale, rescale, "full").combine(cond, uncond)
    c, u = cond.double(), uncond.double()
    expected = u + scale * (c - u)
    if rescale:
        expected = expected * c.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    # values up to 7 x 6 in float32, a handful of roundings
    assert torch.allclose(ours.double(), expected, rtol=1e-6, atol=2e-5)
    if rescale:
        norms = ours.double().norm(dim=-1), c.norm(dim=-1)
        assert torch.allclose(*norms, rtol=1e-5, atol=0)
