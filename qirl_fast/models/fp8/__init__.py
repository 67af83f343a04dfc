"""FP8 in a transformer: which layers (plan.py), our own layer (linear.py), NVIDIA's (te.py).

    fp8 = use_fp8(transformer, plan, recipe="row")
    with fp8.on():  # rollout, replay, ...
        ...

Outside `on` the layers are what they were. Parameters, their names and state dicts never change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qirl_fast.models.fp8.linear import Fp8Linear, forget_changed
from qirl_fast.models.fp8.plan import Layer, describe, plan_layers

__all__ = ["Fp8", "Fp8Linear", "Layer", "describe", "plan_layers", "use_fp8"]

BACKWARD = ("high", "fp8")
TE_RECIPES = {"tensor": "current", "block": "block", "delayed": "delayed"}


class Fp8:
    """The fp8 layers of one transformer, and the switch."""

    def __init__(self, transformer: nn.Module, layers: Sequence[Any], library: str):
        self._transformer, self._layers, self._library = transformer, layers, library

    def weights(self) -> list[Tensor]:
        """All that the layers hold in fp8, scales among it."""
        pairs = [pair for layer in self._layers for pair in layer.quantized()]
        return [t for pair in pairs if pair is not None for t in pair]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the planned layers compute in fp8, with and without gradient, in every thread."""
        if self._library == "te":
            import qirl_fast.models.fp8.te as te

            with te.autocast(self._transformer, True):
                yield
            return
        before = [layer.in_fp8 for layer in self._layers]
        forget_changed([layer for layer in self._layers if not layer.in_fp8])
        for layer in self._layers:
            layer.in_fp8 = True
        try:
            yield
        finally:
            for layer, was in zip(self._layers, before, strict=True):
                layer.in_fp8 = was


def use_fp8(
    transformer: nn.Module,
    plan: Sequence[Layer],
    recipe: str = "row",
    backward: str = "high",
    library: str = "native",
) -> Fp8:
    """Make the planned layers of a transformer able to compute in fp8; off at first.

    Before or after LoRA (PEFT) is put on top; before FSDP and torch.compile.

    Args:
        plan: of `plan_layers`, for this recipe and backward.
        recipe: what shares a scale: "row" (a token; the result does not depend on the batch),
            "block" (128 channels of one), "tensor" (all); "delayed" in library "te" alone: scales
            of earlier calls.
        backward: gradient to a layer's input: "high", in the model's dtype, or "fp8".
        library: "native", or "te", NVIDIA's Transformer Engine, where it is installed; its backward
            is in fp8 whatever `backward` says.
    Raises ValueError for a combination that does not exist, for a GPU without fp8 and where a
    layer of the plan is no nn.Linear; nothing is changed then.
    """
    require_recipe(recipe, library)
    if backward not in BACKWARD:
        raise ValueError(f"fp8 backward {backward!r}: use {' or '.join(BACKWARD)}")
    modules = dict(transformer.named_modules())
    names = [layer.name for layer in plan if layer.fp8]
    names = [f"{name}.base_layer" if f"{name}.base_layer" in modules else name for name in names]
    if library == "te":
        import qirl_fast.models.fp8.te as te

        te.convert(transformer, names, TE_RECIPES[recipe])
        return Fp8(transformer, (), library)
    if not names:
        raise ValueError("no layer of this plan is in fp8; see plan_layers")
    require_device(next(transformer.parameters()).device, recipe)
    found = [modules.get(name) for name in names]
    strange = [
        f"{name} ({type(m).__name__})"
        for name, m in zip(names, found, strict=True)
        if type(m) is not nn.Linear
    ]
    if strange:
        raise ValueError(f"fp8 takes the place of nn.Linear alone; got {', '.join(strange[:3])}")
    layers = [Fp8Linear.convert(m, recipe, backward) for m in found if isinstance(m, nn.Linear)]
    return Fp8(transformer, layers, library)


def require_recipe(recipe: str, library: str) -> None:
    """ValueError for a recipe that the library has not."""
    have = {"native": ("row", "block", "tensor"), "te": tuple(TE_RECIPES)}
    if library not in have:
        raise ValueError(f"fp8 library {library!r}: use {' or '.join(have)}")
    if recipe not in have[library]:
        raise ValueError(
            f"fp8 recipe {recipe!r}: library {library!r} has {', '.join(have[library])}"
        )


def require_device(device: torch.device, recipe: str) -> None:
    """ValueError for a GPU whose tensor cores know no fp8; a CPU computes the same numbers."""
    if device.type != "cuda":
        return
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if recipe == "block" and cuda < (12, 9):
        raise ValueError(
            f"fp8 recipe 'block' needs CUDA 12.9 or newer, and this torch has {torch.version.cuda}"
            "; set recipe=row"
        )
    capability = torch.cuda.get_device_capability(device)
    wanted = (9, 0) if recipe == "block" else (8, 9)
    if capability < wanted or (recipe == "block" and capability[0] != 9):
        name = torch.cuda.get_device_name(device)
        only = "only sm_90 (H100, H200)" if recipe == "block" else "sm_89 and above (L40S, H100)"
        raise ValueError(
            f"fp8 recipe {recipe!r}: {name} is sm_{capability[0]}{capability[1]}, and {only} "
            "multiplies it; set model.fp8=null" + ("" if recipe != "block" else " or recipe=row")
        )
