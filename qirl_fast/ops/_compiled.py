"""The two compiled modules, for launchers whose bindings differ in their last argument alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qirl_fast import _cpu
from qirl_fast.ops._cuda import cuda_module, device_of, stream_of


@dataclass(frozen=True)
class Compiled:
    """_cpu or _cuda; `last`: the argument a binding ends with, threads or the stream."""

    name: str
    module: Callable[[], Any]
    device: Callable[[Tensor], Any]  # the context of a launch
    last: Callable[[Tensor], int]


CPU = Compiled("cpu", lambda: _cpu, lambda x: nullcontext(), lambda x: torch.get_num_threads())
# Looked up at each call: tests put the emulator in their place.
CUDA = Compiled("cuda", lambda: cuda_module(), lambda x: device_of(x), lambda x: stream_of(x))
