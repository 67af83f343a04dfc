"""Attention of a fused block, through the backend that `use_attention` or diffusers'
set_attention_backend chose.

Under torch.use_deterministic_algorithms(True) gradients, too, have the same bits every time:
    sdpa        PyTorch leaves cuDNN out, asks flash for its deterministic backward, and splits the
                keys of the memory-efficient one no further (torch, sdp_utils.cpp,
                attention_backward.cu)
    flash       here: `deterministic=True`, which diffusers does not pass on
    flash3      the same; diffusers' own call of it has no gradient at all
    flex        matrix products where it is not compiled; compiled, its kernels add up in one order
    cudnn       refused, by PyTorch as well
    xformers    refused: it has no backward of fixed order (its IS_DETERMINISTIC), and says so too
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
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
DETERMINISTIC = ("sdpa", "flash", "flash3", "flex")


def use_attention(transformer: Any, name: str) -> None:
    """Send the attention of a stock or fused transformer to one library, and log which.

    name: one of BACKENDS, or "auto": what diffusers is set to, by default "sdpa", PyTorch's
    scaled_dot_product_attention, which picks cuDNN, flash or a kernel of its own.
    Raises ValueError for an unknown name and where the library is not installed or does not serve
    the transformer's device or dtype, or, where torch.use_deterministic_algorithms is on, has no
    backward of fixed order.
    """
    if name == "auto":
        default = _AttentionBackendRegistry.get_active_backend()[0].value
        _require_order(f"auto (diffusers' default, {default})", default)
        logger.info("attention: auto, diffusers' default: %s", default)
        return
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r}: use auto, {', '.join(BACKENDS)}")
    _require_order(repr(name), BACKENDS[name])
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


def _require_order(name: str, backend: str) -> None:
    """ValueError for a backend of diffusers whose gradients have no fixed bits, if they must."""
    served = [BACKENDS[each] for each in DETERMINISTIC]
    if torch.are_deterministic_algorithms_enabled() and backend not in served:
        raise ValueError(
            f"attention {name}: its backward pass adds up in any order, and deterministic "
            f"algorithms were asked for; use {', '.join(DETERMINISTIC)}"
        )


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
    own = _FLASH.get(backend) if parallel is None else None
    if own is not None:
        return own(q, k, v, torch.are_deterministic_algorithms_enabled())
    out: Tensor = dispatch_attention_fn(
        q, k, v, attn_mask=mask, dropout_p=0.0, backend=backend, parallel_config=parallel
    )
    return out.to(q.dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v, deterministic=deterministic)
    return out


def _flash3(q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, deterministic=deterministic)
    return out[0] if isinstance(out, tuple) else out  # some releases give log-sum-exp beside it


_FLASH: dict[AttentionBackendName | None, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    AttentionBackendName.FLASH: _flash,
    AttentionBackendName._FLASH_3: _flash3,
}
