"""Attention of a fused block, through the backend that diffusers' set_attention_backend chose."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

Segments = list[tuple[int, int, bool]]  # start, end, whether it is text


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, S, H, Dh] of q [B, S, H, Dh], k and v [B, T, H, Dh]. attn: the stock attention module.

    mask: bool, broadcast to [B, H, S, T]; True where a query may look.
    """
    return _dispatch(attn, q, k, v, mask, attn.processor._attention_backend)


def attend_segments(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, key_valid: Tensor | None
) -> Tensor:
    """Block-causal attention: a call for each run of text, for each condition image, the target.

    Text sees itself causally and all before it; an image sees itself whole and all before it.
    key_valid: bool [B, S]; False where a prompt is padded. As in diffusers these calls take the
    default backend: others serve no mask.
    """
    after = segments[-1][1] if segments else 0
    runs = [*segments, (after, q.shape[1], False)] if after < q.shape[1] else segments
    outputs = []
    for start, end, is_text in runs:
        mask = None
        if is_text:
            seen = torch.ones(end - start, end, dtype=torch.bool, device=q.device)
            mask = seen.tril(start)[None, None]
        if key_valid is not None:
            valid = key_valid[:, None, None, :end]
            mask = valid if mask is None else mask & valid
        outputs.append(_dispatch(attn, q[:, start:end], k[:, :end], v[:, :end], mask, None))
    return torch.cat(outputs, dim=1)


def _dispatch(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str | None
) -> Tensor:
    parallel = attn.processor._parallel_config
    out: Tensor = dispatch_attention_fn(
        q, k, v, attn_mask=mask, dropout_p=0.0, backend=backend, parallel_config=parallel
    )
    return out.to(q.dtype)
