"""Which linear layers of a transformer run in fp8, and why the others do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from qirl_fast.ops._fp8_checks import MULTIPLE
from qirl_fast.ops.fp8_quantize import BLOCK


@dataclass(frozen=True)
class Layer:
    """One linear layer: its name in the transformer, weight [out, in], and what was decided."""

    name: str
    shape: tuple[int, int]
    fp8: bool
    why: str  # of a layer that stays in the model's dtype


def plan_layers(
    transformer: nn.Module, layers: Sequence[str], skip: Sequence[str], recipe: str, backward: str
) -> list[Layer]:
    """Every linear layer of the transformer, in its order.

    Args:
        layers: name endings of those that run in fp8; skip: of those among them that do not.
        recipe, backward: as of `Fp8Linear`; "delayed" is Transformer Engine's.
    Raises ValueError for an ending that matches no linear layer, and where no layer is left.
    """
    found = {
        name.removesuffix(".base_layer"): module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    for kind, endings in (("layers", layers), ("skip", skip)):
        unknown = [e for e in endings if not any(_ends(name, e) for name in found)]
        if unknown:
            known = sorted({re.sub(r"^.*\.\d+\.(?=\D)", "", name) for name in found})
            raise ValueError(
                f"fp8 {kind} {unknown} match no linear layer of the transformer; it has "
                + ", ".join(known)
            )
    plan = []
    for name, module in found.items():
        shape = (module.out_features, module.in_features)
        why = _why_not(name, shape, layers, skip, recipe, backward)
        plan.append(Layer(name, shape, not why, why))
    if not any(layer.fp8 for layer in plan):
        raise ValueError("fp8 was asked for and no layer can run in it:\n" + describe(plan, recipe))
    return plan


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _why_not(
    name: str,
    shape: tuple[int, int],
    layers: Sequence[str],
    skip: Sequence[str],
    recipe: str,
    backward: str,
) -> str:
    out, width = shape
    if not any(_ends(name, e) for e in layers):
        return "not among the layers"
    if any(_ends(name, e) for e in skip):
        return "skipped by name"
    if out % MULTIPLE or width % MULTIPLE:
        return f"no multiples of {MULTIPLE}"
    blocked = (width, out) if backward == "fp8" else (width,)
    if recipe == "block" and any(size % BLOCK for size in blocked):
        return f"no multiple of {BLOCK}, a block"
    return ""


def describe(plan: Sequence[Layer], recipe: str, library: str = "native") -> str:
    """The plan as comment lines; the same layer of neighbouring blocks on one."""
    by = ", Transformer Engine" if library == "te" else ""
    rows: dict[tuple[str, tuple[int, int], str], list[int]] = {}
    for layer in plan:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", layer.name)
        name = f"{match[1]}{{}}{match[3]}" if match else layer.name
        numbers = rows.setdefault((name, layer.shape, layer.why), [])
        if match:
            numbers.append(int(match[2]))
    lines = ["# precision of each linear layer"]
    for (name, (out, width), why), numbers in rows.items():
        decided = f"fp8 {recipe}{by}" if not why else f"the model's dtype: {why}"
        name = name.format(_ranges(numbers)) if numbers else name
        lines.append(f"# {name:58} {out:6} x {width:<6} {decided}")
    return "\n".join(lines) + "\n"


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,5 of [0, 1, 2, 3, 5]."""
    runs = [
        [n for _, n in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return "{" + ",".join(parts) + "}"
