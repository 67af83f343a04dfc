"""qk_norm_rope: values and gradients, layouts, batch invariance, and the stock attention code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor

from qirl_fast import ops
from qirl_fast.ops.qk_norm_rope import qk_norm_rope_reference

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
Inputs = list[Tensor | None]  # q, k, v, q_weight, k_weight, rope


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int, int, int] = (2, 5, 3, 3, 16),
    seed: int = 0,
    *,
    weights: bool = True,
    rope: str | None = "shared",
) -> Inputs:
    """shape: B, tokens, heads of q, heads of k and v, width; parts of one projection."""
    batch, length, heads, k_heads, width = shape
    fused = normal(batch, length, heads + 2 * k_heads, width, seed=seed).to(dtype)
    q, k, v = fused.split([heads, k_heads, k_heads], dim=2)
    w: Inputs = [None, None]
    if weights:
        w = [1 + 0.3 * normal(width, seed=seed + i).to(dtype) for i in (1, 2)]
    angle = normal(batch, length, width // 2, seed=seed + 3)
    turn = torch.polar(torch.ones_like(angle), angle)
    return [q, k, v, *w, {"shared": turn[0], "each": turn, None: None}[rope]]


JOINT = {
    "image alone": ((2, 5, 3, 3, 16), None),
    "joint": ((2, 9, 3, 3, 16), (2, 4, 3, 3, 16)),
    "one token, one head": ((1, 1, 1, 1, 2), (1, 1, 1, 1, 2)),
    "grouped heads, width 24": ((1, 7, 4, 2, 24), (1, 3, 4, 2, 24)),
    "more tokens than a task": ((2, 37, 2, 2, 128), (2, 19, 2, 2, 128)),
    "width 64": ((1, 6, 5, 5, 64), (1, 2, 5, 5, 64)),
    "width 256": ((1, 3, 2, 2, 256), None),
}


def both(case: str, dtype: torch.dtype, **options: Any) -> tuple[Inputs, Inputs | None]:
    image, text = JOINT[case]
    return make(dtype, image, 0, **options), None if text is None else make(dtype, text, 50)


def leaves(inputs: Inputs) -> Inputs:
    """Copies that require grad (not rope), with the strides of the originals."""
    return [t if t is None or t.is_complex() else t.detach().requires_grad_(True) for t in inputs]


def run(op: Callable[..., Any], image: Inputs, text: Inputs | None) -> list[Tensor]:
    """Q, K, V and the gradients of everything under fixed incoming gradients."""
    image, text = leaves(image), None if text is None else leaves(text)
    out = op(image, text)
    grads = [normal(*t.shape, seed=90 + i).to(t.dtype) for i, t in enumerate(out)]
    wanted = [t for t in (*image, *(text or [])) if t is not None and t.requires_grad]
    return [t.detach() for t in out] + list(torch.autograd.grad(out, wanted, grads))


def ours(image: Inputs, text: Inputs | None) -> Any:
    return ops.qk_norm_rope(*image, text=None if text is None else ops.Stream(*text), eps=EPS)


def plain(image: Inputs, text: Inputs | None) -> Any:
    """The definition through autograd, in the dtype of its inputs."""
    if text is None:
        q, k, _ = qk_norm_rope_reference(*image, *(None,) * 6, EPS)
        return q, k, image[2]
    return qk_norm_rope_reference(*image, *text, EPS)


def stock(image: Inputs, text: Inputs | None) -> Any:
    """What diffusers' Qwen-Image attention processors do between projection and attention."""

    def stream(inputs: Inputs) -> list[Tensor]:
        q, k, v, q_weight, k_weight, rope = inputs
        done = []
        for x, weight in ((q, q_weight), (k, k_weight)):
            norm = RMSNorm(x.shape[-1], eps=EPS)
            norm.weight = torch.nn.Parameter(weight)
            y = torch.func.functional_call(norm, {"weight": weight}, (x,))
            done.append(apply_rotary_emb_qwen(y.to(v.dtype), rope, use_real=False))
        return [*done, v]

    if text is None:
        return stream(image)
    return [torch.cat(pair, dim=1) for pair in zip(stream(text), stream(image), strict=True)]


def wide(inputs: Inputs | None) -> Inputs | None:
    if inputs is None:
        return None
    return [
        None if t is None else t.to(torch.complex128 if t.is_complex() else torch.float64)
        for t in inputs
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", JOINT)
def test_values_and_gradients(isa, poisoned, no_worse, case: str, dtype: torch.dtype) -> None:
    image, text = both(case, dtype)
    truth = run(plain, wide(image), wide(text))
    for got, same, true in zip(run(ours, image, text), run(stock, image, text), truth, strict=True):
        assert got.dtype == dtype
        no_worse(got, same, true)


@pytest.mark.parametrize("options", [{"weights": False}, {"rope": None}, {"rope": "each"}])
def test_without_weights_or_rope_or_one_for_each_sample(isa, no_worse, options) -> None:
    image, text = both("joint", torch.float32, **options)
    truth = run(plain, wide(image), wide(text))
    for got, same, true in zip(run(ours, image, text), run(plain, image, text), truth, strict=True):
        no_worse(got, same, true)


@pytest.mark.parametrize("case", JOINT)
def test_agrees_with_the_stock_processors_in_float32(case: str) -> None:
    image, text = both(case, torch.float32)
    for got, wanted in zip(run(ours, image, text), run(stock, image, text), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [name for name, (image, _) in JOINT.items() if image[-1] % 8 == 0])
def test_cuda_on_the_host(emulated_cuda, poisoned, no_worse, case: str, dtype) -> None:
    image, text = both(case, dtype)
    truth, same = run(plain, wide(image), wide(text)), run(stock, image, text)
    with ops.use_backend("cuda"):
        results = run(ours, image, text)
    for got, eager, true in zip(results, same, truth, strict=True):
        no_worse(got, eager, true)


def test_cuda_refuses_widths_it_has_no_lanes_for(emulated_cuda) -> None:
    with ops.use_backend("cuda"), pytest.raises(ValueError, match="multiple of 8 up to 256"):
        ours(make(shape=(1, 2, 1, 1, 12)), None)


def test_without_text_v_is_v_itself() -> None:
    image = make()
    assert ours(image, None)[2] is image[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_alone_and_in_its_batch(isa, dtype: torch.dtype) -> None:
    image, text = both("joint", dtype)

    def second(inputs: Inputs) -> Inputs:
        return [t[1:] if i < 3 else t for i, t in enumerate(inputs)]

    whole, alone = ours(image, text), ours(second(image), second(text))
    assert all(torch.equal(a, w[1:]) for a, w in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_any_number_of_threads(isa, threads, dtype: torch.dtype) -> None:
    image, text = both("more tokens than a task", dtype)
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(run(ours, image, text))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_layouts_give_the_same_bits() -> None:
    image, text = both("joint", torch.float32)
    wanted = ours(image, text)
    dense = [[t.contiguous() for t in s[:3]] + s[3:] for s in (image, text)]
    swapped = [
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in s[:3]] + s[3:]
        for s in (image, text)
    ]
    apart = [
        [torch.stack([t, t], -1)[..., 0] for t in s[:5]] + [s[5].conj().resolve_conj().conj()]
        for s in (image, text)
    ]
    for other in (dense, swapped, apart):
        got = ours(*other)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_opcheck() -> None:
    image, text = both("joint", torch.float32)
    permuted = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in image[:3]] + image[3:]
    op = torch.ops.qirl.qk_norm_rope.default
    back = torch.ops.qirl.qk_norm_rope_backward.default
    for first in (image, permuted):
        torch.library.opcheck(op, (*first, *text, EPS, ""))
        Q, K, _ = op(*first, *text, EPS, "")
        picked = [s[i] for s in (first, text) for i in (0, 1, 3, 4, 5)]
        for want in (True, False):
            torch.library.opcheck(back, (Q, K, *picked, EPS, want, ""))
    torch.library.opcheck(op, (*image[:2], None, *image[3:], *(None,) * 6, EPS, ""))


@pytest.mark.parametrize("case", ["joint", "image alone"])
def test_compiles_without_a_graph_break(case: str) -> None:
    image, text = both(case, torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    wanted, got = run(ours, image, text), run(compiled, image, text)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_frozen_weights_get_no_gradient_and_under_autocast_nothing_changes() -> None:
    image = make(torch.bfloat16)
    q = image[0].detach().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        Q, K, _ = ops.qk_norm_rope(q, *image[1:], eps=EPS)
    assert Q.dtype == torch.bfloat16 and not K.isnan().any()
    Q.float().sum().backward()
    assert q.grad is not None and image[3].grad is None


BAD: dict[str, tuple[Callable[[Inputs], Inputs], str]] = {
    "odd width": (lambda i: [t[..., :15] for t in i[:3]] + [None] * 3, "even"),
    "k of other tokens": (lambda i: [i[0], i[1][:, :3], *i[2:]], "k"),
    "weight of another width": (lambda i: [*i[:3], i[3][:8], *i[4:]], "weight"),
    "real rope": (lambda i: [*i[:5], i[5].real.contiguous()], "complex64"),
    "rope of other tokens": (lambda i: [*i[:5], i[5][:3]], "rope"),
    "three dimensions": (lambda i: [i[0][0], *i[1:]], "q"),
    "integers": (lambda i: [i[0].int(), *i[1:]], "float32 or bfloat16"),
    "mixed dtypes": (lambda i: [i[0], i[1].bfloat16(), *i[2:]], "k"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, words = BAD[case]
    with pytest.raises(ValueError, match=words) as error:
        ours(change(make()), None)
    assert str(error.value).startswith("qk_norm_rope: ")


def test_rope_that_requires_grad_and_streams_that_do_not_fit() -> None:
    image = make()
    with pytest.raises(ValueError, match="rope"):
        ours([*image[:5], image[5].detach().requires_grad_(True)], None)
    with pytest.raises(ValueError, match="text"):
        ours(image, make(shape=(2, 3, 2, 2, 16)))
    with pytest.raises(ValueError, match="eps"):
        ops.qk_norm_rope(*image, eps=-1.0)
