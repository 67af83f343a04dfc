"""Sums over processes: the same bits however the leaves are spread."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from qirl_fast.distributed import TreeSum, merged


def leaves(count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [
        [torch.randn(7, generator=generator) * 10.0**k, torch.randn(2, 3, generator=generator)]
        for k in range(count)
    ]


def by_the_definition(found: dict[int, list[Tensor]], level: int, number: int) -> list[Tensor]:
    """Node (level, number), [] where nothing is below it."""
    if level == 0:
        return found.get(number, [])
    left = by_the_definition(found, level - 1, 2 * number)
    right = by_the_definition(found, level - 1, 2 * number + 1)
    return [a + b for a, b in zip(left, right, strict=True)] if left and right else left or right


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("count", range(1, 18))
def test_the_sum_is_that_of_the_tree_and_holds_few_lists(count):
    tree = TreeSum()
    for k, tensors in enumerate(leaves(count)):
        tree.add(k, tensors)
        assert len(tree.nodes) == (k + 1).bit_count()
    assert same(tree.total(), by_the_definition(dict(enumerate(leaves(count))), 5, 0))


@pytest.mark.parametrize("seed", range(50))
def test_whoever_holds_whichever_leaves_the_bits_are_the_same(seed):
    draw = random.Random(seed)
    count, holders = draw.randint(1, 20), draw.randint(1, 5)
    kept = {k: t for k, t in enumerate(leaves(count)) if draw.random() < 0.8}
    wanted = by_the_definition({k: [t.clone() for t in v] for k, v in kept.items()}, 5, 0)
    trees = [TreeSum() for _ in range(holders)]
    cuts = sorted(draw.randint(0, count) for _ in range(holders - 1))
    for k, tensors in kept.items():
        owner = draw.randrange(holders) if seed % 2 else sum(k >= cut for cut in cuts)
        trees[owner].add(k, tensors)
    nodes = [node for tree in trees for node in tree.nodes]
    draw.shuffle(nodes)
    assert same(merged(nodes) or [], wanted)


def test_nothing_is_no_sum():
    assert TreeSum().total() is None
