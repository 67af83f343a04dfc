"""The processes of one run: who does which chunks, and what they tell each other.

Every process holds the whole state and computes the same update from it; only chunks of samples are
shared out. What comes back is put together in the order of the chunks, and gradients are added in
the order of a tree (`TreeSum`), so the bits do not depend on how many processes there are. They do
where processes share more: weights that are trained (models/sharding.py), or the tokens of a chunk
(models/sequence.py), whose gradient is then the sum of what each of a group has of it.

Processes are those that torchrun starts, of one program and one output folder. Nothing they send
each other is unpickled: tensors, and JSON.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

# The second name is that of torch before 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

T = TypeVar("T")
Tensors = list[Tensor] | tuple[Tensor, ...]
MARGIN = 1.05  # by which cheaper runs are worth that sums of their gradients are of more nodes
Node = tuple[int, int]  # level from the leaves up, number within the level


class TreeSum:
    """The sum of lists of tensors, element by element; leaves are added in ascending order.

    Node (l, j) of the tree is the sum of nodes (l-1, 2j) and (l-1, 2j+1), a missing one adding
    nothing; leaf k is node (0, k). Of n leaves at most 1 + log2(n) lists are held at a time. The
    first list of each pair is added to in place: leaves are given away.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[Node, Tensors]] = []  # complete so far, ascending

    def add(self, leaf: int, tensors: Tensors) -> None:
        """Take leaf number `leaf`."""
        self._push((0, leaf), tensors)

    def _push(self, node: Node, tensors: Tensors) -> None:
        level, number = node
        if number % 2 and self.nodes and self.nodes[-1][0] == (level, number - 1):
            left = self.nodes.pop()[1]
            torch._foreach_add_(left, tensors)
            self._push((level + 1, number // 2), left)
        else:
            self.nodes.append((node, tensors))

    def total(self) -> Tensors | None:
        """The sum of all leaves, None without any."""
        return merged(self.nodes)


def merged(nodes: Iterable[tuple[Node, Tensors]]) -> Tensors | None:
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


def cuts(costs: Sequence[int], size: int) -> list[int]:
    """size + 1 ascending bounds: of `size` runs of the items, none empty where there are enough.

    Runs of equal number, to one, unless the dearest of them costs over MARGIN more than it must:
    then runs whose dearest costs as little as it can.
    """
    n = len(costs)
    equal = [n * r // size for r in range(size + 1)]
    dearest = max((sum(costs[a:b]) for a, b in pairwise(equal)), default=0)
    low, high = max(costs, default=0), dearest
    while low < high:
        middle = (low + high) // 2
        fits = len(_filled(costs, size, middle)) <= size
        low, high = (low, middle) if fits else (middle + 1, high)
    if n <= size or dearest <= low * MARGIN:
        return equal
    return [*_filled(costs, size, low), n]


def _filled(costs: Sequence[int], size: int, limit: int) -> list[int]:
    """Where runs begin that are filled up to the limit, and of which `size` have something."""
    begins, filled = [0], 0
    for i, cost in enumerate(costs):
        needed = len(costs) - i <= size - len(begins)  # an item for each run that is to come
        if i > begins[-1] and (filled + cost > limit or needed):
            begins.append(i)
            filled = 0
        filled += cost
    return begins


class PeerFailed(RuntimeError):
    """Another process of the run failed where this one did not."""


def _exchange(collective: Callable[[Tensor, Tensor], Any], found: Tensor, sent: Tensor) -> None:
    try:
        collective(found, sent)
    except RuntimeError as error:  # the connection broke, or the time is up
        reason = str(error).strip().splitlines()[-1]
        raise PeerFailed(f"another process is gone or does not answer ({reason})") from error


class World:
    """The processes of a run, of which this one is number `rank` of `size`; by itself: 0 of 1.

    Where a method says "all", every process calls it at the same point, and none returns before the
    last has called. One that serves them and is none of them has a number from `size` on. Each
    `sequence` neighbours are a group that draws the same chunks.
    store: where all that were started leave each other words; None by itself.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, sequence: int = 1, store: dist.Store | None = None
    ):
        self.rank, self.size, self.sequence, self.store = rank, size, sequence, store
        self.group, self.place = divmod(rank, sequence)  # its group, and where it is in it

    def mesh(self, shard: int, device: str) -> DeviceMesh:
        """All: of the processes; each `shard` neighbours hold one copy of something. 0: all do."""
        shape = (self.size // shard, shard) if shard and shard < self.size else (self.size,)
        return init_device_mesh(device, shape, mesh_dim_names=("copy", "shard")[-len(shape) :])

    def neighbours(self, timeout_s: float) -> dist.ProcessGroup:
        """All: those of this process's group, in order."""
        found, _ = dist.new_subgroups(self.sequence, timeout=timedelta(seconds=timeout_s))
        assert found is not None
        return found

    def own(self, count: int, parts: int = 1, costs: Sequence[int] | None = None) -> list[int]:
        """This group's of range(count), ascending: a run of each of `parts` equal ranges.

        costs: of each of range(count), by which runs are cut, see `cuts`; None: all the same.
        """
        each = count // parts
        found: list[int] = []
        for start in range(0, each * parts, each or 1):
            share = costs[start : start + each] if costs else [1] * each
            bounds = cuts(share, self.size // self.sequence)
            found += range(start + bounds[self.group], start + bounds[self.group + 1])
        return found

    def shown(self, own: Sequence[T]) -> Sequence[T]:
        """Of the chunks of its group, a run: those that this process decodes and judges."""
        first, last = (len(own) * k // self.sequence for k in (self.place, self.place + 1))
        return own[first:last]

    def gather(self, value: Any) -> list[Any]:
        """All: the value of each process, by rank. value: plain JSON; NaN is let through."""
        if self.size == 1:
            return [value]
        sent = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self._gather(sent)]

    def concatenated(self, rows: np.ndarray) -> np.ndarray:
        """All: rows of each process, those of rank 0 first, of one shape but for their number."""
        if self.size == 1:
            return rows
        sent = torch.from_numpy(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        found = [part.numpy().view(rows.dtype) for part in self._gather(sent)]
        return np.concatenate(found).reshape(-1, *rows.shape[1:])

    def _gather(self, sent: Tensor) -> list[Tensor]:
        """Bytes of each process, of any number."""
        sizes = torch.empty(self.size, dtype=torch.int64)
        _exchange(_all_gather, sizes, torch.tensor([len(sent)]))
        most = max(1, int(sizes.max()))
        padded, found = sent.new_zeros(most), sent.new_empty(self.size * most)
        padded[: len(sent)] = sent
        _exchange(_all_gather, found, padded)
        return [part[:n] for part, n in zip(found.split(most), sizes.tolist(), strict=True)]

    @contextmanager
    def agreed(self, *kinds: type[Exception]) -> Iterator[None]:
        """All: raises in every process what any raised inside, by the lowest rank.

        A process that raised one itself raises that. kinds: those that stay what they are where
        somebody else raised them, made of their text alone; others become PeerFailed.
        """
        if self.size == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # re-raised below, when the others know
            own = error
        names = [] if own is None else [kind.__name__ for kind in type(own).__mro__]
        told = self.gather([names, str(own)])
        if own is not None:
            raise own
        for rank, (names, text) in enumerate(told):
            if names:
                kind = next((k for k in kinds if k.__name__ in names), None)
                raise kind(text) if kind else PeerFailed(f"process {rank}: {names[0]}: {text}")

    def total(self, tree: TreeSum, like: Sequence[Tensor]) -> list[Tensor]:
        """All: the sum of all processes' leaves, in the order of the tree; zeros without any. The
        parts of a leaf or node that several processes of a group have are added up first, by rank.

        like: tensors of the shapes, all of one dtype and device. Each process adds up one part of
        the elements: of W processes each sends (W - 1) / W of their bytes for each node of the one
        that has the most (one node, where runs of leaves are aligned powers of two) and once more.
        """
        if self.size == 1:
            return list(tree.total() or map(torch.zeros_like, like))
        keys = [[(level, k) for level, k in of] for of in self.gather([n for n, _ in tree.nodes])]
        most = max(map(len, keys))
        if not most:
            return list(map(torch.zeros_like, like))
        count = sum(t.numel() for t in like)
        share = -(-count // self.size)
        sent = like[0].new_zeros(self.size, most, share)
        for j, (_, tensors) in enumerate(tree.nodes):
            flat = like[0].new_zeros(self.size * share)
            torch.cat([t.reshape(-1) for t in tensors], out=flat[:count])
            sent[:, j] = flat.view(self.size, share)
        found = torch.empty_like(sent)
        _exchange(dist.all_to_all_single, found, sent)
        nodes: dict[Node, list[Tensor]] = {}
        for r, own in enumerate(keys):
            for j, key in enumerate(own):
                if key in nodes:  # a group's parts of it
                    nodes[key][0] += found[r, j]
                else:
                    nodes[key] = [found[r, j]]
        (part,) = merged(nodes.items()) or [sent]
        whole = like[0].new_empty(self.size * share)
        _exchange(_all_gather, whole, part.contiguous())
        pieces = whole[:count].split([t.numel() for t in like])
        return [p.view(t.shape).clone() for p, t in zip(pieces, like, strict=True)]


def started() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_threads(threads: int | None) -> int | None:
    """This process's of the CPU threads of all processes of a machine; None: PyTorch's own."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return threads and max(1, threads // here)


def leave() -> None:
    """Destroy the process groups, so that the interpreter may end.

    A group lives on where a DeviceMesh or sharded weights still look at it, and gloo's threads drop
    the tensors of its last work under the GIL. A thread that comes for it while the interpreter
    ends aborts the process ("terminate called without an active exception",
    github.com/pytorch/pytorch/pull/179291); here it gets it.
    """
    dist.destroy_process_group()
    time.sleep(0.1)


@contextmanager
def joined(timeout_s: float, cuda: bool, sequence: int = 1, apart: int = 0) -> Iterator[World]:
    """Inside, the processes that torchrun started know each other; without it there is one.

    timeout_s: after which a process that hears nothing of the others raises. cuda: whether they
    compute on GPUs, each on that of its local rank. sequence: see `World`. apart: how many, the
    last, are none of them.
    """
    if started() == 1:
        yield World()
        return
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps its store when it starts a run again: under the same names processes would
    # find, and wait for, the addresses of those that are gone.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend, size = "cpu:gloo,cuda:nccl" if cuda else "gloo", size - apart
    if rank >= size:
        yield World(rank, size, store=store)
        return
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, sequence, store)
    finally:
        leave()
