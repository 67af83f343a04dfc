"""The fused block of Z-Image, with the arguments of diffusers' ZImageTransformerBlock.

    y = rms1(x) (1 + scale1);  x += tanh(gate1) rms2(attention(y))
    y = rms3(x) (1 + scale2);  x += tanh(gate2) rms4(w2(silu(w1 y) w3 y))

The norms have weights w, which the ops take as rows: w (1 + scale) = 1 + row. Blocks of the context
refiner have no modulation: rows w - 1, and plain sums.
Source: diffusers `transformer_z_image.py`; its omni mode, modulation by token, is not served.
Shapes: B samples, S tokens, D channels, H heads of Dh.
"""

from functools import partial
from typing import Any

from diffusers.models.transformers.transformer_z_image import (
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)
from torch import Tensor

from qirl_fast import ops
from qirl_fast.models.fused.attention import attend
from qirl_fast.models.fused.joint import block_problems
from qirl_fast.models.lora import feed, linear


def problems(transformer: Any) -> list[str]:
    """Why these blocks cannot be fused, one sentence each, three at most."""
    blocks = [
        (f"{name} {i}", block, [block.attention])
        for name in ("noise_refiner", "context_refiner", "layers")
        for i, block in enumerate(getattr(transformer, name))
    ]
    return block_problems(blocks, ZSingleStreamAttnProcessor)


def block_forward(
    self: ZImageTransformerBlock,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    """x [B, S, D] -> [B, S, D]; arguments as the stock block's.

    attn_mask: bool [B, S] of the tokens that are looked at; freqs_cis: complex64 [B, S, Dh / 2] or
    [S, Dh / 2]; adaln_input: [B, min(D, 256)].
    """
    if noise_mask is not None:
        raise ValueError("the fused block of Z-Image serves no omni mode; got a noise_mask")
    scale1 = gate1 = scale2 = gate2 = None
    if self.modulation:
        rows = linear(self.adaLN_modulation[0], adaln_input)
        scale1, gate1, scale2, gate2 = rows.chunk(4, dim=1)
    attn, mlp = self.attention, self.feed_forward
    y = feed(_normed(self.attention_norm1, x, scale1), attn.to_q, attn.to_k, attn.to_v)
    head = attn.inner_dim // attn.heads
    q, k, v = (linear(to, y).unflatten(-1, (-1, head)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q, k, v = ops.qk_norm_rope(
        *(q, k, v, attn.norm_q.weight, attn.norm_k.weight, freqs_cis), eps=attn.norm_q.eps
    )
    mask = None if attn_mask is None else attn_mask[:, None, None, :]
    u = linear(attn.to_out[0], attend(attn, q, k, v, mask).flatten(2))
    u = _normed(self.attention_norm2, u)()
    if gate1 is None:
        x = x + u
        y = feed(_normed(self.ffn_norm1, x), mlp.w1, mlp.w3)
    else:
        row, eps = _row(self.ffn_norm1, x, scale2), self.ffn_norm1.eps
        run = partial(
            ops.gate_residual_norm_modulate, x, u, gate1, row, norm="rms", eps=eps, tanh=True
        )
        y, x = feed(run, mlp.w1, mlp.w3)
    hidden = partial(ops.swiglu, linear(mlp.w1, y), linear(mlp.w3, y))
    u = _normed(self.ffn_norm2, linear(mlp.w2, feed(hidden, mlp.w2)))()
    return x + u if gate2 is None else ops.gate_residual(x, u, gate2, tanh=True)


def _normed(norm: Any, x: Tensor, scale: Tensor | None = None) -> Any:
    """A call of the norm with its weight, and (1 + scale)."""
    return partial(ops.norm_modulate, x, _row(norm, x, scale), norm="rms", eps=norm.eps)


def _row(norm: Any, x: Tensor, scale: Tensor | None) -> Tensor:
    """float32 [B, D]: w (1 + scale) - 1."""
    weight = norm.weight.float()
    if scale is None:
        return (weight - 1).expand(len(x), -1)
    return weight * (1 + scale.float()) - 1
