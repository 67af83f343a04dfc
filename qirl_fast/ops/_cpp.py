"""Entry to csrc/cpu/: the `cpu` backends. The bindings, csrc/bindings/cpu/, make their outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qirl_fast import _cpu


def cpu_launcher(kernel: str) -> Callable[..., Any]:
    """A function of qirl_fast._cpu that takes the backend's arguments and a number of threads."""
    run, threads = getattr(_cpu, kernel), torch.get_num_threads

    def launch(*args: Any) -> Any:
        return run(*args, threads())

    return launch
