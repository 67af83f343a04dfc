"""What processes tell each other, and sums with the same bits however the leaves are spread."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import Tensor
from worlds import talk

from qirl_fast.distributed import TreeSum, World, merged


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


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("each", [1, 4, 5, 12])
def test_shares_are_runs_of_each_part_that_differ_by_one_at_most(size, parts, each):
    shares = [World(rank, size).own(parts * each, parts) for rank in range(size)]
    assert sorted(k for share in shares for k in share) == list(range(parts * each))
    for part in range(parts):
        of_part = [[k for k in share if k // each == part] for share in shares]
        assert [k for share in of_part for k in share] == list(
            range(part * each, (part + 1) * each)
        )
        assert max(map(len, of_part)) - min(map(len, of_part)) <= 1


@pytest.mark.parametrize(("groups", "sequence"), [(1, 2), (3, 2), (2, 4)])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_group_has_the_same_chunks_and_each_is_shown_once(groups, sequence, parts):
    size = groups * sequence
    worlds = [World(rank, size, sequence) for rank in range(size)]
    for world in worlds:
        assert world.own(7 * parts, parts) == World(world.rank // sequence, groups).own(
            7 * parts, parts
        )
    shown = [k for world in worlds for k in world.shown(world.own(7 * parts, parts))]
    assert sorted(shown) == list(range(7 * parts))
    assert parts > 1 or shown == sorted(shown), "in the order of processes"


TALK = """
import json, sys
import numpy as np, torch
from qirl_fast.distributed import PeerFailed, TreeSum, joined

with joined(60, cuda=False) as world:
    found = {"rank": world.rank, "size": world.size}
    found["gathered"] = world.gather({"own": world.rank, "number": 0.1 * world.rank, "no": None})
    rows = np.full((world.rank, 2, 3), world.rank, np.uint8)
    found["rows"] = world.concatenated(rows).tolist()
    found["scores"] = world.concatenated(np.full(1, world.rank / 3, np.float32)).tolist()

    leaves = int(sys.argv[1])
    generator = torch.Generator().manual_seed(leaves)
    drawn = [
        [torch.randn(5, generator=generator) * 10.0**k, torch.randn(2, 3, generator=generator)]
        for k in range(leaves)
    ]
    like, tree = drawn[0] if drawn else [torch.ones(5), torch.ones(2, 3)], TreeSum()
    for k in world.own(leaves):
        tree.add(k, [t.clone() for t in drawn[k]])
    found["total"] = [t.tolist() for t in world.total(tree, like)]

    found["raised"] = []
    for failing, kinds in ((0, (OSError,)), (world.size - 1, ()), (None, ())):
        try:
            with world.agreed(*kinds):
                if world.rank == failing:
                    raise FileNotFoundError(f"nothing at {world.rank}")
        except Exception as error:
            found["raised"].append([type(error).__name__, str(error)])
    print(json.dumps(found))
"""


@pytest.mark.parametrize(("size", "leaves"), [(2, 5), (3, 4), (2, 0)])
def test_processes_hear_the_same_as_one_would_know(size, leaves):
    (alone,), several = (
        [json.loads(out) for out in talk(count, TALK, leaves)] for count in (1, size)
    )
    for rank, found in enumerate(several):
        assert (found["rank"], found["size"]) == (rank, size)
        assert found["gathered"] == [{"own": r, "number": 0.1 * r, "no": None} for r in range(size)]
        assert found["rows"] == [[[r] * 3] * 2 for r in range(size) for _ in range(r)]
        assert torch.equal(torch.tensor(found["scores"]), torch.arange(size) / 3)
        assert found["total"] == alone["total"]
        own = ["FileNotFoundError", f"nothing at {rank}"]
        first = own if rank == 0 else ["OSError", "nothing at 0"]
        said = f"process {size - 1}: FileNotFoundError: nothing at {size - 1}"
        assert found["raised"] == [first, own if rank == size - 1 else ["PeerFailed", said]]
    assert alone["raised"] == [["FileNotFoundError", "nothing at 0"]] * 2
