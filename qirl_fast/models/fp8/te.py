"""FP8 matrix products of a transformer through NVIDIA's Transformer Engine (TE).

    convert(transformer, ["transformer_blocks.0.attn.to_q", ...], "current")
    with autocast(transformer, enabled=True):
        ...

A converted layer stays the module it was and only its class changes, from nn.Linear to TeLinear:
parameters, hooks and state-dict keys stay, so PEFT, optimizers and checkpoints see the model they
knew. The te.Linear that computes is no submodule and reads the layer's own parameters; its
`_extra_state` is in no state dict. Outside `autocast` a converted layer computes what nn.Linear
does, bit for bit; inside, in FP8, in training and evaluation, with gradients and without.

Recipes for x [M, K] on w [N, K], both in e4m3:
    "current"  one scale for x and one for w, of their values now; gradients in e5m2
    "block"    a scale for 1 x 128 of x and 128 x 128 of w, a power of two; gradients in e4m3
    "delayed"  one scale for x and one for w, of their values before; gradients in e5m2
Rows are padded with zeros to a multiple of 16, which moves no scale. The scales of a row depend on
the rows beside it, but for "block".

Frozen weights are quantised once, for forward and backward, one byte a parameter beside the
weights, two on Hopper; and again when they are changed in place or exchanged. What writes through
`weight.data`, as PEFT's merging of an adapter does, cannot be seen: `restore` first. Nor does a
replayed CUDA graph look at its weights. Weights that require a gradient are quantised at each call.

"delayed" has a state that no checkpoint holds: histories of the largest values. They move where the
outermost region ends in grad mode; inputs are at scale 1 before that. A layer called twice in a
region, by guidance's two branches, counts once. Weights are scaled before the first region.

A backward pass that computes activations again belongs inside the region: checkpoint does not
restore TE's switch. Under torch.compile TE breaks the graph. Under FSDP2 this was not tried.

te.LayerNormLinear fits at the text input of either transformer alone (RMSNorm, then a layer that is
kept in bf16 and runs once a prompt): in the blocks and at the output the norms have no weights and
the modulation by the noise level, which differs by row, stands between norm and linear layer.

Source: transformer_engine 2.20, pytorch/module/{linear,base}.py and pytorch/quantization.py.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RECIPES = {
    "current": "Float8CurrentScaling",
    "block": "Float8BlockScaling",
    "delayed": "DelayedScaling",
}
DIVISOR = 16  # of both dimensions of a weight and, for the weight's gradient, of the rows
INSTALL = (
    "pip install --no-build-isolation 'transformer-engine[pytorch]' compiles it against the torch "
    "that is installed and needs a torch with CUDA, nvcc, cuDNN 9.12 or newer with headers, NCCL "
    "headers, ninja and wheel; bench/te.sh does it on a machine with no network"
)


class Unavailable(ImportError):
    """Transformer Engine was asked for and cannot be had; the message says how to get it."""


def require() -> Any:
    """The module transformer_engine.pytorch; Unavailable where it is missing, broken or too old."""
    try:
        te = importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "transformer_engine":
            raise Unavailable(f"FP8 by Transformer Engine needs that package: {INSTALL}") from error
        raise Unavailable(
            f"Transformer Engine is installed but broken: {type(error).__name__}: {error}. "
            "That can break `import peft` too: install it anew, or take it out with pip uninstall "
            f"transformer-engine transformer-engine-torch. {INSTALL}"
        ) from error
    if not hasattr(te, "autocast"):
        raise Unavailable(f"this Transformer Engine has no te.autocast: it is too old. {INSTALL}")
    return te


@dataclass
class _Mode:
    """What the converted layers of one transformer share."""

    recipe: Any
    delayed: bool
    on: bool = False
    scaled: bool = False  # delayed: the weights' scales have been taken


class TeLinear(nn.Linear):
    """nn.Linear through te.Linear while its mode is on. x [..., K] -> [..., N], any rows."""

    mode: _Mode
    engine: Any = None  # te.Linear on this layer's parameters, made when it is needed
    quantised: Any = None  # (storage, version) of the weight that the engine holds in FP8

    @property
    def in_fp8(self) -> bool:
        """Whether it computes in FP8 now."""
        return self.mode.on

    def forward(self, input: Tensor) -> Tensor:
        if not self.mode.on or not input.numel():
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        count = len(rows)
        if count % DIVISOR:
            rows = F.pad(rows, (0, 0, 0, -count % DIVISOR))
        out: Tensor = self._bound()(rows, is_first_microbatch=self._microbatch())
        return out[:count].view(*input.shape[:-1], self.out_features)

    def measure(self) -> None:
        """Quantise the weight with the layout both passes need; no row that counts goes through."""
        with torch.inference_mode(False), torch.enable_grad():
            rows = self.weight.new_zeros(DIVISOR, self.in_features, requires_grad=True)
            self._bound()(rows, is_first_microbatch=None if self.mode.delayed else True)

    def _microbatch(self) -> bool | None:
        """te.Linear's is_first_microbatch: None quantises the weight anew, False keeps it."""
        if self.mode.delayed or self.weight.requires_grad:
            return None
        storage = self.weight.untyped_storage()  # held: another's could come to lie in its place
        now = (storage._cdata, self.weight._version)
        if self.quantised is None or self.quantised[1] != now:
            self.measure()
            self.quantised = (storage, now)
        return False

    def _bound(self) -> Any:
        if self.engine is None:
            has_bias = self.bias is not None
            made = require().Linear(
                *(self.in_features, self.out_features),
                bias=has_bias,
                params_dtype=self.weight.dtype,
                device="meta",
            )
            object.__setattr__(self, "engine", made)  # past nn.Module, which would register it
        if self.engine.weight is not self.weight:
            self.engine.weight = self.weight
            if self.bias is not None:
                self.engine.bias = self.bias
        return self.engine

    def __getstate__(self) -> dict[str, Any]:
        """Copies make an engine of their own."""
        return {k: v for k, v in vars(self).items() if k not in ("engine", "quantised")}


def convert(transformer: nn.Module, layers: Sequence[str], recipe: str) -> None:
    """Make the named linear layers TeLinear, in place.

    layers: names within the transformer; recipe: one of RECIPES.
    Raises ImportError for a missing Transformer Engine, ValueError for an unknown recipe, one this
    device does not run, no layers, and, with every reason, for layers that are missing, no
    nn.Linear or of dimensions that FP8 does not take. Nothing is changed then.
    """
    if recipe not in RECIPES:
        raise ValueError(f"Transformer Engine recipe {recipe!r}: use {', '.join(RECIPES)}")
    found = [f"{name} {problem}" for name in layers if (problem := _problem(transformer, name))]
    if is_converted(transformer):
        found.append("it is converted already: restore it first")
    if found or not layers:
        reasons = "; ".join(found) or "no layers are named"
        raise ValueError(f"this transformer cannot be given to Transformer Engine: {reasons}")
    te = require()
    available = te.is_fp8_block_scaling_available if recipe == "block" else te.is_fp8_available
    runs, why = available(return_reason=True)
    if not runs:
        raise ValueError(f"Transformer Engine recipe {recipe!r} does not run here: {why}")
    recipes = importlib.import_module("transformer_engine.common.recipe")
    mode = _Mode(getattr(recipes, RECIPES[recipe])(), delayed=recipe == "delayed")
    for name in layers:
        layer: Any = transformer.get_submodule(name)
        layer.__class__ = TeLinear
        layer.mode = mode
    vars(transformer)["te_mode"] = mode


def restore(transformer: nn.Module) -> None:
    """Make every TeLinear nn.Linear again, the weights as they are now."""
    for layer in _layers(transformer):
        layer.__class__ = nn.Linear
        for name in ("mode", "engine", "quantised"):
            vars(layer).pop(name, None)
    vars(transformer).pop("te_mode", None)


def is_converted(transformer: nn.Module) -> bool:
    """True between convert and restore."""
    return getattr(transformer, "te_mode", None) is not None


@contextmanager
def autocast(transformer: nn.Module, enabled: bool = True) -> Iterator[None]:
    """A region in which converted layers run in FP8, or with enabled False as nn.Linear.

    Regions nest. ValueError for a transformer that is not converted.
    """
    mode: _Mode | None = getattr(transformer, "te_mode", None)
    if mode is None:
        raise ValueError(
            f"this {type(transformer).__name__} has no layers of Transformer Engine: convert first"
        )
    te, before = require(), mode.on
    if enabled and mode.delayed and not mode.scaled:
        # The scale of a first call is 1, at which weights would be rounded to a few values.
        with torch.enable_grad(), te.autocast(enabled=True, recipe=mode.recipe):
            for layer in _layers(transformer):
                layer.measure()
        mode.scaled = True
    mode.on = enabled
    try:
        with te.autocast(enabled=enabled, recipe=mode.recipe):
            yield
    finally:
        mode.on = before


def _layers(transformer: nn.Module) -> list[Any]:
    return [layer for layer in transformer.modules() if isinstance(layer, TeLinear)]


def _problem(transformer: nn.Module, name: str) -> str:
    """Why this layer cannot be converted; empty where it can."""
    try:
        layer = transformer.get_submodule(name)
    except AttributeError:
        return "is missing"
    if type(layer) is not nn.Linear:
        return f"is {type(layer).__name__} and no nn.Linear"
    if layer.in_features % DIVISOR or layer.out_features % DIVISOR:
        dims = f"{layer.in_features} -> {layer.out_features}"
        return f"maps {dims} channels and FP8 takes multiples of {DIVISOR}"
    return ""
