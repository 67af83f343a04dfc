"""torch.compile of the blocks, in forwards without gradient: the alternative to CUDA graphs.

A block is compiled by itself and serves all of its kind, so sixty cost what one costs. Shapes are
static: each set of them (a resolution, one guidance branch or both, other lengths of text) gets
code of its own. Inductor fuses what lies between our ops, and so may round otherwise: `exact` is
False, and a step whose log-prob is kept does not run here.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from qirl_fast.models.graphs import layout_of, switches_of

logger = logging.getLogger(__name__)

_run: ContextVar[Callable[..., Any] | None] = ContextVar("run", default=None)


def maybe_compiled(block: nn.Module) -> Callable[..., Any]:
    """`block`; in a forward of CompiledForward its compiled code."""
    run = _run.get()
    return block if run is None else partial(run, block)


class CompiledForward:
    """`forward(x, rows, prefix)` without gradient, whose blocks are compiled."""

    exact: ClassVar[bool] = False
    KEPT = 8  # sets of shapes and settings; the one longest unused goes first

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Tensor, Sequence[Tensor], Any], Tensor],
        backend: str = "inductor",
    ):
        """Args: module: whose weights and adapters `forward` reads; backend: of torch.compile.

        ValueError where that cannot compile anything here.
        """
        self._module, self._forward, self._backend = module, forward, backend
        self._kept: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self._making = threading.Lock()
        self.compiled = 0  # sets of shapes and settings so far
        try:
            one = torch.ones(8, device=next(module.parameters()).device)
            self._new(_probe)(one)
        except (TorchDynamoException, RuntimeError) as error:
            raise ValueError(
                f"torch.compile does not work here ({_first_line(error)}): on a CPU it wants a C++ "
                "compiler, on a GPU Triton; install it, or set rollout.denoise=eager"
            ) from error

    def __call__(self, x: Tensor, rows: Sequence[Tensor], prefix: Any) -> Tensor:
        """The output, to rounding what `forward` gives.

        ValueError where the blocks cannot be compiled, or a module has hooks: code that was traced
        without them would leave them out.
        """
        modules = list(self._module.modules())
        if any(m._forward_pre_hooks or m._forward_hooks for m in modules):
            raise ValueError(
                "torch.compile would leave out the hooks that modules of this transformer have (of "
                "FSDP, offloading, ...); set rollout.denoise=eager"
            )
        fp8 = tuple(getattr(m, "in_fp8", False) for m in modules)
        key = (layout_of(x, rows, prefix), switches_of(self._module), fp8)
        with self._making:  # one thread compiles, the others find its code
            run = self._kept.get(key)
            if run is None:
                return self._first(key, x, rows, prefix)
            self._kept.move_to_end(key)
        return self._through(run, x, rows, prefix)

    def _first(self, key: Hashable, x: Tensor, rows: Sequence[Tensor], prefix: Any) -> Tensor:
        start, run = time.perf_counter(), self._new(_call)
        try:
            out = self._through(run, x, rows, prefix)
        except TorchDynamoException as error:
            raise ValueError(
                f"torch.compile cannot compile the blocks of this {type(self._module).__name__} "
                f"({_first_line(error)}); set rollout.denoise=eager"
            ) from error
        self._kept[key] = run
        while len(self._kept) > self.KEPT:
            self._kept.popitem(last=False)
        self.compiled += 1
        logger.info(
            "compiled the blocks for %d rows of %d tokens in %.1f s",
            *(*x.shape[:2], time.perf_counter() - start),
        )
        return out

    def _through(
        self, run: Callable[..., Any], x: Tensor, rows: Sequence[Tensor], prefix: Any
    ) -> Tensor:
        token = _run.set(run)
        try:
            return self._forward(x, rows, prefix)
        finally:
            _run.reset(token)

    def _new(self, function: Any) -> Callable[..., Any]:
        """The function compiled, with a code object of its own: on that Dynamo keeps compiled code
        and counts it against its limit, and with that it goes.
        """
        own = FunctionType(function.__code__.replace(), function.__globals__)
        compiled: Callable[..., Any] = torch.compile(
            own, backend=self._backend, fullgraph=True, dynamic=False
        )
        return compiled


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1


def _first_line(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)  # what a backend raised
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), repr(cause))
