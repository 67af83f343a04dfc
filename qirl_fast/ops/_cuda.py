"""What the launchers of csrc/cuda/ share: the compiled module, the stream, what is missing.

The kernels share csrc/math/ with the CPU kernels. They are not the default on CUDA tensors before
they have been run on a GPU: use_backend('cuda') asks for them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@cache
def missing_cuda() -> str | None:
    """What the cuda backend lacks here, or None."""
    try:
        import_module("qirl_fast._cuda")
    except ImportError as error:
        return f"built without nvcc; reinstall with nvcc on PATH and QIRL_CUDA=ON ({error})."
    return None if torch.cuda.is_available() else "torch.cuda.is_available() is False."


def cuda_module() -> Any:
    """qirl_fast._cuda, imported on first use."""
    return import_module("qirl_fast._cuda")


def stream_of(x: Tensor) -> int:
    """Handle of the current stream of x's device."""
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def device_of(x: Tensor) -> Any:
    """Context in which x's device is the current one, as a launch wants it."""
    return torch.cuda.device(x.device)
