"""Replay: the recorded steps of a trajectory, scored again under the current weights.

A forward takes `how.replay_steps` recorded steps of the chunk's rows. One at a time, the default,
runs at the shape, with the kernels and in the order of rollout: unchanged weights give the recorded
log-prob bit for bit. Several at once fill a large device better; a matrix product of another
shape may then round otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.rollout.dynamics import StepCoefficients
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Model, Sampling, Trajectory, coefficient_tensors


@dataclass(frozen=True)
class Replayed:
    """One recorded step: log-prob [B] with graph, and the velocity [B, N, Z] that made it."""

    logp: Tensor
    logp_old: Tensor
    velocity: Tensor
    coefficients: StepCoefficients


def replay(model: Model, trajectory: Trajectory, how: Sampling) -> Iterator[Replayed]:
    """Yield the recorded steps in order."""
    guidance = how.guidance if how.guidance.in_objective else Guidance()
    found = velocities(model, trajectory, guidance, how.replay_steps)
    for i, velocity in enumerate(found):
        step, x, x_next = trajectory.coefficients[i], trajectory.x[i], trajectory.x_next[i]
        a, c, _, w, b = coefficient_tensors(step, len(trajectory.rows), x.device)
        logp = ops.flow_logp(x, x_next, velocity, a, c, w, b, delta=trajectory.delta[i])
        yield Replayed(logp, trajectory.logp[i], velocity, step)


def velocities(
    model: Model, trajectory: Trajectory, guidance: Guidance, most: int
) -> Iterator[Tensor]:
    """Yield the velocity [B, N, Z] at every recorded state in order, guided as `guidance` says.

    The prompts' prefix is computed once for all of them. most: recorded steps in one forward.
    """
    rows = len(trajectory.rows)
    prefix = trajectory.prompts.prefix(model)
    guided = [guidance.at(sigma) for sigma in trajectory.sigmas]
    null_prefix = trajectory.prompts.null_prefix(model) if any(guided) else None
    for steps in _together(guided, most):
        x = torch.cat([trajectory.x[i] for i in steps])
        sigma = [trajectory.sigmas[i] for i in steps]
        prefixes = [prefix] * len(steps)
        if not guided[steps[0]]:
            v = model.velocity(x, sigma, reduce(model.join, prefixes))
        else:
            prefixes += [null_prefix] * len(steps)
            both = model.velocity(torch.cat([x, x]), sigma * 2, reduce(model.join, prefixes))
            v = guidance.combine(*both.chunk(2))
        yield from v.split(rows)


def _together(guided: list[bool], most: int) -> Iterator[list[int]]:
    """Recorded steps of one forward: neighbours, guided all or none, `most` at most."""
    steps: list[int] = []
    for i, on in enumerate(guided):
        if steps and (len(steps) == most or on != guided[steps[0]]):
            yield steps
            steps = []
        steps.append(i)
    if steps:
        yield steps
