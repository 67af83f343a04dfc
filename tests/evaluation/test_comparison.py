"""Gains, shares and leads of several models, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from qirl_fast.evaluation.comparison import gain, lead, share
from qirl_fast.evaluation.paired import paired_bootstrap

RNG = np.random.default_rng(3)
BASE = RNG.random(60)


def test_a_gain_is_the_paired_bootstraps() -> None:
    model = BASE + RNG.normal(0.1, 0.2, 60)
    found, known = gain(BASE, model), paired_bootstrap(BASE, model)
    assert found.value == pytest.approx(known.diff, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-12)


def test_a_share_is_a_ratio_of_gains() -> None:
    teacher = BASE + RNG.normal(0.3, 0.1, 60)
    assert share(BASE, teacher, teacher) is not None
    same = share(BASE, teacher, teacher)
    assert same is not None and (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    half = share(BASE, teacher, (BASE + teacher) / 2)
    assert half is not None and (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    noisy = share(BASE, teacher, teacher + RNG.normal(0, 0.2, 60))
    assert noisy is not None and noisy.low < noisy.value < noisy.high


def test_a_teacher_without_a_certain_gain_has_no_share() -> None:
    assert share(BASE, BASE, BASE + 1) is None
    assert share(BASE, BASE - 0.1, BASE + 1) is None
    assert share(BASE, BASE + RNG.normal(0.01, 0.3, 60), BASE + 1) is None


def test_a_lead_adds_tasks_up() -> None:
    """Coverage: tasks are drawn by themselves, so the widths add in squares."""
    a = {"one": BASE + RNG.normal(0.2, 0.2, 60), "two": RNG.random(40)}
    b = {"one": BASE, "two": RNG.random(40)}
    found = lead(a, b)
    each = [gain(b[task], a[task]) for task in a]
    assert found.value == pytest.approx(sum(e.value for e in each))
    wanted = np.hypot(*(e.high - e.low for e in each))
    assert found.high - found.low == pytest.approx(wanted, rel=0.05)
    assert str(found).startswith(f"{found.value:+.3f} (")
