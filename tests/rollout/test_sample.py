"""Rollout: what a trajectory records, and what its numbers depend on and what they do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.rollout.dynamics import step_coefficients
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import (
    Sampling,
    Trajectory,
    coefficient_tensors,
    initial_noise,
    row_seeds,
    sample,
)
from qirl_fast.rollout.schedule import make_sigmas

SCHEDULER = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
GUIDED = Guidance(2.0, ratio_mode="frozen_offset")
HOW = Sampling(64, 64, 5, Guidance(), dynamics="flow_sde")
GROUP = 4


def roll(model: Any, text: Any, how: Sampling = HOW, **settings: Any) -> list[Trajectory]:
    """Chunks of three prompts x GROUP samples."""
    arguments = {"group_size": GROUP, "seed": 1, "update": 3, "recorded": (0, 1, 3)} | settings
    return list(sample(model, *text, how, SCHEDULER, **arguments))


def joined(chunks: list[Trajectory], name: str, i: int) -> Tensor:
    """Recorded tensors of step i over all chunks, [rows, ...]."""
    return torch.cat([getattr(chunk, name)[i] for chunk in chunks])


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["plain", "guided"])
def test_what_is_recorded(make_toy, toy_text, storage: str, guidance: Guidance) -> None:
    how = dataclasses.replace(HOW, guidance=guidance, storage_dtype=storage, max_rows=5)
    chunks = roll(make_toy(), toy_text, how)
    dtype = getattr(torch, storage)
    sigmas = make_sigmas(5, 6, SCHEDULER)
    assert [row for chunk in chunks for row in chunk.rows] == list(range(12))
    assert [len(chunk.rows) for chunk in chunks] == [5, 5, 2]
    for chunk in chunks:
        rows = len(chunk.rows)
        assert chunk.recorded == (0, 1, 3)
        assert chunk.sigmas == tuple(float(sigmas[i]) for i in chunk.recorded)
        for k, i in enumerate(chunk.recorded):
            expected = step_coefficients(
                "flow_sde", sigmas[i], sigmas[i + 1], eta=0.7, sigma_max=sigmas[1]
            )
            assert chunk.coefficients[k] == expected
            assert chunk.x[k].dtype == chunk.x_next[k].dtype == chunk.latents.dtype == dtype
            assert chunk.x[k].shape == chunk.x_next[k].shape == (rows, 6, 4)
            assert chunk.logp[k].dtype == torch.float32 and chunk.logp[k].shape == (rows,)
            assert (chunk.delta[k] is not None) == guidance.on
            assert not chunk.logp[k].requires_grad
        assert torch.equal(chunk.x_next[0], chunk.x[1]), "steps 0 and 1 follow one another"
        assert not torch.equal(chunk.x_next[1], chunk.x[2]), "an ODE step lies between 1 and 3"
        owners = [toy_text[0][row // GROUP] for row in chunk.rows]
        assert all(
            chunk.prompts.embeddings[p] is text
            for p, text in zip(chunk.prompts.owner, owners, strict=True)
        )


def test_nothing_recorded_is_the_ode(make_toy, toy_text) -> None:
    """Against Euler steps written out in float64; the noise of steps has no part in it."""
    (chunk,) = roll(make_toy(), toy_text, recorded=())
    assert chunk.recorded == chunk.x == chunk.logp == ()
    sigmas = make_sigmas(5, 6, SCHEDULER)
    model = make_toy(torch.float64)
    x = initial_noise(row_seeds(1, 3, range(12), stream=0), (6, 4), torch.device("cpu")).double()
    with torch.no_grad():
        prefix = model.prefix(toy_text[0], [r // GROUP for r in range(12)], 64, 64)
        for i in range(5):
            sigma = torch.full((12,), sigmas[i], dtype=torch.float64)
            x = x + (sigmas[i + 1] - sigmas[i]) * model.velocity(x, sigma, prefix)
    # five float32 steps on values up to 4: some 5 x 4 x 1e-7
    assert torch.allclose(chunk.latents.double(), x, rtol=0, atol=5e-6)


def test_numbers_are_a_function_of_seed_and_update(make_toy, toy_text) -> None:
    first, again = (roll(make_toy(), toy_text)[0] for _ in range(2))
    torch.manual_seed(123)
    torch.rand(5)
    third = roll(make_toy(), toy_text)[0]
    for other in (again, third):
        assert torch.equal(first.latents, other.latents)
        for name in ("x", "x_next", "logp"):
            pairs = zip(getattr(first, name), getattr(other, name), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    for change in ({"seed": 2}, {"update": 4}):
        other = roll(make_toy(), toy_text, **change)[0]
        assert not torch.isclose(other.x[0], first.x[0]).any(), f"another start under {change}"
        residuals = [(t.x_next[0] - t.x[0]) for t in (first, other)]
        assert not torch.equal(*residuals)


@pytest.mark.parametrize("max_rows", [1, 5, 7])
def test_chunks_change_nothing_but_gemm_rounding(make_toy, toy_text, max_rows: int) -> None:
    """Noise is the same to the bit. Velocities differ by the order of sums in a GEMM alone."""
    split = dataclasses.replace(HOW, max_rows=max_rows)
    still = make_toy()
    with torch.no_grad():
        still.v.zero_()  # no velocity, no GEMM rounding: the whole path is noise
    whole, parts = roll(still, toy_text), roll(still, toy_text, split)
    assert len(whole) == 1 and len(parts) == -(-12 // max_rows)
    for i in range(3):
        for name in ("x", "x_next", "logp"):
            assert torch.equal(joined(parts, name, i), joined(whole, name, i))
    assert torch.equal(torch.cat([c.latents for c in parts]), whole[0].latents)
    whole, parts = roll(make_toy(), toy_text), roll(make_toy(), toy_text, split)
    assert torch.equal(joined(parts, "x", 0), joined(whole, "x", 0)), "the start is noise alone"
    # sums of 4, 5 and 8 products over five steps: a few float32 roundings of values up to 4
    assert torch.allclose(torch.cat([c.latents for c in parts]), whole[0].latents, atol=1e-5)


def test_chunks_of_the_real_model_agree(frozen_model, prompts) -> None:
    """Mixed prompt lengths, chunks that cut through groups."""
    text, null = frozen_model.encode(prompts[:3]), frozen_model.encode([""])[0]
    config = frozen_model.pipeline.scheduler.config
    finals = []
    for max_rows in (12, 5):
        how = Sampling(64, 64, 4, GUIDED, "flow_sde", 0.7, "float32", max_rows)
        chunks = sample(
            frozen_model, text, null, how, config, group_size=4, seed=0, update=1, recorded=(0, 1)
        )
        finals.append(torch.cat([chunk.latents for chunk in chunks]))
    # 3e-6 a forward (tests/models/test_qwenimage21.py), times 3 by guidance, over 4 steps
    assert (finals[0] - finals[1]).abs().max() < 4e-5 * finals[0].abs().max()


def test_shared_noise_starts_a_group_from_one_point(make_toy, toy_text) -> None:
    def starts(shared: bool) -> tuple[Tensor, Tensor]:
        (chunk,) = roll(make_toy(), toy_text, shared_noise=shared)
        return chunk.x[0].unflatten(0, (3, GROUP)), chunk.x_next[0].unflatten(0, (3, GROUP))

    shared, then = starts(True)
    assert all(torch.equal(shared[:, 0], shared[:, g]) for g in range(GROUP))
    apart = [shared[p, 0] for p in range(3)]
    assert not any(torch.isclose(apart[p], apart[q]).any() for p in range(3) for q in range(p))
    assert all(not torch.equal(then[:, 0], then[:, g]) for g in range(1, GROUP)), "own step noise"
    own, _ = starts(False)
    flat = own.flatten(0, 1)
    assert not any(torch.equal(flat[r], flat[q]) for r in range(12) for q in range(r))


def test_shared_noise_survives_chunks_that_cut_groups(make_toy, toy_text) -> None:
    split = dataclasses.replace(HOW, max_rows=3)
    whole = roll(make_toy(), toy_text, shared_noise=True)
    parts = roll(make_toy(), toy_text, split, shared_noise=True)
    assert torch.equal(joined(parts, "x", 0), joined(whole, "x", 0))


def test_row_seeds_are_one_sequence() -> None:
    whole = row_seeds(7, 2, range(40), stream=1)
    assert whole.dtype == torch.int64 and len(set(whole.tolist())) == 40
    for first, count in ((0, 3), (4, 7), (39, 1)):
        assert torch.equal(
            row_seeds(7, 2, range(first, first + count), stream=1), whole[first : first + count]
        )
    others = [(8, 2, 1), (7, 3, 1), (7, 2, 0), (2, 7, 1)]
    for seed, update, stream in others:
        assert not set(row_seeds(seed, update, range(40), stream=stream).tolist()) & set(
            whole.tolist()
        )


def test_initial_noise_is_standard_normal_and_a_function_of_the_seed() -> None:
    seeds = row_seeds(0, 0, range(64), stream=0)
    x = initial_noise(seeds, (50, 16), torch.device("cpu"))
    n = x.numel()
    # mean within 4 / sqrt(n) and variance within 4 sqrt(2 / n): one false alarm in 10^4 seeds
    assert abs(x.double().mean()) < 4 / n**0.5
    assert abs(x.double().var() - 1) < 4 * (2 / n) ** 0.5
    assert torch.equal(initial_noise(seeds[5:6], (50, 16), torch.device("cpu"))[0], x[5])
    rows = x.flatten(1).double()
    correlation = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0).abs().max()
    assert correlation < 6 / rows.shape[1] ** 0.5, "rows are independent"


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde", "cps", "langevin"])
def test_the_residual_of_frozen_offset_is_the_injected_noise(
    make_toy, toy_text, dynamics: str
) -> None:
    """x' - (a x + c v_cond + delta) = s eps, whatever the guidance scale."""
    for scale in (0.5, 1.0, 4.0):
        how = dataclasses.replace(
            HOW, dynamics=dynamics, guidance=Guidance(scale, ratio_mode="frozen_offset")
        )
        model = make_toy()
        (chunk,) = roll(model, toy_text, how)
        seeds = row_seeds(1, 3, range(12), stream=1)
        zeros = torch.zeros(12, 6, 4)
        for k, i in enumerate(chunk.recorded):
            step = chunk.coefficients[k]
            unit = dataclasses.replace(step, a=0.0, c=0.0, s=1.0, w=0.0, b=0.0)
            noise = ops.flow_step(
                zeros, zeros, *coefficient_tensors(unit, 12, model.device), seed=seeds, offset=i
            )[0]
            sigma = torch.full((12,), chunk.sigmas[k])
            with torch.no_grad():
                v = model.velocity(chunk.x[k], sigma, chunk.prompts.prefix(model))
            mean = step.a * chunk.x[k] + step.c * v
            if chunk.delta[k] is not None:
                mean = mean + chunk.delta[k]
            residual = chunk.x_next[k] - mean
            # mean, x' and their difference are rounded at values up to 8
            assert torch.allclose(residual, step.s * noise, rtol=0, atol=4e-6)
            score = (-step.w * (step.s * noise).double() ** 2).mean((1, 2)) - step.b
            assert torch.allclose(chunk.logp[k].double(), score, rtol=1e-4, atol=1e-4)


def test_guided_states_follow_the_guided_velocity(make_toy, toy_text) -> None:
    """The three ratio modes differ in what is scored, never in where the sample goes."""
    finals = {}
    for mode in ("frozen_offset", "conditional", "full"):
        how = dataclasses.replace(HOW, guidance=Guidance(3.0, ratio_mode=mode))
        (chunk,) = roll(make_toy(), toy_text, how)
        finals[mode] = chunk.latents
    plain = roll(make_toy(), toy_text)[0].latents
    assert torch.equal(finals["conditional"], finals["full"])
    # c v_c + c (v - v_c) against c v: a rounding or two at each of three steps
    assert torch.allclose(finals["frozen_offset"], finals["full"], rtol=0, atol=2e-5)
    assert (finals["full"] - plain).abs().max() > 0.01


def test_a_guidance_interval_leaves_the_other_steps_alone(make_toy, toy_text) -> None:
    """Against Euler steps in float64, guided at steps 1 and 2 of five."""
    sigmas = make_sigmas(5, 6, SCHEDULER)
    interval = (float(sigmas[2]), float(sigmas[1]))
    model = make_toy()
    how = dataclasses.replace(HOW, guidance=Guidance(3.0, interval=interval))
    (chunk,) = roll(model, toy_text, how, recorded=())
    assert (model.calls, model.rows) == (5, (5 + 2) * 12)
    exact, (text, null) = make_toy(torch.float64), toy_text
    x = initial_noise(row_seeds(1, 3, range(12), stream=0), (6, 4), torch.device("cpu")).double()
    with torch.no_grad():
        prefix = exact.prefix(text, [r // GROUP for r in range(12)], 64, 64)
        null_prefix = exact.prefix([null], [0] * 12, 64, 64)
        for i in range(5):
            v = exact.velocity(x, [sigmas[i]], prefix)
            if i in (1, 2):
                v_null = exact.velocity(x, [sigmas[i]], null_prefix)
                v = v_null + 3.0 * (v - v_null)
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    assert torch.allclose(chunk.latents.double(), x, rtol=0, atol=2e-5)  # guidance triples it
