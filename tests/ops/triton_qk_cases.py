"""kernels/qk_norm_rope.py in Triton's interpreter, on CPU tensors, against the float64 reference.

Not collected by name: test_triton.py runs this file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported. float32 only: the interpreter truncates
where hardware rounds to bfloat16.
"""

from __future__ import annotations

import pytest
import torch

from qirl_fast.kernels import qk_norm_rope as kernels
from qirl_fast.kernels import qk_norm_rope_backward as backward_kernels
from qirl_fast.ops.qk_norm_rope import qk_norm_rope_backward_reference, qk_norm_rope_reference

EPS = 1e-6


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stream(batch, length, heads, k_heads, width, seed, *, weights=True, rope="shared"):
    """(q, k, v, q_weight, k_weight, rope); q, k, v are parts of one projection."""
    fused = normal(batch, length, heads + 2 * k_heads, width, seed=seed)
    q, k, v = fused.split([heads, k_heads, k_heads], dim=2)
    w = [1 + normal(width, seed=seed + i) for i in (1, 2)] if weights else [None, None]
    angle = normal(batch, length, width // 2, seed=seed + 3)
    turn = torch.polar(torch.ones_like(angle), angle)
    return q, k, v, *w, {"shared": turn[0], "each": turn, "none": None}[rope]


def wide(t):
    if t is None:
        return None
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


CASES = {
    "joint": (stream(2, 5, 3, 3, 8, 0), stream(2, 3, 3, 3, 8, 20)),
    "image alone": (stream(2, 9, 2, 2, 16, 1), (None,) * 6),
    "grouped heads": (stream(1, 3, 4, 2, 32, 2), stream(1, 2, 4, 2, 32, 22)),
    "a rope for each sample": (stream(2, 4, 2, 2, 8, 3, rope="each"), (None,) * 6),
    "a rope for each sample, joint": (
        stream(2, 2, 2, 2, 8, 7, rope="each"),
        stream(2, 3, 2, 2, 8, 27, rope="each"),
    ),
    "weights of two dtypes": (
        stream(1, 2, 2, 2, 8, 8),
        tuple(t.bfloat16() if i == 3 else t for i, t in enumerate(stream(1, 3, 2, 2, 8, 28))),
    ),
    "odd widths": (stream(1, 3, 3, 3, 6, 4), stream(1, 1, 3, 3, 6, 24, rope="none")),
    "no weights": (stream(1, 3, 2, 2, 8, 5, weights=False), stream(1, 2, 2, 2, 8, 25)),
    "several tiles": (stream(1, 2, 40, 40, 128, 6), (None,) * 6),
}


def check(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        assert g.shape == w.shape and g.isfinite().all()
        rtol = 2e-5 if g.dtype == torch.float32 else torch.finfo(g.dtype).eps  # it truncates
        torch.testing.assert_close(g.double(), w.double(), rtol=rtol, atol=4e-6)


@pytest.mark.parametrize("case", CASES)
def test_forward(case):
    image, text = CASES[case]
    if text[0] is None:
        image = (*image[:2], None, *image[3:])
    got = kernels.qk_norm_rope(*image, *text, EPS)
    check(got, qk_norm_rope_reference(*map(wide, image), *map(wide, text), EPS))


@pytest.mark.parametrize("want_weights", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_backward(case, want_weights):
    image, text = CASES[case]
    inputs = [s[i] for s in (image, text) for i in (0, 1, 3, 4, 5)]
    length = image[0].shape[1] + (0 if text[0] is None else text[0].shape[1])
    grads = [normal(t.shape[0], length, *t.shape[2:], seed=9) for t in image[:2]]
    got = backward_kernels.qk_norm_rope_backward(*grads, *inputs, EPS, want_weights)
    wanted = qk_norm_rope_backward_reference(
        *map(wide, grads), *map(wide, inputs), EPS, want_weights
    )
    check(got, wanted)
