"""The fused block of Qwen-Image, with the arguments of diffusers' QwenImageTransformerBlock.

Two streams, image and text, each
    y = norm(x) (1 + scale1) + shift1;  x += gate1 attention
    y = norm(x) (1 + scale2) + shift2;  x += gate2 net2(gelu(net0(y)))
with one attention over both, whose q, k and v are normalised, rotated and written into the joint
buffers, text first, in one pass. Under zero_cond_t (Edit, EditPlus of 2511) condition-image tokens
take the modulation of t = 0.
Source: diffusers `transformer_qwenimage.py`.
Shapes: B samples, S image tokens, L text tokens, D channels, H heads of Dh.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)
from torch import Tensor, nn

from qirl_fast import ops
from qirl_fast.models.fused.attention import attend
from qirl_fast.models.fused.joint import (
    gate_rows,
    gated,
    gelu_mlp,
    half_rows,
    joint_attention,
    norm_rows,
    normed,
)
from qirl_fast.models.lora import feed, linear, quantized
from qirl_fast.models.sequence import Ulysses
from qirl_fast.ops import Stream


class Packed(NamedTuple):
    """What `packed_forward` takes behind the image. Stands where the stock block takes
    encoder_hidden_states: so the block is called as a module, and the hooks of whoever shards,
    offloads or times it run.
    """

    texts: tuple[Tensor, ...]
    img_rows: Tensor
    txt_rows: Tensor
    image_rope: Tensor
    text_ropes: tuple[Tensor, ...]
    t0: tuple[Tensor, Tensor] | None = None
    last: int | None = None
    among: Ulysses | None = None


def problems(transformer: Any) -> list[str]:
    """Why these blocks cannot be fused, one sentence each, three at most."""
    found = []
    for i, block in enumerate(transformer.transformer_blocks):
        found += [f"block {i} {problem}" for problem in _problems(block)]
    return found[:3] + (["..."] if len(found) > 3 else [])


def _problems(block: Any) -> list[str]:
    attn, found = block.attn, []
    if type(attn.processor) is not QwenDoubleStreamAttnProcessor2_0:
        found.append(
            f"has the attention processor {type(attn.processor).__name__}, and the fused block "
            f"replaces {QwenDoubleStreamAttnProcessor2_0.__name__} only"
        )
    if attn.inner_dim // attn.heads % 2:
        found.append(f"has heads of {attn.inner_dim // attn.heads} channels: rotation needs pairs")
    modules = [m for name, m in block.named_modules() if "lora_dropout" not in name]
    dropout = max((m.p for m in modules if isinstance(m, nn.Dropout)), default=0.0)
    if dropout:
        found.append(f"has dropout {dropout}; the fused one has none")
    norms = (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
    if any(norm is None for norm in norms):
        found.append("has no RMSNorm on its queries and keys")
    for mlp in (block.img_mlp, block.txt_mlp):
        if type(mlp.net[0]) is not GELU or mlp.net[0].approximate != "tanh":
            found.append(f"has the activation {type(mlp.net[0]).__name__}; wanted gelu-approximate")
    return found


def block_forward(
    self: QwenImageTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | Packed,
    encoder_hidden_states_mask: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, tuple[Tensor, ...]]:
    """(text [B, L, D], image [B, S, D]); arguments as the stock block's.

    temb: [B, D], or [2 B, D] with the rows of t = 0 last beside a modulate_index [B, S] of 0 and 1.
    With `Packed` texts there are no other arguments, and what `packed_forward` gives comes back.
    """
    if isinstance(encoder_hidden_states, Packed):
        return packed_forward(self, hidden_states, *encoder_hidden_states)
    assert temb is not None
    if joint_attention_kwargs:
        raise ValueError(
            f"the fused block takes no joint_attention_kwargs; got {sorted(joint_attention_kwargs)}"
        )
    image, text = hidden_states, encoder_hidden_states
    samples = image.shape[0]
    modulation = self.img_mod(temb)
    t0 = modulation[samples:] if self.zero_cond_t else None
    img1, img2 = half_rows(modulation[:samples], t0, modulate_index)
    txt1, txt2 = half_rows(self.txt_mod(temb[:samples]), None, None)

    attn = self.attn
    y_image = normed(image, img1, self.img_norm1, attn.to_q, attn.to_k, attn.to_v)
    y_text = normed(text, txt1, self.txt_norm1, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    u_image, u_text = joint_attention(
        attn, y_image, y_text, image_rotary_emb, encoder_hidden_states_mask
    )
    y_image, image = gated(image, u_image, img1, img2, self.img_norm2, self.img_mlp.net[0].proj)
    y_text, text = gated(text, u_text, txt1, txt2, self.txt_norm2, self.txt_mlp.net[0].proj)
    image = ops.gate_residual(image, gelu_mlp(self.img_mlp, y_image), **gate_rows(img2))
    text = ops.gate_residual(text, gelu_mlp(self.txt_mlp, y_text), **gate_rows(txt2))
    return text, image


def packed_forward(
    block: QwenImageTransformerBlock,
    image: Tensor,
    texts: tuple[Tensor, ...],
    img_rows: Tensor,
    txt_rows: Tensor,
    image_rope: Tensor,
    text_ropes: tuple[Tensor, ...],
    t0: tuple[Tensor, Tensor] | None = None,
    last: int | None = None,
    among: Ulysses | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The block on rows whose texts differ in length, without padding and without a mask.

    Linear layers see all tokens of a stream at once; norms of the text, rotation and attention go
    run by run.

    Args:
        image: [B, S, D]; texts: runs of rows, [b_i, L_i, D], in the order of the image's rows.
        img_rows, txt_rows: modulation [B, 6 D]; image_rope: complex64 [S, Dh / 2]; text_ropes: of
            each run, [L_i, Dh / 2].
        t0: bool [S], the image tokens that take the modulation of t = 0, and its row [1, 6 D].
        last: where no block follows, how many image tokens are looked at again; none of them takes
            the modulation of t = 0. They alone come back, and the text as it came.
        among: who shares the tokens; image and texts are then the own ones, ropes of all.
    Returns the image and the texts.
    """
    attn, runs = block.attn, [len(text) for text in texts]
    head = attn.inner_dim // attn.heads
    at_t0, row_t0 = (None, None) if t0 is None else (t0[0], t0[1].expand(len(image), -1))
    img1, img2 = half_rows(img_rows, row_t0, at_t0)
    halves = [half_rows(rows, None, None) for rows in txt_rows.split(runs)]
    y_image = normed(image, img1, block.img_norm1, attn.to_q, attn.to_k, attn.to_v)
    y_texts = [
        ops.norm_modulate(text, **norm_rows(first), eps=block.txt_norm1.eps)
        for text, (first, _) in zip(texts, halves, strict=True)
    ]
    own = [
        linear(to, y_image).unflatten(-1, (-1, head)).split(runs)
        for to in (attn.to_q, attn.to_k, attn.to_v)
    ]
    adders = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    y_text = feed(partial(quantized, _packed(y_texts)), *adders)
    theirs = [
        [part.unflatten(-1, (-1, head)) for part in _unpacked(linear(to, y_text), y_texts)]
        for to in adders
    ]
    parts = [part for run in zip(*own, *theirs, strict=True) for part in run]
    if among is not None:
        tokens = [len(r) for rope in text_ropes for r in [image_rope] * 3 + [rope] * 3]
        parts = among.to_heads(tokens, parts)
    heads = _attended(attn, parts, image_rope, text_ropes)
    if among is not None:
        heads = among.to_tokens(heads)
    image_heads, text_heads = ([each.flatten(2) for each in heads[k::2]] for k in (0, 1))
    if last is not None:
        image, image_heads = image[:, :last], [heads[:, :last] for heads in image_heads]
        img1, img2 = half_rows(img_rows, None, None)
    u_image = linear(attn.to_out[0], torch.cat(image_heads))
    y_image, image = gated(image, u_image, img1, img2, block.img_norm2, block.img_mlp.net[0].proj)
    image = ops.gate_residual(image, gelu_mlp(block.img_mlp, y_image), **gate_rows(img2))
    if last is not None:
        return image, texts
    y_texts, texts_after = [], []
    u_texts = _unpacked(linear(attn.to_add_out, _packed(text_heads)), text_heads)
    for text, u, (first, second) in zip(texts, u_texts, halves, strict=True):
        y, after = ops.gate_residual_norm_modulate(
            text, u, **(gate_rows(first) | norm_rows(second)), eps=block.txt_norm2.eps
        )
        y_texts.append(y)
        texts_after.append(after)
    hidden = _unpacked(gelu_mlp(block.txt_mlp, _packed(y_texts)), y_texts)
    texts = tuple(
        ops.gate_residual(text, u, **gate_rows(second))
        for text, u, (_, second) in zip(texts_after, hidden, halves, strict=True)
    )
    return image, texts


def _attended(
    attn: Any, parts: Sequence[Tensor], image_rope: Tensor, text_ropes: Sequence[Tensor]
) -> list[Tensor]:
    """Of each run what image and text see, [b_i, S, H, Dh] and [b_i, L_i, H, Dh].

    parts: of each run q, k, v of the image, then of the text.
    """
    weights = (attn.norm_added_q.weight, attn.norm_added_k.weight)
    found = []
    for i, rope in enumerate(text_ropes):
        q, k, v, text_q, text_k, text_v = parts[6 * i : 6 * i + 6]
        joint = ops.qk_norm_rope(
            *(q, k, v, attn.norm_q.weight, attn.norm_k.weight, image_rope),
            text=Stream(text_q, text_k, text_v, *weights, rope),
            eps=attn.norm_q.eps,
        )
        heads = attend(attn, *joint)
        found += [heads[:, len(rope) :], heads[:, : len(rope)]]
    return found


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """The tokens of all parts [b_i, L_i, D], one after the other: [1, T, D]."""
    return torch.cat([part.flatten(0, 1) for part in parts])[None]


def _unpacked(y: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """[b_i, L_i, ...] of the tokens of y [1, T, ...], in the order of `like`."""
    sizes = [part.shape[:2] for part in like]
    split = y[0].split([b * length for b, length in sizes])
    return [part.unflatten(0, size) for part, size in zip(split, sizes, strict=True)]
