"""Entry to kernels/flow_step.py: the `triton` backend of flow_step and flow_logp.

Not the default on CUDA tensors: use_backend('triton') asks for it. Triton is imported on first use.
"""

from __future__ import annotations

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


def _kernels() -> Any:
    return import_module("qirl_fast.kernels.flow_step")


def flow_step_triton(*args: Any) -> Any:
    """Triton kernel; arguments of flow_step_reference."""
    return _kernels().flow_step(*args)


def flow_logp_triton(*args: Any) -> Any:
    """Triton kernel; arguments of flow_logp_reference."""
    return _kernels().flow_logp(*args)


def flow_logp_backward_triton(*args: Any) -> Any:
    """Triton kernel; arguments of flow_logp_backward_reference."""
    return _kernels().flow_logp_backward(*args)
