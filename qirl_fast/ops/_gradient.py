"""How a loss op hands on the gradient that its forward pass has already computed."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(gradient: Tensor, by: Tensor) -> Tensor:
    """gradient times the scalar `by`, in the dtype of gradient.

    `loss.backward()` brings a 1: on the CPU, outside of tracing, the value is looked at and the
    gradient returned as it is. A GPU is not asked, which would stop the host.
    """
    real = type(by) is Tensor and by.device.type == "cpu"
    if real and not torch.compiler.is_compiling() and by.item() == 1.0:
        return gradient
    return gradient * by
