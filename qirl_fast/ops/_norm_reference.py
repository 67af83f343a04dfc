"""Plain PyTorch parts of the references of norm_modulate and the gated residuals."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(t: Tensor, *others: Tensor) -> torch.dtype:
    """float32, or float64 where an input is."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def rows_of_tokens(
    row: Tensor, row_t0: Tensor | None, t0: Tensor | None, wide: torch.dtype
) -> Tensor:
    """[B, 1, D], or [B, S, D] where t0 chooses."""
    if t0 is None or row_t0 is None:
        return row.to(wide).unsqueeze(1)
    return torch.where(t0.unsqueeze(-1), row_t0.to(wide).unsqueeze(1), row.to(wide).unsqueeze(1))


def sums_over_tokens(terms: Tensor, t0: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Terms [B, S, D] added over the tokens of the row, and over those at t0 (else empty)."""
    if t0 is None:
        return terms.sum(1), like.new_empty(0, dtype=terms.dtype)
    at_t0 = t0.unsqueeze(-1)
    zero = terms.new_zeros(())
    return torch.where(at_t0, zero, terms).sum(1), torch.where(at_t0, terms, zero).sum(1)


def statistics(x: Tensor, rms: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """xhat, mean (empty for RMSNorm) and rstd of wide x [B, S, D]."""
    mean = x.new_zeros(x.shape[:-1]) if rms else x.mean(-1)
    centred = x - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    return centred * rstd.unsqueeze(-1), x.new_empty(0) if rms else mean, rstd


def normalized(x: Tensor, mean: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """xhat from saved statistics."""
    wide = x.to(rstd.dtype)
    return (wide if rms else wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def norm_gradient(g: Tensor, xhat: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """dx from g = d xhat."""
    along = xhat * (g * xhat).mean(-1, keepdim=True)
    centred = g if rms else g - g.mean(-1, keepdim=True)
    return rstd.unsqueeze(-1) * (centred - along)
