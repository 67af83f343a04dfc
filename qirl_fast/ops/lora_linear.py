"""lora_linear: a linear layer with low-rank adapters, without ever forming W + s B A.

    t_i = x A_i^T
    y   = x W^T + bias + sum_i s_i t_i B_i^T
    u_i = dy B_i,  dx = dy W + sum_i s_i u_i A_i,  dA_i = s_i u_i^T x,  dB_i = s_i dy^T t_i
    dW  = dy^T x,  dbias = sum of dy over tokens, each only where it is asked for

Shapes: x [..., in], weight [out, in], bias [out] or None, A [r, in], B [out, r] with a rank of its
own for each adapter, y [..., out]. No adapters: F.linear.
Dtypes: x, weight and bias float32 or bfloat16, alike; A and B either, used in the dtype of x.
Products are summed in float32. Rounded to the dtype of x: the base product, each t_i and u_i, and
y (dx) once per adapter. Gradients are summed in float32 and come in the dtype of their tensor, but
have passed through the dtype of x. Under autocast everything is cast as F.linear casts it.
Each adapter is added in place into the base product: one pass over [tokens, out] that reads and
writes it, where PEFT's layer makes three (product, times scale, sum), seven reads and writes.
Backends: `cpu` and `cuda` are torch's GEMMs (MKL / oneDNN, cuBLAS); the op is bound by the base
GEMM. `triton` has kernels for the rank-r products; its base GEMM is torch's too. Which bits a
library's GEMM gives may depend on the number of tokens: batch-invariance is not promised here.
Saved for backward: x if an A or the weight is trained, t (r / in of x, 2 % at rank 64 of 3072) if a
B is. Sources: LoRA (arXiv 2106.09685); peft, tuners/lora/layer.py, Linear.forward, which rounds
B(A(x)), its product with s and the sum one by one, and casts x up where A is wider than it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast.ops._checks import (
    LARGE_DTYPES,
    REFERENCE_DTYPES,
    require_rows,
    require_tensor,
)
from qirl_fast.ops._lora_addmm import lora_linear_addmm, lora_linear_backward_addmm
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend

Adapter = tuple[Tensor, Tensor, float]
_Lists = list[Tensor]


# ---- reference ----------------------------------------------------------------------------------
def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: _Lists, b: _Lists, scale: list[float]
) -> tuple[Tensor, _Lists]:
    """(y, [t_i]): the definition, in float32 (float64 for float64 x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x_NI = x.reshape(-1, x.shape[-1]).to(wide)
        y = x_NI @ weight.to(wide).T
        if bias is not None:
            y = y + bias.to(wide)
        ts = [x_NI @ a_i.to(wide).T for a_i in a]
        for t, b_i, s in zip(ts, b, scale, strict=True):
            y = y + s * (t @ b_i.to(wide).T)
    return y.to(x.dtype).reshape(*x.shape[:-1], -1), [t.to(x.dtype) for t in ts]


def lora_linear_backward_reference(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: _Lists,
    b: _Lists,
    t: _Lists,
    scale: list[float],
    want: list[bool],
) -> _Lists:
    """[dx, dweight, dbias, dA_i ..., dB_i ...]; an unwanted one is an empty tensor."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    g, n = dy.reshape(-1, dy.shape[-1]).to(wide), len(a)
    x_NI = None if x is None else x.reshape(-1, x.shape[-1]).to(wide)
    grads = [dy.new_empty(0) for _ in want]
    if want[0]:
        dx = g @ weight.to(wide)
        for a_i, b_i, s in zip(a, b, scale, strict=True):
            dx = dx + s * (g @ b_i.to(wide)) @ a_i.to(wide)
        grads[0] = dx.to(dy.dtype).reshape(*dy.shape[:-1], -1)
    if want[1] and x_NI is not None:
        grads[1] = (g.T @ x_NI).to(weight.dtype)
    if want[2]:
        grads[2] = g.sum(0).to(weight.dtype)
    for i, s in enumerate(scale):
        if want[3 + i] and x_NI is not None:
            grads[3 + i] = (s * (g @ b[i].to(wide)).T @ x_NI).to(a[i].dtype)
        if want[3 + n + i]:
            grads[3 + n + i] = (s * g.T @ t[i].to(wide)).to(b[i].dtype)
    return grads


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "cuda"}
OP = Op(
    "lora_linear",
    {
        "reference": Backend(lora_linear_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(lora_linear_addmm, ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("lora_linear", "lora_linear"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(lora_linear_addmm, ("cuda",), LARGE_DTYPES),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "lora_linear_backward",
    {
        "reference": Backend(lora_linear_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(lora_linear_backward_addmm, ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("lora_linear", "lora_linear_backward"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(lora_linear_backward_addmm, ("cuda",), LARGE_DTYPES),
    },
    _DEFAULT,
)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: _Lists, *_: object
) -> tuple[Tensor, _Lists]:
    tokens = math.prod(x.shape[:-1])
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, [x.new_empty(tokens, a_i.shape[0]) for a_i in a]


def _backward_fake(dy: Tensor, x: Any, weight: Tensor, a: _Lists, b: _Lists, *rest: Any) -> _Lists:
    full = [dy.new_empty(*dy.shape[:-1], weight.shape[1]), weight, weight[:, 0], *a, *b]
    return [
        t.new_empty(t.shape) if wanted else dy.new_empty(0)
        for t, wanted in zip(full, rest[-1], strict=True)
    ]


_lora_linear = OP.register(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, float[] scale)"
    " -> (Tensor, Tensor[])",
    _fake,
    large=(0, 1),
)
_lora_linear_backward = OP_BACKWARD.register(
    "(Tensor dy, Tensor? x, Tensor weight, Tensor[] a, Tensor[] b, Tensor[] t, float[] scale,"
    " bool[] want) -> Tensor[]",
    _backward_fake,
    large=(0, 2),
)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: list[float],
        backend: str,
        *factors: Tensor,
    ) -> Tensor:
        n = len(scale)
        a, b = list(factors[:n]), list(factors[n:])
        y, t = _lora_linear(x, weight, bias, a, b, scale, backend)
        needs = ctx.needs_input_grad
        keep_x, keep_t = needs[1] or any(needs[5 : 5 + n]), any(needs[5 + n :])
        ctx.save_for_backward(x if keep_x else None, weight, *factors, *(t if keep_t else ()))
        ctx.scale, ctx.backend = scale, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.scale)
        x, weight, *rest = ctx.saved_tensors
        a, b, t = rest[:n], rest[n : 2 * n], rest[2 * n :]
        want = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:]]
        grads = _lora_linear_backward(dy, x, weight, a, b, t, ctx.scale, want, ctx.backend)
        given = [g if wanted else None for g, wanted in zip(grads, want, strict=True)]
        return *given[:3], None, None, *given[3:]


# ---- public -------------------------------------------------------------------------------------
def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, adapters: Sequence[Adapter] = ()
) -> Tensor:
    """y [..., out] in the dtype of x; see the module docstring for the math.

    x: [..., in], float32 or bfloat16; weight [out, in] and bias [out] of the same dtype (outside
    autocast). adapters: (A [r, in], B [out, r], scale) each, scale a finite float; may be empty.
    Gradients: to every tensor that requires one; a frozen weight costs nothing.
    Raises ValueError for shapes, dtypes, devices or values outside this.
    """
    a, b, scale = _checked(x, weight, bias, adapters)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, *factors = (_cast(t, dtype) for t in (x, weight, *a, *b))
        a, b = factors[: len(a)], factors[len(a) :]
        bias = None if bias is None else _cast(bias, dtype)
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        came = weight.dtype if bias is None else f"{weight.dtype} and {bias.dtype}"
        raise ValueError(
            f"lora_linear: weight and bias must have the dtype of x, {x.dtype}; got {came}."
        )
    backend = forced_backend()
    given = (x, weight, *(() if bias is None else (bias,)), *a, *b)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        # The op runs with autocast's casts done; torch's own would only look at each tensor again.
        return _LoraLinear.apply(x, weight, bias, scale, backend, *a, *b)
    return _lora_linear(x, weight, bias, a, b, scale, backend)[0]


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)  # float64 is left alone by autocast


def _checked(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]
) -> tuple[_Lists, _Lists, list[float]]:
    """(A_i, B_i, scale_i) of adapters whose shapes fit."""
    require_rows("lora_linear", "x", x)
    _require("weight", weight, x, "[out, in]", 2, {1: x.shape[-1]})
    out = weight.shape[0]
    if bias is not None:
        _require("bias", bias, x, "[out]", 1, {0: out})
    a: _Lists = []
    b: _Lists = []
    scale: list[float] = []
    if not isinstance(adapters, list | tuple):
        came = type(adapters).__name__
        raise ValueError(f"lora_linear: adapters must be a list of (A, B, scale); got {came}.")
    for i, adapter in enumerate(adapters):
        name = f"adapters[{i}]"
        if not isinstance(adapter, tuple | list) or len(adapter) != 3:
            came = type(adapter).__name__
            raise ValueError(f"lora_linear: {name} must be (A, B, scale); got {came}.")
        a_i, b_i, s = adapter
        _require(f"{name} A", a_i, x, "[r, in]", 2, {1: x.shape[-1]})
        _require(f"{name} B", b_i, x, "[out, r]", 2, {0: out, 1: a_i.shape[0]})
        if not isinstance(s, int | float) or not -math.inf < s < math.inf:
            raise ValueError(f"lora_linear: {name} scale must be a finite float; got {s!r}.")
        a.append(a_i)
        b.append(b_i)
        scale.append(float(s))
    return a, b, scale


def _require(name: str, t: Tensor, x: Tensor, form: str, ndim: int, sizes: dict[int, int]) -> None:
    """t is a floating tensor of `ndim` on x's device with these sizes, none of them 0."""
    require_tensor("lora_linear", name, t, form)
    fits = t.ndim == ndim and all(t.shape[i] == size for i, size in sizes.items())
    if not fits or t.numel() == 0:
        where = ", ".join(f"size {size} in dimension {i}" for i, size in sizes.items())
        raise ValueError(
            f"lora_linear: {name} must be {form}, not empty, with {where}; got {tuple(t.shape)}."
        )
    if t.dtype not in REFERENCE_DTYPES:
        raise ValueError(f"lora_linear: {name} must be float32 or bfloat16; got {t.dtype}.")
    if t.device != x.device:
        raise ValueError(f"lora_linear: {name} must be on {x.device}, as x is; got {t.device}.")
