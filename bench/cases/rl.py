"""RL ops at [rows, tokens, channels] or [rows]; `eager` is as public trainers write it."""

import torch
from torch import Tensor

from bench.cases.case import Case, Make, Shape, per_row, size_of
from qirl_fast import ops


def _coefficients(make: Make, rows: int) -> tuple[Tensor, ...]:
    """a, c, s, w, b of a Flow-GRPO step."""
    s = make.full(rows, 0.3)
    return make.full(rows, 1.01), make.full(rows, -0.1), s, 1 / (2 * s * s), torch.log(s)


def _eager_logp(x, x_next, v, a, c, w, b):
    x, x_next, v = x.float(), x_next.float(), v.float()
    mean = per_row(a, x) * x + per_row(c, x) * v
    return (-per_row(w, x) * (x_next - mean) ** 2 - per_row(b, x)).flatten(1).mean(1)


def _eager_step(x, v, a, c, s, w, b, seed):
    mean = per_row(a, x) * x.float() + per_row(c, x) * v.float()
    x_next = (mean + per_row(s, x) * torch.randn_like(mean)).to(x.dtype)
    logp = (-per_row(w, x) * (x_next.float() - mean) ** 2 - per_row(b, x)).flatten(1).mean(1)
    return x_next, logp


def _eager_guide(v_cond, v_uncond, scale, rescale):
    comb = v_uncond + scale * (v_cond - v_uncond)
    if not rescale:
        return comb
    norm, comb_norm = (torch.norm(t, dim=-1, keepdim=True) for t in (v_cond, comb))
    return comb * (norm / comb_norm)


def flow_step(shape: Shape, make: Make) -> Case:
    x, v = make.large(*shape), make.large(*shape)
    inputs = (x, v, *_coefficients(make, shape[0]), make.seeds(shape[0]))

    def ours(x, v, a, c, s, w, b, seed):
        return ops.flow_step(x, v, a, c, s, w, b, seed=seed, offset=0)

    return Case("flow_step", shape, inputs, ours, _eager_step, 3 * size_of(x), same_job=False)


def flow_logp(shape: Shape, make: Make) -> Case:
    x, x_next, v = (make.large(*shape) for _ in range(3))
    a, c, _, w, b = _coefficients(make, shape[0])
    n = size_of(x)
    inputs = (x, x_next, v, a, c, w, b)
    r = 4 * x.numel()
    return Case("flow_logp", shape, inputs, ops.flow_logp, _eager_logp, 3 * n, r + n, leaves=(2,))


def _guide(shape: Shape, make: Make, rescale: bool) -> Case:
    v, u = make.large(*shape), make.large(*shape)

    def ours(v, u, scale):
        return ops.guide(v, u, scale, rescale=rescale)

    def eager(v, u, scale):
        return _eager_guide(v, u, scale, rescale)

    n = size_of(v)
    backward = (5 if rescale else 3) * n  # the rescaled one reads both velocities again
    # eager rounds the difference to storage and then takes it times 4: bfloat16 shows that.
    return Case("guide", shape, (v, u, 4.0), ours, eager, 3 * n, backward, leaves=(0, 1))


def guide(shape: Shape, make: Make) -> Case:
    return _guide(shape, make, rescale=False)


def guide_rescaled(shape: Shape, make: Make) -> Case:
    return _guide(shape, make, rescale=True)


def guide_step(shape: Shape, make: Make) -> Case:
    x, v, u = (make.large(*shape) for _ in range(3))
    inputs = (x, v, u, *_coefficients(make, shape[0]), make.seeds(shape[0]))

    def ours(x, v, u, a, c, s, w, b, seed):
        return ops.guide_step(
            *(x, v, u, 4.0, a, c, s, w, b), seed=seed, offset=0, rescale=True, frozen=True
        )

    def eager(x, v, u, a, c, s, w, b, seed):
        delta = (per_row(c, x) * (_eager_guide(v, u, 4.0, True) - v)).to(x.dtype)
        mean = per_row(a, x) * x.float() + per_row(c, x) * v.float() + delta.float()
        x_next = (mean + per_row(s, x) * torch.randn_like(mean)).to(x.dtype)
        logp = (-per_row(w, x) * (x_next.float() - mean) ** 2 - per_row(b, x)).flatten(1).mean(1)
        return x_next, logp, delta

    return Case("guide_step", shape, inputs, ours, eager, 5 * size_of(x), same_job=False)


def velocity_loss(shape: Shape, make: Make) -> Case:
    v, target, weight = make.large(*shape), make.large(*shape), make.rows(shape[0]).abs()

    def ours(v, target, weight):
        return ops.velocity_loss(v, target, weight=weight).loss

    def eager(v, target, weight):
        return (weight * ((v.float() - target.float()) ** 2).flatten(1).mean(1)).mean()

    n = size_of(v)
    return Case("velocity_loss", shape, (v, target, weight), ours, eager, 2 * n, n, leaves=(0,))


def nft_loss(shape: Shape, make: Make) -> Case:
    v, v_old, x_t, x0 = (make.large(*shape) for _ in range(4))
    sigma, advantage = make.full(shape[0], 0.7), make.rows(shape[0])
    inputs = (v, v_old, x_t, x0, sigma, advantage)

    def ours(v, v_old, x_t, x0, sigma, advantage):
        return ops.nft_loss(v, v_old, x_t, x0, sigma, advantage, beta=1.0).loss

    def eager(v, v_old, x_t, x0, sigma, advantage):
        beta, clip = 1.0, 5.0
        v, v_old, x_t, x0 = (t.float() for t in (v, v_old, x_t, x0))
        share = (advantage.clamp(-clip, clip) / clip) / 2 + 0.5
        total = 0.0
        for part, sign in ((share, 1.0), (1 - share, -1.0)):
            mixed = (1 - sign * beta) * v_old + sign * beta * v
            error = x_t - per_row(sigma, x_t) * mixed - x0
            weight = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
            total = total + part * (error**2 / per_row(weight, x0)).flatten(1).mean(1) / beta
        return (total * clip).mean()

    n = size_of(v)
    return Case("nft_loss", shape, inputs, ours, eager, 4 * n, n, leaves=(0,))


def awm_logp(shape: Shape, make: Make) -> Case:
    v, noise, x0 = (make.large(*shape) for _ in range(3))

    def ours(v, noise, x0, time):
        return ops.awm_logp(v, noise, x0, time)

    def eager(v, noise, x0, time):
        return -((v.float() - (noise.float() - x0.float())) ** 2).flatten(1).mean(1)

    inputs, n = (v, noise, x0, make.full(shape[0], 0.7)), size_of(v)
    return Case("awm_logp", shape, inputs, ours, eager, 3 * n, 4 * n, leaves=(0,))


def awm_loss(shape: Shape, make: Make) -> Case:
    v, x0, noise = (make.large(*shape) for _ in range(3))
    sigma, advantage = make.full(shape[0], 0.7), make.rows(shape[0])
    logp_old = -((v.float() - (noise.float() - x0.float())) ** 2).flatten(1).mean(1)
    inputs = (v, noise, x0, sigma, logp_old, advantage)

    def ours(v, noise, x0, sigma, logp_old, advantage):
        return ops.awm_loss(
            v, noise, x0, sigma, logp_old, advantage, clip_low=1e-4, clip_high=1e-4
        ).loss

    def eager(v, noise, x0, sigma, logp_old, advantage):
        target = noise.float() - x0.float()
        ratio = torch.exp(-((v.float() - target) ** 2).flatten(1).mean(1) - logp_old)
        clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        return torch.maximum(-advantage * ratio, -advantage * clipped).mean()

    n = size_of(v)
    return Case("awm_loss", shape, inputs, ours, eager, 3 * n, n, leaves=(0,))


def policy_loss(shape: Shape, make: Make) -> Case:
    (rows,) = shape
    logp, advantage = make.rows(rows), make.rows(rows)
    inputs = (logp, logp + 1e-4 * make.rows(rows), advantage)

    def ours(logp, logp_old, advantage):
        return ops.policy_loss(logp, logp_old, advantage, clip_low=1e-4, clip_high=1e-4).loss

    def eager(logp, logp_old, advantage):
        ratio = torch.exp(logp - logp_old)
        clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        return torch.maximum(-advantage * ratio, -advantage * clipped).mean()

    n = size_of(logp)
    return Case("policy_loss", shape, inputs, ours, eager, 3 * n, 2 * n, leaves=(0,))


def group_advantage(shape: Shape, make: Make) -> Case:
    (rows,), members = shape, 24
    rewards = make.rows(rows, 1).double()
    group = torch.arange(rows, device=make.device) // members
    weights = torch.ones(1, dtype=torch.float64, device=make.device)

    def ours(rewards, group, weights):
        return ops.group_advantage(rewards, group, weights, num_groups=rows // members).advantage

    def eager(rewards, group, weights):
        total, out = (rewards * weights).sum(1), torch.zeros(rows, device=rewards.device)
        for g in range(rows // members):
            mine = total[group == g]
            out[group == g] = ((mine - mine.mean()) / (mine.std() + 1e-4)).float()
        return out

    inputs, n = (rewards, group, weights), size_of(rewards)
    return Case("group_advantage", shape, inputs, ours, eager, 3 * n, same_job=False)


CASES = {
    "flow_step": flow_step,
    "flow_logp": flow_logp,
    "guide": guide,
    "guide, rescaled": guide_rescaled,
    "guide_step": guide_step,
    "velocity_loss": velocity_loss,
    "nft_loss": nft_loss,
    "awm_logp": awm_logp,
    "awm_loss": awm_loss,
}

# One row a sample of a whole update; always float32.
UPDATE_CASES = {"group_advantage": group_advantage, "policy_loss": policy_loss}
UPDATE_SHAPE: Shape = (1152,)
