"""What NFT and AWM share: levels, noise, the lagging policy, and recipes that do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qirl_fast.algorithms.levels import LagSettings
from qirl_fast.algorithms.nft import Settings
from qirl_fast.config import ConfigError, load_config

RECORDED = (0, 2, 4)


def test_levels_are_one_from_each_part_of_the_schedule(make_bench) -> None:
    """Three of ten steps from step 1 on: 1 to 3, 4 to 6, 7 to 9, each step drawn some time."""
    settings = Settings(name="nft", levels=3, first=1)
    algorithm = make_bench(settings, RECORDED, dynamics="ode").algorithm
    rollout = SimpleNamespace(steps=10)
    drawn = [algorithm.record(rollout, seed=0, update=u) for u in range(1, 60)]
    assert drawn == [algorithm.record(rollout, seed=0, update=u) for u in range(1, 60)]
    assert drawn != [algorithm.record(rollout, seed=1, update=u) for u in range(1, 60)]
    for k, part in enumerate(({1, 2, 3}, {4, 5, 6}, {7, 8, 9})):
        assert {steps[k] for steps in drawn} == part


@pytest.mark.parametrize(("first", "steps"), [(0, 7), (2, 7)])
def test_all_levels_where_no_number_is_given(make_bench, first: int, steps: int) -> None:
    settings = Settings(name="nft", first=first)
    algorithm = make_bench(settings, RECORDED, dynamics="ode").algorithm
    rollout = SimpleNamespace(steps=steps)
    assert algorithm.record(rollout, 0, 1) == tuple(range(first, steps))
    assert settings.recorded_steps(rollout) == steps - first


def test_noised_states_are_between_sample_and_noise(make_bench) -> None:
    bench = make_bench(Settings(name="nft"), RECORDED, dynamics="ode")
    noised, noise = bench.algorithm.noised(bench.chunk)
    x0 = bench.chunk.latents
    assert bench.chunk.sigmas[0] == 1 and torch.equal(noised.x[0], noise[0])
    for x, eps, t in zip(noised.x, noise, bench.chunk.sigmas, strict=True):
        torch.testing.assert_close(x.double(), (1 - t) * x0.double() + t * eps.double())
        assert eps.shape == x0.shape and eps.dtype == torch.float32
    every = torch.stack(noise).flatten()
    # 864 normal numbers: four standard errors of mean and variance.
    assert abs(every.mean()) < 4 / len(every) ** 0.5
    assert abs(every.var() - 1) < 4 * (2 / len(every)) ** 0.5
    assert len(every.unique()) == len(every), "levels and rows have noise of their own"


def test_noise_is_a_function_of_the_row_and_the_step(make_bench) -> None:
    """Not of the rows beside it, nor of the levels drawn with it, and none of rollout's."""
    from dataclasses import replace

    bench = make_bench(Settings(name="nft"), RECORDED, dynamics="ode")
    chunk, (_, noise) = bench.chunk, bench.algorithm.noised(bench.chunk)
    part = replace(chunk.states_of([3, 7]), recorded=(4,), sigmas=chunk.sigmas[2:])
    _, (alone,) = bench.algorithm.noised(part)
    assert torch.equal(alone, noise[2][[3, 7]])
    from qirl_fast.rollout.sample import initial_noise

    drawn = initial_noise(chunk.seeds, (6, 4), torch.device("cpu"))
    assert all(not torch.isin(eps, drawn).any() for eps in noise)


@pytest.mark.parametrize(
    ("lag", "wanted"),
    [
        (LagSettings(), {0: 0.0, 1: 0.001, 100: 0.1, 500: 0.5, 900: 0.5}),
        (
            LagSettings(after=75, rate=0.0075, most=0.999),
            {74: 0.0, 75: 0.0, 76: 0.0075, 175: 0.75, 300: 0.999},
        ),
    ],
    ids=["GenEval", "several rewards"],
)
def test_the_published_schedules_of_the_lag(lag: LagSettings, wanted: dict[int, float]) -> None:
    for step, share in wanted.items():
        assert lag.decay(step) == pytest.approx(share)


def test_the_lagging_policy_moves_once_an_update(make_bench) -> None:
    """Two optimizer steps an update, a share of 0.1 a step kept: after steps 2 and 4."""
    settings = Settings(name="nft", lag=LagSettings(rate=0.1))
    bench = make_bench(settings, RECORDED, dynamics="ode", updates=2)
    lagging = bench.algorithm.lagging.average
    wanted = bench.weights()
    for step in range(1, 5):
        bench.nudge(0.1, seed=step)
        bench.algorithm.after_step(step)
        if step % 2 == 0:
            keep = 0.1 * step
            pairs = zip(wanted, bench.weights(), strict=True)
            wanted = [keep * old + (1 - keep) * new for old, new in pairs]
        for ours, theirs in zip(lagging, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_state_goes_through(make_bench) -> None:
    make = lambda: make_bench(  # noqa: E731
        Settings(name="nft", lag=LagSettings(rate=0.2)), RECORDED, dynamics="ode"
    )
    first, second = make(), make()
    for step in (1, 2):
        first.nudge(0.1, seed=step)
        first.algorithm.after_step(step)
    second.algorithm.load_state(first.algorithm.state())
    pairs = zip(first.algorithm.lagging.average, second.algorithm.lagging.average, strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    assert not torch.equal(second.algorithm.lagging.average[0], second.weights()[0])


@pytest.mark.parametrize("name", ["nft", "awm"])
@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["rollout.dynamics=flow_sde"], "rollout.dynamics: got 'flow_sde', and"),
        (["rollout.window={start: 0, size: 2}"], "rollout.window, rollout.sde_steps: choose steps"),
        (["rollout.sde_steps={count: 2}"], "rollout.window, rollout.sde_steps: choose steps"),
        (["rollout.guidance=1.5"], "rollout.ratio_mode: got None with rollout.guidance=1.5"),
        (
            ["rollout.guidance=1.5", "rollout.ratio_mode=frozen_offset"],
            "rollout.ratio_mode: got 'frozen_offset' with rollout.guidance=1.5",
        ),
        (["algorithm.levels=7"], "algorithm.levels: got 7"),
        (["algorithm.first=6", "algorithm.levels=null"], "algorithm.levels: got None from step 6"),
        (["model.fp8={mode: corrected}"], "model.fp8.mode: got 'corrected', which is about"),
    ],
)
def test_a_recipe_that_contradicts_the_forward_process_is_refused(name, settings, part) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([f"configs/algorithms/{name}.yaml", *settings])
    assert part in str(error.value)


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_guidance_that_is_declared_is_taken(name: str) -> None:
    declared = ["rollout.guidance=1.5", "rollout.ratio_mode=conditional"]
    assert load_config([f"configs/algorithms/{name}.yaml", *declared]).rollout.guidance == 1.5
