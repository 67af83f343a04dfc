"""Launchers of csrc/cuda/qk_norm_rope.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast.ops._cuda import cuda_module, device_of, stream_of

Maybe = Tensor | None
Six = tuple[Maybe, Maybe, Maybe, Maybe, Maybe, Maybe]  # q, k, v, weights of q and k, rope


def dense_heads(x: Tensor) -> Tensor:
    """x itself when its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_rope(rope: Tensor | None) -> Tensor | None:
    """rope with contiguous pairs; a lazily conjugated one becomes real memory."""
    return None if rope is None else dense_heads(rope.resolve_conj())


def dense_stream(*stream: Tensor | None) -> Six:
    """The same six, copied where a last dimension is not contiguous."""
    *heads, q_weight, k_weight, rope = stream
    q, k, v = (None if t is None else dense_heads(t) for t in heads)
    q_weight, k_weight = (None if t is None else t.contiguous() for t in (q_weight, k_weight))
    return q, k, v, q_weight, k_weight, dense_rope(rope)


def joint_buffers(
    q: Tensor, k: Tensor, text_q: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Q, K, V to write to; no V without text."""
    length = q.shape[1] + (0 if text_q is None else text_q.shape[1])

    def buffer(t: Tensor) -> Tensor:
        return t.new_empty((t.shape[0], length, *t.shape[2:]))

    return buffer(q), buffer(k), None if text_q is None else buffer(k)


def qk_norm_rope_cuda(
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
    """CUDA kernel, csrc/cuda/qk_norm_rope.cu."""
    image = dense_stream(q, k, v, q_weight, k_weight, rope)
    text = dense_stream(text_q, text_k, text_v, text_q_weight, text_k_weight, text_rope)
    Q, K, V = joint_buffers(q, k, text_q)
    with device_of(q):
        cuda_module().qk_norm_rope(
            text,
            image,
            (Q, K, V),
            eps,
            stream_of(q),
        )
    return Q, K, q.new_empty(0) if V is None else V


def gradient_buffers(
    q: Tensor, k: Tensor, text_q: Tensor | None, text_k: Tensor | None
) -> tuple[Tensor, ...]:
    """dq, dk, text_dq, text_dk to write to, contiguous; empty where there is no text."""
    none = q.new_empty(0)
    return tuple(none if t is None else t.new_empty(t.shape) for t in (q, k, text_q, text_k))


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


def qk_norm_rope_backward_cuda(
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
    """CUDA kernel, csrc/cuda/qk_norm_rope.cu."""
    image = dense_stream(q, k, None, q_weight, k_weight, rope)
    text = dense_stream(text_q, text_k, None, text_q_weight, text_k_weight, text_rope)
    dQ, dK = dense_heads(dQ), dense_heads(dK)
    dq, dk, text_dq, text_dk = gradient_buffers(q, k, text_q, text_k)
    partials = dw = None
    if want_weights:
        lengths = (q.shape[1], 0 if text_q is None else text_q.shape[1])
        chunks = sum(-(-length // cuda_module().qk_chunk) for length in lengths)
        partials = dQ.new_empty((q.shape[0], chunks, 2, q.shape[3]), dtype=torch.float32)
        dw = dQ.new_empty((4, q.shape[3]), dtype=torch.float32)
    with device_of(q):
        cuda_module().qk_norm_rope_backward(
            text,
            image,
            dQ,
            dK,
            (text_dq, text_dk, dq, dk),
            partials,
            dw,
            eps,
            stream_of(q),
        )
    rows = (text_q_weight, text_k_weight, q_weight, k_weight)
    text_dqw, text_dkw, dqw, dkw = weight_gradients(dq, dw, *rows)
    return dq, dk, dqw, dkw, text_dq, text_dk, text_dqw, text_dkw
