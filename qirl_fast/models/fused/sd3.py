"""The fused block of Stable Diffusion 3.5, with the arguments of diffusers' JointTransformerBlock.

    image: y = norm(x) (1 + scale1) + shift1;  x += gate1 attention(y, text)
           z = norm(x) (1 + scale3) + shift3;  x += gate3 attention2(z)     in dual blocks (Medium),
                                               where both norms are of the block's input
           y = norm(x) (1 + scale2) + shift2;  x += gate2 net2(gelu(net0(y)))
    text:  the same without attention2; after the last block there is none
Tokens are not rotated.
Source: diffusers `transformer_sd3.py`, `attention.py`.
Shapes: B samples, S image tokens, L text tokens, D channels.
"""

from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from qirl_fast import ops
from qirl_fast.models.fused.attention import attend
from qirl_fast.models.fused.joint import (
    Rows,
    block_problems,
    gate_rows,
    gated,
    gelu_mlp,
    half_rows,
    joint_attention,
    normed,
    refuse_kwargs,
)
from qirl_fast.models.lora import linear
from qirl_fast.ops import Quantized


def problems(transformer: Any) -> list[str]:
    """Why these blocks cannot be fused, one sentence each, three at most."""
    blocks = [
        (f"block {i}", b, [b.attn, *([] if b.attn2 is None else [b.attn2])])
        for i, b in enumerate(transformer.transformer_blocks)
    ]
    found = block_problems(blocks, JointAttnProcessor2_0)
    for name, block, _ in blocks:
        if block._chunk_size is not None:
            found.append(f"{name} has a chunked MLP; call disable_forward_chunking()")
        for mlp in (block.ff, block.ff_context):
            if mlp is not None and (
                type(mlp.net[0]) is not GELU or mlp.net[0].approximate != "tanh"
            ):
                found.append(f"{name} has the activation {type(mlp.net[0]).__name__}")
    return found


def block_forward(
    self: JointTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """(text [B, L, D], image [B, S, D]), text None after the last block; arguments as the stock
    block's. temb: [B, D].
    """
    refuse_kwargs(joint_attention_kwargs)
    image, text, attn, act = hidden_states, encoder_hidden_states, self.attn, F.silu(temb)
    own, width = linear(self.norm1.linear, act), image.shape[-1]
    img1, img2 = half_rows(own[:, : 6 * width])
    theirs = linear(self.norm1_context.linear, act)
    if self.context_pre_only:
        scale, shift = theirs.chunk(2, dim=1)
        txt1: Rows = {"scale": scale, "shift": shift}
        txt2: Rows = {}
    else:
        txt1, txt2 = half_rows(theirs)
    y_image = normed(image, img1, self.norm2, attn.to_q, attn.to_k, attn.to_v)
    y_text = normed(text, txt1, self.norm2, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    u_image, u_text = joint_attention(attn, y_image, y_text, None)
    first = self.ff.net[0].proj
    if self.attn2 is None:
        y_image, image = gated(image, u_image, img1, img2, self.norm2, first)
    else:
        shift3, scale3, gate3 = own[:, 6 * width :].chunk(3, dim=1)
        img3 = {"shift": shift3, "scale": scale3, "gate": gate3}
        to = (self.attn2.to_q, self.attn2.to_k, self.attn2.to_v)
        u2 = _attention(self.attn2, normed(image, img3, self.norm2, *to))
        image = ops.gate_residual(image, u_image, **gate_rows(img1))
        y_image, image = gated(image, u2, img3, img2, self.norm2, first)
    image = ops.gate_residual(image, gelu_mlp(self.ff, y_image), **gate_rows(img2))
    if self.context_pre_only:
        return None, image
    y_text, text = gated(text, u_text, txt1, txt2, self.norm2_context, self.ff_context.net[0].proj)
    text = ops.gate_residual(text, gelu_mlp(self.ff_context, y_text), **gate_rows(txt2))
    return text, image


def _attention(attn: Any, y: Tensor | Quantized) -> Tensor:
    """What attention over the image's tokens alone adds, [B, S, D]."""
    head = attn.inner_dim // attn.heads
    q, k, v = (linear(to, y).unflatten(-1, (-1, head)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q, k, v = ops.qk_norm_rope(q, k, v, attn.norm_q.weight, attn.norm_k.weight, eps=attn.norm_q.eps)
    return linear(attn.to_out[0], attend(attn, q, k, v).flatten(2))
