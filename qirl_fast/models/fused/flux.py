"""The fused blocks of FLUX.1, with the arguments of diffusers' FluxTransformerBlock and
FluxSingleTransformerBlock.

Double blocks: `joint.two_streams`, modulated by the time and the prompt's pooled vector. Single
blocks, on text and image in one stream,
    y = norm(x) (1 + scale) + shift;  x += gate out([attention(y), gelu(mlp(y))])
Source: diffusers `transformer_flux.py`.
Shapes: B samples, S image tokens, L text tokens, D channels, H heads of Dh.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor
from torch.nn import functional as F

from qirl_fast import ops
from qirl_fast.models.fused.attention import attend
from qirl_fast.models.fused.joint import (
    block_problems,
    gelu_mlp,
    named,
    refuse_kwargs,
    rotations,
    two_streams,
)
from qirl_fast.models.lora import feed, linear

Rope = Tensor | tuple[Tensor, Tensor]  # complex64 [L + S, Dh / 2], or diffusers' (cos, sin)


def problems(transformer: Any) -> list[str]:
    """Why these blocks cannot be fused, one sentence each, three at most."""
    double = named("block", transformer.transformer_blocks)
    single = named("single block", transformer.single_transformer_blocks)
    found = block_problems([*double, *single], FluxAttnProcessor)
    for name, block, _ in double:
        for mlp in (block.ff, block.ff_context):
            if type(mlp.net[0]) is not GELU or mlp.net[0].approximate != "tanh":
                found.append(f"{name} has the activation {type(mlp.net[0]).__name__}")
    return found


def block_forward(
    self: FluxTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rope | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """(text [B, L, D], image [B, S, D]); arguments as the stock block's. temb: [B, D]."""
    refuse_kwargs(joint_attention_kwargs)
    act = F.silu(temb)
    rows = linear(self.norm1.linear, act), linear(self.norm1_context.linear, act)
    mlp = (gelu_mlp, lambda ff: ff.net[0].proj)
    rope = rotations(image_rotary_emb)
    return two_streams(self, hidden_states, encoder_hidden_states, rows, rope, mlp)


def single_forward(
    self: FluxSingleTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb: Tensor,
    image_rotary_emb: Rope | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(text [B, L, D], image [B, S, D]); arguments as the stock block's. Without
    encoder_hidden_states, x [B, L + S, D] of both together, as FLUX.2's.
    """
    refuse_kwargs(joint_attention_kwargs)
    x, attn, length = hidden_states, self.attn, None
    if encoder_hidden_states is not None:
        x, length = torch.cat([encoder_hidden_states, x], dim=1), encoder_hidden_states.shape[1]
    shift, scale, gate = linear(self.norm.linear, F.silu(temb)).chunk(3, dim=1)
    norm = partial(ops.norm_modulate, x, scale, shift, eps=self.norm.norm.eps)
    y = feed(norm, attn.to_q, attn.to_k, attn.to_v, self.proj_mlp)
    q, k, v = (
        linear(to, y).unflatten(-1, (-1, attn.head_dim)) for to in (attn.to_q, attn.to_k, attn.to_v)
    )
    q, k, v = ops.qk_norm_rope(
        *(q, k, v, attn.norm_q.weight, attn.norm_k.weight, rotations(image_rotary_emb)),
        eps=attn.norm_q.eps,
    )
    hidden = ops.gelu(linear(self.proj_mlp, y))
    u = torch.cat([attend(attn, q, k, v).flatten(2), hidden], dim=2)
    x = ops.gate_residual(x, linear(self.proj_out, u), gate)
    return x if length is None else (x[:, :length], x[:, length:])
