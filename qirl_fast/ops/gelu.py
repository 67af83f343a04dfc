"""gelu: GELU in its tanh approximation.

    t     = 2 sqrt(2/pi) (x + 0.044715 x^3),  s = 1 / (1 + exp(-t)) = (1 + tanh(t/2)) / 2
    y     = x s
    dL/dx = dL/dy (s + x s (1 - s) dt/dx)

Shapes: x, y [..., K], any number of dimensions; read without a copy when the last one is contiguous
and the others have one stride.
Dtypes: float32 or bfloat16; computed in float32 and rounded once. The gradient has the dtype of x.
Backward recomputes everything from x: nothing else is saved.
quantize="row" or "block": y is returned in fp8 (e4m3fn) too, made in the same pass: the bits of
fp8_quantize(y, granularity=quantize). Gradients flow through y alone.
Source: Hendrycks and Gimpel, arXiv 1606.08415; equals torch.nn.functional.gelu(x,
approximate="tanh") and diffusers' gelu-approximate. Differs: the left tail keeps its relative
accuracy (PyTorch's 1 + tanh cancels below x = -3) down to -9.9; below, where |y| < 2e-36, y stays
at its value there, for -inf too (NaN in PyTorch), and no finite x gives a non-finite gradient.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast.ops._act_cuda import gelu_backward_cuda, gelu_cuda
from qirl_fast.ops._checks import (
    LARGE_DTYPES,
    REFERENCE_DTYPES,
    require_operands,
)
from qirl_fast.ops._cpp import cpu_launcher
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._quantized import (
    and_quantized,
    fp8_outputs,
    require_quantize,
)
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend
from qirl_fast.ops.fp8_quantize import Quantized


# ---- reference ----------------------------------------------------------------------------------
def gelu_reference(x: Tensor) -> Tensor:
    """The definition, in float32 (float64 for float64 x)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)


def gelu_backward_reference(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient to x."""
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    wide, dy = x.to(wide_dtype), grad.to(wide_dtype)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * wide**2)
    tanh = torch.tanh(inner)
    return (dy * (0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh**2) * slope)).to(x.dtype)


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}
OP = Op(
    "gelu",
    {
        "reference": Backend(and_quantized(gelu_reference), ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("gelu"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(triton_launcher("gelu", "gelu"), ("cuda",), LARGE_DTYPES, missing_triton),
        "cuda": Backend(gelu_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "gelu_backward",
    {
        "reference": Backend(gelu_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("gelu_backward"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("gelu", "gelu_backward"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(gelu_backward_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)


def _fake(x: Tensor, quantize: str) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    return y, *fp8_outputs(y, quantize)


def _backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_gelu = OP.register("(Tensor x, str quantize) -> (Tensor, Tensor, Tensor)", _fake)
_gelu_backward = OP_BACKWARD.register("(Tensor grad, Tensor x) -> Tensor", _backward_fake, (0, 1))


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: str, backend: str) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.backend = backend
        y, *fp8 = _gelu(x, quantize, backend)
        ctx.mark_non_differentiable(*fp8)
        ctx.set_materialize_grads(False)
        return y, *fp8

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = None if grad is None else _gelu_backward(grad, x, ctx.backend)
        return dx, None, None


# ---- public -------------------------------------------------------------------------------------
@overload
def gelu(x: Tensor, quantize: None = None) -> Tensor: ...
@overload
def gelu(x: Tensor, quantize: str) -> Quantized: ...
def gelu(x: Tensor, quantize: str | None = None) -> Tensor | Quantized:
    """GELU (tanh approximation) of x [..., K], in its dtype; see the module docstring.

    x: float32 or bfloat16, at least one dimension and one element. Differentiable in x.
    quantize: "row" or "block" returns Quantized(y, q, scale): q float8_e4m3fn in the shape of x,
        scale float32 [..., 1] or [..., ceil(K / 128)].
    Raises ValueError for shapes, dtypes or names outside this.
    """
    require_operands("gelu", {"x": x})
    granularity = require_quantize("gelu", quantize)
    run = _Gelu.apply if torch.is_grad_enabled() and x.requires_grad else _gelu
    y, q, scale = run(x, granularity, forced_backend())
    return Quantized(y, q, scale) if granularity else y
