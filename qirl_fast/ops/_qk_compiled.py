"""Launchers of csrc/cpu/qk_norm_rope.inl.cpp and csrc/cuda/qk_norm_rope.cu.

The bindings of both modules take the same arguments, the last one apart: threads or the stream.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qirl_fast.ops._checks import LARGE_DTYPES
from qirl_fast.ops._compiled import CPU, CUDA, Compiled
from qirl_fast.ops._recycled import empty

Maybe = Tensor | None
Six = tuple[Maybe, Maybe, Maybe, Maybe, Maybe, Maybe]  # q, k, v, weights of q and k, rope


def dense_heads(x: Tensor) -> Tensor:
    """x itself when its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_rope(rope: Tensor | None) -> Tensor | None:
    """rope with contiguous pairs; a lazily conjugated one becomes real memory."""
    return None if rope is None else dense_heads(rope.resolve_conj())


def dense_weight(weight: Tensor) -> Tensor:
    """weight, contiguous; ValueError for a dtype that the kernels do not read."""
    if weight.dtype not in LARGE_DTYPES:
        raise ValueError(
            f"qk_norm_rope: weights must be float32 or bfloat16 for a compiled backend; got "
            f"{weight.dtype}. Cast, or use_backend('reference')."
        )
    return weight.contiguous()


def dense_stream(*stream: Tensor | None) -> Six:
    """The same six, copied where a last dimension is not contiguous."""
    *heads, q_weight, k_weight, rope = stream
    q, k, v = (None if t is None else dense_heads(t) for t in heads)
    q_weight, k_weight = (None if t is None else dense_weight(t) for t in (q_weight, k_weight))
    return q, k, v, q_weight, k_weight, dense_rope(rope)


def joint_buffers(
    q: Tensor, k: Tensor, text_q: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Q, K, V to write to; no V without text."""
    length = q.shape[1] + (0 if text_q is None else text_q.shape[1])

    def buffer(t: Tensor) -> Tensor:
        return empty(t, (t.shape[0], length, *t.shape[2:]))

    return buffer(q), buffer(k), None if text_q is None else buffer(k)


def _qk_norm_rope(
    on: Compiled,
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
    image = dense_stream(q, k, v, q_weight, k_weight, rope)
    text = dense_stream(text_q, text_k, text_v, text_q_weight, text_k_weight, text_rope)
    Q, K, V = joint_buffers(q, k, text_q)
    with on.device(q):
        on.module().qk_norm_rope(
            text,
            image,
            (Q, K, V),
            eps,
            on.last(q),
        )
    return Q, K, q.new_empty(0) if V is None else V


def gradient_buffers(
    q: Tensor, k: Tensor, text_q: Tensor | None, text_k: Tensor | None
) -> tuple[Tensor, ...]:
    """dq, dk, text_dq, text_dk to write to, contiguous; empty where there is no text."""
    none = q.new_empty(0)
    return tuple(none if t is None else empty(t) for t in (q, k, text_q, text_k))


def weight_gradients(
    none: Tensor, dw: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, ...]:
    """Rows of dw, float32 in the order of `weights`, each in its weight's dtype.

    Unwanted ones are empty; absent ones are new tensors like `none`, empty too.
    """
    return tuple(
        none.new_empty(0)
        if weight is None
        else (weight.new_empty(0) if dw is None else dw[i].to(weight.dtype, copy=True))
        for i, weight in enumerate(weights)
    )


def _qk_norm_rope_backward(
    on: Compiled,
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
) -> tuple[Tensor, ...]:
    image = dense_stream(q, k, None, q_weight, k_weight, rope)
    text = dense_stream(text_q, text_k, None, text_q_weight, text_k_weight, text_rope)
    dQ, dK = dense_heads(dQ), dense_heads(dK)
    dq, dk, text_dq, text_dk = gradient_buffers(q, k, text_q, text_k)
    partials = dw = None
    if want_weights:
        lengths = (q.shape[1], 0 if text_q is None else text_q.shape[1])
        chunks = sum(-(-length // on.module().qk_chunk) for length in lengths)
        partials = dQ.new_empty((q.shape[0], chunks, 2, q.shape[3]), dtype=torch.float32)
        dw = dQ.new_empty((4, q.shape[3]), dtype=torch.float32)
    with on.device(q):
        on.module().qk_norm_rope_backward(
            text,
            image,
            dQ,
            dK,
            (text_dq, text_dk, dq, dk),
            partials,
            dw,
            eps,
            on.last(q),
        )
    rows = (text_q_weight, text_k_weight, q_weight, k_weight)
    text_dqw, text_dkw, dqw, dkw = weight_gradients(dq, dw, *rows)
    return dq, dk, dqw, dkw, text_dq, text_dk, text_dqw, text_dkw


qk_norm_rope_cpu = partial(_qk_norm_rope, CPU)
qk_norm_rope_cuda = partial(_qk_norm_rope, CUDA)
qk_norm_rope_backward_cpu = partial(_qk_norm_rope_backward, CPU)
qk_norm_rope_backward_cuda = partial(_qk_norm_rope_backward, CUDA)
