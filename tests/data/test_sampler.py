"""The order of prompts: no repeats, the same for the same seed, exact resume at any point."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter

import pytest

from qirl_fast.data.prompts import Prompt
from qirl_fast.data.sampler import PromptSampler

DRAWN = "5080a2160fb1c4588aea06c4033e52f85ac3ace97f8c0ad20cd0e7d1d6533107"


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


def test_the_order_over_epochs_is_frozen() -> None:
    """Digest of what was drawn before buckets and dropping came."""
    digest = hashlib.sha256()
    for n in range(1, 16):
        for per_step in range(1, n + 1):
            for seed in (0, 5):
                for batch in draw(PromptSampler(make_prompts(n), per_step, seed), 5 * n):
                    digest.update(" ".join(batch).encode())
    assert digest.hexdigest() == DRAWN


BUCKETS = [(512, 512)] * 7 + [(384, 640)] * 5 + [(640, 384)] * 4


def test_a_batch_is_of_one_bucket_and_an_epoch_of_every_row() -> None:
    prompts = make_prompts(16)
    bucket = {p.id: b for p, b in zip(prompts, BUCKETS, strict=True)}
    batches = draw(PromptSampler(prompts, 4, seed=2, buckets=BUCKETS), 100)
    assert all(len({bucket[row] for row in batch}) == 1 for batch in batches)
    assert all(len(set(batch)) == 4 for batch in batches)
    for size, rows in Counter(BUCKETS).items():
        flat = [row for batch in batches for row in batch if bucket[row] == size]
        for start in range(0, len(flat) - rows + 1, rows):
            assert len(set(flat[start : start + rows])) == rows, "each stretch is one epoch"
    counts = Counter(row for batch in batches for row in batch)
    # Rows of different buckets may be an epoch's rest apart.
    assert len(counts) == 16 and max(counts.values()) - min(counts.values()) <= 2
    order = [bucket[batch[0]] for batch in batches]
    assert len({tuple(order[i : i + 4]) for i in range(0, 96, 4)}) > 4, "buckets come mixed"


def test_one_bucket_is_no_bucket() -> None:
    plain = draw(PromptSampler(make_prompts(10), 4, seed=3), 20)
    assert draw(PromptSampler(make_prompts(10), 4, 3, buckets=["x"] * 10), 20) == plain


@pytest.mark.parametrize("buckets", [None, BUCKETS])
@pytest.mark.parametrize("done", range(7))
def test_peek_changes_nothing(done: int, buckets: list[object] | None) -> None:
    sampler = PromptSampler(make_prompts(16), 4, 1, buckets)
    draw(sampler, done)
    state = sampler.state_dict()
    seen = sampler.peek()
    assert sampler.peek() == seen and sampler.state_dict() == state and next(sampler) == seen


@pytest.mark.parametrize("buckets", [None, BUCKETS])
@pytest.mark.parametrize("done", range(9))
def test_dropped_rows_never_come_again_and_the_others_go_on(
    done: int, buckets: list[object] | None
) -> None:
    prompts = make_prompts(16)
    sampler = PromptSampler(prompts, 3, 1, buckets)
    before = [row for batch in draw(sampler, done) for row in batch]
    sampler.drop([p for p in sampler.peek() if p not in prompts[12:]][:1])
    sampler.drop([prompts[15], prompts[15]])
    state = json.loads(json.dumps(sampler.state_dict()))
    gone = {prompts[row].id for row in state["dropped"]}
    assert "p15" in gone and len(gone) in (1, 2)
    resumed = PromptSampler(prompts, 3, 1, buckets)
    resumed.load_state_dict(state)
    batches = draw(sampler, 60)
    assert draw(resumed, 60) == batches and resumed.state_dict() == sampler.state_dict()
    assert all(len(set(batch)) == 3 and not gone & set(batch) for batch in batches)
    counts = Counter(before) + Counter(row for batch in batches for row in batch)
    counts = Counter({row: count for row, count in counts.items() if row not in gone})
    # Every epoch draws each row once; rows of different buckets may be an epoch's rest apart.
    assert len(counts) == 16 - len(gone) and max(counts.values()) - min(counts.values()) <= 2


def test_dropping_leaves_the_order_of_the_others() -> None:
    whole = [row for batch in draw(PromptSampler(make_prompts(9), 1, 0), 9) for row in batch]
    sampler = PromptSampler(make_prompts(9), 1, 0)
    first = draw(sampler, 3)
    sampler.drop([Prompt(whole[5], f"p {whole[5][1:]}", None, {})])
    rest = [row for batch in [*first, *draw(sampler, 5)] for row in batch]
    assert rest == whole[:5] + whole[6:]


def test_what_cannot_be_dropped() -> None:
    prompts = make_prompts(16)
    sampler = PromptSampler(prompts, 4, 1, BUCKETS)
    state = sampler.state_dict()
    with pytest.raises(ValueError, match=r"3 usable prompts of bucket \(640, 384\)"):
        sampler.drop(prompts[15:])
    with pytest.raises(ValueError, match="not among the rows: 'q 0'"):
        sampler.drop(make_prompts(1, "q"))
    assert sampler.state_dict() == state
    with pytest.raises(ValueError, match="3 usable prompts, and"):
        PromptSampler(prompts, 4, 1).drop(prompts[3:])


def test_buckets_that_do_not_serve() -> None:
    prompts = make_prompts(16)
    with pytest.raises(ValueError, match=r"4 usable prompts of bucket \(640, 384\)"):
        PromptSampler(prompts, 5, 0, BUCKETS)
    with pytest.raises(ValueError, match="got 3 for 16 prompts"):
        PromptSampler(prompts, 4, 0, BUCKETS[:3])
    state = PromptSampler(prompts, 4, 0, BUCKETS).state_dict()
    for other in (None, BUCKETS[::-1]):
        with pytest.raises(ValueError, match="the buckets of the prompts have changed"):
            PromptSampler(prompts, 4, 0, other).load_state_dict(state)


def test_a_state_from_before_rows_could_be_dropped() -> None:
    prompts = make_prompts(7)
    sampler = PromptSampler(prompts, 3, 5)
    draw(sampler, 4)
    new = ("dropped", "rest", "buckets_sha256")
    state = {name: value for name, value in sampler.state_dict().items() if name not in new}
    resumed = PromptSampler(prompts, 3, 5)
    resumed.load_state_dict(state)
    assert draw(resumed, 9) == draw(sampler, 9)
