"""AWM: its loss and gradient against float64 equations, and what holds the policy."""

from __future__ import annotations

import pytest
import torch

from qirl_fast.algorithms.awm import Settings
from qirl_fast.algorithms.levels import LagSettings

RECORDED = (1, 2, 4)
FORMS = {
    "uniform": lambda m, t: m,
    "t": lambda m, t: t * m,
    "t2": lambda m, t: t**2 * m,
    "huber": lambda m, t: t * ((m + 1e-10).sqrt() - 1e-5),
    "ghuber": lambda m, t: t * ((m + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25,
}


def settings(**more) -> Settings:
    return Settings(**{"name": "awm", "ref_weight": 0.0, "lag_weight": 0.0, **more})


@pytest.mark.parametrize("weighting", list(FORMS))
@pytest.mark.parametrize("held", [(0.0, 0.0), (0.3, 0.7)])
@pytest.mark.parametrize("updates", [1, 2])
def test_loss_and_gradient(make_bench, advantage, agree, weighting, held, updates) -> None:
    """With two updates the weights have moved and ratios are clipped on either side; none may sit
    so near to a bound that precisions could fall on different sides.
    """
    clip = 0.02
    objective = settings(
        weighting=weighting,
        clip_low=clip,
        clip_high=clip,
        adv_scale=0.5,
        ref_weight=held[0],
        lag_weight=held[1],
    )
    bench = make_bench(objective, RECORDED, dynamics="ode", updates=updates)
    lag = bench.exact()
    bench.nudge(0.05, seed=8)  # what an earlier update did
    prepared, old = bench.prepare(), bench.exact()
    assert (prepared.logp_old is None) == (updates == 1)
    if updates > 1:
        bench.nudge(0.04)
    twin, x0, a = bench.exact(), bench.chunk.latents.double(), 0.5 * advantage.double()
    steps = bench.losses(advantage, prepared)

    noised, noise = bench.algorithm.noised(bench.chunk)
    wanted, ratios = torch.zeros((), dtype=torch.float64), []
    found = zip(
        noise,
        bench.chunk.sigmas,
        *(bench.velocities(model, noised.x) for model in (twin, old, lag)),
        bench.reference_velocities(noised.x),
        strict=True,
    )
    for eps, t, v, v_old, v_lag, v_ref in found:
        target = eps.double() - x0
        m, m_old = ((u - target).square().mean((1, 2)) for u in (v, v_old.detach()))
        ratio = (FORMS[weighting](m_old, t) - FORMS[weighting](m, t)).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        total = torch.maximum(-a * ratio, -a * clipped).mean()
        total = total + held[0] * (v - v_ref).square().mean()
        wanted = wanted + total + held[1] * (v - v_lag.detach()).square().mean()
        ratios.append(ratio.detach())
    agree(bench, twin, steps, wanted / len(RECORDED))
    for step, ratio in zip(steps, ratios, strict=True):
        assert torch.allclose(step.ratio.double(), ratio, rtol=1e-5, atol=0)
        assert ("velocity_kl" in step.metrics, "lag_kl" in step.metrics) == (held[0] > 0,) * 2
    every = torch.cat(ratios)
    if updates == 1:
        assert all((step.ratio == 1).all() for step in steps)
    else:
        assert min((every - bound).abs().min() for bound in (1 - clip, 1 + clip)) > 1e-5
        assert (every < 1 - clip).any() and (every > 1 + clip).any()


def test_before_the_first_step_a_ratio_is_one_to_the_bit(make_bench, advantage) -> None:
    bench = make_bench(settings(), RECORDED, dynamics="ode", updates=2)
    steps = bench.losses(advantage, bench.prepare())
    assert all((step.ratio == 1).all() for step in steps)
    assert all(step.metrics["approx_kl"] == 0 for step in steps)


def test_the_policy_itself_draws(make_bench) -> None:
    bench = make_bench(settings(), RECORDED, dynamics="ode")
    bench.nudge(0.1)
    moved = bench.weights()
    with bench.algorithm.sampling():
        assert all(map(torch.equal, moved, bench.model.parameters()))


def test_only_what_holds_the_policy_is_run(make_bench, advantage) -> None:
    """Forwards: the loss's own three, and three each of the reference and the lagging policy."""
    for more, forwards in (({}, 3), ({"ref_weight": 0.1}, 6), ({"lag_weight": 0.1}, 6)):
        bench = make_bench(settings(**more), RECORDED, dynamics="ode")
        bench.model.calls = 0
        bench.losses(advantage, bench.prepare())
        assert bench.model.calls == forwards


def test_idle_only_where_nothing_holds(make_bench) -> None:
    zeros, some = torch.zeros(12), torch.full((12,), float("nan"))
    free = make_bench(settings(), RECORDED, dynamics="ode").algorithm
    held = make_bench(settings(lag_weight=1.0), RECORDED, dynamics="ode").algorithm
    assert free.idle(zeros) and not free.idle(some) and not held.idle(zeros)


def test_advantages_are_needed(make_bench) -> None:
    bench = make_bench(settings(), RECORDED, dynamics="ode")
    with pytest.raises(ValueError, match="awm: advantages None"):
        bench.losses(None, bench.prepare())


def test_defaults_are_the_published_ones() -> None:
    made = Settings(name="awm")
    assert (made.levels, made.weighting, made.power) == (6, "ghuber", 0.25)
    assert (made.ref_weight, made.lag_weight, made.adv_scale) == (0.003, 1.0, 0.2)
    assert made.lag == LagSettings(after=0, rate=0.001, most=0.3)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(resumes) -> None:
    """Two optimizer steps a rollout, and a lagging policy whose state is in the checkpoint."""
    metrics, state = resumes(
        "configs/algorithms/awm.yaml",
        "algorithm={levels: 2, lag: {rate: 0.2, most: 0.9}}",
        "train.updates_per_rollout=2",
    )
    assert metrics["lag_kl"] > 0 and any(t.any() for t in state["lagging"])
