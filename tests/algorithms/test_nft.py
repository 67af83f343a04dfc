"""DiffusionNFT: its loss and gradient against float64 equations, and the policy that draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qirl_fast.algorithms.levels import LagSettings
from qirl_fast.algorithms.nft import Settings

RECORDED = (0, 2, 4)


@pytest.mark.parametrize("ref_weight", [0.0, 0.3])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_loss_and_gradient(make_bench, advantage, agree, beta: float, ref_weight: float) -> None:
    """The published equations, v+ and v- formed as they stand there. Advantages of 2 and adv_clip
    of 1.5: some rows are clipped.
    """
    settings = Settings(name="nft", beta=beta, adv_clip=1.5, ref_weight=ref_weight)
    bench = make_bench(settings, RECORDED, dynamics="ode")
    drew = bench.exact()
    bench.nudge(0.1)
    prepared = bench.prepare()
    twin, x0, a = bench.exact(), bench.chunk.latents.double(), advantage.double()
    steps = bench.losses(advantage, prepared)

    noised, _ = bench.algorithm.noised(bench.chunk)
    p = 0.5 + 0.5 * (a / 1.5).clamp(-1, 1)
    wanted, worse = torch.zeros((), dtype=torch.float64), []

    def matched(x: Tensor, v: Tensor, t: float) -> Tensor:
        error = x.double() - t * v - x0
        weight = error.detach().abs().mean((1, 2), keepdim=True).clamp(min=1e-5)
        worse.append(error.detach().square().mean().item())
        return (error.square() / weight).mean((1, 2))

    found = zip(
        noised.x,
        bench.chunk.sigmas,
        bench.velocities(twin, noised.x),
        bench.velocities(drew, noised.x),
        bench.reference_velocities(noised.x),
        strict=True,
    )
    for x, t, v, v_old, v_ref in found:
        v_old = v_old.detach()
        better = matched(x, (1 - beta) * v_old + beta * v, t)
        bad = matched(x, (1 + beta) * v_old - beta * v, t)
        policy = (p * better + (1 - p) * bad) / beta * 1.5
        wanted = wanted + policy.mean() + ref_weight * (v - v_ref).square().mean()
    agree(bench, twin, steps, wanted / len(RECORDED))
    for i, step in enumerate(steps):
        assert step.ratio is None and ("velocity_kl" in step.metrics) == bool(ref_weight)
        assert step.metrics["better_mse"].item() == pytest.approx(worse[2 * i], rel=1e-4)
        assert step.metrics["worse_mse"].item() == pytest.approx(worse[2 * i + 1], rel=1e-4)


def test_the_lagging_policy_draws_and_is_what_the_loss_starts_from(make_bench) -> None:
    bench = make_bench(Settings(name="nft"), RECORDED, dynamics="ode")
    before = bench.weights()
    bench.nudge(0.1)
    moved = bench.weights()
    with bench.algorithm.sampling():
        assert all(map(torch.equal, before, bench.model.parameters()))
    assert all(map(torch.equal, moved, bench.model.parameters()))
    old, _ = bench.prepare()
    noised, _ = bench.algorithm.noised(bench.chunk)
    wanted = bench.velocities(bench.exact(before), noised.x)
    for ours, theirs in zip(old, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, moved, bench.model.parameters()))


def test_good_samples_attract_and_bad_ones_repel(make_bench) -> None:
    """A step down the gradient brings v nearer to eps - x0 of good samples, away from bad ones."""
    for sign in (1.0, -1.0):
        bench = make_bench(Settings(name="nft", ref_weight=0.0), RECORDED, dynamics="ode")
        noised, noise = bench.algorithm.noised(bench.chunk)

        def error(bench=bench, noised=noised, noise=noise) -> float:
            x0 = bench.chunk.latents
            pairs = zip(bench.algorithm.velocities(noised), noise, strict=True)
            return sum((v - (eps - x0)).square().mean().item() for v, eps in pairs)

        before = error()
        steps = bench.losses(torch.full((12,), sign), bench.prepare())
        torch.stack([step.loss for step in steps]).mean().backward()
        with torch.no_grad():
            for p in bench.model.parameters():
                p.sub_(1e-3 * p.grad)
        assert (error() < before) == (sign > 0)


def test_nothing_is_idle_and_advantages_are_needed(make_bench) -> None:
    bench = make_bench(Settings(name="nft"), RECORDED, dynamics="ode")
    assert not bench.algorithm.idle(torch.zeros(12))
    with pytest.raises(ValueError, match="nft: advantages None"):
        bench.losses(None, bench.prepare())


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(resumes) -> None:
    """With a policy that lags far behind, whose state is in the checkpoint."""
    metrics, state = resumes(
        "configs/algorithms/nft.yaml",
        "algorithm.lag={rate: 0.4, most: 0.9}",
        "algorithm.levels=2",
        "algorithm.ref_weight=0.1",
    )
    assert metrics["velocity_kl"] > 0 and any(t.any() for t in state["lagging"])
    assert LagSettings(rate=0.4, most=0.9).decay(2) == 0.8
