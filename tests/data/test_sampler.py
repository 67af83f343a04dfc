"""The order of prompts: no repeats, the same for the same seed, exact resume at any point."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from qirl_fast.data.prompts import Prompt
from qirl_fast.data.sampler import PromptSampler


def make_prompts(n: int, word: str = "p") -> list[Prompt]:
    return [Prompt(f"{word}{i}", f"{word} {i}", None, {}) for i in range(n)]


def draw(sampler: PromptSampler, batches: int) -> list[list[str]]:
    return [[p.id for p in batch] for batch in itertools.islice(sampler, batches)]


@pytest.mark.parametrize(
    ("n", "per_step"), [(12, 4), (10, 4), (7, 5), (5, 5), (1, 1), (9, 1), (8, 7)]
)
def test_no_repeats_within_a_batch_or_an_epoch(n: int, per_step: int) -> None:
    batches = draw(PromptSampler(make_prompts(n), per_step, seed=3), 6 * n)
    assert all(len(set(batch)) == per_step == len(batch) for batch in batches)
    flat = [row for batch in batches for row in batch]
    for start in range(0, len(flat) - n + 1, n):
        assert len(set(flat[start : start + n])) == n, "each stretch of n draws is one epoch"
    counts = Counter(flat)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    prompts = make_prompts(32)
    first = draw(PromptSampler(prompts, 32, seed=0), 3)
    assert first == draw(PromptSampler(prompts, 32, seed=0), 3)
    orders = [tuple(batch) for batch in first + draw(PromptSampler(prompts, 32, seed=1), 3)]
    assert len(set(orders)) == 6
    assert tuple(p.id for p in prompts) not in orders


def test_the_order_is_the_documented_one() -> None:
    """Frozen: a change would alter every run that is resumed or repeated."""
    order = [p for batch in draw(PromptSampler(make_prompts(6), 2, seed=0), 3) for p in batch]
    assert order == ["p3", "p2", "p5", "p4", "p0", "p1"]


@pytest.mark.parametrize("done", range(9))
def test_resume_at_any_point(done: int) -> None:
    prompts = make_prompts(7)
    sampler = PromptSampler(prompts, 3, seed=5)
    draw(sampler, done)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = PromptSampler(prompts, 3, seed=5)
    resumed.load_state_dict(state)
    assert draw(resumed, 12) == draw(sampler, 12)
    assert resumed.state_dict() == sampler.state_dict()


def test_state_of_other_data_is_refused() -> None:
    state = PromptSampler(make_prompts(7), 3, seed=5).state_dict()
    for prompts, per_step, seed, part in (
        (make_prompts(7, "q"), 3, 5, "the training prompts have changed"),
        (make_prompts(7)[::-1], 3, 5, "the training prompts have changed"),
        (make_prompts(7), 2, 5, "data.prompts_per_step has changed .saved 3, now 2"),
        (make_prompts(7), 3, 6, "the seed has changed .saved 5, now 6"),
    ):
        with pytest.raises(ValueError, match=part):
            PromptSampler(prompts, per_step, seed).load_state_dict(state)


@pytest.mark.parametrize(("n", "per_step"), [(3, 4), (3, 0), (0, 1), (3, -1)])
def test_impossible_sizes(n: int, per_step: int) -> None:
    with pytest.raises(ValueError, match=rf"prompts_per_step: got {per_step}; with {n} prompts"):
        PromptSampler(make_prompts(n), per_step, seed=0)
    with pytest.raises(ValueError, match="seed: got -1"):
        PromptSampler(make_prompts(3), 1, seed=-1)
