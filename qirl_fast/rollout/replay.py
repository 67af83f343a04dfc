"""Replay: the recorded steps of a trajectory, scored again under the current weights.

Each recorded step runs as one forward of the chunk's own rows: the shape, the kernels and the
order of rollout, so that unchanged weights give the recorded log-prob bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.rollout.dynamics import StepCoefficients
from qirl_fast.rollout.sample import Model, Sampling, Trajectory, coefficient_tensors


@dataclass(frozen=True)
class Replayed:
    """One recorded step: log-prob [B] with graph, and the velocity [B, N, Z] that made it."""

    logp: Tensor
    logp_old: Tensor
    velocity: Tensor
    coefficients: StepCoefficients


def replay(model: Model, trajectory: Trajectory, how: Sampling) -> Iterator[Replayed]:
    """Yield the recorded steps in order; the prompts' prefix is computed once for all of them."""
    guidance, rows = how.guidance, len(trajectory.rows)
    prefix = trajectory.prompts.prefix(model, how)
    null_prefix = trajectory.prompts.null_prefix(model, how) if guidance.in_objective else None
    for i, step in enumerate(trajectory.coefficients):
        x = trajectory.x[i]
        sigma = torch.full((rows,), trajectory.sigmas[i], device=x.device)
        v = model.velocity(x, sigma, prefix)
        if null_prefix is not None:
            v = guidance.combine(v, model.velocity(x, sigma, null_prefix))
        a, c, _, w, b = coefficient_tensors(step, rows, x.device)
        logp = ops.flow_logp(x, trajectory.x_next[i], v, a, c, w, b, delta=trajectory.delta[i])
        yield Replayed(logp, trajectory.logp[i], v, step)
