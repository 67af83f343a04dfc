"""Fused blocks for stock diffusers transformers, put in place and taken out again.

    qirl_fast.patch(pipeline.transformer)

Each block keeps its modules, parameters and hooks and gets another `forward`, made of
`qirl_fast.ops`: state dict, LoRA (PEFT), gradient checkpointing, FSDP2 and torch.compile see the
model they knew. A model that cannot be fused as a whole is refused as a whole.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from qirl_fast.models.fused import flux, flux2, qwenimage, qwenimage21, sd3, zimage

Forwards = dict[str, Callable[..., Any]]  # by the list of blocks that have it

_FUSED: dict[type[nn.Module], tuple[Forwards, Callable[[Any], list[str]]]] = {
    QwenImage21Transformer2DModel: (
        {"transformer_blocks": qwenimage21.block_forward},
        qwenimage21.problems,
    ),
    QwenImageTransformer2DModel: (
        {"transformer_blocks": qwenimage.block_forward},
        qwenimage.problems,
    ),
    SD3Transformer2DModel: ({"transformer_blocks": sd3.block_forward}, sd3.problems),
    FluxTransformer2DModel: (
        {
            "transformer_blocks": flux.block_forward,
            "single_transformer_blocks": flux.single_forward,
        },
        flux.problems,
    ),
    Flux2Transformer2DModel: (
        {
            "transformer_blocks": flux2.block_forward,
            "single_transformer_blocks": flux2.single_forward,
        },
        flux2.problems,
    ),
    ZImageTransformer2DModel: (
        dict.fromkeys(("noise_refiner", "context_refiner", "layers"), zimage.block_forward),
        zimage.problems,
    ),
}
DTYPES = (torch.float32, torch.bfloat16)


def patch(transformer: Any) -> Any:
    """Give every block of a stock transformer its fused forward; returns the transformer.

    transformer: of diffusers: QwenImage21Transformer2DModel, QwenImageTransformer2DModel (T2I,
    Edit, EditPlus with zero_cond_t), SD3Transformer2DModel (3.5), FluxTransformer2DModel,
    Flux2Transformer2DModel or ZImageTransformer2DModel; float32 or bfloat16, with or without LoRA.
    A second patch changes nothing.
    Raises TypeError for another class and ValueError, with every reason, for a model whose blocks
    compute what the fused ones do not: dropout, an odd head size, mixed or other dtypes, replaced
    attention processors. Nothing is changed then.
    """
    kind = _kind(transformer)
    forwards, problems = _FUSED[kind]
    found = [*_dtype_problems(transformer), *problems(transformer)]
    if found:
        raise ValueError(f"patch: this {kind.__name__} cannot be fused: " + "; ".join(found))
    for blocks, forward in forwards.items():
        for block in getattr(transformer, blocks):
            block.forward = MethodType(forward, block)
    return transformer


def unpatch(transformer: Any) -> Any:
    """Give every block its stock forward back; returns the transformer."""
    for block in blocks_of(transformer):
        vars(block).pop("forward", None)
    return transformer


def is_patched(transformer: Any) -> bool:
    """True where the blocks have their fused forward."""
    return all("forward" in vars(block) for block in blocks_of(transformer))


def blocks_of(transformer: Any) -> list[Any]:
    """The blocks of a stock transformer that get a fused forward."""
    forwards, _ = _FUSED[_kind(transformer)]
    return [block for blocks in forwards for block in getattr(transformer, blocks)]


def _kind(transformer: Any) -> type[nn.Module]:
    for kind in _FUSED:
        if isinstance(transformer, kind):
            return kind
    served = ", ".join(kind.__name__ for kind in _FUSED)
    raise TypeError(
        f"patch: got {type(transformer).__name__}; fused blocks exist for {served} of diffusers. "
        "Pass pipeline.transformer, before torch.compile or any wrapper."
    )


def _dtype_problems(transformer: Any) -> list[str]:
    """LoRA weights may be wider than the model: `lora_linear` reads them in the dtype of x."""
    named = [pair for block in blocks_of(transformer) for pair in block.named_parameters()]
    dtypes = {p.dtype for n, p in named if "lora_" not in n}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        return [f"its blocks mix {names}; cast them to one dtype with .to(dtype)"]
    if not dtypes <= set(DTYPES):
        return [f"its blocks are {dtypes.pop()}; cast them to float32 or bfloat16"]
    return []
