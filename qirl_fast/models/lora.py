"""A linear layer of a transformer: plain, in fp8, or under PEFT's LoRA, through `qirl_fast.ops`."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from qirl_fast import ops
from qirl_fast.models.fp8.linear import Fp8Linear
from qirl_fast.ops import Quantized

Adapter = tuple[Tensor, Tensor, float]


def linear(layer: Any, x: Tensor | Quantized) -> Tensor:
    """`layer(x)`; where it is PEFT's LoRA on a linear layer, base and adapters in one op.

    x: [..., in], quantised or not (see `feed`). Everything else a layer can be (sharded by hooks,
    DoRA, dropout in training, merged adapters, a bias on B) is called as it is: the same function,
    PEFT's passes.
    """
    y = x.y if isinstance(x, Quantized) else x
    adapters = _plain_adapters(layer)
    if adapters is None:
        out: Tensor = layer(x if _in_fp8(layer) else y)
        return out
    base = layer.base_layer
    if _in_fp8(base):
        return _add_adapters(base(x), y, adapters)
    return ops.lora_linear(y, base.weight, base.bias, adapters)


def feed(op: Callable[..., Any], *layers: Any) -> Any:
    """`op()`, whose output goes into all these layers, quantised once where some are in fp8.

    op: takes quantize= and returns y or Quantized, or a tuple that begins with it. Returns what it
    returns.
    """
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    wanted = {base.granularity for base in bases if _in_fp8(base)}
    if len(wanted) != 1:
        return op()
    granularity = wanted.pop()
    if granularity != "tensor":
        return op(quantize=granularity)
    y = op()
    if isinstance(y, Tensor):
        return quantized(y, granularity)
    return quantized(y[0], granularity), *y[1:]


def quantized(y: Tensor, quantize: str | None = None) -> Tensor | Quantized:
    """y, with its fp8 numbers where they are asked for: an op for `feed` where y is there."""
    if quantize is None:
        return y
    return Quantized(y, *ops.fp8_quantize(y.detach(), granularity=quantize))


def _in_fp8(layer: Any) -> bool:
    return isinstance(layer, Fp8Linear) and layer.in_fp8 and not _hooked(layer)


def _add_adapters(y: Tensor, x: Tensor, adapters: list[Adapter]) -> Tensor:
    """y + sum_i s_i (x A_i^T) B_i^T, each added in one pass over y."""
    out = y.flatten(0, -2)
    for a, b, scale in adapters:
        t = F.linear(x, a.to(x.dtype)).flatten(0, -2)
        out = torch.addmm(out, t, b.to(x.dtype).t(), alpha=scale)
    return out.view(y.shape)


def _plain_adapters(layer: Any) -> list[Adapter] | None:
    """(A, B, scale) of the active adapters; None for a layer that needs its own forward."""
    if type(layer) is not LoraLinear or type(layer.base_layer) not in (nn.Linear, Fp8Linear):
        return None
    if layer.merged or layer.fan_in_fan_out or _hooked(layer) or _hooked(layer.base_layer):
        return None
    names = [] if layer.disable_adapters else layer.active_adapters
    names = [name for name in names if name in layer.lora_A]
    for name in names:
        dropout = layer.lora_dropout[name]
        if name in layer.lora_variant or layer.lora_bias[name]:
            return None
        if not isinstance(dropout, nn.Identity) and dropout.training and dropout.p > 0:
            return None
    return [
        (layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
        for name in names
    ]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
