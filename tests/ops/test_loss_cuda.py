"""The CUDA kernels of the losses, run on the host by the emulator: the bits of the CPU kernels.

Both take their formulas from csrc/math and add in the order of math/rows.h, so nothing but pow and
exp, here those of one library, could differ.
"""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast import ops

QIRL = torch.ops.qirl
SHAPES = [(1, 1), (3, 5, 7), (2, 1023), (2, 3, 683), (1, 5000), (35, 9)]
DTYPES = [torch.float32, torch.bfloat16]


def draw(shape, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def rows_with_gap(t):
    """The same values in rows that do not follow each other and begin at any address."""
    flat = t.reshape(len(t), -1)
    return torch.cat((flat, flat), 1)[:, : flat.shape[1]].unflatten(1, t.shape[1:])


def same_bits(op, *args):
    got, want = (getattr(QIRL, op)(*args, backend) for backend in ("cuda", "cpu"))
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return got


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
def test_velocity_loss(shape, dtype, target_dtype, emulated_cuda, poisoned):
    v, target = draw(shape, 2)
    v, target = v.to(dtype), rows_with_gap(target.to(target_dtype))
    for weight in (None, torch.linspace(0.5, 2, shape[0])):
        for want_grad in (True, False):
            same_bits("velocity_loss", v, target, weight, want_grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [(0, 1.0, 1.0), (2, 1.0, 1.0), (1, 0.5, 1.0), (1, 0.3, 1 / 0.3)])
def test_awm_logp(shape, dtype, form, emulated_cuda, poisoned):
    v, noise, x0 = draw(shape, 3)
    v, noise, x0 = v.to(dtype), rows_with_gap(noise), x0.bfloat16()
    _, slope = same_bits("awm_logp", v, noise, x0, torch.linspace(0.1, 0.9, shape[0]), *form)
    grad = torch.linspace(-1, 2, shape[0])
    same_bits("awm_logp_backward", grad, slope, v, noise, x0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_ref", [False, True])
def test_nft_loss(shape, dtype, with_ref, emulated_cuda, poisoned):
    v, v_old, v_ref, x_t, x0 = draw(shape, 5)
    v, v_old, x0 = v.to(dtype), rows_with_gap(v_old.to(dtype)), x0.bfloat16()
    sigma, advantage = torch.linspace(0.1, 0.9, shape[0]), torch.linspace(-7, 6, shape[0])
    for want_grad in (True, False):
        large = (v, v_old, v_ref if with_ref else None, x_t, x0)
        same_bits("nft_loss", *large, sigma, advantage, 0.1, 5.0, 1e-4, want_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 256, 600])
@pytest.mark.parametrize("clip", [(1e-4, 2e-4), (1.0, math.inf)])
def test_policy_loss(dtype, rows, clip, emulated_cuda, poisoned):
    g = torch.Generator().manual_seed(rows)
    old, move, advantage = (torch.randn(rows, generator=g, dtype=torch.float64) for _ in range(3))
    args = [t.to(dtype) for t in (old + 3e-4 * move, old, advantage)]
    same_bits("policy_loss", *args, *clip)
    equal = same_bits("policy_loss", args[1], args[1], args[2], *clip)
    assert (equal[1] == 1).all() and float(equal[2]) == 0 and float(equal[3]) == 0


def test_through_the_public_functions(emulated_cuda):
    v, noise, x0, other = draw((4, 300), 4)
    rows = torch.linspace(0.2, 0.9, 4)

    def run():
        leaf = v.clone().requires_grad_()
        total = ops.velocity_loss(leaf, other, weight=rows).loss
        total = total + ops.nft_loss(leaf, other, noise, x0, rows, rows, beta=0.5).loss
        old = ops.awm_logp(v, noise, x0, rows).detach() + 0.1
        clip = {"clip_low": 0.2, "clip_high": 0.2}
        total = total + ops.awm_loss(leaf, noise, x0, rows, old, rows, **clip).loss
        total.backward()
        return total.detach(), leaf.grad

    with ops.use_backend("cuda"):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))


def test_a_nan_passes(emulated_cuda):
    v, v_old, x_t, x0 = draw((3, 40), 4)
    ones, nan = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    numbers = (0.5, 5.0, 0.0, True)
    with ops.use_backend("cuda"):
        assert ops.velocity_loss(v, v_old.index_fill(1, torch.tensor([7]), math.nan)).loss.isnan()
    spoilt = v_old.clone()
    spoilt[1, 7] = math.nan
    for args in ((spoilt, None, x_t, x0, ones, ones), (v_old, None, x_t, x0, ones, nan)):
        loss, metrics, dv = QIRL.nft_loss(v, *args, *numbers, "cuda")
        assert loss.isnan() and metrics[0, 1].isnan() and dv[1].isnan().any()
        assert metrics[:, [0, 2]].isfinite().all() and dv[[0, 2]].isfinite().all()
    zero = torch.zeros(3)
    for args in ((nan, zero, ones), (zero, nan, ones), (zero, zero, -nan)):
        loss, _, _, _, grad = QIRL.policy_loss(*args, 0.1, 0.1, "cuda")
        assert loss.isnan() and grad[1].isnan() and int(grad.isnan().sum()) == 1


def test_rows_do_not_depend_on_the_batch(emulated_cuda):
    v, v_old, x_t, x0 = draw((5, 1500), 4)
    sigma, advantage = torch.linspace(0.1, 0.9, 5), torch.linspace(-7, 6, 5)
    rest = (0.1, 5.0, 0.0, False, "cuda")
    _, together, _ = QIRL.nft_loss(v, v_old, None, x_t, x0, sigma, advantage, *rest)
    at = [4, 1]
    part = [t[at] for t in (x_t, x0, sigma, advantage)]
    assert torch.equal(QIRL.nft_loss(v[at], v_old[at], None, *part, *rest)[1], together[:, at])
