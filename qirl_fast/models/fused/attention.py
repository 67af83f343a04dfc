"""Attention of a fused block, through the backend that `use_attention` or diffusers'
set_attention_backend chose.
"""

import logging
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)
from torch import Tensor

logger = logging.getLogger(__name__)

Segments = list[tuple[int, int, bool]]  # start, end, whether it is text

# Our names -> diffusers' backends. None of these calls has a mask, but for runs of text.
BACKENDS = {
    "sdpa": "native",
    "cudnn": "_native_cudnn",
    "flash": "flash",
    "flash3": "_flash_3",
    "xformers": "xformers",
    "flex": "flex",
}
GPU_ONLY = ("cudnn", "flash", "flash3", "xformers", "flex")  # flex: no backward on a CPU
NO_FLOAT32 = ("cudnn", "flash", "flash3")


def use_attention(transformer: Any, name: str) -> None:
    """Send the attention of a stock or fused transformer to one library, and log which.

    name: one of BACKENDS, or "auto": what diffusers is set to, by default "sdpa", PyTorch's
    scaled_dot_product_attention, which picks cuDNN, flash or a kernel of its own.
    Raises ValueError for an unknown name and where the library is not installed or does not serve
    the transformer's device or dtype.
    """
    if name == "auto":
        logger.info("attention: auto, diffusers' default")
        return
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r}: use auto, {', '.join(BACKENDS)}")
    device, dtype = transformer.device.type, transformer.dtype
    if name in GPU_ONLY and device != "cuda":
        raise ValueError(
            f"attention {name!r} runs on CUDA and the model is on {device}; use auto or sdpa"
        )
    if name in NO_FLOAT32 and dtype == torch.float32:
        raise ValueError(
            f"attention {name!r} serves no float32; set model.dtype=bfloat16, or use auto or sdpa"
        )
    try:
        with attention_backend("native"):  # on leaving, the default of other models is what it was
            transformer.set_attention_backend(BACKENDS[name])
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"attention {name!r} was asked for: {error}") from error
    logger.info("attention: %s", name)


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, S, H, Dh] of q [B, S, H, Dh], k and v [B, T, H, Dh]. attn: the stock attention module.

    mask: bool, broadcast to [B, H, S, T]; True where a query may look.
    """
    return _dispatch(attn, q, k, v, mask, _backend(attn, mask))


def _backend(attn: Any, mask: Tensor | None) -> AttentionBackendName | None:
    """The chosen one; with a mask, which other libraries do not take, PyTorch's."""
    chosen: AttentionBackendName | None = getattr(attn.processor, "_attention_backend", None)
    return chosen if mask is None else AttentionBackendName.NATIVE


def attend_segments(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, key_valid: Tensor | None
) -> Tensor:
    """Block-causal attention: a call for each run of text, for each condition image, the target.

    Text sees itself causally and all before it; an image sees itself whole and all before it.
    key_valid: bool [B, S]; False where a prompt is padded. Calls with a mask go to
    scaled_dot_product_attention: other libraries serve none.
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
        parts = (q[:, start:end], k[:, :end], v[:, :end])
        outputs.append(_dispatch(attn, *parts, mask, _backend(attn, mask)))
    return torch.cat(outputs, dim=1)


def _dispatch(
    attn: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    backend: AttentionBackendName | None,
) -> Tensor:
    parallel = getattr(attn.processor, "_parallel_config", None)
    out: Tensor = dispatch_attention_fn(
        q, k, v, attn_mask=mask, dropout_p=0.0, backend=backend, parallel_config=parallel
    )
    return out.to(q.dtype)
