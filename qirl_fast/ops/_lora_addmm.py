"""Launchers of lora_linear on torch's GEMMs: the `cpu` and `cuda` backends.

Rank-r products are added in place, alpha = scale, so [tokens, out] is passed over once an adapter.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

_Lists = list[Tensor]


def lora_linear_addmm(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: _Lists, b: _Lists, scale: list[float]
) -> tuple[Tensor, _Lists]:
    """(y, [t_i]) by F.linear and one in-place addmm per adapter."""
    x_NI = x.reshape(-1, x.shape[-1])
    y, ts = F.linear(x_NI, weight, bias), []
    for a_i, b_i, s in zip(a, b, scale, strict=True):
        ts.append(F.linear(x_NI, a_i.to(x.dtype)))
        y.addmm_(ts[-1], b_i.to(x.dtype).T, alpha=s)
    return y.view(*x.shape[:-1], -1), ts


def lora_linear_backward_addmm(
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
    g, n = dy.reshape(-1, dy.shape[-1]), len(a)
    x_NI = None if x is None else x.reshape(-1, x.shape[-1])
    grads = [dy.new_empty(0) for _ in want]
    if want[0]:
        grads[0] = g @ weight
    if want[1] and x_NI is not None:
        grads[1] = g.T @ x_NI
    if want[2]:
        grads[2] = g.sum(0)
    for i, s in enumerate(scale):
        if want[0] or want[3 + i]:
            u = g @ b[i].to(g.dtype)
            if want[0]:
                grads[0].addmm_(u, a[i].to(g.dtype), alpha=s)
            if want[3 + i] and x_NI is not None:
                grads[3 + i] = _scaled_mm(u.T, x_NI, s).to(a[i].dtype)
        if want[3 + n + i]:
            grads[3 + n + i] = _scaled_mm(g.T, t[i], s).to(b[i].dtype)
    if want[0]:
        grads[0] = grads[0].view(*dy.shape[:-1], -1)
    return grads


def _scaled_mm(p: Tensor, q: Tensor, s: float) -> Tensor:
    """s p q, rounded once."""
    out = p.new_empty(p.shape[0], q.shape[1])
    return out.addmm_(p, q, beta=0, alpha=s)
