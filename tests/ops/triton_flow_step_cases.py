"""kernels/flow_step.py in Triton's interpreter, on CPU tensors: float32 against the C++ kernels.

Not collected by name: test_triton.py runs this file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported. The interpreter truncates float32 to
bfloat16 where hardware rounds to nearest, so bfloat16 outputs are allowed one unit in the last
place and are not replayed.
"""

from __future__ import annotations

import pytest
import torch

from qirl_fast import ops
from qirl_fast.kernels import flow_step as kernels


def inputs(shape, x_dtype, v_dtype, with_delta):
    g = torch.Generator().manual_seed(0)
    rows = shape[0]
    x, v, delta = (torch.randn(shape, generator=g) for _ in range(3))
    a, c, s = (torch.rand(rows, generator=g) + 0.1 for _ in range(3))
    w, b = 1 / (2 * s * s), torch.log(s)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g)
    return x.to(x_dtype), v.to(v_dtype), a, -c, s, w, b, seed, delta if with_delta else None


@pytest.mark.parametrize(
    ("shape", "with_delta", "offset"),
    [((2, 5), False, 2**40 + 3), ((2, 7, 147), True, 1), ((1, 2048), False, 0)],
)
def test_step_replay_and_gradients_match_the_cpu_kernels(shape, with_delta, offset):
    x, v, a, c, s, w, b, seed, delta = inputs(shape, torch.float32, torch.bfloat16, with_delta)
    x_next, logp = kernels.flow_step(x, v, a, c, s, w, b, seed, offset, delta)
    want_x, want_logp = ops.flow_step(x, v, a, c, s, w, b, seed=seed, offset=offset, delta=delta)
    # One formula, each operation rounded once, on both sides. The sum of squares has another order.
    assert torch.equal(x_next, want_x)
    torch.testing.assert_close(logp, want_logp, rtol=1e-6, atol=1e-7)
    same, residual = kernels.flow_logp(x, x_next, v, a, c, w, b, delta, True)
    alone, nothing = kernels.flow_logp(x, x_next, v, a, c, w, b, delta, False)
    assert torch.equal(same, logp) and torch.equal(alone, logp) and nothing.numel() == 0

    grad = torch.linspace(-1, 2, shape[0])
    dx, dv = kernels.flow_logp_backward(grad, residual, a, c, w, torch.float32, None)
    assert dv.numel() == 0
    leaf = x.clone().requires_grad_()
    ops.flow_logp(leaf, x_next, v, a, c, w, b, delta=delta).backward(grad)
    torch.testing.assert_close(dx, leaf.grad, rtol=1e-6, atol=0)


def test_bfloat16_is_within_one_unit():
    x, v, a, c, s, w, b, seed, delta = inputs((2, 300), torch.bfloat16, torch.bfloat16, True)
    x_next, _ = kernels.flow_step(x, v, a, c, s, w, b, seed, 3, delta)
    want, _ = ops.flow_step(x, v, a, c, s, w, b, seed=seed, offset=3, delta=delta)
    steps = x_next.view(torch.int16).int() - want.view(torch.int16).int()
    assert int(steps.abs().max()) <= 1
