"""Each algorithm, on a toy model whose reward is plain, ends up drawing what is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.algorithms import Policy, awm, dppo, grpo, grpo_guard, make_algorithm, nft
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, sample
from qirl_fast.rollout.workers import Workers

SCHEDULER = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
GROUP, UPDATES, STEPS = 16, 30, 6
CLIP = {"clip_low": 0.05, "clip_high": 0.05}
WINDOW = {"start": 0, "size": 3, "every": 0, "stride": 1}
MOVING = {"start": 0, "size": 2, "every": 5, "stride": 1}
CASES = {
    "flow_grpo": (grpo.Settings(name="grpo", **CLIP), "flow_sde", {"window": WINDOW}, 1),
    "flow_grpo_fast": (
        grpo.Settings(name="grpo", **CLIP),
        "flow_sde",
        {"sde_steps": {"count": 1, "high": 3}},
        1,
    ),
    "dance_grpo": (grpo.Settings(name="grpo", **CLIP), "dance_sde", {"window": WINDOW}, 1),
    "mix_grpo": (grpo.Settings(name="grpo", **CLIP), "flow_sde", {"window": MOVING}, 1),
    "flow_cps": (grpo.Settings(name="grpo", **CLIP), "cps", {"window": WINDOW}, 1),
    "grpo_guard": (
        grpo_guard.Settings(name="grpo_guard", **CLIP),
        "flow_sde",
        {"window": WINDOW},
        2,
    ),
    "dppo": (dppo.Settings(name="dppo", threshold=0.01), "flow_sde", {"window": WINDOW}, 2),
    "nft": (nft.Settings(name="nft"), "ode", {}, 1),
    "awm": (awm.Settings(name="awm", levels=4, ref_weight=0.0), "ode", {}, 1),
}


def reward(latents: Tensor) -> Tensor:
    """Best, 0, where the first channel's mean is 1."""
    return -(latents[..., 0].mean(1) - 1).square()


@pytest.mark.parametrize("name", list(CASES))
def test_reward_rises(make_toy, toy_text, name: str) -> None:
    """From about -1 (the mean is near 0) by at least half of the way, in 30 updates of 48."""
    settings, dynamics, chosen, updates = CASES[name]
    rollout = SimpleNamespace(steps=STEPS, window=None, sde_steps=None)
    for key, values in chosen.items():
        setattr(rollout, key, SimpleNamespace(**values))
    model = make_toy()
    how = Sampling(64, 64, STEPS, Guidance(), dynamics, max_rows=24, keeps=type(settings).keeps)
    trainable = dict(model.named_parameters())
    algorithm = make_algorithm(settings, Policy(model, trainable, how, Workers(1), updates))
    optimizer = torch.optim.Adam(trainable.values(), lr=0.02)
    course, steps = [], 0
    for update in range(1, UPDATES + 1):
        recorded = algorithm.record(rollout, 0, update)
        with algorithm.sampling():
            found = sample(
                model,
                *toy_text,
                how,
                SCHEDULER,
                group_size=GROUP,
                seed=0,
                update=update,
                recorded=recorded,
            )
            chunks = list(found)
        scores = torch.cat([reward(chunk.latents) for chunk in chunks])
        course.append(scores.mean().item())
        group = torch.arange(3).repeat_interleave(GROUP)
        advantage = ops.group_advantage(scores[:, None], group, torch.ones(1)).advantage.float()
        prepared = algorithm.prepare(chunks, ["t2i"] * len(scores))
        for chunk, own in zip(chunks, prepared, strict=True):
            part = advantage[chunk.rows.start : chunk.rows.stop]
            losses = [step.loss for step in algorithm.loss(chunk, part, own)]
            torch.stack(losses).mean().backward()
            if updates > 1 or chunk is chunks[-1]:
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                algorithm.after_step(steps)
    start, end = (sum(part) / 3 for part in (course[:3], course[-3:]))
    assert end > start / 2, course
