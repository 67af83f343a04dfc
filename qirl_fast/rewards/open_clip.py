"""Names of an open_clip CLIP checkpoint -> names of transformers' CLIPModel.

open_clip (mlfoundations/open_clip, and its copy in tgxs002/HPSv2) keeps the vision tower under
`visual.` and the text tower at the top; query, key and value are one matrix, and projections are
stored for x @ P, so that they are transposed here. Layers are `resblocks.N` there, `layers.N` here.
"""

import re

import torch

MARK = "visual.conv1.weight"
BUFFERS = ("attn_mask",)

TOP = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = ("text_projection", "visual.proj")
RESBLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def is_open_clip(state: dict[str, torch.Tensor]) -> bool:
    """True for a state dict with open_clip's names."""
    return MARK in state


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under transformers' names; ValueError for a name that is not known."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name in BUFFERS:
            continue
        block = RESBLOCK.fullmatch(name)
        if block:
            tower = "vision_model" if block[1] else "text_model"
            prefix = f"{tower}.encoder.layers.{block[2]}."
            renamed |= {prefix + k: v for k, v in _layer(block[3], tensor, name).items()}
        else:
            renamed[_renamed(name, TOP, name)] = tensor.T if name in TRANSPOSED else tensor
    return renamed


def _layer(part: str, tensor: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.rpartition("_")[2]
        return {
            f"self_attn.{x}_proj.{kind}": piece
            for x, piece in zip("qkv", tensor.chunk(3), strict=True)
        }
    return {_renamed(part, LAYER, name): tensor}


def _renamed(part: str, table: dict[str, str], name: str) -> str:
    if part in table:
        return table[part]
    stem, _, kind = part.rpartition(".")
    if stem not in table:
        raise ValueError(
            f"{name!r} is no tensor of an open_clip CLIP with a ViT image tower and the built-in "
            "text tower; other towers are not supported, convert the model to transformers first"
        )
    return f"{table[stem]}.{kind}"
