"""A linear layer of a transformer, plain or under PEFT's LoRA, through `ops.lora_linear`."""

from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from qirl_fast import ops

Adapter = tuple[Tensor, Tensor, float]


def linear(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)`; where it is PEFT's LoRA on a linear layer, base and adapters in one op.

    x: [..., in]. Everything else a layer can be (quantised, sharded by hooks, DoRA, dropout in
    training, merged adapters, a bias on B) is called as it is: the same function, PEFT's passes.
    """
    adapters = _plain_adapters(layer)
    if adapters is None:
        out: Tensor = layer(x)
        return out
    base = layer.base_layer
    return ops.lora_linear(x, base.weight, base.bias, adapters)


def _plain_adapters(layer: Any) -> list[Adapter] | None:
    """(A, B, scale) of the active adapters; None for a layer that needs its own forward."""
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear:
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
