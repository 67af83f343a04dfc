"""awm_loss: advantage weighted matching, the clipped policy loss of a pseudo log-probability.

    logp = awm_logp(v, noise, x0, time)            see awm_logp: one pass, and one for the gradient
    loss = policy_loss(logp, logp_old, advantage)  see policy_loss: B numbers

Shapes: v, noise, x0 [B, ...]; time, logp_old, advantage float32 [B]. The values before an update
come from awm_logp on the same noise and time, and give a ratio of exactly 1.
Gradients: to v only. The other outputs carry none.
Source: AWM (arXiv 2509.25050), its published training script, `exp_first`: one ratio for each
noise and time. For its `sum_first`, one ratio for the mean of several, average awm_logp yourself
and hand it to policy_loss. Its penalties against the reference and the average policy are
velocity_loss; its clip of the advantage belongs to group_advantage.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qirl_fast.ops._checks import require_no_grad, require_per_row
from qirl_fast.ops.awm_logp import awm_logp, require_awm
from qirl_fast.ops.policy_loss import policy_loss


class AwmLoss(NamedTuple):
    """loss scalar, logp and ratio [B], clip_fraction and approx_kl scalars."""

    loss: Tensor
    logp: Tensor
    ratio: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def awm_loss(
    v: Tensor,
    noise: Tensor,
    x0: Tensor,
    time: Tensor,
    logp_old: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weighting: str = "uniform",
    power: float = 0.25,
) -> AwmLoss:
    """Clipped policy loss of B clean samples; see the module docstring for the math.

    v, noise, x0, time, weighting, power: as for awm_logp.
    logp_old, advantage: float32 [B]; logp_old is an earlier awm_logp of the same noise and time.
    clip_low, clip_high: as for policy_loss.
    Raises ValueError for whatever those two refuse.
    """
    require_awm("awm_loss", v, noise, x0, time, weighting, power)
    real = torch.promote_types(v.dtype, torch.float32)
    for name, t in (("logp_old", logp_old), ("advantage", advantage)):
        require_per_row("awm_loss", name, t, v, real)
    why = "it is differentiable in v only"
    require_no_grad("awm_loss", why, logp_old=logp_old, advantage=advantage)
    logp = awm_logp(v, noise, x0, time, weighting=weighting, power=power)
    out = policy_loss(logp, logp_old, advantage, clip_low=clip_low, clip_high=clip_high)
    return AwmLoss(out.loss, logp.detach(), out.ratio, out.clip_fraction, out.approx_kl)
