"""How the bindings see tensors, with DLPack's exchange functions and, as PyTorch 2.10, without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from qirl_fast import _cpu, ops
from qirl_fast.ops._recycled import empty

FLOATS = torch.arange(240, dtype=torch.float32)
TENSORS = {
    "contiguous": FLOATS.view(2, 3, 40),
    "bfloat16": FLOATS.bfloat16().view(2, 120),
    "transposed": FLOATS.view(3, 80).t(),
    "a slice": FLOATS.view(4, 60)[1:, 8:],
    "expanded": FLOATS[:4].view(4, 1).expand(4, 5),
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


def test_none_is_absent_and_nothing_else_is_taken(hidden: bool) -> None:
    assert _cpu.look_at(None)[0] == 0
    for other in (3, "x", FLOATS.numpy(), [1.0]):
        with pytest.raises(TypeError, match="takes tensors and None; got"):
            _cpu.look_at(other)


def test_a_kernel_refuses_a_dtype_it_would_read_wrongly(hidden: bool) -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        _cpu.guide(x, x, torch.ones(2), False, 1)


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
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((), (3,), (2, 3, 70), (4, 512, 1024)):
            y = empty(torch.empty(shape, dtype=dtype))
            assert (y.shape, y.dtype, y.is_contiguous()) == (shape, dtype, True)
            assert type(y) is Tensor and not y.requires_grad and y.data_ptr() % 64 == 0
            assert torch.equal(y.fill_(3), torch.full(shape, 3.0, dtype=dtype))
    assert empty(TENSORS["a parameter"]).shape == (3, 4)
    assert empty(TENSORS["transposed"]).stride() == (3, 1)
    assert empty(TENSORS["no elements"]).shape == (0, 3)


@pytest.mark.parametrize("name", ["a slice", "expanded", "transposed"])
def test_what_is_not_dense_is_copied(hidden: bool, name: str) -> None:
    x = TENSORS[name]
    coefficients = torch.rand(4, 2 * len(x), generator=torch.Generator().manual_seed(1))[:, ::2]
    given = [x, x + 1, x * 2, *coefficients]
    wanted = ops.flow_logp(*(t.contiguous() for t in given))
    assert torch.equal(ops.flow_logp(*given), wanted)


def test_what_every_check_lets_pass_is_seen_at_once() -> None:
    x, half, row = torch.ones(2, 3, 4), torch.ones(2, 3, 4).bfloat16(), torch.ones(2)
    assert _cpu.plain_rows((x, x), (half, x), (row,))
    assert _cpu.plain_rows((x.transpose(1, 2),), (), ())
    wrong = [
        ((x, half), (), ()),
        ((x,), (x[:1],), ()),
        ((x,), (x[0],), ()),
        ((x,), (None,), ()),
        ((x,), (), (torch.ones(3),)),
        ((x,), (), (row.double(),)),
        ((x,), (), (row.view(2, 1),)),
        ((x.double(),), (), ()),
        ((x.to("meta"),), (), ()),
        ((nn.Parameter(x),), (), ()),
        ((torch.empty(0, 4),), (), ()),
        ((torch.tensor(1.0),), (), ()),
        ((x.to_sparse(),), (), ()),
        ((3,), (), ()),
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


class Subclass(torch.Tensor):
    pass


def test_what_does_not_lie_in_memory_as_it_reads_goes_to_the_dispatcher() -> None:
    x = torch.ones(2)
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    zeros = torch._efficientzerotensor((2,))
    for odd in (x.to_sparse(), x.to("meta"), x.as_subclass(Subclass), negated, zeros):
        for arguments in ((odd,), (x, odd), (x, [x, odd]), (x, (odd,))):
            assert _cpu.kinds(arguments, (0,)) is None
    assert _cpu.kinds((3,), (0,)) is _cpu.empty_like("x") is None
