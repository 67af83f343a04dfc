"""Who does which chunks: runs whose dearest is as cheap as it can be; no bit depends on it."""

from __future__ import annotations

import json
import random
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from worlds import content, ended

from qirl_fast.conditioning import tokens_of
from qirl_fast.distributed import MARGIN, World, cuts
from qirl_fast.models.prefix import Conditioned
from qirl_fast.shares import row_cost


def dearest(costs: list[int], bounds: Any) -> int:
    return max(sum(costs[a:b]) for a, b in pairwise(bounds))


@pytest.mark.parametrize("seed", range(200))
def test_the_dearest_run_is_as_cheap_as_of_any_cut(seed) -> None:
    draw = random.Random(seed)
    n, size = draw.randint(1, 9), draw.randint(1, 5)
    costs = [draw.choice([1, 2, 3, 50, 10**12]) * draw.randint(1, 9) for _ in range(n)]
    found = cuts(costs, size)
    equal = [n * r // size for r in range(size + 1)]
    assert found[0] == 0 and found[-1] == n and len(found) == size + 1
    if n <= size:
        assert found == equal
        return
    assert all(a < b for a, b in pairwise(found))
    best = min(dearest(costs, (0, *at, n)) for at in combinations(range(1, n), size - 1))
    assert found == equal or dearest(costs, found) == best
    assert dearest(costs, found) <= best * MARGIN
    assert found != equal or dearest(costs, equal) <= best * MARGIN


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("parts", [1, 3])
def test_equal_costs_are_shared_by_number(size, parts) -> None:
    for rank in range(size):
        world = World(rank, size)
        assert world.own(parts * 11, parts, [7] * parts * 11) == world.own(parts * 11, parts)


def test_each_minibatch_is_cut_by_its_own_costs() -> None:
    costs = [9, 1, 1, 1, 1, 1, 1, 9]
    assert World(0, 2).own(8, 2, costs) == [0, 4, 5, 6]
    assert World(1, 2).own(8, 2, costs) == [1, 2, 3, 7]


def test_a_cost_is_that_of_the_operations() -> None:
    """Those of one block, counted as matrix products, of width D, N drawn and L given tokens."""
    n, given, d = 40, 25, 16
    for beside in (True, False):
        own = n + given if beside else n
        matrices = 2 * own * 12 * d * d
        attention = 2 * 2 * own * (n + given) * d
        assert row_cost(n, given, d, beside) * 4 * d == matrices + attention


def test_the_most_loaded_of_two_has_less_to_do_than_by_number() -> None:
    """Rows of 1024 px of Qwen-Image-Edit-Plus, by prompts with three images or one."""
    drawn = 64 * 64
    row = {k: row_cost(drawn, k * drawn, 3072, beside=True) for k in (1, 3)}
    costs = [8 * row[images] for images in (3, 3, 3, 1, 1, 1, 1, 1)]
    found = cuts(costs, 2)
    assert found == [0, 2, 8]
    assert dearest(costs, found) < 0.9 * dearest(costs, [0, 4, 8])


@pytest.mark.parametrize(("size", "number", "cost"), [(8, 1.26, 1.12), (64, 1.41, 1.13)])
def test_what_the_page_on_many_processes_says(size, number, cost) -> None:
    draw, drawn, worst = random.Random(0), 64 * 64, {"number": 0.0, "cost": 0.0}
    for _ in range(200):
        images = [draw.randint(1, 3) for _ in range(4 * size)]
        costs = [row_cost(drawn, k * drawn + 100, 3072, beside=True) for k in images]
        mean = sum(costs) / size
        worst["number"] += dearest(costs, range(0, 4 * size + 1, 4)) / mean / 200
        worst["cost"] += dearest(costs, cuts(costs, size)) / mean / 200
    assert worst == {
        "number": pytest.approx(number, abs=0.02),
        "cost": pytest.approx(cost, abs=0.02),
    }


def test_tokens_are_those_of_text_and_images() -> None:
    assert tokens_of(torch.zeros(7, 4)) == 7
    slots = torch.tensor([False, True, True, False, False])
    prompt = Conditioned(torch.zeros(5, 4), slots, torch.zeros(8, 6), ((2, 4),))
    assert tokens_of(prompt) == 3 + 8
    beside = Conditioned(torch.zeros(5, 4), slots & False, torch.zeros(8, 6), ((2, 4),))
    assert tokens_of(beside) == 5 + 8


def test_the_bits_do_not_depend_on_unequal_shares(processes, finished, tmp_path) -> None:
    """Costs grow with the twentieth power of a prompt's length: shares are far from equal."""
    own = ["rollout={max_rows: 1, group_size: 2}", "data.prompts_per_step=4"]
    own += ["train.updates_per_rollout=2", "evaluation={prompts: 7, samples_per_prompt: 2}"]
    hook = f"""
import json
from pathlib import Path
from qirl_fast import heldout_samples, rollouts, shares
shares.row_cost = lambda drawn, given, width, beside: given**20
def told(*arguments):
    found = shares.own_chunks(*arguments)
    with open(Path({str(tmp_path)!r}, "own-" + os.environ["RANK"]), "a") as file:
        file.write(json.dumps(found) + "\\n")
    return found
rollouts.own_chunks = heldout_samples.own_chunks = told
"""
    runs = processes(2, [*own, f"output={tmp_path}", "run=r"], hook=hook)
    assert ended(runs) == [0, 0], runs[0].output()
    lines = [(tmp_path / f"own-{rank}").read_text().splitlines() for rank in (0, 1)]
    shares = [[json.loads(line) for line in of_one] for of_one in lines]
    unequal = 0
    for first, second in zip(*shares, strict=True):
        assert sorted(first + second) == list(range(len(first) + len(second)))
        for part in ((0, 1, 2, 3), (4, 5, 6, 7)) if len(first + second) == 8 else ():
            a, b = (sum(k in part for k in each) for each in (first, second))
            assert a > 0 and b > 0
            unequal += a != b
    assert unequal >= 2
    assert content(tmp_path / "r", 2) == content(finished("unequal", *own), 2)
