"""Launchers of csrc/cuda/qk_norm_rope.cu; tensors cross as they do to the CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast.ops._checks import DTYPE_CODE
from qirl_fast.ops._cuda import cuda_module, device_of, stream_of
from qirl_fast.ops._qk_cpu import (
    dense_heads,
    dense_stream,
    gradient_buffers,
    heads_of,
    joint_buffers,
    weight_gradients,
)
from qirl_fast.ops._qk_cpu import stream_of as tokens_of


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
            tokens_of(*text),
            tokens_of(*image),
            (Q.data_ptr(), K.data_ptr(), 0 if V is None else V.data_ptr()),
            (q.shape[0], q.shape[2], k.shape[2], q.shape[3]),
            eps,
            DTYPE_CODE[q.dtype],
            stream_of(q),
        )
    return Q, K, q.new_empty(0) if V is None else V


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
            tokens_of(*text),
            tokens_of(*image),
            heads_of(dQ),
            heads_of(dK),
            tuple(t.data_ptr() if t.numel() else 0 for t in (text_dq, text_dk, dq, dk)),
            *(0 if t is None else t.data_ptr() for t in (partials, dw)),
            (q.shape[0], q.shape[2], k.shape[2], q.shape[3]),
            eps,
            DTYPE_CODE[q.dtype],
            stream_of(q),
        )
    weights = (text_q_weight, text_k_weight, q_weight, k_weight)
    text_dqw, text_dkw, dqw, dkw = weight_gradients(dq, dw, *weights)
    return dq, dk, dqw, dkw, text_dq, text_dk, text_dqw, text_dkw
