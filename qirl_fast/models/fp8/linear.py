"""A linear layer whose frozen weight is multiplied in fp8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qirl_fast import ops
from qirl_fast.ops import Quantized

Pair = tuple[Tensor, Tensor]  # fp8 numbers and their scales


class Fp8Linear(nn.Linear):
    """An nn.Linear on which `convert` was called: the same parameters, names and hooks.

    The weight is quantised at the first forward and again when it is another one: changed in place,
    exchanged, moved, or put there anew, as FSDP2 does at every all-gather. What writes through
    `weight.data` cannot be seen: PEFT's merging of an adapter does, and `models.lora.linear` tells
    of it in `merged`. Inside torch.compile the weight is quantised at every call: a graph cannot
    ask whether it has changed.
    """

    granularity: str  # "row", "block" or "tensor", see ops.fp8_linear
    backward: str  # of the gradient to the input: "high", in the weight's dtype, or "fp8"
    in_fp8: bool  # False: the plain layer
    merged: tuple[str, ...]  # adapters added into the weight, of which its version knows nothing
    _assigned: int  # how often a weight was put in its place
    _made: tuple[tuple[Any, ...], Tensor, tuple[Pair, Pair | None]] | None

    @staticmethod
    def convert(layer: nn.Linear, granularity: str, backward: str) -> Fp8Linear:
        """The layer itself, with fp8 off until `in_fp8` is set."""
        layer.__class__ = Fp8Linear
        own: Any = layer
        own.granularity, own.backward, own.in_fp8 = granularity, backward, False
        own.merged, own._assigned, own._made = (), 0, None
        out: Fp8Linear = own
        return out

    def restore(self) -> nn.Linear:
        """The layer itself, as it was before `convert`."""
        for name in ("granularity", "backward", "in_fp8", "merged", "_assigned", "_made"):
            vars(self).pop(name)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            vars(self)["_assigned"] += 1

    def quantized(self) -> tuple[Pair, Pair | None]:
        """(W in fp8, W^T in fp8 where the backward wants it), of the weight as it is now."""
        if torch.compiler.is_compiling():
            return self._quantize()
        weight = self.weight
        storage = weight.untyped_storage()._cdata
        version = (storage, weight._version, weight.dtype, self._assigned, self.merged)
        made = self._made
        if made is None or made[0] != version:
            # Held on to, the storage's address is no other's while it is compared with.
            made = self._made = (version, weight.detach(), self._quantize())
        return made[2]

    def _quantize(self) -> tuple[Pair, Pair | None]:
        # Made in inference mode they could not be saved for a backward pass later.
        with torch.inference_mode(False), torch.no_grad():
            weight = self.weight.detach()
            back = None
            if self.backward == "fp8":
                back = ops.fp8_quantize(weight, granularity=self.granularity, transpose=True)
            return ops.fp8_quantize(weight, granularity=self.granularity), back

    def forward(self, input: Tensor | Quantized) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x; x may come quantised in our granularity."""
        if not self.in_fp8:
            x = input.y if isinstance(input, Quantized) else input
            return F.linear(x, self.weight, self.bias)
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "an fp8 layer's weight is frozen, and this one requires grad: train a LoRA on top "
                "(model.adapter=lora), or keep the layer out of fp8"
            )
        (q, scale), back = self.quantized()
        return ops.fp8_linear(
            *(input, q, scale, self.bias),
            granularity=self.granularity,
            weight=self.weight,
            weight_t=back,
            grad="fp8" if self.backward == "fp8" else "bf16",
        )
