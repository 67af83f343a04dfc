"""GRPO's loss and gradient against float64 equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.algorithms.grpo import Settings
from qirl_fast.algorithms.transitions import Prepared
from qirl_fast.rollout.guidance import Guidance

RECORDED = (0, 1, 3)
GROUP = 4


def settings(clip_low: float, clip_high: float, kl=0.0, velocity_kl=0.0, step_weights="equal"):
    return Settings(
        name="grpo",
        clip_low=clip_low,
        clip_high=clip_high,
        kl_weight=kl,
        velocity_kl_weight=velocity_kl,
        step_weights=step_weights,
    )


def expected_loss(
    bench, twin, advantage: Tensor, objective: Settings
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Mean over rows and steps of the surrogate and its KLs; also the ratios and KLs by step."""
    chunk, total, ratios, kls = bench.chunk, torch.zeros((), dtype=torch.float64), [], []
    pull = [2 * k.w * k.s * abs(k.c) for k in chunk.coefficients]  # d logp / d v = pull eps
    harmonic = len(pull) / sum(1 / p for p in pull)
    found, references = bench.velocities(twin, chunk.x), bench.reference_velocities(chunk.x)
    for k, (step, v, v_ref) in enumerate(zip(chunk.coefficients, found, references, strict=True)):
        x, x_next = chunk.x[k].double(), chunk.x_next[k].double()
        delta = 0.0 if chunk.delta[k] is None else chunk.delta[k].double()
        mean, mean_ref = step.a * x + step.c * v + delta, step.a * x + step.c * v_ref + delta
        density = torch.distributions.Normal(mean, step.s)
        ratio = (density.log_prob(x_next).mean((1, 2)) - chunk.logp[k].double()).exp()
        clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        weight = harmonic / pull[k] if objective.step_weights == "noise" else 1.0
        total = total + weight * torch.maximum(-advantage * ratio, -advantage * clipped).mean()
        kl = torch.distributions.kl_divergence(
            density, torch.distributions.Normal(mean_ref, step.s)
        ).mean()
        total = total + objective.kl_weight * kl
        total = total + objective.velocity_kl_weight * (v - v_ref).square().mean()
        ratios.append(ratio.detach())
        kls.append(torch.stack([kl, (v - v_ref).square().mean()]).detach())
    return total / len(chunk.coefficients), ratios, kls


@pytest.mark.parametrize(
    "guidance",
    [Guidance(), Guidance(2.0, ratio_mode="frozen_offset")],
    ids=["unguided", "frozen_offset"],
)
@pytest.mark.parametrize(
    "weights",
    [(0.0, 0.0), (0.3, 0.0), (0.0, 2.0), (0.3, 2.0), (0.0, 0.0, "noise"), (0.3, 2.0, "noise")],
    ids=str,
)
def test_loss_and_gradient(make_bench, advantage, agree, guidance: Guidance, weights) -> None:
    """Weights moved so far that some ratios are clipped on either side and some are not.

    No ratio may sit so near to a clip bound that the two precisions could fall on different sides:
    asserted.
    """
    objective = settings(0.02, 0.03, *weights)
    bench = make_bench(objective, RECORDED, guidance=guidance)
    bench.nudge(0.06)
    twin = bench.exact()
    steps = bench.losses(advantage, bench.prepare())
    wanted, ratios, kls = expected_loss(bench, twin, advantage.double(), objective)
    agree(bench, twin, steps, wanted)

    every = torch.cat(ratios)
    for bound in (0.98, 1.03):
        assert (every - bound).abs().min() > 1e-4, "too near to a bound to compare precisions"
    assert (every < 0.98).any() and (every > 1.03).any()
    assert ((every > 0.98) & (every < 1.03)).any()
    for step, ratio, kl in zip(steps, ratios, kls, strict=True):
        assert torch.allclose(step.ratio.double(), ratio, rtol=1e-4, atol=0)
        assert not step.ratio.requires_grad
        clipped = ((ratio < 0.98) | (ratio > 1.03)).double().mean()
        assert step.metrics["clip_fraction"].item() == pytest.approx(clipped.item(), abs=1e-6)
        if objective.needs_reference:
            assert step.metrics["kl"].item() == pytest.approx(kl[0].item(), rel=1e-4)
            assert step.metrics["velocity_kl"].item() == pytest.approx(kl[1].item(), rel=1e-4)
        else:
            assert "kl" not in step.metrics


def test_kl_terms_are_zero_before_the_first_update(make_bench) -> None:
    bench = make_bench(settings(1e-4, 1e-4, 0.3, 2.0), RECORDED)
    for step in bench.losses(torch.linspace(-1, 1, 12), bench.prepare()):
        assert step.metrics["kl"].item() == step.metrics["velocity_kl"].item() == 0
        assert (step.ratio == 1).all() and step.metrics["clip_fraction"].item() == 0
        assert step.metrics["approx_kl"].item() == 0


@pytest.mark.parametrize(
    ("weights", "forwards"), [((0.0, 0.0), 3), ((0.1, 0.0), 6), ((0.0, 0.1), 6)]
)
def test_the_reference_is_run_only_when_asked_for(make_bench, weights, forwards: int) -> None:
    bench = make_bench(settings(1e-4, 1e-4, *weights), RECORDED)
    bench.model.calls = 0
    bench.losses(torch.ones(12), bench.prepare())
    assert bench.model.calls == forwards


def test_a_kl_without_its_reference_and_a_loss_without_advantages_are_refused(make_bench) -> None:
    bench = make_bench(settings(0.1, 0.1, 0.1), RECORDED)
    for advantage, prepared in ((torch.ones(12), Prepared()), (None, bench.prepare())):
        with pytest.raises(ValueError, match="take them from the rollout and from `prepare`"):
            bench.losses(advantage, prepared)


def test_flat_and_failed_groups_contribute_nothing(make_bench) -> None:
    """Group 0 is flat, group 1 has a failed member: their rows' ratios receive no gradient."""
    bench = make_bench(settings(0.1, 0.1), RECORDED)
    rewards = torch.rand(12, 1, generator=torch.Generator().manual_seed(0))
    rewards[:4] = 0.25
    valid = torch.ones(12, 1, dtype=torch.bool)
    valid[6] = False
    group = torch.arange(3).repeat_interleave(GROUP)
    found = ops.group_advantage(rewards, group, torch.ones(1), valid=valid)
    seen: list[Tensor] = []
    real = bench.model.velocity

    def velocity(*arguments):
        v = real(*arguments)
        v.register_hook(seen.append)
        return v

    bench.model.velocity = velocity
    steps = bench.losses(found.advantage, bench.prepare())
    torch.stack([step.loss for step in steps]).sum().backward()
    assert len(seen) == len(RECORDED)
    assert all(not grad[:8].any() and grad[8:].abs().amax((1, 2)).min() > 0 for grad in seen)


def test_chunks_of_zeros_are_idle_where_no_kl_holds_them(make_bench) -> None:
    zeros, some = torch.zeros(12), torch.zeros(12).index_fill(0, torch.tensor(3), float("nan"))
    free, held = (make_bench(settings(0.1, 0.1, kl), RECORDED).algorithm for kl in (0.0, 0.1))
    assert free.idle(zeros) and not free.idle(some) and not held.idle(zeros)


def test_sampling_and_after_step_leave_the_policy_alone(make_bench) -> None:
    bench = make_bench(settings(0.1, 0.1), RECORDED)
    before = bench.weights()
    with bench.algorithm.sampling():
        pass
    bench.algorithm.after_step(1)
    assert all(map(torch.equal, before, bench.model.parameters()))
    assert bench.algorithm.state() == {}
