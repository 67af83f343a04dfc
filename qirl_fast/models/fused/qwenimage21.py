"""The fused block of Qwen-Image-2.1, with the arguments of diffusers' QwenImage21TransformerBlock.

    y = norm(x) (1 + scale1);  q, k = rope(rms(q)), rope(rms(k));  x += tanh(gate1) attention
    y = norm(x) (1 + scale2);  x += tanh(gate2) out(silu(gate_layer(y)) proj(y))

Text and condition-image tokens take the modulation of t = 0, the target's tokens their sample's.
Source: diffusers `transformer_qwenimage21.py`.
Shapes: B samples, S tokens of this pass, D channels, H heads of Dh.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AttnProcessor,
    QwenImage21KVLayerCache,
    QwenImage21TransformerBlock,
)
from torch import Tensor

from qirl_fast import ops
from qirl_fast.models.fused.attention import Segments, attend, attend_segments
from qirl_fast.models.lora import feed, linear
from qirl_fast.models.sequence import Ulysses
from qirl_fast.ops import Quantized


@dataclass(frozen=True)
class SharedPrefix:
    """One layer's keys and values of what rows see before their own tokens.

    k, v: a tensor [b, L, H, Dh] each for runs of rows whose prefixes are equally long, in the order
    of the rows. Stands where diffusers passes a QwenImage21KVLayerCache.
    among: who shares the rows' tokens; k and v are then of the own heads, and `tokens` are all of a
    row's.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    among: Ulysses | None = None
    tokens: int = 0

    def attend(self, attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, S, H, Dh]: each row's tokens see its prefix and each other."""
        if self.among is not None:
            q, k, v = self.among.to_heads([self.tokens] * 3, [q, k, v])
        runs = [len(run) for run in self.k]
        parts = zip(q.split(runs), k.split(runs), v.split(runs), self.k, self.v, strict=True)
        outputs = [
            attend(attn, own_q, torch.cat([pre_k, own_k], dim=1), torch.cat([pre_v, own_v], dim=1))
            for own_q, own_k, own_v, pre_k, pre_v in parts
        ]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out if self.among is None else self.among.to_tokens([out])[0]


def problems(transformer: Any) -> list[str]:
    """Why these blocks cannot be fused, one sentence each."""
    found = []
    for i, block in enumerate(transformer.transformer_blocks):
        kind = type(block.attn.processor)
        if kind is not QwenImage21AttnProcessor:
            found.append(
                f"block {i} has the attention processor {kind.__name__}, and the fused block "
                f"replaces {QwenImage21AttnProcessor.__name__} only"
            )
        head = block.attn.inner_dim // block.attn.heads
        if head % 2:
            found.append(f"block {i} has heads of {head} channels, and rotation needs pairs")
        if block.attn.to_out[1].p:
            found.append(f"block {i} has dropout {block.attn.to_out[1].p}; the fused one has none")
    return found[:3] + (["..."] if len(found) > 3 else [])


def block_forward(
    self: QwenImage21TransformerBlock,
    hidden_states: Tensor,
    modulation: Tensor,
    rotary_emb: Tensor | None = None,
    attention_mask: Any | None = None,
    target_token_mask: Tensor | None = None,
    layer_cache: QwenImage21KVLayerCache | SharedPrefix | None = None,
    kv_cache_mode: str | None = None,
    cache_write_slice: slice | None = None,
    segments: Segments | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """x [B, S, D] -> [B, S, D]; arguments as the stock block's.

    modulation: [B, 4 D], or [B + 1, 4 D] with the row of t = 0 last beside a target_token_mask [S].
    """
    x, samples = hidden_states, hidden_states.shape[0]
    scale1, gate1, scale2, gate2 = modulation[:samples].chunk(4, dim=-1)
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    third: dict[str, Any] = {}
    # After "extract", the tokens of a pass are the target's alone: none takes the row of t = 0.
    if target_token_mask is not None and kv_cache_mode != "cached":
        t0 = ~target_token_mask
        scale1_t0, gate1_t0, scale2_t0, gate2_t0 = (
            row.expand(samples, -1) for row in modulation[-1:].chunk(4, dim=-1)
        )
        first = {"t0": t0, "scale_t0": scale1_t0}
        second = {"t0": t0, "gate_t0": gate1_t0, "scale_t0": scale2_t0}
        third = {"t0": t0, "gate_t0": gate2_t0}
    attn, mlp = self.attn, self.img_mlp
    norm = partial(ops.norm_modulate, x, scale1, eps=self.img_norm1.eps, **first)
    q, k, v = project(attn, feed(norm, attn.to_q, attn.to_k, attn.to_v), rotary_emb)
    if isinstance(layer_cache, SharedPrefix):
        heads = layer_cache.attend(attn, q, k, v)
    else:
        k, v = _through_cache(k, v, layer_cache, kv_cache_mode, cache_write_slice)
        heads = (
            attend(attn, q, k, v, attention_mask)
            if segments is None
            else attend_segments(attn, q, k, v, segments, key_valid)
        )
    u = linear(attn.to_out[0], heads.flatten(2))
    eps = self.img_norm2.eps
    gated = partial(
        ops.gate_residual_norm_modulate, x, u, gate1, scale2, eps=eps, tanh=True, **second
    )
    y, x = feed(gated, mlp.gate_layer, mlp.proj)
    hidden = partial(ops.swiglu, linear(mlp.gate_layer, y), linear(mlp.proj, y))
    u = linear(mlp.out, feed(hidden, mlp.out))
    return ops.gate_residual(x, u, gate2, tanh=True, **third)


def project(attn: Any, y: Tensor | Quantized, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (normalised and rotated) and v, each [B, S, H, Dh]. rope: complex64 [S, Dh / 2]."""
    head = attn.inner_dim // attn.heads
    q, k, v = (linear(to, y).unflatten(-1, (-1, head)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q_norm, k_norm = attn.norm_q, attn.norm_k
    return ops.qk_norm_rope(q, k, v, q_norm.weight, k_norm.weight, rope, eps=q_norm.eps)


def _through_cache(
    k: Tensor,
    v: Tensor,
    cache: QwenImage21KVLayerCache | None,
    mode: str | None,
    part: slice | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values to look at: "extract" stores `part` of them, "cached" puts those before."""
    if cache is not None and mode == "extract" and part is not None:
        kept_k, kept_v = k[:, part], v[:, part]
        whole = kept_k.shape == k.shape  # a part is copied, or it would hold on to all of it
        cache.store(*((kept_k, kept_v) if whole else (kept_k.clone(), kept_v.clone())))
    elif cache is not None and mode == "cached":
        cached_k, cached_v = cache.get()
        return torch.cat([cached_k, k], dim=1), torch.cat([cached_v, v], dim=1)
    return k, v
