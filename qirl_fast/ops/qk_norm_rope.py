"""qk_norm_rope: norm and rotate the heads of Q and K; write text and image into the joint buffers.

    n = x / sqrt(mean of x^2 over the head + eps) * weight         per token and head
    (y_2j + i y_2j+1) = (n_2j + i n_2j+1) * rope_j                 rope_j = cos + i sin

for x = q and k of each stream; v is copied. With a text stream of T tokens the results are the
buffers joint attention wants, text first, image behind it.

Shapes: q [B, S, H, Dh], k and v [B, S, Hk, Dh], Dh even; weights [Dh]; rope [S, Dh / 2], or
[B, S, Dh / 2]. Q [B, T + S, H, Dh]; K, V [B, T + S, Hk, Dh].
Dtypes: q, k, v of both streams float32 or bfloat16, alike; each weight float32 or bfloat16; rope
complex64. Norm, weight and rotation are computed in float32, each product and sum rounded on its
own, and rounded once to the dtype of q. Weight gradients add in float32 over a few tokens, these
partial sums in a fixed order (float64 on the CPU).
Gradients: to q, k, v and the weights, not to rope. The norm is computed again from q and k.
Layout: any strides as long as Dh is contiguous, so the parts of one QKV projection come as they
are.
Source: diffusers, QwenDoubleStreamAttnProcessor2_0 and _qwenimage21_prepare_qkv with RMSNorm and
apply_rotary_emb_qwen(use_real=False). In bfloat16 diffusers rounds the normed heads, then their
product with the weight, then the rotated pair; here there is one rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast.ops._checks import LARGE_DTYPES, REFERENCE_DTYPES
from qirl_fast.ops._cpp import cpu_launcher
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._qk_checks import Stream, require_eps, require_joint, require_stream
from qirl_fast.ops._qk_cuda import (
    qk_norm_rope_backward_cuda,
    qk_norm_rope_cuda,
)
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend

Gradients = tuple[Tensor, ...]  # of q, k, q_weight, k_weight; then of the text stream's


# ---- reference ----------------------------------------------------------------------------------
def qk_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    text_rope: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in float32 (float64 for float64 q). Without text V is empty."""
    Q, K = _norm_rope(q, q_weight, rope, eps), _norm_rope(k, k_weight, rope, eps)
    if text_q is None or text_k is None or text_v is None or v is None:
        return Q, K, q.new_empty(0)
    text_Q = _norm_rope(text_q, text_q_weight, text_rope, eps)
    text_K = _norm_rope(text_k, text_k_weight, text_rope, eps)
    return torch.cat((text_Q, Q), 1), torch.cat((text_K, K), 1), torch.cat((text_v, v), 1)


def qk_norm_rope_backward_reference(
    dQ: Tensor,
    dK: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    text_rope: Tensor | None,
    eps: float,
    want_weights: bool,
) -> Gradients:
    """Gradients in the order of `Gradients`; one that is absent or unwanted is empty.

    With r = 1 / sqrt(mean x^2 + eps) and dn = weight * conj(rope) dy:
    dx = r (dn - x r mean(dn x r)), dweight = sum over tokens and heads of conj(rope) dy * x r.
    """
    none = q.new_empty(0)
    text_length = 0 if text_q is None else text_q.shape[1]
    results: list[Tensor] = []
    for stream in (
        (q, q_weight, dQ[:, text_length:], k, k_weight, dK[:, text_length:], rope),
        (text_q, text_q_weight, dQ, text_k, text_k_weight, dK, text_rope),
    ):
        heads: list[Tensor] = []
        weights: list[Tensor] = []
        for x, weight, dy in (stream[:3], stream[3:6]):
            dx = dweight = none
            if x is not None:
                assert dy is not None
                dx, dw = _norm_rope_grad(dy[:, : x.shape[1]], x, weight, stream[6], eps)
                if weight is not None:
                    dweight = dw.to(weight.dtype) if want_weights else weight.new_empty(0)
            heads.append(dx)
            weights.append(dweight)
        results += heads + weights
    return tuple(results)


def _norm_rope(x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.to(wide)
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        n = n * weight.to(wide)
    return (n if rope is None else _rotate(n, rope)).to(x.dtype)


def _norm_rope_grad(
    dy: Tensor, x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    dn = dy.to(wide) if rope is None else _rotate(dy.to(wide), rope.conj())
    r = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    n = x.to(wide) * r
    dweight = (dn * n).sum((0, 1, 2))
    if weight is not None:
        dn = dn * weight.to(wide)
    return (r * (dn - n * (dn * n).mean(-1, keepdim=True))).to(x.dtype), dweight


def _rotate(n: Tensor, rope: Tensor) -> Tensor:
    pairs = torch.view_as_complex(n.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rope.to(pairs.dtype).unsqueeze(-2)).flatten(-2)


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}
OP = Op(
    "qk_norm_rope",
    {
        "reference": Backend(qk_norm_rope_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("qk_norm_rope"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("qk_norm_rope", "qk_norm_rope"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(qk_norm_rope_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "qk_norm_rope_backward",
    {
        "reference": Backend(qk_norm_rope_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("qk_norm_rope_backward"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("qk_norm_rope_backward", "qk_norm_rope_backward"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(qk_norm_rope_backward_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)


def _fake(q: Tensor, k: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    text_q = rest[3]
    if text_q is None:
        return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty(0)
    length = text_q.shape[1] + q.shape[1]
    Q, K, V = (t.new_empty((t.shape[0], length, *t.shape[2:])) for t in (q, k, k))
    return Q, K, V


def _backward_fake(dQ: Tensor, dK: Tensor, *rest: Any) -> Gradients:
    q, k, q_weight, k_weight, _, text_q, text_k, text_q_weight, text_k_weight, *_ = rest
    want_weights = rest[-1]

    def like(t: Tensor | None, wanted: bool) -> Tensor:
        if t is None:
            return q.new_empty(0)
        return t.new_empty(t.shape if wanted else 0)

    heads, text_heads = (q, k), (text_q, text_k)
    weights, text_weights = (q_weight, k_weight), (text_q_weight, text_k_weight)
    return (
        *(like(t, True) for t in heads),
        *(like(t, want_weights) for t in weights),
        *(like(t, True) for t in text_heads),
        *(like(t, want_weights) for t in text_weights),
    )


_qk_norm_rope = OP.register(
    "(Tensor q, Tensor k, Tensor? v, Tensor? q_weight, Tensor? k_weight, Tensor? rope,"
    " Tensor? text_q, Tensor? text_k, Tensor? text_v, Tensor? text_q_weight,"
    " Tensor? text_k_weight, Tensor? text_rope, float eps) -> (Tensor, Tensor, Tensor)",
    _fake,
    large=(0, 1, 2, 6, 7, 8),
)
_qk_norm_rope_backward = OP_BACKWARD.register(
    "(Tensor dQ, Tensor dK, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? rope,"
    " Tensor? text_q, Tensor? text_k, Tensor? text_q_weight, Tensor? text_k_weight,"
    " Tensor? text_rope, float eps, bool want_weights)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    large=(2, 3, 7, 8),
)


class _QkNormRope(torch.autograd.Function):
    """Saves inputs only. Without text the caller keeps v, so no V passes through here."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, _, q_weight, k_weight, rope, text_q, text_k, _, *text_rest, eps, backend = args
        ctx.save_for_backward(q, k, q_weight, k_weight, rope, text_q, text_k, *text_rest)
        ctx.eps, ctx.backend = eps, backend
        Q, K, V = _qk_norm_rope(*args)
        return Q, K, V

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dQ: Tensor, dK: Tensor, dV: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        want_weights = any(needs[i] for i in (3, 4, 9, 10))
        dq, dk, dqw, dkw, text_dq, text_dk, text_dqw, text_dkw = _qk_norm_rope_backward(
            dQ, dK, *saved, ctx.eps, want_weights, ctx.backend
        )
        dv = text_dv = None
        if saved[5] is not None:
            length = saved[5].shape[1]
            dv, text_dv = dV[:, length:], dV[:, :length]
        image = (dq, dk, dv, dqw, dkw, None)
        gradients = (*image, text_dq, text_dk, text_dv, text_dqw, text_dkw, None, None, None)
        return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


# ---- public -------------------------------------------------------------------------------------
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: Tensor | None = None,
    *,
    text: Stream | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, K, V) ready for attention; see the module docstring for the math.

    q: [B, S, H, Dh]. k, v: [B, S, Hk, Dh]. float32 or bfloat16, alike, Dh even.
    q_weight, k_weight: RMSNorm weights [Dh], float32 or bfloat16; None for ones.
    rope: complex64 [S, Dh / 2] or [B, S, Dh / 2]; None for no rotation.
    text: the same six of a text stream with the same B, heads and Dh, which the joint Q, K, V
        begin with. Without it V is v itself.
    Raises ValueError for shapes, dtypes or devices outside this, and for a rope that requires grad.
    """
    image = Stream(q, k, v, q_weight, k_weight, rope)
    require_stream("", image)
    require_eps(eps)
    rest: tuple[Tensor | None, ...] = (None,) * 6
    if text is not None:
        require_stream("text.", text)
        require_joint(image, text)
        rest = tuple(text)
    args = (q, k, v if text is not None else None, q_weight, k_weight, rope, *rest)
    wants_grad = any(t is not None and t.requires_grad for t in args)
    call = _QkNormRope.apply if torch.is_grad_enabled() and wants_grad else _qk_norm_rope
    Q, K, V = call(*args, float(eps), forced_backend())
    return Q, K, v if text is None else V
