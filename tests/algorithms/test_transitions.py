"""Which steps a ratio is of: windows that stay or move, and draws; what may not be asked for."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qirl_fast.algorithms import ALGORITHMS, Policy, grpo
from qirl_fast.algorithms.algorithm import Algorithm
from qirl_fast.algorithms.transitions import window_at
from qirl_fast.config import ConfigError, load_config
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling
from qirl_fast.rollout.workers import Workers


def recorded(steps: int, seed: int, update: int, **chosen: Any) -> tuple[int, ...]:
    how = Sampling(64, 64, steps, Guidance())
    algorithm = grpo.Grpo(grpo.Settings(name="grpo"), Policy(None, {}, how, Workers(1)))
    rollout = SimpleNamespace(steps=steps, window=None, sde_steps=None)
    for name, values in chosen.items():
        setattr(rollout, name, SimpleNamespace(**values))
    return algorithm.record(rollout, seed, update)


def test_every_algorithm_has_the_same_methods() -> None:
    for kind in ALGORITHMS.values():
        for name in ("record", "loss"):
            assert getattr(kind, name) is not getattr(Algorithm, name)
        for name in ("sampling", "idle", "prepare", "after_step", "state", "load_state"):
            assert callable(getattr(kind, name))


def test_a_window_that_stays() -> None:
    stays = {"start": 2, "size": 3, "every": 0, "stride": 1}
    for update in (1, 2, 50):
        assert recorded(8, 0, update, window=stays) == (2, 3, 4)


def test_a_window_moves_to_the_last_trained_step_and_begins_again() -> None:
    """MixGRPO: window 2 of 6 steps, moved every 3 updates. Step 5 is never trained."""
    moves = {"start": 0, "size": 2, "every": 3, "stride": 1}
    firsts = [recorded(6, 0, update, window=moves) for update in range(1, 17)]
    assert firsts[:3] == [(0, 1)] * 3 and firsts[3:6] == [(1, 2)] * 3
    assert firsts[9:12] == [(3, 4)] * 3 and firsts[12:15] == [(0, 1)] * 3
    assert firsts[15] == (1, 2)


def test_a_window_that_strides_stops_where_the_next_would_not_fit() -> None:
    places = [window_at(u, 10, start=1, size=3, every=1, stride=2) for u in range(1, 6)]
    assert places == [range(1, 4), range(3, 6), range(5, 8), range(1, 4), range(3, 6)]


def test_drawn_steps_are_distinct_and_never_the_last() -> None:
    for seed in range(20):
        for update in range(1, 21):
            steps = recorded(6, seed, update, sde_steps={"count": 3, "high": 5})
            assert steps == tuple(sorted(set(steps))) and len(steps) == 3
            assert steps[0] >= 0 and steps[-1] <= 4


def test_draws_follow_seed_and_update() -> None:
    def course(seed: int) -> list[tuple[int, ...]]:
        chosen = {"count": 2, "high": None}
        return [recorded(10, seed, update, sde_steps=chosen) for update in range(1, 40)]

    assert course(3) == course(3)
    assert course(3) != course(4)
    assert len(set(course(3))) > 10, "the draw is not seeded alike at every update"


def test_draws_favour_high_noise_with_the_stated_weights() -> None:
    """One step out of six, step i with weight 6 - i, over 6000 updates."""
    n, high = 6000, 6
    chosen = {"count": 1, "high": high}
    counts = Counter(recorded(10, 0, update, sde_steps=chosen)[0] for update in range(n))
    weight = np.arange(high, 0, -1) / 21
    assert set(counts) == set(range(high))
    for step in range(high):
        expected, spread = n * weight[step], (n * weight[step] * (1 - weight[step])) ** 0.5
        assert abs(counts[step] - expected) < 4 * spread


@pytest.mark.parametrize("name", ["flow_grpo", "grpo_guard", "dppo"])
@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["rollout.dynamics=ode"], "rollout.dynamics: got 'ode', which has no density, so"),
        (["rollout.window=null"], "rollout.window, rollout.sde_steps: got neither"),
        (["rollout.sde_steps={count: 1}"], "rollout.window, rollout.sde_steps: got both"),
        (["rollout.ratio_mode=null"], "rollout.ratio_mode: not declared"),
        (["rollout.window={start: 2, size: 4}"], "steps 2 to 5 do not fit"),
    ],
)
def test_a_recipe_that_contradicts_a_ratio_is_refused(name: str, settings, part: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([f"configs/algorithms/{name}.yaml", *settings])
    assert part in str(error.value)
