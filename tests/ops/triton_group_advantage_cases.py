"""kernels/group_advantage.py in Triton's interpreter, on CPU tensors, against the C++ kernel.

Not collected by name: test_triton.py runs this file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported.
"""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

from qirl_fast import ops
from qirl_fast.kernels import group_advantage as kernels

SHARED = runpy.run_path(str(Path(__file__).with_name("test_group_advantage_cuda.py")))
KINDS, MODES, STDS, batch, spoil = (
    SHARED[name] for name in ("KINDS", "MODES", "STDS", "batch", "spoil")
)


def run(rewards, group, weights, mode, std, valid=None, **options):
    """By the Triton kernel; options default to those of the public function."""
    values = {"ddof": 0, "eps": 1e-4, "std_floor": 0.0, "clamp": 5.0, "min_range": 0.0, **options}
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    values["num_groups"] = values.get("num_groups", int(group.max()) + 1)
    return kernels.group_advantage(
        rewards, group, weights.double(), valid, mode=mode, std=std, **values
    )


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [([2], torch.float32), ([3, 2, 17, 5], torch.float32), ([100, 2, 31], torch.float64)],
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("std", STDS)
def test_matches_the_cpu_kernel(sizes, dtype, mode, std):
    rewards, group, weights = batch(sizes, 3, dtype)
    valid = torch.ones_like(rewards, dtype=torch.bool)
    if len(sizes) > 1:
        rewards[group == 0] = 0.1  # a flat group
        valid[(group == 1).nonzero()[0]] = False
        rewards[~valid] = math.nan
    for options in ({}, {"ddof": 1, "eps": 0.0, "std_floor": 0.01, "min_range": 1e-3}):
        got = run(rewards, group, weights, mode, std, valid, **options)
        wanted = ops.group_advantage(
            rewards, group, weights, mode=mode, std=std, valid=valid, **options
        )
        # float64 sums in another order; float32 results are those, rounded.
        bound = 1e-6 if dtype == torch.float32 else 1e-12
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound, equal_nan=True)
        assert bool((got[2][0] == wanted.mean[0]).all()) or len(sizes) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "std"), [("zscore_sum", "group"), ("gdpo", "global")])
def test_bad_values_give_nan_and_no_number(kind, mode, std):
    rewards, group, weights = batch([4, 5, 3], 2, torch.float64)
    affected = spoil(kind, rewards, group, weights)
    advantage, keep, mean, spread, span = run(rewards, group, weights, mode, std, num_groups=3)
    if mode == "gdpo":
        affected = torch.ones_like(affected)
    assert torch.equal(advantage.isnan(), affected)
    assert not bool(keep[affected].any()) and bool(keep[~affected].all())
    if "id" not in kind:
        for value in (mean, spread, span[:, None]):
            assert torch.equal(value.isnan().all(1), torch.tensor([False, True, False]))
            assert torch.equal(value.isnan().any(1), torch.tensor([False, True, False]))
