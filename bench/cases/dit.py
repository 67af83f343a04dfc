"""Transformer ops at [batch, tokens, width]. `eager` is written as diffusers and PEFT write it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases.case import Case, Make, Shape, size_of
from qirl_fast import ops

HEAD_DIM = 128
TEXT_TOKENS = 256
RANK = 64


def _modulated(x, scale, shift):
    norm = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return norm * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _fp8(y):
    """The three passes over y that follow an op when nothing is fused: amax, scale, cast."""
    scale = (y.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=2.0**-126)
    return (y.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


def _liger_layer_norm(x, scale, shift):
    """LayerNorm's affine is the modulation of a batch of one."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, 1 + scale[0], shift[0], 1e-6)


def _flash_attn_layer_norm(x, scale, shift):
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x, 1 + scale[0], shift[0], eps=1e-6)


def norm_modulate(shape: Shape, make: Make) -> Case:
    x = make.large(*shape)
    scale, shift = (make.large(shape[0], shape[-1]) for _ in range(2))
    rivals = {"liger": _liger_layer_norm, "flash-attn": _flash_attn_layer_norm}
    return Case(
        "norm_modulate",
        shape,
        (x, scale, shift),
        ops.norm_modulate,
        _modulated,
        2 * size_of(x),
        3 * size_of(x),
        leaves=(0, 1, 2),
        rivals=rivals if shape[0] == 1 else {},
    )


def norm_modulate_fp8(shape: Shape, make: Make) -> Case:
    """y in fp8 too, for the linear layer behind."""
    x = make.large(*shape)
    scale, shift = (make.large(shape[0], shape[-1]) for _ in range(2))

    def ours(x, scale, shift):
        return ops.norm_modulate(x, scale, shift, quantize="row")

    def eager(x, scale, shift):
        y = _modulated(x, scale, shift)
        return y, *_fp8(y)

    # A y that lies between two codes may round to either: one fp8 step of 1/8.
    return Case(
        "norm_modulate, fp8",
        shape,
        (x, scale, shift),
        ours,
        eager,
        2 * size_of(x) + x.numel(),
        tolerance=2**-3,
    )


def gate_residual(shape: Shape, make: Make) -> Case:
    residual, u, gate = make.large(*shape), make.large(*shape), make.large(shape[0], shape[-1])

    def eager(residual, u, gate):
        return residual + gate.unsqueeze(1) * u

    n = size_of(u)
    inputs = (residual, u, gate)
    return Case(
        "gate_residual", shape, inputs, ops.gate_residual, eager, 3 * n, 3 * n, leaves=(0, 1, 2)
    )


def gate_residual_norm_modulate(shape: Shape, make: Make) -> Case:
    residual, u = make.large(*shape), make.large(*shape)
    gate, scale, shift = (make.large(shape[0], shape[-1]) for _ in range(3))

    def eager(residual, u, gate, scale, shift):
        residual = residual + gate.unsqueeze(1) * u
        return _modulated(residual, scale, shift), residual

    n = size_of(u)
    return Case(
        "gate_residual_norm_modulate",
        shape,
        (residual, u, gate, scale, shift),
        ops.gate_residual_norm_modulate,
        eager,
        4 * n,
        6 * n,
        leaves=(0, 1, 2, 3, 4),
    )


def _rms_norm(x, weight):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    return x.to(weight.dtype) * weight


def _rotate(x, rope):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rope.unsqueeze(1)).flatten(3).type_as(x)


def qk_norm_rope(shape: Shape, make: Make) -> Case:
    """Image and text streams written into the joint buffer; [B, S, H, 128] with S all tokens."""
    batch, tokens, width = shape
    heads, text = width // HEAD_DIM, min(TEXT_TOKENS, tokens // 2)
    qkv = [make.large(batch, tokens - text, heads, HEAD_DIM) for _ in range(3)]
    text_qkv = [make.large(batch, text, heads, HEAD_DIM) for _ in range(3)]
    weights = [1 + 0.1 * make.rows(HEAD_DIM) for _ in range(4)]
    weights = [w.to(make.dtype) for w in weights]
    angles = make.rows(tokens, HEAD_DIM // 2)
    rope = torch.polar(torch.ones_like(angles), angles)
    inputs = (*qkv, *text_qkv, *weights, rope[text:].contiguous(), rope[:text].contiguous())

    def ours(q, k, v, text_q, text_k, text_v, wq, wk, text_wq, text_wk, rope, text_rope):
        stream = ops.Stream(text_q, text_k, text_v, text_wq, text_wk, text_rope)
        return ops.qk_norm_rope(q, k, v, wq, wk, rope, text=stream)

    def eager(q, k, v, text_q, text_k, text_v, wq, wk, text_wq, text_wk, rope, text_rope):
        q, k = _rotate(_rms_norm(q, wq), rope), _rotate(_rms_norm(k, wk), rope)
        text_q = _rotate(_rms_norm(text_q, text_wq), text_rope)
        text_k = _rotate(_rms_norm(text_k, text_wk), text_rope)
        pairs = ((text_q, q), (text_k, k), (text_v, v))
        return tuple(torch.cat(pair, dim=1) for pair in pairs)

    n = size_of(*qkv, *text_qkv)
    joint = (batch, tokens, heads, HEAD_DIM)
    # The backward pass reads q and k again, beside three gradients in and three out.
    return Case(
        "qk_norm_rope",
        joint,
        inputs,
        ours,
        eager,
        2 * n,
        2 * n + 2 * n // 3,
        leaves=tuple(range(6)),
    )


def gelu(shape: Shape, make: Make) -> Case:
    x = make.large(*shape)

    def eager(x):
        return F.gelu(x, approximate="tanh")

    return Case("gelu", shape, (x,), ops.gelu, eager, 2 * size_of(x), 3 * size_of(x), leaves=(0,))


def _liger_swiglu(gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def swiglu(shape: Shape, make: Make) -> Case:
    gate, up = make.large(*shape), make.large(*shape)

    def eager(gate, up):
        return F.silu(gate) * up

    n = size_of(gate)
    return Case(
        "swiglu",
        shape,
        (gate, up),
        ops.swiglu,
        eager,
        3 * n,
        5 * n,
        leaves=(0, 1),
        rivals={"liger": _liger_swiglu},
    )


def swiglu_fp8(shape: Shape, make: Make) -> Case:
    """y in fp8 too, for the linear layer behind."""
    gate, up = make.large(*shape), make.large(*shape)

    def ours(gate, up):
        return ops.swiglu(gate, up, quantize="row")

    def eager(gate, up):
        y = F.silu(gate) * up
        return y, *_fp8(y)

    size = 3 * size_of(gate) + gate.numel()
    return Case("swiglu, fp8", shape, (gate, up), ours, eager, size, tolerance=2**-3)


def lora_linear(shape: Shape, make: Make) -> Case:
    """Bound by the base GEMM: the share of the copy says little here."""
    width = shape[-1]
    x, weight = make.large(*shape), make.large(width, width) / width**0.5
    a, b = make.large(RANK, width) / width**0.5, make.large(width, RANK) / RANK**0.5

    def ours(x, weight, a, b):
        return ops.lora_linear(x, weight, None, [(a, b, 2.0)])

    def eager(x, weight, a, b):
        return F.linear(x, weight) + F.linear(F.linear(x, a), b) * 2.0

    n, w = 2 * size_of(x), size_of(weight)
    return Case(
        "lora_linear", shape, (x, weight, a, b), ours, eager, n + w, n + w, leaves=(0, 2, 3)
    )


def fp8_quantize(shape: Shape, make: Make) -> Case:
    x = make.large(*shape)

    def ours(x):
        return ops.fp8_quantize(x, granularity="row")

    # A quotient that lies between two codes may round to either: one fp8 step of 1/8.
    return Case("fp8_quantize", shape, (x,), ours, _fp8, size_of(x) + x.numel(), tolerance=2**-3)


def fp8_linear(shape: Shape, make: Make) -> Case:
    """Bound by its GEMM. `eager` is the linear layer of the storage dtype that it replaces."""
    width = shape[-1]
    x, weight = make.large(*shape), make.large(width, width) / width**0.5
    weight_q, weight_scale = ops.fp8_quantize(weight, granularity="row")

    def ours(x, weight, weight_q, weight_scale):
        return ops.fp8_linear(x, weight_q, weight_scale, granularity="row", weight=weight)

    def eager(x, weight, weight_q, weight_scale):
        return F.linear(x, weight)

    n, w = 2 * size_of(x), size_of(weight)
    inputs: tuple[Tensor, ...] = (x, weight, weight_q, weight_scale)
    return Case(
        "fp8_linear",
        shape,
        inputs,
        ours,
        eager,
        n + w // x.element_size(),
        n + w,
        leaves=(0,),
        same_job=False,
    )


CASES = {
    "norm_modulate": norm_modulate,
    "norm_modulate, fp8": norm_modulate_fp8,
    "gate_residual": gate_residual,
    "gate_residual_norm_modulate": gate_residual_norm_modulate,
    "qk_norm_rope": qk_norm_rope,
    "gelu": gelu,
    "swiglu": swiglu,
    "swiglu, fp8": swiglu_fp8,
    "lora_linear": lora_linear,
    "fp8_quantize": fp8_quantize,
    "fp8_linear": fp8_linear,
}
