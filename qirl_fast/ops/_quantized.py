"""What the ops share that also return their result y in fp8: (q, scale) = fp8_quantize(y).

An op takes the granularity as its last argument, "" for none, and returns q and scale last, empty
where they are not wanted. q is e4m3fn; y is quantised as it was rounded to its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qirl_fast.ops.fp8_quantize import (
    BLOCK,
    Quantized,
    empty_outputs,
    fp8_quantize_reference,
)

WANTED = ("row", "block")


def require_quantize(op: str, quantize: str | None) -> str:
    """The granularity that the op is asked for, "" for None."""
    if quantize is None:
        return ""
    if isinstance(quantize, str) and quantize in WANTED:
        return quantize
    hint = ""
    if quantize == "tensor":
        hint = " A whole tensor's scale is known only after the op: call fp8_quantize on y."
    raise ValueError(f"{op}: quantize must be None, 'row' or 'block'; got {quantize!r}.{hint}")


def fp8_outputs(y: Tensor, quantize: str) -> tuple[Tensor, Tensor]:
    """Empty q and scale for y."""
    if quantize:
        q, scale, _ = empty_outputs(y, quantize, False, False)
        return q, scale
    return y.new_empty(0, dtype=torch.float8_e4m3fn), y.new_empty(0, dtype=torch.float32)


def fp8_of(q: Tensor, scale: Tensor, quantize: str) -> tuple[Tensor | None, Tensor | None, int]:
    """q, scale and the elements that share a scale, as the bindings take them."""
    if not quantize:
        return None, None, 0
    return q, scale, BLOCK if quantize == "block" else q.shape[-1]


def and_quantized(reference: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """`reference`, whose first or only result is y, with q and scale behind its results."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        *rest, quantize = args
        result = reference(*rest)
        results = (result,) if isinstance(result, Tensor) else result
        if not quantize:
            return *results, *fp8_outputs(results[0], "")
        return *results, *fp8_quantize_reference(results[0], quantize, False, False)

    return run


def quantized(y: Tensor, q: Tensor, scale: Tensor) -> Quantized:
    """The three for the caller; q and scale come with y's rows, y with its shape."""
    return Quantized(y, q.reshape(y.shape), scale.reshape(*y.shape[:-1], scale.shape[-1]))
