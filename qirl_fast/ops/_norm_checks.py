"""Checks and layouts shared by norm_modulate and the gated residuals: x [B, S, D], rows [B, D]."""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast.ops._checks import REFERENCE_DTYPES, require_tensor

NORMS = ("layer", "rms")


def require_tokens(op: str, name: str, x: Tensor) -> None:
    """x is a floating tensor [B, S, D] or [B, D] that is not empty."""
    require_tensor(op, name, x)
    if x.dtype not in REFERENCE_DTYPES:
        raise ValueError(f"{op}: {name} must be float32 or bfloat16; got {x.dtype}.")
    if x.ndim not in (2, 3) or x.numel() == 0:
        raise ValueError(
            f"{op}: {name} needs shape [B, S, D] or [B, D] with no empty dimension; "
            f"got {tuple(x.shape)}."
        )


def require_norm(op: str, norm: str, eps: float) -> None:
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be 'layer' or 'rms'; got {norm!r}.")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be finite and at least 0; got {eps}.")


def require_modulation(op: str, t0: Tensor | None, x: Tensor, **rows: Tensor | None) -> None:
    """Each tensor is [B, D] as x asks; <name>_t0 is there exactly if t0 and <name> are."""
    for name, t in rows.items():
        if name.endswith("_t0"):
            _require_t0_partner(op, name, t, t0, rows[name.removesuffix("_t0")])
        if t is not None:
            _require_modulation_row(op, name, t, x)


def _require_t0_partner(
    op: str, name: str, t: Tensor | None, t0: Tensor | None, partner: Tensor | None
) -> None:
    if t is not None and (t0 is None or partner is None):
        without = "t0" if t0 is None else name.removesuffix("_t0")
        raise ValueError(f"{op}: {name} came without {without}; give both or neither.")
    if t is None and t0 is not None and partner is not None:
        raise ValueError(f"{op}: t0 needs {name}, the rows of the tokens it marks; got None.")


def _require_modulation_row(op: str, name: str, t: Tensor, x: Tensor) -> None:
    require_tensor(op, name, t, "[B, D]")
    wanted = (x.shape[0], x.shape[-1])
    if t.shape != wanted:
        raise ValueError(
            f"{op}: {name} needs one row a sample, shape {tuple(wanted)}; got {tuple(t.shape)}."
        )
    if t.dtype not in REFERENCE_DTYPES:
        raise ValueError(f"{op}: {name} must be float32 or bfloat16; got {t.dtype}.")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, as the tokens are; got {t.device}.")


def tokens_at_t0(op: str, t0: Tensor | None, x: Tensor) -> Tensor | None:
    """t0 as [B, S], a view; checked against x."""
    if t0 is None:
        return None
    require_tensor(op, "t0", t0, "[S] or [B, S], bool")
    rows, tokens = x.shape[0], x.shape[1] if x.ndim == 3 else 1
    if t0.shape != (tokens,) and t0.shape != (rows, tokens):
        raise ValueError(
            f"{op}: t0 needs shape ({tokens},) or ({rows}, {tokens}); got {tuple(t0.shape)}."
        )
    if t0.dtype != torch.bool:
        raise ValueError(f"{op}: t0 must be torch.bool; got {t0.dtype}.")
    if t0.device != x.device:
        raise ValueError(f"{op}: t0 must be on {x.device}, as the tokens are; got {t0.device}.")
    return t0.expand(rows, tokens)


def as_tokens(x: Tensor) -> Tensor:
    """[B, D] as [B, 1, D]; [B, S, D] as it is."""
    return x.unsqueeze(1) if x.ndim == 2 else x


def gradient_for(sum_BD: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The float32 gradient of a row in the row's dtype; None where there is none."""
    return None if dtype is None or sum_BD.numel() == 0 else sum_BD.to(dtype)
