"""Sums whose bits depend on what is added and on nothing else.

`TreeSum` adds leaves 0, 1, 2, ... in the order of a binary tree: node (l, j) is the sum of nodes
(l-1, 2j) and (l-1, 2j+1), a missing one adding nothing. Whoever holds whichever leaves, the sum of
all has the same bits.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Node = tuple[int, int]  # level from the leaves up, number within the level


class TreeSum:
    """The sum of lists of tensors, element by element; leaves are added in ascending order.

    Of n leaves at most 1 + log2(n) lists are held at a time. The first list of each pair is added
    to in place: leaves are given away.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[Node, Sequence[Tensor]]] = []  # complete so far, ascending

    def add(self, leaf: int, tensors: Sequence[Tensor]) -> None:
        """Take leaf number `leaf`."""
        self._push((0, leaf), tensors)

    def _push(self, node: Node, tensors: Sequence[Tensor]) -> None:
        level, number = node
        if number % 2 and self.nodes and self.nodes[-1][0] == (level, number - 1):
            left = self.nodes.pop()[1]
            torch._foreach_add_(left, tensors)
            self._push((level + 1, number // 2), left)
        else:
            self.nodes.append((node, tensors))

    def total(self) -> Sequence[Tensor] | None:
        """The sum of all leaves, None without any."""
        return merged(self.nodes)


def merged(nodes: Iterable[tuple[Node, Sequence[Tensor]]]) -> Sequence[Tensor] | None:
    """The root over nodes none of which is below another; their first lists are added to."""
    found = dict(nodes)
    while len(found) > 1:
        lowest = min(level for level, _ in found)
        for node in sorted(node for node in found if node[0] == lowest):
            tensors = found.pop(node, None)
            if tensors is None:  # taken as somebody's right
                continue
            right = found.pop((lowest, node[1] + 1), None) if node[1] % 2 == 0 else None
            if right is not None:
                torch._foreach_add_(tensors, right)
            found[lowest + 1, node[1] // 2] = tensors
    return next(iter(found.values()), None)
