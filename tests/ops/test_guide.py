"""guide: values and gradients against float64, the 0/0 guard, and all that must not matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qirl_fast import _cpu, ops
from qirl_fast.ops.guide import guide_reference

SHAPES = [(1, 1), (3, 17), (2, 5, 64), (3, 2, 7, 33), (1, 3, 4099), (2, 4096, 16)]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    v_cond, v_uncond = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    return v_cond, v_uncond, 1 + 4 * torch.rand(shape[0], generator=g)


def value_and_gradients(function, v_cond, v_uncond, scale, rescale, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (v_cond, v_uncond)]
    y = function(*leaves, scale, rescale)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def public(v_cond, v_uncond, scale, rescale):
    return ops.guide(v_cond, v_uncond, scale, rescale=rescale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rescale", [False, True])
def test_value_and_gradients_match_float64(shape, dtype, rescale, isa, poisoned, no_worse):
    v_cond, v_uncond, scale = inputs(shape, dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = value_and_gradients(public, v_cond, v_uncond, scale, rescale, grad)
    assert _cpu.last_isa() == isa
    same = value_and_gradients(guide_reference, v_cond, v_uncond, scale, rescale, grad)
    truth = value_and_gradients(
        guide_reference, v_cond.double(), v_uncond.double(), scale, rescale, grad.double()
    )
    for got, torch_version, exact in zip(result, same, truth, strict=True):
        assert got.dtype == dtype
        no_worse(got, torch_version, exact)


def test_rescaled_tokens_have_the_conditional_norm(isa):
    v_cond, v_uncond, scale = inputs((2, 50, 64))
    y = ops.guide(v_cond, v_uncond, scale, rescale=True)
    torch.testing.assert_close(y.norm(dim=-1), v_cond.norm(dim=-1), rtol=1e-5, atol=0)
    plain = ops.guide(v_cond, v_uncond, scale)
    cosine = torch.nn.functional.cosine_similarity(y, plain, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(2, 50), rtol=1e-5, atol=0)


def test_matches_the_qwen_image_pipeline_in_float32(isa):
    """diffusers: comb = u + s (c - u); comb * (|c| / |comb|)."""
    v_cond, v_uncond, _ = inputs((2, 50, 64))
    comb = v_uncond + 4.0 * (v_cond - v_uncond)
    norms = [torch.norm(t, dim=-1, keepdim=True) for t in (v_cond, comb)]
    expected = comb * (norms[0] / norms[1])
    torch.testing.assert_close(
        ops.guide(v_cond, v_uncond, 4.0, rescale=True), expected, rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_vanishing_norms_give_zero_not_nan(backend):
    v_cond, v_uncond, _ = inputs((1, 3, 8))
    v_cond[0, 0], v_uncond[0, 0] = 0.0, 0.0  # |c| = |g| = 0
    v_uncond[0, 1] = 2.0 * v_cond[0, 1]  # g = u + 2 (c - u) = 0 but |c| > 0
    v_cond[0, 2] = 0.0  # |c| = 0 but |g| > 0
    with ops.use_backend(backend):
        y, dc, du = value_and_gradients(
            public, v_cond, v_uncond, torch.tensor([2.0]), True, torch.ones(1, 3, 8)
        )
    assert torch.equal(y, torch.zeros(1, 3, 8))
    for gradient in (dc, du):
        assert torch.equal(gradient, torch.zeros(1, 3, 8))


def test_float_scale_is_the_same_as_a_tensor(isa):
    v_cond, v_uncond, _ = inputs((3, 40))
    expected = ops.guide(v_cond, v_uncond, torch.full((3,), 3.5))
    assert torch.equal(ops.guide(v_cond, v_uncond, 3.5), expected)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_threads_or_run(dtype, rescale, isa, threads):
    v_cond, v_uncond, scale = inputs((5, 700, 33), dtype)
    grad = torch.randn(5, 700, 33, generator=torch.Generator().manual_seed(1))
    with threads(1):
        expected = value_and_gradients(public, v_cond, v_uncond, scale, rescale, grad)
    for count in (1, 2, 3):
        with threads(count):
            again = value_and_gradients(public, v_cond, v_uncond, scale, rescale, grad)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    rows = [3, 1]
    alone = value_and_gradients(
        public, v_cond[rows], v_uncond[rows], scale[rows], rescale, grad[rows]
    )
    assert all(torch.equal(a, b[rows]) for a, b in zip(alone, expected, strict=True))


def test_all_instruction_sets_give_the_same_bits():
    v_cond, v_uncond, scale = inputs((2, 9, 77))
    results = []
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        results.append(
            value_and_gradients(public, v_cond, v_uncond, scale, True, torch.ones(2, 9, 77))
        )
    _cpu.unforce_isa()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 8, 21])
def test_tokens_taken_together_give_the_bits_of_one_alone(tokens, dtype, isa, threads):
    c, u, dy = torch.randn(3, 2, tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    c[0, 0], u[0, -1], c[1, -1] = 0.0, math.inf, 2.0 * u[1, -1]
    scale = torch.tensor([2.0, -1.0])  # g = 0 in the last token of all

    def run(*at: slice) -> tuple[Tensor, ...]:
        given = [t[at].contiguous() for t in (dy, c, u)]
        y = _cpu.guide(*given[1:], scale[at[0]], True, torch.get_num_threads())
        return y, *_cpu.guide_backward(*given, scale[at[0]], True, torch.get_num_threads())

    for count in (1, 3):
        with threads(count):
            together = run(slice(None))
        for row, token in itertools.product(range(2), range(tokens)):
            at = slice(row, row + 1), slice(token, token + 1)
            for alone, part in zip(run(*at), (t[at] for t in together), strict=True):
                assert torch.equal(alone.isnan(), part.isnan())
                assert torch.equal(alone.nan_to_num(0.5), part.nan_to_num(0.5))


@pytest.mark.parametrize("rescale", [False, True])
def test_large_output_is_streamed_and_equal(rescale, isa):
    v_cond, v_uncond, scale = inputs((9, 4096, 64))
    expected = value_and_gradients(public, v_cond, v_uncond, scale, rescale, v_cond)
    part = [t[7:8] for t in (v_cond, v_uncond, scale)]
    alone = value_and_gradients(public, *part, rescale, v_cond[7:8])
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone, expected, strict=True))


@pytest.mark.parametrize("rescale", [False, True])
def test_non_contiguous_inputs_and_gradient(rescale, isa):
    v_cond, v_uncond, scale = inputs((4, 6, 10))
    expected = value_and_gradients(public, v_cond, v_uncond, scale, rescale, torch.ones(4, 6, 10))
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat((t, t), dim=1)[:, :6],
        lambda t: torch.stack((t, t), dim=-1)[..., 0],
    ):
        leaves = [layout(t).detach().requires_grad_() for t in (v_cond, v_uncond)]
        y = ops.guide(*leaves, scale, rescale=rescale)
        y.sum().backward()
        got = (y, leaves[0].grad, leaves[1].grad)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("rescale", [False, True])
def test_gradcheck_of_the_reference(rescale):
    leaves = [t.double().requires_grad_() for t in inputs((2, 2, 5))[:2]]
    with ops.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda c, u: ops.guide(c, u, 3.0, rescale=rescale), leaves)


@pytest.mark.parametrize("rescale", [False, True])
def test_opcheck(rescale):
    v_cond, v_uncond, scale = inputs((3, 4, 6), torch.bfloat16)
    v_cond = v_cond.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(torch.ops.qirl.guide.default, [v_cond, v_uncond, scale, rescale, ""])
    torch.library.opcheck(
        torch.ops.qirl.guide_backward.default,
        [torch.ones_like(v_cond), v_cond, v_uncond, scale, rescale, ""],
    )


def test_compiles_without_graph_break_with_gradient():
    v_cond, v_uncond, scale = inputs((3, 20, 16))
    grad = torch.ones(3, 20, 16)
    for value in (scale, 2.5):
        compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
        got = value_and_gradients(compiled, v_cond, v_uncond, value, True, grad)
        expected = value_and_gradients(public, v_cond, v_uncond, value, True, grad)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


GOOD = torch.ones(2, 8)
BAD = {
    "zero rows": ((torch.ones(0, 8), torch.ones(0, 8), 2.0), r"at least one row.*\(0, 8\)"),
    "shape": ((GOOD, torch.ones(2, 7), 2.0), r"v_uncond must have the shape of v_cond, \(2, 8\)"),
    "dtype": ((GOOD, GOOD.bfloat16(), 2.0), r"v_uncond must have the dtype of v_cond"),
    "not a tensor": ((GOOD, 1.0, 2.0), r"v_uncond must be a tensor; got float"),
    "NaN scale": ((GOOD, GOOD, math.nan), r"scale must be finite; got nan"),
    "inf scale": ((GOOD, GOOD, torch.tensor([1.0, math.inf])), r"scale\[1\] is inf"),
    "scale per token": ((GOOD, GOOD, torch.ones(2, 8)), r"scale needs one value a row"),
    "float64 scale": ((GOOD, GOOD, torch.ones(2).double()), r"scale must be torch.float32"),
    "scale with grad": ((GOOD, GOOD, torch.ones(2, requires_grad=True)), r"scale requires grad"),
    "rescale of scalars": ((torch.ones(2), torch.ones(2), 2.0), r"rescale needs shape"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_names_what_came_and_what_is_wanted(case, backend):
    arguments, message = BAD[case]
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        ops.guide(*arguments, rescale=True)
