"""A linear layer whose frozen weight is multiplied in fp8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from qirl_fast import ops
from qirl_fast.ops import Quantized

Pair = tuple[Tensor, Tensor]  # fp8 numbers and their scales


class Fp8Linear(nn.Linear):
    """An nn.Linear on which `convert` was called: the same parameters, names and hooks.

    The weight is quantised once and kept until it becomes another one: changed in place, exchanged,
    moved, or put there anew, as FSDP2 does at every all-gather. What writes through `weight.data`,
    as PEFT's merging of an adapter does, leaves no version behind: the sum of its bits, taken when
    a region of `Fp8.on` begins (a pass of reading, no host read but one for all layers), shows it
    at the next region. The numbers stay where they lie, so a recorded CUDA graph reads the present
    ones. Inside torch.compile the weight is quantised at every call: a graph cannot ask whether it
    has changed.
    """

    granularity: str  # "row", "block" or "tensor", see ops.fp8_linear
    backward: str  # of the gradient to the input: "high", in the weight's dtype, or "fp8"
    in_fp8: bool  # False: the plain layer
    stale: bool  # the weight is quantised at the next call, whatever is known of it
    _assigned: int  # how often a weight was put in its place
    _made: tuple[tuple[Any, ...], Tensor, tuple[Pair, Pair | None]] | None
    _bits: Tensor | None  # what `bits` was when they were made

    @staticmethod
    def convert(layer: nn.Linear, granularity: str, backward: str) -> Fp8Linear:
        """The layer itself, with fp8 off until `in_fp8` is set."""
        layer.__class__ = Fp8Linear
        own: Any = layer
        own.granularity, own.backward, own.in_fp8 = granularity, backward, False
        own.stale, own._assigned, own._made, own._bits = True, 0, None, None
        out: Fp8Linear = own
        return out

    def restore(self) -> nn.Linear:
        """The layer itself, as it was before `convert`."""
        for name in ("granularity", "backward", "in_fp8", "stale", "_assigned", "_made", "_bits"):
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
        count = -1 if weight.is_inference() else weight._version
        version = (weight.untyped_storage()._cdata, count, weight.dtype, self._assigned)
        made = self._made
        if self.stale or made is None or made[0] != version:
            numbers = self._quantize() if made is None else _moved_into(made[2], self._quantize())
            # Held on to, the storage's address is no other's while it is compared with.
            made = self._made = (version, weight.detach(), numbers)
            self.stale, self._bits = False, self.bits()
        return made[2]

    def bits(self) -> Tensor:
        """int64 []: the sum of the weight's bits, eight bytes a number, modulo 2^64."""
        with torch.inference_mode(False), torch.no_grad():
            weight = self.weight.detach()
            own = weight.to_local() if isinstance(weight, DTensor) else weight
            return own.contiguous().view(torch.int64).sum()

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


def forget_changed(layers: Sequence[Fp8Linear]) -> None:
    """What the layers hold of weights whose bits are others now is made anew at the next call."""
    known = [layer for layer in layers if layer._bits is not None and not layer.stale]
    if known:
        now = torch.stack([layer.bits() for layer in known])
        then = torch.stack([cast(Tensor, layer._bits).to(now.device) for layer in known])
        for layer, changed in zip(known, (now != then).tolist(), strict=True):
            layer.stale = changed


def _moved_into(old: tuple[Pair, Pair | None], new: tuple[Pair, Pair | None]) -> Any:
    """The new numbers, in the old ones' memory where they fit there."""
    tensors = [[t for pair in pairs if pair is not None for t in pair] for pairs in (old, new)]
    like = [[(t.shape, t.dtype, t.device) for t in ts] for ts in tensors]
    if like[0] != like[1]:
        return new
    for to, t in zip(*tensors, strict=True):
        to.copy_(t)
    return old
