"""The one place a backend is chosen.

An op has a table of backends, one per name in BACKENDS that it implements, and a default for each
device type. ``QIRL_BACKEND`` (read at import) or ``use_backend(...)`` forces one for every op. A
forced backend that an op lacks, that is not installed, or that cannot serve the tensors raises
BackendError; nothing falls back. The first choice of each op is logged (logger "qirl_fast.ops").

The forced name travels through the registered op as an argument, so torch.compile guards on it and
a backward pass uses the backend of its forward pass, whatever thread or context it runs in.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad, profiler
from torch.compiler import is_dynamo_compiling

from qirl_fast import _cpu

# Named once: looking one up in torch costs as much as calling it.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state

BACKENDS = ("reference", "cpu", "triton", "cuda")
logger = logging.getLogger("qirl_fast.ops")


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve this call."""


def _nothing_missing() -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    run: called with the op's tensors and options, all checked by the public function.
    devices: torch device types it serves.
    dtypes: dtypes of the large tensors it serves.
    missing: returns what is not installed, as a sentence for the error message, or None.
    """

    run: Callable[..., Any]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[], str | None] = _nothing_missing


@dataclass
class Op:
    """Name, backends and the default backend for each device type."""

    name: str
    backends: Mapping[str, Backend]
    default: Mapping[str, str]
    _logged: set[str] = field(default_factory=set)

    def choose(self, forced: str, device: torch.device, *dtypes: torch.dtype) -> str:
        """The backend for tensors of these dtypes on ``device``; ``forced`` is one or ''."""
        name = forced or self.default.get(device.type, "")
        who = f"{self.name}: backend '{name}'" + (" (forced)" if forced else "")
        if not name:
            raise BackendError(
                f"{self.name}: no backend for device type '{device.type}'; it serves "
                f"{', '.join(self.default)}. Move the tensors there."
            )
        if name not in self.backends:
            raise BackendError(
                f"{who} does not exist for this op; it has {', '.join(self.backends)}."
            )
        backend = self.backends[name]
        reason = backend.missing()
        if reason is not None:
            raise BackendError(f"{who} is not available: {reason}")
        if device.type not in backend.devices:
            raise BackendError(
                f"{who} serves tensors on {', '.join(backend.devices)}; these are on '{device}'."
            )
        for dtype in dtypes:
            if dtype not in backend.dtypes:
                wanted = ", ".join(str(d) for d in backend.dtypes)
                raise ValueError(
                    f"{who} takes {wanted}; got {dtype}. Cast, or use_backend('reference')."
                )
        if name not in self._logged:
            self._logged.add(name)
            logger.info("%s on %s: backend %s", self.name, device.type, name)
        return name

    def register(
        self, schema: str, fake: Callable[..., Any], large: tuple[int, ...] = (0,)
    ) -> Callable[..., Any]:
        """Define the torch op `qirl::<name>` and return what calls it.

        schema: arguments and results, e.g. "(Tensor x, float eps) -> Tensor". Callers pass the
            forced backend ('' for none) as one more, last argument.
        fake: takes the same arguments without the backend and returns outputs by `new_empty`.
        large: positions of the tensors whose device and dtypes choose the backend; an absent one
            (None) is left out.

        Where PyTorch's dispatcher would do no more than call the backend that served such tensors
        before, the call goes there at once: on small tensors it takes about half as long.
        """
        qualified = f"qirl::{self.name}"
        arguments, result = schema.split("->")
        torch.library.define(qualified, f"{arguments.rstrip()[:-1]}, str backend) ->{result}")
        served: dict[tuple[str, int | None], str] = {}  # the backend for what was forced, and kinds

        def run(*args: Any) -> Any:
            *rest, forced = args
            kinds = _cpu.kinds(args, large)
            name = served.get((forced, kinds))
            if name is None:
                given = [rest[i] for i in large if rest[i] is not None]
                name = self.choose(forced, given[0].device, *(t.dtype for t in given))
                if kinds is not None:
                    served[forced, kinds] = name
            return self.backends[name].run(*rest)

        torch.library.impl(qualified, ("cpu", "cuda"), run)
        torch.library.register_fake(qualified, lambda *args: fake(*args[:-1]))
        overload = getattr(torch.ops.qirl, self.name).default

        def call(*args: Any) -> Any:
            if forward_ad._current_level >= 0:
                _refuse_tangents(self.name, args)
            if is_dynamo_compiling():
                return overload(*args)
            if not watched():
                name = served.get((args[-1], _cpu.kinds(args, large)))
                if name is not None:
                    return self.backends[name].run(*args[:-1])
            return overload(*args)

        return call


def watched() -> bool:
    """Whether a mode, a transform, a trace or the profiler has to see the ops that are called."""
    return (
        _dispatch_modes() > 0
        or _function_modes() > 0
        or _transform() is not None
        or _trace() is not None
        or profiler._is_profiler_enabled  # in any thread
    )


def _refuse_tangents(op: str, args: tuple[Any, ...]) -> None:
    """Forward-mode AD would go on with a tangent of zero."""
    for t in (t for a in args for t in (a if isinstance(a, list | tuple) else (a,))):
        if isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative (jvp). Use backward(), or write it in "
                "PyTorch's own operations."
            )


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend '{name}'; choose from {', '.join(BACKENDS)}.")
    return name


_forced: str = ""
if os.environ.get("QIRL_BACKEND"):
    _forced = _checked(os.environ["QIRL_BACKEND"], "QIRL_BACKEND")


def forced_backend() -> str:
    """Name of the forced backend, '' when each op takes its default."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside the block (process-wide, not per thread).

    name: 'reference', 'cpu', 'triton' or 'cuda'; anything else is a ValueError.
    """
    global _forced
    before, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = before
