"""Argument checks shared by the ops. Metadata only: no host sync, traceable by torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from qirl_fast import _cpu

LARGE_DTYPES = (torch.float32, torch.bfloat16)
REFERENCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensor(op: str, name: str, t: object, form: str = "") -> None:
    """t is a tensor that lies in memory as strides say; `form` describes the shape wanted."""
    wanted = f"a tensor {form}".rstrip()
    if not isinstance(t, Tensor):
        raise ValueError(f"{op}: {name} must be {wanted}; got {type(t).__name__}.")
    if t.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be {wanted}, not sparse; got {t.layout}.")


def given(**tensors: object) -> dict[str, object]:
    """Those that are not None."""
    return {name: t for name, t in tensors.items() if t is not None}


def require_operands(
    op: str,
    same: dict[str, Any],
    *,
    like: dict[str, Any] | None = None,
    per_row: dict[str, Any] | None = None,
) -> None:
    """What the kernels on rows take, by name; ValueError tells the first that is not so.

    same: floating tensors of one shape [B, ...], dtype and device, the first giving it to all.
    like: of that shape and device, each of a floating dtype. per_row: float32 [B].
    """
    like, per_row = like or {}, per_row or {}
    groups = tuple(same.values()), tuple(like.values()), tuple(per_row.values())
    # All of it in one call, as a tensor's attributes cost one each; what it says no to is looked
    # at again below. Not traced: Dynamo sees only the rest.
    if not is_dynamo_compiling() and _cpu.plain_rows(*groups, ()):
        return
    (first, x), *rest = same.items()
    require_rows(op, first, x)
    for name, t in rest:
        require_like(op, name, t, first, x, dtype=True)
    for name, t in like.items():
        require_like(op, name, t, first, x, dtype=False)
    for name, t in per_row.items():
        require_per_row(op, name, t, x, torch.float32)


def require_rows(op: str, name: str, x: Tensor) -> None:
    """x is a floating tensor [B, ...] with at least one row and one element a row."""
    require_tensor(op, name, x)
    if x.dtype not in REFERENCE_DTYPES:
        raise ValueError(f"{op}: {name} must be float32 or bfloat16; got {x.dtype}.")
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(
            f"{op}: {name} needs shape [B, ...] with at least one row and one element a row; "
            f"got {tuple(x.shape)}."
        )


def require_like(
    op: str, name: str, t: Tensor, like_name: str, like: Tensor, *, dtype: bool
) -> None:
    """t has the shape and device of `like`, is floating, and with dtype=True has its dtype."""
    require_tensor(op, name, t)
    if t.shape != like.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {like_name}, {tuple(like.shape)}; "
            f"got {tuple(t.shape)}."
        )
    if dtype and t.dtype != like.dtype:
        raise ValueError(
            f"{op}: {name} must have the dtype of {like_name}, {like.dtype}; got {t.dtype}."
        )
    if t.dtype not in REFERENCE_DTYPES:
        raise ValueError(f"{op}: {name} must be float32 or bfloat16; got {t.dtype}.")
    if t.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {like_name}, {like.device}; got {t.device}."
        )


def require_per_row(op: str, name: str, t: Tensor, x: Tensor, *dtypes: torch.dtype) -> None:
    """t is a tensor [B] on x's device with one of `dtypes`."""
    require_tensor(op, name, t, f"[{x.shape[0]}], one value a row")
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: {name} needs one value a row, shape ({x.shape[0]},); got {tuple(t.shape)}."
        )
    if t.dtype not in dtypes:
        raise ValueError(
            f"{op}: {name} must be {' or '.join(str(d) for d in dtypes)}; got {t.dtype}."
        )
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, as the rows are; got {t.device}.")


def require_finite(op: str, name: str, values_B: Tensor) -> None:
    """Values are finite. Reads the values: for real CPU tensors only."""
    finite = torch.isfinite(values_B)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"{op}: {name}[{row}] is {float(values_B[row])}; coefficients must be finite."
        )


def require_no_grad(op: str, why: str, **tensors: Tensor | None) -> None:
    """None of these tensors asks for a gradient, which the op would silently leave out."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise ValueError(f"{op}: {name} requires grad, but {why}. Pass {name}.detach().")


def row_sizes(x: Tensor) -> tuple[int, int]:
    """Rows and elements a row."""
    return x.shape[0], x.numel() // x.shape[0]


def matrices(*tensors: Tensor) -> list[Tensor]:
    """The tensors, of one shape [..., K], as matrices with dense rows; copied where they must be.

    One row of everything when all are contiguous; else [rows, K], a view where the leading
    dimensions have one stride, as the halves of a fused projection do.
    """
    if all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, -1) for t in tensors]
    return [matrix(t) for t in tensors]


def matrix(x: Tensor) -> Tensor:
    """x [..., K] as [rows, K] with dense rows; copied where it must be."""
    view = x.reshape(-1, x.shape[-1])
    return view if view.stride(1) == 1 or view.shape[1] == 1 else view.contiguous()
