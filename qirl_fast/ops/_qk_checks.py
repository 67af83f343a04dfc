"""The stream type of qk_norm_rope and its argument checks: metadata only, no host sync."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qirl_fast.ops._checks import (
    LARGE_DTYPES,
    REFERENCE_DTYPES,
    require_like,
    require_no_grad,
    require_tensor,
)

_OP = "qk_norm_rope"


class Stream(NamedTuple):
    """One stream of tokens: projections, norm weights and rotation; see ops/qk_norm_rope.py.

    q: [B, S, H, Dh]. k, v: [B, S, Hk, Dh]. q_weight, k_weight: [Dh], None for ones.
    rope: complex64 [S, Dh / 2] or [B, S, Dh / 2], None for no rotation.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    rope: Tensor | None = None


def require_stream(prefix: str, s: Stream) -> None:
    """Shapes, dtypes and devices inside one stream; `prefix` stands before names in messages."""
    _require_heads(f"{prefix}q", s.q)
    _require_heads(f"{prefix}k", s.k)
    batch, length, _, width = s.q.shape
    if width % 2 != 0:
        raise ValueError(
            f"{_OP}: {prefix}q has heads of width {width}; rotated pairs want an even width."
        )
    wanted = (batch, length, s.k.shape[2], width)
    if s.k.shape != wanted:
        raise ValueError(
            f"{_OP}: {prefix}k must be [B, S, heads, Dh] with the B, S, Dh of {prefix}q, {wanted}; "
            f"got {tuple(s.k.shape)}."
        )
    _require_kin(f"{prefix}k", s.k, f"{prefix}q", s.q)
    require_like(_OP, f"{prefix}v", s.v, f"{prefix}k", s.k, dtype=True)
    for name, weight in ((f"{prefix}q_weight", s.q_weight), (f"{prefix}k_weight", s.k_weight)):
        if weight is not None:
            _require_weight(name, weight, s.q)
    if s.rope is not None:
        _require_rope(f"{prefix}rope", s.rope, s.q)


def require_joint(image: Stream, text: Stream) -> None:
    """The text stream fits in one buffer with the image stream."""
    for name, t, like in (("q", text.q, image.q), ("k", text.k, image.k)):
        wanted = (like.shape[0], t.shape[1], *like.shape[2:])
        if t.shape != wanted:
            raise ValueError(
                f"{_OP}: text.{name} must be [B, T, heads, Dh] with the B, heads, Dh of {name}, "
                f"{wanted}; got {tuple(t.shape)}."
            )
        _require_kin(f"text.{name}", t, name, like)


def require_eps(eps: float) -> None:
    """eps is a finite number, not negative."""
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{_OP}: eps must be finite and >= 0; got {eps}.")


def _require_heads(name: str, x: Tensor) -> None:
    require_tensor(_OP, name, x)
    if x.dtype not in REFERENCE_DTYPES:
        raise ValueError(f"{_OP}: {name} must be float32 or bfloat16; got {x.dtype}.")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"{_OP}: {name} needs shape [B, S, heads, Dh], none of them 0; got {tuple(x.shape)}."
        )


def _require_kin(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.dtype != like.dtype:
        raise ValueError(
            f"{_OP}: {name} must have the dtype of {like_name}, {like.dtype}; got {t.dtype}."
        )
    if t.device != like.device:
        raise ValueError(
            f"{_OP}: {name} must be on the device of {like_name}, {like.device}; got {t.device}."
        )


def _require_weight(name: str, weight: Tensor, q: Tensor) -> None:
    require_tensor(_OP, name, weight)
    if weight.shape != q.shape[-1:]:
        raise ValueError(
            f"{_OP}: {name} needs one value a channel of a head, shape ({q.shape[-1]},); "
            f"got {tuple(weight.shape)}."
        )
    if weight.dtype not in LARGE_DTYPES and weight.dtype != q.dtype:
        raise ValueError(f"{_OP}: {name} must be float32 or bfloat16; got {weight.dtype}.")
    if weight.device != q.device:
        raise ValueError(f"{_OP}: {name} must be on {q.device}, as q is; got {weight.device}.")


def _require_rope(name: str, rope: Tensor, q: Tensor) -> None:
    require_tensor(_OP, name, rope)
    batch, length, _, width = q.shape
    if rope.dtype != torch.complex64:
        raise ValueError(
            f"{_OP}: {name} must be complex64, cos + i sin of each pair's angle; got {rope.dtype}."
        )
    shared, own = (length, width // 2), (batch, length, width // 2)
    if rope.shape not in (shared, own):
        raise ValueError(
            f"{_OP}: {name} must be [S, Dh / 2] or [B, S, Dh / 2], {shared} or {own}; "
            f"got {tuple(rope.shape)}."
        )
    if rope.device != q.device:
        raise ValueError(f"{_OP}: {name} must be on {q.device}, as q is; got {rope.device}.")
    require_no_grad(_OP, "the rotation has no gradient", **{name: rope})
