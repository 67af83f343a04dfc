"""Argument checks of fp8_linear. Metadata only: no host sync, traceable by torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast.ops._checks import LARGE_DTYPES, require_no_grad, require_rows, require_tensor
from qirl_fast.ops.fp8_quantize import BLOCK, GRANULARITIES

_OP = "fp8_linear"
MULTIPLE = 16  # of both dimensions of the weight: what fp8 tensor cores take


def require_linear(
    x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, granularity: str
) -> None:
    """x, the quantised weight and the bias fit together."""
    require_rows(_OP, "x", x)
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"{_OP}: granularity must be {', '.join(GRANULARITIES)}; got {granularity!r}."
        )
    _require_weight("weight_q", weight_q, x)
    rows, width = weight_q.shape
    if x.shape[-1] != width:
        raise ValueError(
            f"{_OP}: x needs {width} elements in its last dimension, as weight_q "
            f"{tuple(weight_q.shape)} has; got {tuple(x.shape)}."
        )
    if rows % MULTIPLE or width % MULTIPLE:
        raise ValueError(
            f"{_OP}: both dimensions of weight_q must be multiples of {MULTIPLE}; got "
            f"{tuple(weight_q.shape)}. Keep this layer in bfloat16, or pad its weight once."
        )
    if granularity == "block" and width % BLOCK:
        raise ValueError(
            f"{_OP}: by blocks weight_q needs a multiple of {BLOCK} in its last dimension; got "
            f"{tuple(weight_q.shape)}. Quantise this layer by rows."
        )
    _require_scale("weight_scale", weight_scale, weight_q, granularity)
    if bias is not None:
        _require_tensor("bias", bias, x, LARGE_DTYPES)
        if tuple(bias.shape) != (rows,):
            raise ValueError(f"{_OP}: bias must have shape ({rows},); got {tuple(bias.shape)}.")


def require_quantized(x: Tensor, q: Tensor, scale: Tensor | None, granularity: str) -> None:
    """(q, scale) can be what fp8_quantize makes of x."""
    assert scale is not None
    _require_tensor("x.q", q, x, (torch.float8_e4m3fn,))
    if q.shape != x.shape:
        raise ValueError(
            f"{_OP}: x.q must have the shape of x.y, {tuple(x.shape)}; got {tuple(q.shape)}."
        )
    _require_scale("x.scale", scale, q, granularity)


def require_gradient_weight(
    x: Tensor,
    weight_q: Tensor,
    granularity: str,
    grad: str,
    weight: Tensor | None,
    weight_t: tuple[Tensor, Tensor] | None,
) -> None:
    """What `grad` needs is there and fits; without a gradient to make, nothing is needed."""
    if grad not in ("bf16", "fp8"):
        raise ValueError(f"{_OP}: grad must be bf16 or fp8; got {grad!r}.")
    if weight is not None:
        _require_tensor("weight", weight, x, LARGE_DTYPES)
        if weight.shape != weight_q.shape:
            raise ValueError(
                f"{_OP}: weight must have the shape of weight_q, {tuple(weight_q.shape)}; got "
                f"{tuple(weight.shape)}."
            )
    if weight_t is not None:
        q, scale = weight_t
        _require_weight("weight_t[0]", q, x)
        if q.shape != weight_q.shape[::-1]:
            raise ValueError(
                f"{_OP}: weight_t[0] must have shape {tuple(weight_q.shape[::-1])}, that of "
                f"fp8_quantize(W, transpose=True); got {tuple(q.shape)}."
            )
        _require_scale("weight_t[1]", scale, q, granularity)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return
    if grad == "fp8" and granularity == "block" and weight_q.shape[0] % BLOCK:
        raise ValueError(
            f"{_OP}: by blocks grad='fp8' needs a multiple of {BLOCK} in both dimensions of the "
            f"weight; got {tuple(weight_q.shape)}. Take grad='bf16'."
        )
    if grad == "bf16" and weight is None:
        raise ValueError(f"{_OP}: x requires grad and grad='bf16': pass weight=W.")
    if grad == "fp8" and weight_t is None:
        raise ValueError(
            f"{_OP}: x requires grad and grad='fp8': pass weight_t=fp8_quantize(W, "
            f"granularity={granularity!r}, transpose=True)."
        )


def require_frozen(
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    weight_t: tuple[Tensor, Tensor] | None,
) -> None:
    """No weight asks for a gradient."""
    require_no_grad(
        _OP,
        "weights are frozen here: train a LoRA on top",
        weight_q=weight_q,
        weight_scale=weight_scale,
        bias=bias,
        weight=weight,
        **({} if weight_t is None else {"weight_t[0]": weight_t[0], "weight_t[1]": weight_t[1]}),
    )


def _require_tensor(name: str, t: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    require_tensor(_OP, name, t)
    if t.dtype not in dtypes:
        wanted = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{_OP}: {name} must be {wanted}; got {t.dtype}.")
    if t.device != x.device:
        raise ValueError(f"{_OP}: {name} must be on {x.device}, as x is; got {t.device}.")


def _require_weight(name: str, q: Tensor, x: Tensor) -> None:
    _require_tensor(name, q, x, (torch.float8_e4m3fn,))
    if q.ndim != 2 or not q.is_contiguous():
        raise ValueError(
            f"{_OP}: {name} must be a contiguous matrix; got shape {tuple(q.shape)}, strides "
            f"{q.stride()}. fp8_quantize returns one."
        )


def _require_scale(name: str, scale: Tensor, q: Tensor, granularity: str) -> None:
    _require_tensor(name, scale, q, (torch.float32,))
    blocks = (q.shape[-1] + BLOCK - 1) // BLOCK
    spans = {"row": (*q.shape[:-1], 1), "block": (*q.shape[:-1], blocks), "tensor": (1,)}
    wanted = spans[granularity]
    if tuple(scale.shape) != wanted:
        raise ValueError(
            f"{_OP}: {name} must have shape {wanted} for granularity {granularity!r}; got "
            f"{tuple(scale.shape)}."
        )
