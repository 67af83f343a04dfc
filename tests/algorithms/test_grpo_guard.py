"""GRPO-Guard against float64 equations, and against values that flow_grpo's script computed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qirl_fast.algorithms.grpo_guard import Settings, step_length
from qirl_fast.rollout.dynamics import StepCoefficients, step_coefficients
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import Replayed
from qirl_fast.rollout.schedule import make_sigmas

SCHEDULER = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "peers_golden.npz"))
SIGMAS = [1.0, 0.83, 0.6, 0.31, 0.07, 0.0]
RECORDED = (0, 1, 3)
CLIP = 0.004


def settings(clip: float = CLIP, **more) -> Settings:
    return Settings(name="grpo_guard", clip_low=clip, clip_high=clip, **more)


@pytest.mark.parametrize("dynamics", ["ode", "flow_sde", "dance_sde", "langevin", "cps"])
def test_the_length_of_a_step_is_in_its_coefficients(dynamics: str) -> None:
    for now, after in pairwise(SIGMAS[:-1]):
        step = step_coefficients(dynamics, now, after, eta=0.6, sigma_max=SIGMAS[1])
        assert step_length(now, step) == pytest.approx(after - now, rel=1e-12)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0, ratio_mode="frozen_offset")])
def test_loss_and_gradient(make_bench, advantage, agree, dynamics, guidance, updates) -> None:
    """The exponent as the mean of noise times the mean's shift, which knows of no log-prob.

    With one update the weights are still rollout's; with two they have moved, clips fire on either
    side, and no ratio may sit so near to a bound that precisions could fall on different sides.
    """
    objective = settings(velocity_kl_weight=0.5)
    bench = make_bench(objective, RECORDED, dynamics=dynamics, guidance=guidance, updates=updates)
    prepared, old = bench.prepare(), bench.exact()
    assert (prepared.old is None) == (updates == 1)
    if updates > 1:
        bench.nudge(0.06)
    twin, chunk = bench.exact(), bench.chunk
    steps = bench.losses(advantage, prepared)

    wanted, ratios = torch.zeros((), dtype=torch.float64), []
    sigmas = make_sigmas(5, 6, SCHEDULER)
    found = zip(
        bench.velocities(twin, chunk.x),
        bench.velocities(old, chunk.x),
        bench.reference_velocities(chunk.x),
        strict=True,
    )
    for i, (v, v_old, v_ref) in enumerate(found):
        k, x, x_next = chunk.coefficients[i], chunk.x[i].double(), chunk.x_next[i].double()
        delta = 0.0 if chunk.delta[i] is None else chunk.delta[i].double()
        mean, mean_old = (k.a * x + k.c * u + delta for u in (v, v_old.detach()))
        eps = (x_next - mean_old) / k.s
        ratio = (eps * (mean - mean_old)).mean((1, 2)).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        a = advantage.double()
        down = sigmas[RECORDED[i]] - sigmas[RECORDED[i] + 1]
        surrogate = torch.maximum(-a * ratio, -a * clipped).mean() / down
        wanted = wanted + surrogate + 0.5 * (v - v_ref).square().mean()
        ratios.append(ratio.detach())
    agree(bench, twin, steps, wanted / len(RECORDED))
    for step, ratio in zip(steps, ratios, strict=True):
        assert torch.allclose(step.ratio.double(), ratio, rtol=2e-6, atol=0)
    every = torch.cat(ratios)
    if updates == 1:
        assert all((step.ratio == 1).all() for step in steps)
        return
    assert (every < 1 - CLIP).any() and (every > 1 + CLIP).any()
    assert (
        min((every - bound).abs().min() for bound in (1 - CLIP, 1 + CLIP)) > 4e-6
    )  # twice what ours may be off


def replayed(logp: Tensor, v: Tensor) -> Replayed:
    s = float(GOLDEN["guard_std"] * GOLDEN["guard_sqrt_dt"])
    k = StepCoefficients(a=1.0, c=1.0, s=s, w=0.5 / s**2, b=0.0)
    return Replayed(logp, torch.from_numpy(GOLDEN["grpo_old"]), v, k)


def test_flow_grpos_own_values(make_bench) -> None:
    """Its bias is one number for the batch; so it is given a batch whose rows have one bias."""
    mean, old, advantage = (
        torch.from_numpy(GOLDEN[name]) for name in ("guard_mean", "guard_old_mean", "grpo_adv")
    )
    even = old + (mean - old).square().mean().sqrt()
    logp = torch.from_numpy(GOLDEN["grpo_logp"]).clone().requires_grad_()
    algorithm = make_bench(settings(float(GOLDEN["grpo_clip"])), RECORDED).algorithm
    found = algorithm.surrogate(replayed(logp, even), advantage, old)
    (found.loss / float(GOLDEN["guard_sqrt_dt"]) ** 2).backward()
    loss = found.loss.item() / float(GOLDEN["guard_sqrt_dt"]) ** 2
    assert loss == pytest.approx(float(GOLDEN["guard_loss"]), rel=1e-6)
    torch.testing.assert_close(
        logp.grad, torch.from_numpy(GOLDEN["guard_dlogp"]), rtol=1e-5, atol=0
    )


def test_a_row_has_its_own_bias(make_bench) -> None:
    """What another row of the batch does leaves a row's ratio alone: flow_grpo's script fails."""
    mean, old, advantage = (
        torch.from_numpy(GOLDEN[name]) for name in ("guard_mean", "guard_old_mean", "grpo_adv")
    )
    logp = torch.from_numpy(GOLDEN["grpo_logp"])
    algorithm = make_bench(settings(), RECORDED).algorithm
    other = mean.clone()
    other[0] += 1.0
    ratios = [algorithm.surrogate(replayed(logp, v), advantage, old).ratio for v in (mean, other)]
    assert ratios[0][0] != ratios[1][0] and torch.equal(ratios[0][1:], ratios[1][1:])


def test_the_bias_keeps_the_mean_exponent_at_zero(make_bench) -> None:
    """Drawn from the old policy: mean log-ratio is -KL, the exponent's mean is 0."""
    generator = torch.Generator().manual_seed(3)
    s, rows, n = 0.5, 64, (6, 4)
    old, shift = torch.zeros(rows, *n), 0.3
    eps = torch.randn(rows, *n, generator=generator)
    k = StepCoefficients(a=1.0, c=1.0, s=s, w=0.5 / s**2, b=0.0)
    x_next, v = old + s * eps, old + shift
    score = [-(k.w * (x_next - mu).square()).mean((1, 2)) for mu in (v, old)]
    algorithm = make_bench(settings(), RECORDED).algorithm
    found = algorithm.surrogate(Replayed(*score, v, k), torch.ones(rows), old)
    spread = shift / (rows * 24) ** 0.5  # of the mean of shift * eps
    assert abs(found.ratio.log().mean()) < 4 * spread
    assert (score[0] - score[1]).mean() < -0.1
