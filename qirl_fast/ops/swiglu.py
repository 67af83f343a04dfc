"""swiglu: y = silu(gate) up, the middle of a SwiGLU feed-forward.

    silu(g) = g s,  s = 1 / (1 + exp(-g))
    dL/dup = dL/dy silu(g),  dL/dgate = dL/dy up s (1 + g (1 - s))

Shapes: gate, up, y [..., F]. gate and up may be the two halves of one projection [..., 2F]: read
without a copy when the last dimension is contiguous and the others have one stride.
Dtypes: float32 or bfloat16, gate and up alike; computed in float32 and rounded once (eager PyTorch
rounds silu(gate) to the storage dtype first). Gradients have the dtype of their tensor.
Backward recomputes everything from gate and up, in one pass for both gradients.
quantize="row" or "block": y is returned in fp8 (e4m3fn) too, made in the same pass: the bits of
fp8_quantize(y, granularity=quantize). Gradients flow through y alone.
Source: Shazeer, arXiv 2002.05202; the order of QwenImage21SwiGLUFeedForward in diffusers,
activation(gate_layer(x)) * proj(x). Differs: below gate = -85, where |silu| < 2e-35, silu stays at
its value there, for -inf too (NaN in PyTorch).
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast.ops._act_cuda import swiglu_backward_cuda, swiglu_cuda
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
def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.to(wide), up.to(wide)
    return (g * torch.sigmoid(g) * u).to(gate.dtype)


def swiglu_backward_reference(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to gate and up."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    dy, g, u = grad.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(g)
    dgate = dy * u * s * (1 + g * torch.sigmoid(-g))
    return dgate.to(gate.dtype), (dy * g * s).to(up.dtype)


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}
OP = Op(
    "swiglu",
    {
        "reference": Backend(and_quantized(swiglu_reference), ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("swiglu"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("swiglu", "swiglu"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(swiglu_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "swiglu_backward",
    {
        "reference": Backend(swiglu_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("swiglu_backward"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("swiglu", "swiglu_backward"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(swiglu_backward_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)


def _fake(gate: Tensor, up: Tensor, quantize: str) -> tuple[Tensor, Tensor, Tensor]:
    y = gate.new_empty(gate.shape)
    return y, *fp8_outputs(y, quantize)


def _backward_fake(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_swiglu = OP.register(
    "(Tensor gate, Tensor up, str quantize) -> (Tensor, Tensor, Tensor)", _fake, (0, 1)
)
_swiglu_backward = OP_BACKWARD.register(
    "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)", _backward_fake, (0, 1, 2)
)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, quantize: str, backend: str
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        y, *fp8 = _swiglu(gate, up, quantize, backend)
        ctx.mark_non_differentiable(*fp8)
        ctx.set_materialize_grads(False)
        return y, *fp8

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        gate, up = ctx.saved_tensors
        return *_swiglu_backward(grad, gate, up, ctx.backend), None, None


# ---- public -------------------------------------------------------------------------------------
@overload
def swiglu(gate: Tensor, up: Tensor, quantize: None = None) -> Tensor: ...
@overload
def swiglu(gate: Tensor, up: Tensor, quantize: str) -> Quantized: ...
def swiglu(gate: Tensor, up: Tensor, quantize: str | None = None) -> Tensor | Quantized:
    """silu(gate) * up [..., F], in the dtype of gate; see the module docstring.

    gate, up: float32 or bfloat16 of one shape, dtype and device, at least one dimension and one
    element; the halves of one [..., 2F] tensor serve as they are. Differentiable in both.
    quantize: "row" or "block" returns Quantized(y, q, scale): q float8_e4m3fn in the shape of gate,
        scale float32 [..., 1] or [..., ceil(F / 128)].
    Raises ValueError for shapes, dtypes, devices or names outside this.
    """
    require_operands("swiglu", {"gate": gate, "up": up})
    granularity = require_quantize("swiglu", quantize)
    trains = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    run = _Swiglu.apply if trains else _swiglu
    y, q, scale = run(gate, up, granularity, forced_backend())
    return Quantized(y, q, scale) if granularity else y
