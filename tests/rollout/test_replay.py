"""Replay scores what rollout recorded: bit for bit under unchanged weights, right under others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, Trajectory, sample

SCHEDULER = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
MODES = {
    "unguided": Guidance(),
    "frozen_offset": Guidance(2.0, ratio_mode="frozen_offset"),
    "conditional": Guidance(2.0, ratio_mode="conditional"),
    "full": Guidance(2.0, ratio_mode="full"),
    "full, rescaled": Guidance(2.0, rescale=True, ratio_mode="full"),
}
DYNAMICS = ("flow_sde", "dance_sde", "cps", "langevin")
ADAPTERS = {
    "lora": ("lora", torch.float32),
    "full": ("full", torch.float32),
    "lora in bfloat16": ("lora", torch.bfloat16),
}
# Everything in float32; a model in bfloat16 under the two dynamics that are used most.
CASES = [
    (adapter, mode, dynamics, storage)
    for adapter in ADAPTERS
    for mode in MODES
    for dynamics in (DYNAMICS if "bfloat16" not in adapter else ("flow_sde", "cps"))
    for storage in ("float32", "bfloat16")
]


@pytest.fixture(scope="module")
def trained(weights: Any, prompts: Any) -> Callable[[str], tuple[Any, Any]]:
    """`trained(adapter)`: the packaged model with trainable weights off their start; its text."""

    @cache
    def make(adapter: str) -> tuple[Any, Any]:
        kind, dtype = ADAPTERS[adapter]
        model = QwenImage21.load(weights, dtype)
        parameters = model.trainable(kind, 4, 8, None, 0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in parameters.values():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
            return model, (model.encode(prompts[:2]), model.encode([""])[0])

    return make


@pytest.mark.parametrize(("adapter", "mode", "dynamics", "storage"), CASES)
def test_the_ratio_is_exactly_one_before_an_update(
    trained, adapter: str, mode: str, dynamics: str, storage: str
) -> None:
    """Prompts of two lengths, four rows in chunks of three and one, graph on; no tolerance."""
    model, (text, null) = trained(adapter)
    how = Sampling(64, 64, 3, MODES[mode], dynamics, 0.7, storage, max_rows=3)
    config = model.pipeline.scheduler.config
    settings = {"group_size": 2, "seed": 0, "update": 1, "recorded": (0, 1)}
    for chunk in sample(model, text, null, how, config, **settings):
        scored = list(replay(model, chunk, how))
        assert len(scored) == 2
        for step in scored:
            assert step.logp.requires_grad and torch.isfinite(step.logp_old).all()
            assert torch.equal(step.logp, step.logp_old)
            assert ((step.logp - step.logp_old).exp() - 1 == 0).all()


def roll(model: Any, toy_text: Any, mode: str, **settings: Any) -> tuple[Trajectory, Sampling]:
    how = Sampling(64, 64, 5, MODES[mode], **{"dynamics": "flow_sde", **settings})
    (chunk,) = sample(
        model, *toy_text, how, SCHEDULER, group_size=4, seed=1, update=3, recorded=(0, 1, 3)
    )
    return chunk, how


def nudge(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator).to(p.dtype))


def logp_float64(model: Any, chunk: Trajectory, how: Sampling, k: int) -> Tensor:
    """The score of recorded step k written out from the equations, in the model's float64."""
    x, x_next = chunk.x[k].double(), chunk.x_next[k].double()
    sigma = torch.full((len(chunk.rows),), chunk.sigmas[k], dtype=torch.float64)
    v = model.velocity(x, sigma, chunk.prompts.prefix(model))
    if how.guidance.ratio_mode == "full":
        v_null = model.velocity(x, sigma, chunk.prompts.null_prefix(model))
        v_cond, v = v, v_null + how.guidance.scale * (v - v_null)
        if how.guidance.rescale:
            v = v * v_cond.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)
    step = chunk.coefficients[k]
    mean = step.a * x + step.c * v
    if how.guidance.ratio_mode == "frozen_offset":
        mean = mean + chunk.delta[k].double()
    return -step.w * (x_next - mean).square().mean((1, 2)) - step.b


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("mode", list(MODES))
def test_scores_and_gradients_under_new_weights(
    make_toy, toy_text, mode: str, dynamics: str
) -> None:
    """Against float64. The log-prob is a mean of squares times w, which float32 rounds at 1e-7 of
    values up to 10 before it is amplified by w <= 40: 1e-4 relative is ten times that."""
    model, exact = make_toy(), make_toy(torch.float64)
    chunk, how = roll(model, toy_text, mode, dynamics=dynamics)
    nudge(model)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    for k, step in enumerate(replay(model, chunk, how)):
        expected = logp_float64(exact, chunk, how, k)
        assert not torch.equal(step.logp, step.logp_old), "the weights have moved"
        assert torch.equal(step.logp_old, chunk.logp[k])
        assert step.coefficients == chunk.coefficients[k]
        assert torch.allclose(step.logp.double(), expected, rtol=1e-4, atol=1e-5)
        weight = torch.linspace(-1, 1, len(chunk.rows))
        # the steps share the graph of the prefix, so it is kept
        loss = (step.logp * weight).sum()
        ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        theirs = torch.autograd.grad((expected * weight).sum(), list(exact.parameters()))
        for a, b in zip(ours, theirs, strict=True):
            assert b.abs().max() > 0
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("mode", list(MODES))
def test_only_full_runs_the_unconditional_branch(make_toy, toy_text, mode: str) -> None:
    """In replay; and a forward takes both branches where no replay has to repeat one alone."""
    model = make_toy()
    chunk, how = roll(model, toy_text, mode)
    rows, full = len(chunk.rows), mode.startswith("full")
    assert model.rows == 5 * rows * (2 if how.guidance.on else 1)
    assert model.calls == (5 + 3 if how.guidance.on and not full else 5)
    model.calls = model.rows = 0
    list(replay(model, chunk, how))
    assert (model.calls, model.rows) == (3, 3 * rows * (2 if full else 1))


@pytest.mark.parametrize("most", [2, 3, 9])
@pytest.mark.parametrize("mode", list(MODES))
def test_several_steps_in_one_forward(make_toy, toy_text, mode: str, most: int) -> None:
    """The scores and gradients of one step at a time, but for the rounding of other shapes."""
    model = make_toy()
    chunk, one = roll(model, toy_text, mode)
    nudge(model)
    found = []
    for how in (one, dataclasses.replace(one, replay_steps=most)):
        model.calls = 0
        steps = list(replay(model, chunk, how))
        sum((s.logp * torch.linspace(-1, 1, len(chunk.rows))).sum() for s in steps).backward()
        found.append((steps, [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    assert model.calls == -(-3 // most)
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert a.coefficients == b.coefficients and torch.equal(a.logp_old, b.logp_old)
        assert torch.allclose(a.logp, b.logp, rtol=1e-4, atol=1e-5)  # as against float64 above
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert a.abs().max() > 0 and (a - b).abs().max() <= 1e-4 * a.abs().max()


@pytest.mark.parametrize("mode", ["frozen_offset", "conditional", "full", "full, rescaled"])
@pytest.mark.parametrize("most", [1, 3])
def test_a_guidance_interval_holds_in_replay(make_toy, toy_text, mode: str, most: int) -> None:
    """Guided at step 1 alone of the recorded 0, 1, 3: the ratio is 1 at all of them."""
    model = make_toy()
    sigmas = roll(model, toy_text, "unguided")[0].sigmas
    within = (sigmas[1] - 1e-6, sigmas[1] + 1e-6)
    guidance = dataclasses.replace(MODES[mode], interval=within)
    how = Sampling(64, 64, 5, guidance, "flow_sde", replay_steps=most)
    model.rows = 0
    (chunk,) = sample(
        model, *toy_text, how, SCHEDULER, group_size=4, seed=1, update=3, recorded=(0, 1, 3)
    )
    assert model.rows == (5 + 1) * len(chunk.rows)
    assert [d is not None for d in chunk.delta] == [False, mode == "frozen_offset", False]
    model.rows = 0
    scored = list(replay(model, chunk, how))
    assert model.rows == (3 + mode.startswith("full")) * len(chunk.rows)
    for step in scored:
        close = torch.equal if most == 1 else partial(torch.allclose, rtol=1e-4, atol=1e-5)
        assert close(step.logp, step.logp_old)


def test_the_prefix_is_computed_once_and_gets_gradients(make_toy, toy_text, monkeypatch) -> None:
    model = make_toy()
    chunk, how = roll(model, toy_text, "frozen_offset")
    made = []
    whole = type(model).prefix
    monkeypatch.setattr(
        type(model), "prefix", lambda *a: made.append(whole(*a)) or made[-1], raising=True
    )
    sum(step.logp.sum() for step in replay(model, chunk, how)).backward()
    assert len(made) == 1 and model.u.grad.abs().max() > 0


def test_conditional_scores_the_conditional_branch(make_toy, toy_text) -> None:
    """Its old log-prob is that of a guided state under the unguided mean: lower than the others."""
    scores = {}
    for mode in ("frozen_offset", "conditional", "full"):
        chunk, _ = roll(make_toy(), toy_text, mode)
        scores[mode] = chunk.logp[0]
    # one rounding of the mean apart, amplified by w as above
    assert torch.allclose(scores["frozen_offset"], scores["full"], rtol=1e-4, atol=1e-4)
    assert (scores["conditional"] - scores["full"]).abs().max() > 1e-3


def test_storage_is_rounded_before_it_is_scored(make_toy, toy_text) -> None:
    """The recorded log-prob is that of the bfloat16 state, not of the one before rounding."""
    model, exact = make_toy(), make_toy(torch.float64)
    chunk, how = roll(model, toy_text, "unguided", storage_dtype="bfloat16")
    assert chunk.x_next[0].dtype == torch.bfloat16
    with torch.no_grad():
        for k in range(3):
            expected = logp_float64(exact, chunk, how, k)
            assert torch.allclose(chunk.logp[k].double(), expected, rtol=1e-4, atol=1e-5)
    finer, _ = roll(make_toy(), toy_text, "unguided")
    moved = (chunk.logp[0] - finer.logp[0]).abs().max()
    assert moved > 1e-4, "rounding moves the score by far more than the tolerance above"


def test_another_chunk_order_replays_alike(make_toy, toy_text) -> None:
    """Nothing is remembered between chunks: replaying backwards gives the same scores."""
    model = make_toy()
    how = Sampling(64, 64, 5, MODES["frozen_offset"], "flow_sde", max_rows=3)
    chunks = list(
        sample(model, *toy_text, how, SCHEDULER, group_size=4, seed=1, update=3, recorded=(0, 2))
    )
    nudge(model)
    forward = [[s.logp for s in replay(model, c, how)] for c in chunks]
    backward = [[s.logp for s in replay(model, c, how)] for c in reversed(chunks)][::-1]
    assert len(forward) == 4
    for one, other in zip(forward, backward, strict=True):
        assert len(one) == 2 and all(map(torch.equal, one, other))
