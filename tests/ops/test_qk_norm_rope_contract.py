"""qk_norm_rope: what must not change its bits, NaN, mixed dtypes, and diffusers' own attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage, transformer_qwenimage21
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Attention
from torch import Tensor

from qirl_fast import _cpu, ops

DTYPES = [torch.float32, torch.bfloat16]
KERNELS = ["reference", "cpu", "cuda"]
Streams = tuple[ops.Stream, ops.Stream]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(length: int, width: int, seed: int = 0) -> Tensor:
    angle = normal(length, width // 2, seed=seed)
    return torch.polar(torch.ones_like(angle), angle)


def stream(batch: int, length: int, heads: int, width: int, seed: int, dtype: Any) -> ops.Stream:
    q, k, v = normal(3, batch, length, heads, width, seed=seed).to(dtype)
    weights = (1 + 0.3 * normal(width, seed=seed + i) for i in (1, 2))
    return ops.Stream(q, k, v, *weights, rotation(length, width, seed + 3))


def pair(batch: int, image: int, text: int, heads: int, width: int, dtype: Any) -> Streams:
    streams = [stream(batch, n, heads, width, 10 * n, dtype) for n in (image, text)]
    return streams[0], streams[1]


def sample(streams: Streams, at: slice) -> Streams:
    image, text = (s._replace(q=s.q[at], k=s.k[at], v=s.v[at]) for s in streams)
    return image, text


def gradients_for(out: Any) -> list[Tensor]:
    return [normal(*t.shape, seed=90 + i).to(t.dtype) for i, t in enumerate(out)]


def run(streams: Streams, grads: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """(Q, K, V and the gradients of q, k, v of both streams; the gradients of the weights)."""
    image, text = (
        ops.Stream(*(t.detach().requires_grad_(not t.is_complex()) for t in s)) for s in streams
    )
    out = ops.qk_norm_rope(*image, text=text)
    heads, weights = [*image[:3], *text[:3]], [*image[3:5], *text[3:5]]
    got = torch.autograd.grad(out, heads + weights, grads or gradients_for(out))
    return [*(t.detach() for t in out), *got[:6]], list(got[6:])


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_outputs_bypass_the_caches_and_a_sample_alone_has_its_bits(isa, poisoned, dtype):
    """Two samples are just beyond the size from which stores are streamed, one is not."""
    image, text = (1000, 50) if dtype == torch.float32 else (2000, 100)
    streams = pair(2, image, text, 9, 128, dtype)
    with torch.no_grad():
        grads = gradients_for(ops.qk_norm_rope(*streams[0], text=streams[1]))
    assert streams[0].q.nbytes >= 8 << 20 > streams[0].q[:1].nbytes * 3 // 2
    whole, _ = run(streams, grads)
    for i in range(2):
        at = slice(i, i + 1)
        alone, _ = run(sample(streams, at), [g[at] for g in grads])
        assert equal(alone, [t[at] for t in whole])


@pytest.mark.parametrize("width", [2, 20, 64, 128, 130])
def test_all_instruction_sets_give_the_same_bits(width: int) -> None:
    streams = pair(2, 11, 5, 9, width, torch.bfloat16)
    results = []
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        heads, weights = run(streams)
        results.append(heads + weights)
    _cpu.unforce_isa()
    assert all(equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_samples_alone_repeats_and_unaligned_inputs(emulated_cuda, dtype) -> None:
    streams = pair(2, 11, 9, 3, 24, dtype)

    def shifted(t: Tensor) -> Tensor:
        """The same values one element off any aligned address."""
        wide = torch.cat((t[..., :1], t, t[..., :7]), dim=-1)
        return wide[..., 1 : 1 + t.shape[-1]]

    image, text = (ops.Stream(*map(shifted, s[:3]), *s[3:]) for s in streams)
    with ops.use_backend("cuda"), torch.no_grad():
        grads = gradients_for(ops.qk_norm_rope(*streams[0], text=streams[1]))
    with ops.use_backend("cuda"):
        heads, weights = run(streams, grads)
        for same in (streams, (image, text)):
            again, weights_again = run(same, grads)
            assert equal(again, heads) and equal(weights_again, weights)
        alone, _ = run(sample(streams, slice(1, 2)), [g[1:] for g in grads])
    assert equal(alone, [t[1:] for t in heads])


@pytest.mark.parametrize("backend", KERNELS)
def test_nan_reaches_its_head_and_nothing_else(emulated_cuda, backend: str) -> None:
    image, text = pair(1, 9, 3, 3, 16, torch.float32)
    grads = gradients_for(ops.qk_norm_rope(*image, text=text))
    with ops.use_backend(backend):
        clean, _ = run((image, text), grads)
        image.q[0, 4, 1, 5] = math.nan  # joint place 3 + 4
        grads[1][0, 2, 0, 3] = math.nan  # of K, text token 2
        dirty, weights = run((image, text), grads)
    wanted = [torch.zeros_like(t, dtype=torch.bool) for t in clean]
    wanted[0][0, 7, 1] = True  # Q
    wanted[3][0, 4, 1] = True  # dq
    wanted[7][0, 2, 0] = True  # dk of the text
    for got, before, nan in zip(dirty, clean, wanted, strict=True):
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(got[~nan], before[~nan])
    assert bool(weights[0].isnan().all())  # of the image's q
    assert int(weights[3].isnan().sum()) == 2  # of the text's k: the pair that was rotated
    assert not weights[1].isnan().any() and not weights[2].isnan().any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_have_dtypes_of_their_own(emulated_cuda, backend: str, dtype) -> None:
    image, text = pair(1, 9, 3, 3, 16, dtype)
    image = image._replace(q_weight=image.q_weight.bfloat16())
    text = text._replace(k_weight=text.k_weight.bfloat16())
    as_float = [
        s._replace(q_weight=s.q_weight.float(), k_weight=s.k_weight.float()) for s in (image, text)
    ]
    with ops.use_backend(backend):
        heads, weights = run((image, text))
        heads_float, weights_float = run((as_float[0], as_float[1]))
    low = torch.bfloat16
    assert [w.dtype for w in weights] == [low, torch.float32, torch.float32, low]
    assert equal(heads, heads_float)
    assert equal(weights, [w.to(g.dtype) for w, g in zip(weights_float, weights, strict=True)])


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_in_any_layout(emulated_cuda, backend: str) -> None:
    """As attention hands them back: heads before tokens; or expanded, by a plain sum."""
    streams = pair(2, 5, 3, 3, 16, torch.float32)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t[:1, :1, :1, :1].expand(t.shape),
    ):
        with ops.use_backend(backend):
            grads = gradients_for(ops.qk_norm_rope(*streams[0], text=streams[1]))
            strided = [layout(g) for g in grads]
            got, wanted = run(streams, strided), run(streams, [g.contiguous() for g in strided])
        assert equal(got[0], wanted[0]) and equal(got[1], wanted[1])


def test_widths_beyond_the_scratch_of_the_cpu_kernel_are_refused() -> None:
    image = stream(1, 2, 1, 1026, 0, torch.float32)
    with pytest.raises(ValueError, match="at most 1024 channels; got 1026"):
        ops.qk_norm_rope(*image)
    with ops.use_backend("reference"):
        assert ops.qk_norm_rope(*image)[0].isfinite().all()


# ---- diffusers' own code, float32 ---------------------------------------------------------------
def close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Both take a dozen roundings of numbers of size 4."""
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def random_norms(module: torch.nn.Module) -> None:
    for i, (name, parameter) in enumerate(module.named_parameters()):
        if "norm" in name:
            parameter.data = 1 + 0.3 * normal(*parameter.shape, seed=i)


@torch.no_grad()
def test_is_what_qwen_image_21_prepares() -> None:
    attention = QwenImage21Attention(24, 3, 16)
    random_norms(attention)
    x, rope = normal(2, 7, 24), rotation(7, 16)
    prepare = transformer_qwenimage21._qwenimage21_prepare_qkv
    wanted = prepare(attention, x, rope, None, None, None)[:3]
    projections = (attention.to_q, attention.to_k, attention.to_v)
    q, k, v = (projection(x).unflatten(-1, (3, 16)) for projection in projections)
    close(ops.qk_norm_rope(q, k, v, attention.norm_q.weight, attention.norm_k.weight, rope), wanted)


@torch.no_grad()
def test_is_what_the_double_stream_processor_hands_to_attention(monkeypatch) -> None:
    attention = QwenImageTransformerBlock(48, 3, 16).attn
    random_norms(attention)
    image, text = normal(2, 7, 48), normal(2, 4, 48, seed=1)
    rope, text_rope = rotation(7, 16), rotation(4, 16, seed=1)
    handed: list[tuple[Tensor, ...]] = []

    def record(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        handed.append((q, k, v))
        return v

    monkeypatch.setattr(transformer_qwenimage, "dispatch_attention_fn", record)
    attention(image, encoder_hidden_states=text, image_rotary_emb=(rope, text_rope))

    def project(x: Tensor, *projections: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [projection(x).unflatten(-1, (3, 16)) for projection in projections]

    got = ops.qk_norm_rope(
        *project(image, attention.to_q, attention.to_k, attention.to_v),
        *(attention.norm_q.weight, attention.norm_k.weight, rope),
        text=ops.Stream(
            *project(text, attention.add_q_proj, attention.add_k_proj, attention.add_v_proj),
            *(attention.norm_added_q.weight, attention.norm_added_k.weight, text_rope),
        ),
    )
    close(got, handed[0])
