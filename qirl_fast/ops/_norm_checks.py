"""Checks and layouts shared by norm_modulate and the gated residuals: x [B, S, D], rows [B, D]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from qirl_fast import _cpu
from qirl_fast.ops._checks import REFERENCE_DTYPES, require_like, require_tensor

NORMS = ("layer", "rms")


def require_norm(op: str, norm: str, eps: float) -> None:
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be 'layer' or 'rms'; got {norm!r}.")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be finite and at least 0; got {eps}.")


def require_modulated(
    op: str,
    large: dict[str, Tensor],
    rows: dict[str, Tensor | None],
    t0: Tensor | None,
    rows_t0: dict[str, Tensor | None],
) -> Tensor | None:
    """t0 as [B, S], a view. ValueError tells the first argument that the ops do not take.

    large: floating tensors [B, S, D] or [B, D], the first giving shape and device to all.
    rows: [B, D]. rows_t0: theirs for the tokens that t0 marks, as <name>_t0; there exactly if t0
    and <name> are.
    """
    (first, x), *others = large.items()
    # All of it in one call, as a tensor's attributes cost one each; what it says no to is looked
    # at again below. Not traced: Dynamo sees only the rest.
    groups = (x,), tuple(t for _, t in others), (), tuple(rows.values())
    unmarked = t0 is None and all(t is None for t in rows_t0.values())
    if unmarked and not is_dynamo_compiling() and _cpu.plain_rows(*groups):
        return None
    _require_tokens(op, first, x)
    for name, t in others:
        require_like(op, name, t, first, x, dtype=False)
    for name, row in rows.items():
        if row is not None:
            _require_row(op, name, row, x)
    for (name, row), (name_t0, row_t0) in zip(rows.items(), rows_t0.items(), strict=True):
        _require_t0_partner(op, name_t0, row_t0, t0, name, row)
        if row_t0 is not None:
            _require_row(op, name_t0, row_t0, x)
    return None if t0 is None else _tokens_at_t0(op, t0, x)


def _require_tokens(op: str, name: str, x: Tensor) -> None:
    """x is a floating tensor [B, S, D] or [B, D] that is not empty."""
    require_tensor(op, name, x)
    if x.dtype not in REFERENCE_DTYPES:
        raise ValueError(f"{op}: {name} must be float32 or bfloat16; got {x.dtype}.")
    if x.ndim not in (2, 3) or x.numel() == 0:
        raise ValueError(
            f"{op}: {name} needs shape [B, S, D] or [B, D] with no empty dimension; "
            f"got {tuple(x.shape)}."
        )


def _require_t0_partner(
    op: str, name: str, t: Tensor | None, t0: Tensor | None, of: str, partner: Tensor | None
) -> None:
    if t is not None and (t0 is None or partner is None):
        without = "t0" if t0 is None else of
        raise ValueError(f"{op}: {name} came without {without}; give both or neither.")
    if t is None and t0 is not None and partner is not None:
        raise ValueError(f"{op}: t0 needs {name}, the rows of the tokens it marks; got None.")


def _require_row(op: str, name: str, t: Tensor, x: Tensor) -> None:
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


def _tokens_at_t0(op: str, t0: Tensor, x: Tensor) -> Tensor:
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


def from_tokens(y: Tensor, x: Tensor) -> Tensor:
    """What as_tokens(x) led to, in the shape of x."""
    return y.squeeze(1) if x.ndim == 2 else y


def gradient_for(sum_BD: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The float32 gradient of a row in the row's dtype; None where there is none."""
    return None if dtype is None or sum_BD.numel() == 0 else sum_BD.to(dtype)
