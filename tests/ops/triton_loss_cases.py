"""kernels/{velocity_loss,nft_loss,awm_logp,policy_loss}.py in Triton's interpreter, on CPU tensors.

Not collected by name: test_triton.py runs this file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported. Values and gradients are compared with the
C++ kernels', which the other tests compare with float64. Sums have another order, so sums over a
row differ by an ulp or two of float32; a bfloat16 gradient by one unit in the last place, as the
interpreter truncates where hardware rounds.
"""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast.kernels import awm_logp as awm
from qirl_fast.kernels import nft_loss as nft
from qirl_fast.kernels import policy_loss as policy
from qirl_fast.kernels import velocity_loss as velocity
from qirl_fast.ops import awm_logp as _awm  # noqa: F401  registers the ops
from qirl_fast.ops.policy_loss import OP as POLICY

QIRL = torch.ops.qirl
SHAPES = [(1, 1), (2, 7, 147), (3, 1023), (18, 5), (1, 2048)]
DTYPES = [torch.float32, torch.bfloat16]


def draw(shape, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def rows_with_gap(t):
    """The same values in rows that do not follow each other."""
    flat = t.reshape(len(t), -1)
    return torch.cat((flat, flat), 1)[:, : flat.shape[1]].unflatten(1, t.shape[1:])


def same(got, want, rtol=5e-7):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.dtype == torch.bfloat16:
            scale = float(b.float().abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-20 * scale)
        else:
            scale = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_velocity_loss(shape, dtype, weighted):
    v, target = draw(shape, 2)
    v, target = v.to(dtype), rows_with_gap(target)
    weight = torch.linspace(0.5, 2, shape[0]) if weighted else None
    for want_grad in (True, False):
        got = velocity.velocity_loss(v, target, weight, want_grad)
        same(got, QIRL.velocity_loss(v, target, weight, want_grad, "cpu"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [(0, 1.0, 1.0), (2, 1.0, 1.0), (1, 0.5, 1.0), (1, 0.3, 1 / 0.3)])
def test_awm_logp(shape, dtype, form):
    v, noise, x0 = draw(shape, 3)
    v, noise = v.to(dtype), rows_with_gap(noise)
    time = torch.linspace(0.1, 0.9, shape[0])
    got = awm.awm_logp(v, noise, x0, time, *form)
    want = QIRL.awm_logp(v, noise, x0, time, *form, "cpu")
    same(got, want)
    grad = torch.linspace(-1, 2, shape[0])
    dv = awm.awm_logp_backward(grad, want[1], v, noise, x0)
    wanted = QIRL.awm_logp_backward(grad, want[1], v, noise, x0, "cpu")
    if dtype == torch.float32:
        assert torch.equal(dv, wanted)  # one product and two sums, each rounded, on both sides
    same([dv], [wanted])


def test_awm_logp_of_a_perfect_velocity():
    noise, x0 = draw((2, 30), 2)
    time = torch.tensor([0.2, 0.8])
    for form in ((0, 1.0, 1.0), (1, 0.5, 1.0), (1, 0.25, 4.0)):
        logp, slope = awm.awm_logp(noise - x0, noise, x0, time, *form)
        assert (logp == 0).all() and slope.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_ref", [False, True])
def test_nft_loss(shape, dtype, with_ref):
    v, v_old, v_ref, x_t, x0 = draw(shape, 5)
    v, v_old, v_ref = v.to(dtype), rows_with_gap(v_old.to(dtype)), v_ref if with_ref else None
    sigma, advantage = torch.linspace(0.1, 0.9, shape[0]), torch.linspace(-7, 6, shape[0])
    for want_grad in (True, False):
        args = (v, v_old, v_ref, x_t, x0, sigma, advantage, 0.1, 5.0, 1e-4, want_grad)
        same(nft.nft_loss(*args), QIRL.nft_loss(*args, "cpu"), rtol=1e-6)


def test_nft_loss_lets_a_nan_pass():
    v, v_old, x_t, x0 = draw((3, 40), 4)
    for where, rows in ((v_old, (1, 5)), (x0, (1, 7))):
        where[rows] = math.nan
        args = (v, v_old, None, x_t, x0, torch.ones(3), torch.ones(3), 0.5, 5.0, 0.0, True)
        loss, metrics, dv = nft.nft_loss(*args)
        assert loss.isnan() and metrics[0, 1].isnan() and dv[1].isnan().any()
        assert metrics[:, [0, 2]].isfinite().all() and dv[[0, 2]].isfinite().all()
        where[rows] = 0.0
    advantage = torch.tensor([1.0, math.nan, 1.0])
    args = (v, v_old, None, x_t, x0, torch.ones(3), advantage, 0.5, 5.0, 0.0, True)
    assert nft.nft_loss(*args)[0].isnan()


def test_a_row_does_not_depend_on_the_batch():
    v, v_old, x_t, x0 = draw((20, 1500), 4)
    sigma, advantage = torch.linspace(0.1, 0.9, 20), torch.linspace(-7, 6, 20)
    numbers = (0.1, 5.0, 0.0, False)
    _, together, _ = nft.nft_loss(v, v_old, None, x_t, x0, sigma, advantage, *numbers)
    at = [18, 3]
    part = [t[at] for t in (x_t, x0, sigma, advantage)]
    _, alone, _ = nft.nft_loss(v[at], v_old[at], None, *part, *numbers)
    assert torch.equal(alone, together[:, at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 256, 600])
@pytest.mark.parametrize("clip", [(1e-4, 2e-4), (1.0, math.inf)])
def test_policy_loss(dtype, rows, clip):
    g = torch.Generator().manual_seed(rows)
    old, move, advantage = (torch.randn(rows, generator=g, dtype=torch.float64) for _ in range(3))
    args = [t.to(dtype) for t in (old + 3e-4 * move, old, advantage)]
    # exp differs by an ulp between libraries, and the sum has another order.
    rtol = 1e-13 if dtype == torch.float64 else 1e-7
    same(policy.policy_loss(*args, *clip), POLICY.backends["cpu"].run(*args, *clip), rtol)
    equal = policy.policy_loss(args[1], args[1], args[2], *clip)
    assert (equal[1] == 1).all() and float(equal[2]) == 0 and float(equal[3]) == 0


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_policy_loss_lets_a_nan_pass(where, sign):
    args = [torch.zeros(9), torch.zeros(9), sign * torch.ones(9)]
    args[where][4] = math.nan
    loss, _, _, _, grad = policy.policy_loss(*args, 0.1, 0.1)
    assert loss.isnan() and grad[4].isnan() and int(grad.isnan().sum()) == 1


def test_rows_that_are_not_dense_are_copied():
    v, target = draw((4, 6, 10), 2)
    want = velocity.velocity_loss(v, target, None, True)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.stack((t, t), dim=-1)[..., 0],
        lambda t: torch.cat((t, t), dim=1)[:, :6],
    ):
        got = velocity.velocity_loss(layout(v), layout(target), None, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
