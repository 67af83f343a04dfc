"""Entry to kernels/: the `triton` backends. Triton is imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


@cache
def missing_triton() -> str | None:
    """What the triton backend lacks here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install 'qirl-fast[triton]'."
    return None if torch.cuda.is_available() else "torch.cuda.is_available() is False."


def triton_launcher(module: str, function: str) -> Callable[..., Any]:
    """`function` of kernels/<module>.py, imported when it is called."""

    def launch(*args: Any) -> Any:
        return getattr(import_module(f"qirl_fast.kernels.{module}"), function)(*args)

    return launch
