"""Flow-DPPO: which rows the mask takes out, and the loss of the rest against float64 equations."""

from __future__ import annotations

import pytest
import torch

from qirl_fast.algorithms.dppo import Settings
from qirl_fast.rollout.dynamics import StepCoefficients
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import Replayed

RECORDED = (0, 1, 3)
THRESHOLD = 2e-3


def settings(threshold: float = THRESHOLD, **more) -> Settings:
    return Settings(name="dppo", threshold=threshold, **more)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0, ratio_mode="frozen_offset")])
def test_loss_and_gradient(make_bench, advantage, agree, dynamics, guidance, updates) -> None:
    """With two updates the weights have moved: all four kinds of rows are there.

    Right to 1e-5 of itself is a divergence, and none is so near to the threshold.
    """
    objective = settings(kl_weight=0.5)
    bench = make_bench(objective, RECORDED, dynamics=dynamics, guidance=guidance, updates=updates)
    prepared, old = bench.prepare(), bench.exact()
    if updates > 1:
        bench.nudge(0.06)
    twin, chunk, a = bench.exact(), bench.chunk, advantage.double()
    steps = bench.losses(advantage, prepared)

    wanted, kinds = torch.zeros((), dtype=torch.float64), []
    found = zip(
        bench.velocities(twin, chunk.x),
        bench.velocities(old, chunk.x),
        bench.reference_velocities(chunk.x),
        strict=True,
    )
    for i, (v, v_old, v_ref) in enumerate(found):
        k, x, x_next = chunk.coefficients[i], chunk.x[i].double(), chunk.x_next[i].double()
        delta = 0.0 if chunk.delta[i] is None else chunk.delta[i].double()
        mean, mean_old, mean_ref = (k.a * x + k.c * u + delta for u in (v, v_old.detach(), v_ref))
        densities = [torch.distributions.Normal(mu, k.s) for mu in (mean, mean_old, mean_ref)]
        kl = [torch.distributions.kl_divergence(densities[0], d) for d in densities[1:]]
        score = [-k.w * (x_next - mu).square().mean((1, 2)) for mu in (mean, mean_old)]
        ratio = (score[0] - score[1]).exp()
        far = kl[0].mean((1, 2)).detach()
        assert (far / THRESHOLD - 1).abs().min() > 1e-4
        further = ((ratio > 1) & (a > 0)) | ((ratio < 1) & (a < 0))
        keep = ~((far >= THRESHOLD) & further)
        wanted = wanted + (-a * ratio * keep).mean() + 0.5 * kl[1].mean()
        kinds += [*zip((far >= THRESHOLD).tolist(), further.tolist(), strict=True)]
        assert steps[i].metrics["masked_fraction"].item() == pytest.approx(1 - keep.double().mean())
        assert steps[i].metrics["divergence"].item() == pytest.approx(far.mean().item(), rel=1e-4)
        assert torch.allclose(steps[i].ratio.double(), ratio.detach(), rtol=1e-4, atol=0)
    agree(bench, twin, steps, wanted / len(RECORDED))
    if updates == 1:
        assert all((step.ratio == 1).all() for step in steps)
        assert not any(step.metrics["masked_fraction"] for step in steps)
    else:
        assert set(kinds) == {(False, False), (False, True), (True, False), (True, True)}


def rows(make_bench, v: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor):
    """Loss and gradient to log-probs of rows that rollout left at velocity 0 and log-prob 0."""
    k = StepCoefficients(a=1.0, c=1.0, s=0.5, w=2.0, b=0.0)
    logp = logp.clone().requires_grad_()
    algorithm = make_bench(settings(0.02), RECORDED).algorithm
    old = torch.zeros(len(v), 6, 4)
    step = Replayed(logp, torch.zeros(len(v)), old + v[:, None, None], k)
    found = algorithm.surrogate(step, advantage, old)
    found.loss.backward()
    return found, logp.grad


def test_what_moved_too_far_moves_back_but_no_further(make_bench) -> None:
    """v = 0.1 is a KL of 0.1^2 / (2 0.5^2) = 0.02, the threshold; 0.09 is below it."""
    v = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.09, 0.09])
    logp = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.3, -0.3])
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    found, grad = rows(make_bench, v, logp, a)
    assert (grad == 0).tolist() == [True, False, False, True, False, False]
    kept = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(grad, -a * logp.exp() * kept / 6)
    assert found.metrics["masked_fraction"].item() == pytest.approx(2 / 6)


def test_a_dropped_ratio_may_overflow_and_a_nan_is_not_dropped(make_bench) -> None:
    v, a = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    found, grad = rows(make_bench, v, torch.tensor([200.0, 0.0]), a)
    assert torch.isfinite(found.loss) and torch.isfinite(grad).all()
    for place in ("v", "logp", "a"):
        values = {"v": v.clone(), "logp": torch.zeros(2), "a": a.clone()}
        values[place][0] = torch.nan
        if place == "v":  # as a NaN velocity would have it
            values["logp"][0] = torch.nan
        found, _ = rows(make_bench, values["v"], values["logp"], values["a"])
        assert torch.isnan(found.loss)
