"""The fused blocks of FLUX.2, with the arguments of diffusers' Flux2TransformerBlock and
Flux2SingleTransformerBlock.

Double blocks: `joint.two_streams` with a SwiGLU, all modulated by the same rows. Single blocks, on
text and image in one stream, have one layer in and one out:
    y = norm(x) (1 + scale) + shift;  q, k, v, g, h = in(y);  x += gate out([attention, silu(g) h])
Source: diffusers `transformer_flux2.py`; its cache of reference images is not served.
Shapes: B samples, S image tokens, L text tokens, D channels, H heads of Dh.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from torch import Tensor

from qirl_fast import ops
from qirl_fast.models.fused.attention import attend
from qirl_fast.models.fused.joint import (
    block_problems,
    named,
    refuse_kwargs,
    rotations,
    two_streams,
)
from qirl_fast.models.lora import feed, linear
from qirl_fast.ops import Quantized

Rope = Tensor | tuple[Tensor, Tensor]  # complex64 [L + S, Dh / 2], or diffusers' (cos, sin)


def problems(transformer: Any) -> list[str]:
    """Why these blocks cannot be fused, one sentence each, three at most of a kind of block."""
    double = named("block", transformer.transformer_blocks)
    single = named("single block", transformer.single_transformer_blocks)
    return [
        *block_problems(double, Flux2AttnProcessor),
        *block_problems(single, Flux2ParallelSelfAttnProcessor),
    ]


def swiglu_mlp(mlp: Any, y: Tensor | Quantized) -> Tensor:
    """out(silu(g) h) of g, h = in(y)."""
    hidden = partial(ops.swiglu, *linear(mlp.linear_in, y).chunk(2, dim=-1))
    return linear(mlp.linear_out, feed(hidden, mlp.linear_out))


def block_forward(
    self: Flux2TransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Rope | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """(text [B, L, D], image [B, S, D]); arguments as the stock block's. temb_mod_*: [B, 6 D]."""
    refuse_kwargs(joint_attention_kwargs)
    rows = _rows(temb_mod_img, hidden_states), _rows(temb_mod_txt, hidden_states)
    mlp = (swiglu_mlp, lambda ff: ff.linear_in)
    rope = rotations(image_rotary_emb)
    return two_streams(self, hidden_states, encoder_hidden_states, rows, rope, mlp)


def single_forward(
    self: Flux2SingleTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Rope | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [B, L + S, D], or (text, image); arguments as the stock block's. temb_mod: [B, 3 D]."""
    refuse_kwargs(joint_attention_kwargs)
    x, length = hidden_states, text_seq_len
    if encoder_hidden_states is not None:
        x, length = torch.cat([encoder_hidden_states, x], dim=1), encoder_hidden_states.shape[1]
    attn = self.attn
    shift, scale, gate = _rows(temb_mod, x).chunk(3, dim=1)
    y = feed(partial(ops.norm_modulate, x, scale, shift, eps=self.norm.eps), attn.to_qkv_mlp_proj)
    sizes = (*[attn.inner_dim] * 3, *[attn.mlp_hidden_dim] * 2)
    q, k, v, g, h = linear(attn.to_qkv_mlp_proj, y).split(sizes, dim=-1)
    q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in (q, k, v))
    q, k, v = ops.qk_norm_rope(
        *(q, k, v, attn.norm_q.weight, attn.norm_k.weight, rotations(image_rotary_emb)),
        eps=attn.norm_q.eps,
    )
    u = torch.cat([attend(attn, q, k, v).flatten(2), ops.swiglu(g, h)], dim=2)
    x = ops.gate_residual(x, linear(attn.to_out, u), gate)
    return (x[:, :length], x[:, length:]) if split_hidden_states else x


def _rows(modulation: Tensor, x: Tensor) -> Tensor:
    """[B, ...] of modulation [B or 1, ...]; one row a sample, or one for all."""
    if modulation.ndim != 2:
        raise ValueError(
            f"the fused block of FLUX.2 takes modulation [B, n D]; got {list(modulation.shape)}: "
            "rows by token, for reference images, are not served"
        )
    return modulation.expand(len(x), -1)
