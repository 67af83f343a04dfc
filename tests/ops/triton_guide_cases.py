"""kernels/guide.py in Triton's interpreter, on CPU tensors, against the C++ kernels.

Not collected by name: test_triton.py runs this file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported. The interpreter truncates float32 to
bfloat16 where hardware rounds to nearest: bfloat16 results may be one unit off.
"""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast import ops
from qirl_fast.kernels import guide as kernels
from qirl_fast.kernels import guide_step as step_kernels


def inputs(shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    c, u, dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    return c, u, 1 + 4 * torch.rand(shape[0], generator=g), dy


def results(c, u, scale, dy, rescale):
    """By the C++ kernels."""
    leaves = [t.clone().requires_grad_() for t in (c, u)]
    y = ops.guide(*leaves, scale, rescale=rescale)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


SHAPES = [(1, 1), (2, 5), (3, 7, 33), (2, 65, 64), (2, 3, 2500), (3, 4, 5, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("spaced", [False, True])
def test_float32(shape, rescale, spaced):
    c, u, scale, dy = inputs(shape)
    if c.numel() > 200:
        c[0].view(-1)[3] = math.nan
        c[-1, ..., -1, :], u[-1, ..., -1, :] = 0, 0  # a token whose factor is 0 / 0
    if spaced:
        c, u, dy = (torch.cat((t, t), dim=1)[:, : t.shape[1]] for t in (c, u, dy))
    got = kernels.guide(c, u, scale, rescale), *kernels.guide_backward(dy, c, u, scale, rescale)
    for a, b in zip(got, results(c, u, scale, dy, rescale), strict=True):
        if rescale:  # sums of another order: some roundings of them, a few of the products
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, equal_nan=True)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rescale", [False, True])
def test_bfloat16_is_within_one_unit(rescale):
    c, u, scale, dy = inputs((2, 9, 40), torch.bfloat16)
    got = kernels.guide(c, u, scale, rescale), *kernels.guide_backward(dy, c, u, scale, rescale)
    for a, b in zip(got, results(c, u, scale, dy, rescale), strict=True):
        assert int((a.view(torch.int16).int() - b.view(torch.int16).int()).abs().max()) <= 1


@pytest.mark.parametrize("shape", [(4, 7, 33), (4, 40, 8)])
def test_a_row_alone_is_that_row_of_the_batch(shape):
    c, u, scale, dy = inputs(shape)
    batch = kernels.guide(c, u, scale, True), *kernels.guide_backward(dy, c, u, scale, True)
    one = [t[2:3] for t in (c, u, scale, dy)]
    alone = kernels.guide(*one[:3], True), *kernels.guide_backward(one[3], *one[:3], True)
    assert all(torch.equal(a, b[2:3]) for a, b in zip(alone, batch, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_guide_step(shape, rescale, frozen):
    """Plain: the bits of the C++ kernel. Rescaled: a factor's sums have another order."""
    v_cond, v_uncond, scale, x = inputs(shape)
    g = torch.Generator().manual_seed(5)
    a, c, s = (torch.rand(shape[0], generator=g) + 0.2 for _ in range(3))
    rows = (a, -c, s, 1 / (2 * s * s), s.log())
    seed = torch.arange(shape[0]) * 977 - 3
    got = step_kernels.guide_step(
        *(x, v_cond, v_uncond, scale, rescale, *rows, seed, 2**33, frozen)
    )
    wanted = ops.guide_step(
        *(x, v_cond, v_uncond, scale, *rows),
        seed=seed,
        offset=2**33,
        rescale=rescale,
        frozen=frozen,
    )
    for ours, theirs in zip(got, wanted if frozen else wanted[:2], strict=False):
        if not rescale and ours is not got[1]:
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=4e-6)
    assert frozen or got[2].numel() == 0


def test_guide_step_in_bfloat16_is_off_by_the_interpreters_two_roundings():
    """The guided velocity may be a unit off, which c = 0.2 scales, and x' another."""
    v_cond, v_uncond, scale, x = inputs((2, 65, 64), torch.bfloat16)
    one = torch.ones(2)
    rows = (one, -0.2 * one, 0.3 * one, one, one)
    got = step_kernels.guide_step(
        *(x, v_cond, v_uncond, scale, False, *rows, torch.arange(2), 1, False)
    )
    wanted = ops.guide_step(x, v_cond, v_uncond, scale, *rows, seed=torch.arange(2), offset=1)
    largest = float(ops.guide(v_cond, v_uncond, scale).abs().max())
    torch.testing.assert_close(got[0], wanted[0], rtol=2**-7, atol=0.2 * 2**-7 * largest)
