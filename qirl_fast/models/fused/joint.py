"""A block of two streams, image and text, made of ops: Qwen-Image, SD 3.5, FLUX.1 and FLUX.2.

Each stream
    y = norm(x) (1 + scale1) + shift1;  x += gate1 attention
    y = norm(x) (1 + scale2) + shift2;  x += gate2 mlp(y)
with one attention over both. q, k and v are normalised, rotated where the family rotates, and
written into the joint buffers, text first, in one pass.
Source: diffusers `transformer_flux.py`, `transformer_flux2.py`, `attention.py`
(JointTransformerBlock) and `transformer_qwenimage.py`. Stable Diffusion 3 puts the image first:
attention does not see the order of its keys.
Shapes: B samples, S image tokens, L text tokens, D channels, H heads of Dh.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qirl_fast import ops
from qirl_fast.models.fused.attention import attend
from qirl_fast.models.lora import feed, linear
from qirl_fast.ops import Quantized, Stream

Rows = dict[str, Any]  # by the names of the ops' arguments


def half_rows(
    own: Tensor, t0: Tensor | None = None, index: Tensor | None = None
) -> tuple[Rows, Rows]:
    """Rows of the two norms and gates: shift, scale, gate [B, D], and those of t = 0.

    own, t0: [B, 6 D] in the order of the checkpoint.
    """
    names = ("shift", "scale", "gate")
    parts = own.chunk(6, dim=-1)
    first = dict(zip(names, parts[:3], strict=True))
    second = dict(zip(names, parts[3:], strict=True))
    if t0 is not None and index is not None:
        at_t0 = t0.chunk(6, dim=-1)
        mask = index != 0
        for rows, values in ((first, at_t0[:3]), (second, at_t0[3:])):
            rows |= {f"{n}_t0": v for n, v in zip(names, values, strict=True)} | {"t0": mask}
    return first, second


def norm_rows(rows: Rows) -> Rows:
    """Those of a norm: shift and scale."""
    return {n: v for n, v in rows.items() if not n.startswith("gate")}


def gate_rows(rows: Rows) -> Rows:
    """Those of a gate."""
    return {n: v for n, v in rows.items() if n.startswith("gate") or n == "t0"}


def normed(x: Tensor, rows: Rows, norm: Any, *into: Any) -> Tensor | Quantized:
    """The norm whose output goes into these layers."""
    y: Tensor | Quantized = feed(
        partial(ops.norm_modulate, x, **norm_rows(rows), eps=norm.eps), *into
    )
    return y


def gated(
    x: Tensor, u: Tensor, first: Rows, second: Rows, norm: Any, *into: Any
) -> tuple[Tensor | Quantized, Tensor]:
    """(the norm of x + gate u, whose output goes into these layers, and x + gate u)."""
    rows = gate_rows(first) | norm_rows(second)
    run = partial(ops.gate_residual_norm_modulate, x, u, **rows, eps=norm.eps)
    y, out = feed(run, *into)
    return y, out


def joint_attention(
    attn: Any,
    image: Tensor | Quantized,
    text: Tensor | Quantized,
    rope: tuple[Tensor, Tensor] | None,
    text_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the two streams add: [B, S, D] and [B, L, D]; the text's heads as they are where no
    layer follows them. rope: complex64 of image and text; text_valid: bool [B, L].
    """
    head = attn.inner_dim // attn.heads
    image_rope, text_rope = rope if rope is not None else (None, None)
    q, k, v = (
        linear(to, image).unflatten(-1, (-1, head)) for to in (attn.to_q, attn.to_k, attn.to_v)
    )
    text_q, text_k, text_v = (
        linear(to, text).unflatten(-1, (-1, head))
        for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    )
    text_weights = (attn.norm_added_q.weight, attn.norm_added_k.weight)
    stream = Stream(text_q, text_k, text_v, *text_weights, text_rope)
    q, k, v = ops.qk_norm_rope(
        *(q, k, v, attn.norm_q.weight, attn.norm_k.weight, image_rope),
        text=stream,
        eps=attn.norm_q.eps,
    )
    mask = None
    length = text_q.shape[1]
    if text_valid is not None:  # every image token may be looked at
        mask = F.pad(text_valid.bool(), (0, q.shape[1] - length), value=True)[:, None, None, :]
    heads = attend(attn, q, k, v, mask).flatten(2)
    text_heads = heads[:, :length]
    u_text = text_heads if attn.to_add_out is None else linear(attn.to_add_out, text_heads)
    return linear(attn.to_out[0], heads[:, length:]), u_text


def gelu_mlp(mlp: Any, y: Tensor | Quantized) -> Tensor:
    """net2(gelu(net0(y))) of diffusers' FeedForward."""
    hidden = partial(ops.gelu, linear(mlp.net[0].proj, y))
    return linear(mlp.net[2], feed(hidden, mlp.net[2]))


def two_streams(
    block: Any,
    image: Tensor,
    text: Tensor,
    rows: tuple[Tensor, Tensor],
    rope: Tensor | None,
    mlp: tuple[Callable[[Any, Tensor | Quantized], Tensor], Callable[[Any], Any]],
) -> tuple[Tensor, Tensor]:
    """(text [B, L, D], image [B, S, D]) after a block of FLUX.1 or FLUX.2.

    Args:
        rows: modulation [B, 6 D] of image and text. rope: complex64 [L + S, Dh / 2].
        mlp: what a stream's MLP computes, and the first layer of one.
    """
    attn, (run, first) = block.attn, mlp
    (img1, img2), (txt1, txt2) = map(half_rows, rows)
    y_image = normed(image, img1, block.norm2, attn.to_q, attn.to_k, attn.to_v)
    y_text = normed(
        text, txt1, block.norm2_context, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    )
    parts = None if rope is None else (rope[text.shape[1] :], rope[: text.shape[1]])
    u_image, u_text = joint_attention(attn, y_image, y_text, parts)
    y_image, image = gated(image, u_image, img1, img2, block.norm2, first(block.ff))
    y_text, text = gated(text, u_text, txt1, txt2, block.norm2_context, first(block.ff_context))
    image = ops.gate_residual(image, run(block.ff, y_image), **gate_rows(img2))
    text = ops.gate_residual(text, run(block.ff_context, y_text), **gate_rows(txt2))
    return text, image


def rotations(rope: Any) -> Tensor | None:
    """complex64 [S, Dh / 2] of diffusers' (cos, sin) [S, Dh], which hold every angle twice."""
    if rope is None or isinstance(rope, Tensor):
        return rope
    cos, sin = rope
    return torch.complex(cos[:, ::2].float(), sin[:, ::2].float())


def refuse_kwargs(kwargs: dict[str, Any] | None) -> None:
    """ValueError where a block is called with something that the fused one has no place for."""
    if kwargs:
        raise ValueError(f"the fused block takes no joint_attention_kwargs; got {sorted(kwargs)}")


def named(kind: str, blocks: Iterable[Any]) -> list[tuple[str, Any, Sequence[Any]]]:
    """Blocks of one attention each, as `block_problems` takes them."""
    return [(f"{kind} {i}", block, [block.attn]) for i, block in enumerate(blocks)]


def block_problems(
    blocks: Iterable[tuple[str, Any, Sequence[Any]]], processor: type[Any]
) -> list[str]:
    """Why these blocks cannot be fused, one sentence each, three at most.

    blocks: name, block and its attentions, whose processor the fused block replaces.
    """
    found = []
    for name, block, attentions in blocks:
        for attn in attentions:
            kind = type(attn.processor)
            if kind is not processor:
                found.append(
                    f"{name} has the attention processor {kind.__name__}, and the fused block "
                    f"replaces {processor.__name__} only"
                )
            head = attn.inner_dim // attn.heads
            if head % 2:
                found.append(f"{name} has heads of {head} channels: rotation needs pairs")
            text = getattr(attn, "added_kv_proj_dim", None) is not None
            if attn.norm_q is None or (text and attn.norm_added_q is None):
                found.append(f"{name} has no RMSNorm on its queries and keys")
            if getattr(attn, "fused_projections", False):
                found.append(f"{name} has fused projections; call unfuse_qkv_projections()")
        modules = [m for n, m in block.named_modules() if "lora_dropout" not in n]
        dropout = max((m.p for m in modules if isinstance(m, nn.Dropout)), default=0.0)
        if dropout:
            found.append(f"{name} has dropout {dropout}; the fused one has none")
    return found[:3] + (["..."] if len(found) > 3 else [])
