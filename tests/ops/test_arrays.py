"""How the bindings see tensors, with DLPack's exchange functions and, as PyTorch 2.10, without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from qirl_fast import _cpu, ops

FLOATS = torch.arange(240, dtype=torch.float32)
TENSORS = {
    "contiguous": FLOATS.view(2, 3, 40),
    "bfloat16": FLOATS.bfloat16().view(2, 120),
    "transposed": FLOATS.view(3, 80).t(),
    "a slice": FLOATS.view(4, 60)[1:, 8:],
    "expanded": FLOATS[:4].view(4, 1).expand(4, 5),
    "expanded rows": FLOATS[:5].expand(3, 4, 5),
    "half of a projection": FLOATS.view(4, 6, 10)[..., 5:],
    "every other token": FLOATS.view(4, 6, 10)[:, ::2],
    "heads before tokens": FLOATS.view(2, 6, 4, 5).transpose(1, 2),
    "one token each": FLOATS.view(4, 6, 10)[:, 2:3],
    "five dimensions": FLOATS.view(2, 3, 4, 5, 2),
    "a number": torch.tensor(3.0),
    "a leaf": FLOATS.clone().requires_grad_(),
    "a parameter": nn.Parameter(torch.ones(3, 4)),
    "bool": torch.ones(5, dtype=torch.bool),
    "int64": torch.ones(5, 2, dtype=torch.int64),
    "float64": torch.ones(5, dtype=torch.float64),
    "float8": torch.ones(5).to(torch.float8_e4m3fn),
    "complex": torch.ones(2, 3, dtype=torch.complex64),
    "no elements": torch.empty(0, 3),
}
CODES = {torch.float32: 0, torch.bfloat16: 1}


@pytest.fixture(params=[False, True], ids=["exchange", "attributes"])
def hidden(request: pytest.FixtureRequest) -> Iterator[bool]:
    _cpu.hide_exchange(request.param)
    yield request.param
    _cpu.hide_exchange(False)


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_seen(hidden: bool, name: str) -> None:
    t = TENSORS[name]
    sizes, strides = ([*those[:4], 0, 0, 0, 0][:4] for those in (t.shape, t.stride()))
    code = CODES.get(t.dtype, -1)
    last = t.shape[-1] if t.ndim else 1
    address = t.data_ptr() if t.numel() else 0
    assert _cpu.look_at(t) == (address, code, t.numel(), last, sizes, strides)


@pytest.mark.parametrize("name", [n for n, t in TENSORS.items() if t.ndim and t.numel()])
def test_what_can_be_read_without_a_copy(hidden: bool, name: str) -> None:
    """`even` is what reshape(-1, K) gives as a view, with a dense last dimension."""
    t = TENSORS[name]
    dense, rows, vectors, even, step = _cpu.layout_of(t)
    matrix = t.reshape(-1, t.shape[-1])
    assert dense == t.is_contiguous() and rows == all(r.is_contiguous() for r in t)
    assert vectors == (t.stride(-1) == 1 or t.shape[-1] == 1)
    assert even == (vectors and matrix.data_ptr() == t.data_ptr())
    assert not even or len(matrix) == 1 or step == matrix.stride(0)


def test_none_is_absent_and_nothing_else_is_taken(hidden: bool) -> None:
    assert _cpu.look_at(None)[0] == 0
    for other in (3, "x", FLOATS.numpy(), [1.0]):
        with pytest.raises(TypeError, match="takes tensors and None; got"):
            _cpu.look_at(other)


def test_a_kernel_refuses_a_dtype_it_would_read_wrongly(hidden: bool) -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        _cpu.guide(x, x, torch.ones(2), False, 1)


def test_a_gradient_of_another_dtype_is_refused_or_cast() -> None:
    """The registered backward ops may be called by anyone; autograd casts before it calls them."""
    x, half, scale = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16(), torch.zeros(2, 8)
    heads, rest = x[..., None, :], (None,) * 8
    ops_of = torch.ops.qirl
    for call in (
        lambda: ops_of.gelu_backward(half, x, ""),
        lambda: ops_of.swiglu_backward(x, x, half, ""),
        lambda: ops_of.guide_backward(half, x, x, torch.ones(2), False, ""),
        lambda: ops_of.qk_norm_rope_backward(
            half[..., None, :], heads, heads, heads, *rest, 1e-6, False, ""
        ),
    ):
        with pytest.raises(TypeError, match="in one dtype; got another one too"):
            call()
    norm = ops_of.norm_modulate_backward
    _, mean, rstd, *_ = ops_of.norm_modulate(x, scale, None, None, None, None, False, 1e-6, "", "")
    got = norm(half, x, mean, rstd, scale, None, None, False, True, False, "")
    wanted = norm(half.float(), x, mean, rstd, scale, None, None, False, True, False, "")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_give_the_same_bits_either_way(hidden: bool, dtype: torch.dtype) -> None:
    wide = torch.randn(3, 2, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    x, v = wide.transpose(0, 1)[..., :64], wide.transpose(0, 1)[..., 6:]
    coefficients = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)).unbind(1)
    v = v.clone().requires_grad_()

    def results() -> list[Tensor]:
        logp = ops.flow_logp(x, x + 1, v, *coefficients)
        guided = ops.guide(v, x, 3.0, rescale=True)
        return [logp, guided, *torch.autograd.grad(logp.sum() + guided.float().sum(), v)]

    got = results()
    _cpu.hide_exchange(not hidden)
    assert all(torch.equal(a, b) for a, b in zip(got, results(), strict=True))


def test_outputs(hidden: bool) -> None:
    for code, dtype in enumerate((torch.float32, torch.bfloat16)):
        for shape in ((), (3,), (2, 3, 70), (4, 512, 1024), (2, 1, 3, 1, 5, 1)):
            y = _cpu.new_output(shape, code)
            assert (y.shape, y.dtype, y.is_contiguous()) == (shape, dtype, True)
            assert type(y) is Tensor and not y.requires_grad and y.data_ptr() % 64 == 0
            assert torch.equal(y.fill_(3), torch.full(shape, 3.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 70), (1100, 1024), (2, 1, 3, 1, 2, 4)])
def test_outputs_in_8_bits(hidden: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q, scale = ops.fp8_quantize(x, dtype=dtype)
    assert (type(q), q.dtype, q.shape, q.is_contiguous()) == (Tensor, dtype, shape, True)
    with ops.use_backend("reference"):
        wanted, wanted_scale = ops.fp8_quantize(x, dtype=dtype)
    assert torch.equal(q.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scale, wanted_scale)
    y, nothing, no_scale = torch.ops.qirl.gelu(x, "", "")
    assert (nothing.dtype, nothing.shape, no_scale.shape) == (torch.float8_e4m3fn, (0,), (0,))
    assert torch.equal(y, ops.gelu(x))


@pytest.mark.parametrize("name", ["a slice", "expanded", "transposed"])
def test_what_is_not_dense_is_copied(hidden: bool, name: str) -> None:
    x = TENSORS[name]
    coefficients = torch.rand(4, 2 * len(x), generator=torch.Generator().manual_seed(1))[:, ::2]
    given = [x, x + 1, x * 2, *coefficients]
    wanted = ops.flow_logp(*(t.contiguous() for t in given))
    assert torch.equal(ops.flow_logp(*given), wanted)


def test_what_every_check_lets_pass_is_seen_at_once() -> None:
    x, half, row = torch.ones(2, 3, 4), torch.ones(2, 3, 4).bfloat16(), torch.ones(2)
    shift = torch.ones(2, 8).bfloat16()[:, 4:]
    assert _cpu.plain_rows((x, x), (half, x), (row,), (shift, None, shift.float()))
    assert _cpu.plain_rows((x.transpose(1, 2),), (), (), ())
    assert _cpu.plain_rows((x[:, 0],), (), (), (shift,))
    wrong = [
        ((x, half), (), (), ()),
        ((x,), (x[:1],), (), ()),
        ((x,), (x[0],), (), ()),
        ((x,), (None,), (), ()),
        ((x,), (), (torch.ones(3),), ()),
        ((x,), (), (row.double(),), ()),
        ((x,), (), (row.view(2, 1),), ()),
        ((x,), (), (None,), ()),
        ((x,), (), (), (shift[:1],)),
        ((x,), (), (), (shift[:, 1:],)),
        ((x,), (), (), (shift.half(),)),
        ((x,), (), (), (shift[:, None],)),
        ((x,), (), (), (3,)),
        ((x[None],), (), (), (shift,)),
        ((row,), (), (), (None,)),
        ((x.double(),), (), (), ()),
        ((x.to("meta"),), (), (), ()),
        ((nn.Parameter(x),), (), (), ()),
        ((torch.empty(0, 4),), (), (), ()),
        ((torch.tensor(1.0),), (), (), ()),
        ((x.to_sparse(),), (), (), ()),
        ((3,), (), (), ()),
    ]
    assert not any(_cpu.plain_rows(*groups) for groups in wrong)


def kinds(*tensors: object) -> int | None:
    return _cpu.kinds(tensors, tuple(range(len(tensors))))


def test_kinds_tell_devices_and_dtypes_apart() -> None:
    x, half = torch.ones(2), torch.ones(2).bfloat16()
    given = [(x,), (half,), (x, half), (half, x), (x, None), (None, x), (x, x, None), (x.double(),)]
    given += [(x.to(torch.float8_e4m3fn),), (x.to(torch.float8_e5m2),)]
    assert len({kinds(*tensors) for tensors in given}) == len(given)
    assert kinds(x[:1]) == kinds(x.view(1, 2)) == kinds(nn.Parameter(x)), "sizes do not count"
    assert kinds(x) == _cpu.kinds((x, half, [half, x], 3, "s", None), (0,))
    assert kinds(*[x] * 8) is not None, "as many as gate_residual_norm_modulate has"
    assert kinds(*[x] * 9) is None and _cpu.kinds((x, *[3] * 32), (0,)) is None, "too many to tell"


class Subclass(torch.Tensor):
    pass


def test_what_does_not_lie_in_memory_as_it_reads_goes_to_the_dispatcher() -> None:
    x = torch.ones(2)
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    zeros = torch._efficientzerotensor((2,))
    conjugated = torch.ones(2, dtype=torch.complex64).conj()
    odds = (x.to_sparse(), x.to("meta"), x.as_subclass(Subclass), negated, conjugated, zeros)
    for odd in odds:
        for arguments in ((odd,), (x, odd), (x, [x, odd]), (x, (odd,))):
            assert _cpu.kinds(arguments, (0,)) is None
    assert _cpu.kinds((3,), (0,)) is None
