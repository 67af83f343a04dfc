"""GRPO: the steps it trains, its loss and its gradient against float64 equations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.algorithms import ALGORITHMS, grpo
from qirl_fast.algorithms.grpo import Objective
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, Trajectory, sample

SCHEDULER = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
RECORDED = (0, 1, 3)
GROUP = 4


def test_every_algorithm_has_the_same_functions() -> None:
    assert ALGORITHMS["grpo"] is grpo
    for module in ALGORITHMS.values():
        assert all(callable(getattr(module, f)) for f in ("record", "sampling", "loss"))
        assert callable(module.after_step)


def test_a_window_is_the_same_at_every_update() -> None:
    for update in (1, 2, 50):
        assert grpo.record(8, (2, 3), None, 0, update) == (2, 3, 4)
    assert grpo.record(3, (0, 2), None, 0, 1) == (0, 1)


def test_drawn_steps_are_distinct_and_never_the_last() -> None:
    for seed in range(20):
        for update in range(1, 21):
            steps = grpo.record(6, None, (3, 5), seed, update)
            assert steps == tuple(sorted(set(steps))) and len(steps) == 3
            assert steps[0] >= 0 and steps[-1] <= 4


def test_draws_follow_seed_and_update() -> None:
    def course(seed: int) -> list[tuple[int, ...]]:
        return [grpo.record(10, None, (2, 9), seed, update) for update in range(1, 40)]

    assert course(3) == course(3)
    assert course(3) != course(4)
    assert len(set(course(3))) > 10, "the draw is not seeded alike at every update"


def test_draws_favour_high_noise_with_the_stated_weights() -> None:
    """One step out of six, step i with weight 6 - i, over 6000 updates."""
    n, high = 6000, 6
    counts = Counter(grpo.record(10, None, (1, high), 0, update)[0] for update in range(n))
    weight = np.arange(high, 0, -1) / 21
    assert set(counts) == set(range(high))
    for step in range(high):
        expected, spread = n * weight[step], (n * weight[step] * (1 - weight[step])) ** 0.5
        assert abs(counts[step] - expected) < 4 * spread


@pytest.mark.parametrize(
    ("steps", "window", "draw", "message"),
    [
        (4, (0, 2), (1, 2), "give a window or a draw"),
        (4, None, None, "give a window or a draw"),
        (4, (2, 2), None, r"recorded steps \[2, 3\] do not lie in 0..2"),
        (4, (0, 0), None, r"recorded steps \[\] do not lie in 0..2"),
        (4, (-1, 2), None, r"recorded steps \[-1, 0\] do not lie in 0..2"),
    ],
)
def test_steps_that_cannot_be_trained_are_refused(steps, window, draw, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo.record(steps, window, draw, 0, 1)


def roll(model: Any, toy_text: Any, guidance: Guidance) -> tuple[Trajectory, Sampling]:
    how = Sampling(64, 64, 5, guidance, "flow_sde")
    (chunk,) = sample(
        model, *toy_text, how, SCHEDULER, group_size=GROUP, seed=1, update=3, recorded=RECORDED
    )
    return chunk, how


def nudge(model: torch.nn.Module, by: float) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p.dtype))


def expected_loss(
    model: Any, chunk: Trajectory, how: Sampling, advantage: Tensor, objective: Objective
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Mean over rows and steps of the surrogate and its KLs; also the ratios and KLs by step."""
    total, ratios, kls = torch.zeros((), dtype=torch.float64), [], []
    pull = [2 * k.w * k.s * abs(k.c) for k in chunk.coefficients]  # d logp / d v = pull eps
    harmonic = len(pull) / sum(1 / p for p in pull)
    prefix = chunk.prompts.prefix(model)
    with model.reference():
        prefix_ref = chunk.prompts.prefix(model).detach()
    for k, step in enumerate(chunk.coefficients):
        x, x_next = chunk.x[k].double(), chunk.x_next[k].double()
        sigma = torch.full((len(chunk.rows),), chunk.sigmas[k], dtype=torch.float64)
        v = model.velocity(x, sigma, prefix)
        with torch.no_grad(), model.reference():
            v_ref = model.velocity(x, sigma, prefix_ref)
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


def losses(model, chunk, advantage, how, objective) -> list[grpo.StepLoss]:
    (reference,) = grpo.references(model, [chunk], how, objective)
    return list(grpo.loss(model, chunk, advantage, how, objective, reference))


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
def test_loss_and_gradient(make_toy, toy_text, guidance: Guidance, weights) -> None:
    """Weights moved so far that some ratios are clipped on either side and some are not.

    A log-prob is right to about 1e-5 in float32 (w up to 40 times 1e-7 of squares up to 3), the
    gradient of a ratio therefore to 1e-4 of the largest. No ratio may sit so near to a clip bound
    that the two precisions could fall on different sides: asserted.
    """
    model, exact = make_toy(), make_toy(torch.float64)
    chunk, how = roll(model, toy_text, guidance)
    nudge(model, 0.06)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(q)
        exact.untrained = [p.double() for p in model.untrained]
    order = torch.randperm(3 * GROUP, generator=torch.Generator().manual_seed(0))
    advantage = torch.linspace(-2, 2, 3 * GROUP)[order]
    objective = Objective(0.02, 0.03, *weights)
    steps = losses(model, chunk, advantage, how, objective)
    ours = torch.stack([step.loss for step in steps]).mean()
    ours.backward()
    theirs, ratios, kls = expected_loss(exact, chunk, how, advantage.double(), objective)
    theirs.backward()

    every = torch.cat(ratios)
    for bound in (0.98, 1.03):
        assert (every - bound).abs().min() > 1e-4, "too near to a bound to compare precisions"
    assert (every < 0.98).any() and (every > 1.03).any()
    assert ((every > 0.98) & (every < 1.03)).any()
    assert abs(ours.item() - theirs.item()) < 1e-4 * max(1.0, abs(theirs.item()))
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert q.grad.abs().max() > 0
        assert (p.grad - q.grad).abs().max() < 2e-4 * q.grad.abs().max()
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


def test_kl_terms_are_zero_before_the_first_update(make_toy, toy_text) -> None:
    model = make_toy()
    chunk, how = roll(model, toy_text, Guidance())
    objective = Objective(1e-4, 1e-4, 0.3, 2.0)
    for step in losses(model, chunk, torch.linspace(-1, 1, 12), how, objective):
        assert step.metrics["kl"].item() == step.metrics["velocity_kl"].item() == 0
        assert (step.ratio == 1).all() and step.metrics["clip_fraction"].item() == 0
        assert step.metrics["approx_kl"].item() == 0


def test_the_reference_is_run_only_when_asked_for(make_toy, toy_text) -> None:
    model = make_toy()
    chunk, how = roll(model, toy_text, Guidance())
    for weights, forwards in (((0.0, 0.0), 3), ((0.1, 0.0), 6), ((0.0, 0.1), 6)):
        model.calls = 0
        losses(model, chunk, torch.ones(12), how, Objective(1e-4, 1e-4, *weights))
        assert model.calls == forwards


def test_a_kl_without_its_reference_is_refused(make_toy, toy_text) -> None:
    chunk, how = roll(make_toy(), toy_text, Guidance())
    with pytest.raises(ValueError, match="take it from `references`"):
        next(grpo.loss(make_toy(), chunk, torch.ones(12), how, Objective(0.1, 0.1, 0.1), None))


def test_flat_and_failed_groups_contribute_nothing(make_toy, toy_text) -> None:
    """Group 0 is flat, group 1 has a failed member; only group 2's prompt receives a gradient."""
    model = make_toy()
    text, null = [t.clone().requires_grad_() for t in toy_text[0]], toy_text[1]
    chunk, how = roll(model, (text, null), Guidance())
    rewards = torch.rand(12, 1, generator=torch.Generator().manual_seed(0))
    rewards[:4] = 0.25
    valid = torch.ones(12, 1, dtype=torch.bool)
    valid[6] = False
    group = torch.arange(3).repeat_interleave(GROUP)
    found = ops.group_advantage(rewards, group, torch.ones(1), valid=valid)
    steps = losses(model, chunk, found.advantage, how, Objective(0.1, 0.1))
    torch.stack([step.loss for step in steps]).sum().backward()
    assert not text[0].grad.any() and not text[1].grad.any()
    assert text[2].grad.abs().max() > 0


def test_sampling_and_after_step_leave_the_policy_alone(make_toy) -> None:
    model = make_toy()
    before = [p.detach().clone() for p in model.parameters()]
    with grpo.sampling(model):
        pass
    grpo.after_step(model)
    assert all(map(torch.equal, before, model.parameters()))
