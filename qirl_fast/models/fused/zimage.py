"""The fused block of Z-Image, with the arguments of diffusers' ZImageTransformerBlock.

    y = rms1(x) (1 + scale1);  x += tanh(gate1) rms2(attention(y))
    y = rms3(x) (1 + scale2);  x += tanh(gate2) rms4(w2(silu(w1 y) w3 y))

The norms have weights w, which the ops take as rows: w (1 + scale) = 1 + row. Blocks of the context
refiner have no modulation: rows w - 1, and plain sums.
Source: diffusers `transformer_z_image.py`; its omni mode, modulation by token, is not served.
Shapes: B samples, S tokens, D channels, H heads of Dh; N image tokens, N' with padding, L of text.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import (
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)
from torch import Tensor
from torch.nn import functional as F

from qirl_fast import ops
from qirl_fast.models.fused.attention import attend
from qirl_fast.models.fused.joint import block_problems
from qirl_fast.models.lora import feed, linear

PATCH = "2-1"  # of the transformer's embedders: 2 x 2 latents of one frame


def refined(transformer: Any, prompts: Sequence[Tensor], length: int, rope: Tensor) -> Tensor:
    """[P, L, D] of embeddings [L_p, C], padded to L tokens. rope: complex64 [L, Dh / 2]."""
    text = torch.stack([F.pad(p, (0, 0, 0, length - len(p))) for p in prompts])
    own = torch.tensor([[i < len(p) for i in range(length)] for p in prompts], device=text.device)
    x = torch.where(own[..., None], transformer.cap_embedder(text), transformer.cap_pad_token)
    for block in transformer.context_refiner:
        x = block(x, None, rope)
    return x


def run_blocks(
    transformer: Any,
    x: Tensor,
    text: Tensor,
    temb: Tensor,
    rope: Tensor,
    runner: Callable[[int, Any], Any],
) -> Tensor:
    """What the transformer gives for image tokens x [B, N, Z]: x0 - eps, [B, N, Z].

    Args:
        text: refined, [B, L, D]; temb: [B, min(D, 256)]; rope: complex64 [N' + L, Dh / 2], of the
            image's tokens first.
        runner: see `Adapter.runner`.
    """
    tokens, padding = x.shape[1], len(rope) - text.shape[1] - x.shape[1]
    x = transformer.all_x_embedder[PATCH](x)
    x = torch.cat([x, transformer.x_pad_token.expand(len(x), padding, -1)], dim=1)
    refiners = transformer.noise_refiner
    for i, block in enumerate(refiners):
        x = runner(i, block)(x, None, rope[: x.shape[1]], temb)
    x = torch.cat([x, text], dim=1)
    for i, block in enumerate(transformer.layers, start=len(refiners)):
        x = runner(i, block)(x, None, rope, temb)
    final = transformer.all_final_layer[PATCH]
    scale = linear(final.adaLN_modulation[1], F.silu(temb))
    out: Tensor = final.linear(ops.norm_modulate(x[:, :tokens], scale, eps=final.norm_final.eps))
    return out


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
        assert adaln_input is not None
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
