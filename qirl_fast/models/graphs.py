"""CUDA graphs of the forward: the launches of one denoising step, recorded once and replayed.

A graph reads and writes fixed memory. So its inputs are copied into tensors of its own, the latents
and modulation at every step and a chunk's prefix once, and it is good for one set of shapes, for
weights that lie where they lay, for adapters switched as they were and for the backends then
chosen; all of that is checked at every call, and another graph is recorded where it differs.
In-place updates of the weights need no new graph.
"""

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils import _pytree

from qirl_fast.models.fp8.linear import Fp8Linear
from qirl_fast.ops.dispatch import forced_backend

logger = logging.getLogger(__name__)

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


@cache
def _pool() -> Any:
    """One memory pool for all graphs: they run in turn, and outputs are copied out at once."""
    return torch.cuda.graph_pool_handle()


def capture_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(replay, output) of a CUDA graph of `run`, after two runs aside that set libraries up.

    Other threads, such as a judge's, may use the device meanwhile.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
        out = run()
    return graph.replay, out


def layout_of(x: Tensor, rows: Sequence[Tensor], prefix: Any) -> tuple[Hashable, ...]:
    """Shapes, strides, dtypes and everything that is no tensor in what a forward is given."""
    leaves, spec = _pytree.tree_flatten((x, tuple(rows), prefix))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
    return tuple((t.shape, t.stride(), t.dtype) for t in tensors), spec, others


def switches_of(module: nn.Module) -> tuple[Hashable, ...]:
    """What is chosen beside the weights: adapters and their scales, attention, ops' backend."""
    modules = list(module.modules())
    layers = (m for m in modules if isinstance(m, BaseTunerLayer))
    processors = (getattr(m, "processor", None) for m in modules)
    return (
        tuple(
            (tuple(m.active_adapters), m.disable_adapters, m.merged, tuple(m.scaling.items()))
            for m in layers
        ),
        tuple(getattr(p, "_attention_backend", None) for p in processors if p is not None),
        forced_backend(),
    )


class ForwardGraphs:
    """`forward(x, rows, prefix)` without gradient, replayed from graphs: the bits of `forward`."""

    exact: ClassVar[bool] = True
    KEPT = 8  # sets of shapes; the one longest unused goes first

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Tensor, Sequence[Tensor], Any], Tensor],
        capture: Capture = capture_cuda,
    ):
        """Args: module: whose weights and adapters `forward` reads; capture: see capture_cuda."""
        self._module, self._forward, self._capture = module, forward, capture
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()

    def __call__(self, x: Tensor, rows: Sequence[Tensor], prefix: Any) -> Tensor:
        """The output, the caller's own to keep."""
        leaves, spec = _pytree.tree_flatten((tuple(rows), prefix))
        tensors = [x, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        layout = layout_of(x, rows, prefix)
        key = (layout, switches_of(self._module), self._weights(), self._fp8())
        graph = self._graphs.get(key)
        if graph is None:
            # Inputs made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                graph = self._record(tensors, leaves, spec)
            self._graphs[key] = graph
            while len(self._graphs) > self.KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph.load(tensors)
        graph.replay()
        return graph.out.clone()

    def forget(self) -> None:
        """Free the graphs and their memory; they are recorded again where they are wanted."""
        self._graphs.clear()

    def _record(self, tensors: list[Tensor], leaves: list[Any], spec: Any) -> "_Graph":
        start = time.perf_counter()
        graph = _Graph(tensors)
        inputs = iter(graph.own[1:])
        inside = [next(inputs) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        rows, prefix = _pytree.tree_unflatten(inside, spec)
        run = partial(self._forward, graph.own[0], rows, prefix)
        graph.replay, graph.out = self._capture(run)
        logger.info(
            "recorded a graph of the forward of %d rows of %d tokens in %.1f s",
            *(*tensors[0].shape[:2], time.perf_counter() - start),
        )
        return graph

    def _weights(self) -> tuple[int, ...]:
        return tuple(p.data_ptr() for p in self._module.parameters())

    def _fp8(self) -> tuple[Hashable, ...]:
        """Layers in fp8; of our own, where its numbers lie for the weight as it is now."""
        layers = [m for m in self._module.modules() if getattr(m, "in_fp8", False)]
        return tuple(
            tuple(t.data_ptr() for t in m.quantized()[0]) if isinstance(m, Fp8Linear) else id(m)
            for m in layers
        )


class _Graph:
    """A recorded forward: its input tensors, what was last copied into them, its output."""

    replay: Callable[[], None]
    out: Tensor

    def __init__(self, tensors: list[Tensor]):
        """Memory laid out like `tensors` and holding them: recording runs on true indices."""
        self.own = [_fixed(t) for t in tensors]
        self._loaded: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(tensors)
        self.load(tensors)

    def load(self, tensors: list[Tensor]) -> None:
        """Copy what has changed since the last call."""
        to, new = [], []
        for i, t in enumerate(tensors):
            last, version = self._loaded[i], 0 if t.is_inference() else t._version
            if last is not None and last[0]() is t and last[1] == version and not t.is_inference():
                continue
            self._loaded[i] = (weakref.ref(t), version)
            to.append(_base(self.own[i]))
            new.append(_base(t))
        if to:
            torch._foreach_copy_(to, new)


def _base(t: Tensor) -> Tensor:
    """The part of t that lies in memory: one row of what is spread over rows."""
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if size > 1 and stride == 0:
            t = t.narrow(dim, 0, 1)
    return t


def _fixed(t: Tensor) -> Tensor:
    """Memory of its own, laid out as t."""
    base = _base(t)
    own = torch.empty_strided(base.shape, base.stride(), dtype=t.dtype, device=t.device)
    return own.expand(t.shape)


def hold(*kinds: type[Any]) -> None:
    """Let graphs look into dataclasses of these kinds."""
    for kind in kinds:
        _pytree.register_dataclass(kind)
