"""Any shape, layout, dtype and value: an op raises its own error, or gives what `reference` gives.

Shapes from nothing to odd and wide, each tensor at an address and with strides of its own; values
of the size that trainers have are compared, forward and backward, within LOOSE roundings of the
coarsest dtype. Where a token's values are nearly one and its norm divides by next to nothing, ours
may be off the float64 numbers twice as far as the reference's in the same dtype. Then one row is
filled with NaN, infinities and numbers at the ends of float32: it may give anything or be refused,
and the other rows keep their bits. `make asan ARGS=tests/ops/test_fuzz_ops.py` runs the same under
AddressSanitizer and UBSan.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qirl_fast import ops

fuzz = settings(
    max_examples=int(os.environ.get("QIRL_FUZZ", "12")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
Call = dict[str, Any]

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
ROWS = st.sampled_from([0, 1, 2, 3, 4])
TOKENS = st.sampled_from([0, 1, 2, 3, 5, 64, 65])
WIDTHS = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 65, 127, 129, 255, 1025])
MULTIPLES = st.sampled_from([16, 32, 48, 128, 144, 256])  # of what fp8's GEMM takes
LAYOUTS = ["plain", "moved", "moved by three", "wide rows", "every second", "turned"]
WILD = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -0.0, 1e30]
# Both sides compute in float32 and round once or twice; sums of a thousand terms in two orders.
LOOSE = 32
FLOATS = (torch.float32, torch.bfloat16)


def laid(t: Tensor, layout: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if layout.startswith("moved"):  # off the alignment that allocators give
        by = 3 if layout.endswith("three") else 1
        return torch.cat([t.new_zeros(by), t.flatten(), t.new_zeros(2)])[by : by + t.numel()].view(
            t.shape
        )
    if layout == "wide rows":
        return torch.cat([t, t + 9], -1)[..., : t.shape[-1]]
    if layout == "every second":
        return torch.stack([t, t + 9], -1)[..., 0]
    if layout == "turned" and t.ndim > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    return t


class Draw:
    """Tensors of one case: dtypes of their own or one for all, layouts of their own."""

    def __init__(self, data: st.DataObject) -> None:
        self.of = data.draw
        self.generator = torch.Generator().manual_seed(self.of(st.integers(0, 2**31)))
        self.dtype = None if self.of(st.booleans()) else self.of(DTYPES)
        self.b, self.s, self.d = self.of(ROWS), self.of(TOKENS), self.of(WIDTHS)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A large tensor; its elements differ, so that no norm divides by almost nothing."""
        t = torch.randn(shape, generator=self.generator) + (torch.arange(shape[-1]) % 7 - 3)
        return laid(t.to(dtype or self.dtype or self.of(DTYPES)), self.of(st.sampled_from(LAYOUTS)))

    def all(self, names: str, *shape: int) -> Call:
        return {name: self(*shape) for name in names.split()}

    def row(self) -> Tensor:
        """One number a row, in 0.1 .. 1.1."""
        return torch.rand(self.b, generator=self.generator) + 0.1

    def rows(self) -> tuple[int, ...]:
        return (self.b, self.s, self.d) if self.of(st.booleans()) else (self.b, self.d)

    def modulation(self, names: str) -> Call:
        found = self.all(names, self.b, self.d)
        if self.of(st.booleans()):
            t0 = torch.rand((self.b, self.s), generator=self.generator) < 0.5
            found |= {f"{n}_t0": self(self.b, self.d) for n in names.split()} | {"t0": t0}
        return found

    def flow(self, names: str) -> Call:
        rows = self.rows()
        return {"x": self(*rows), "v": self(*rows)} | {name: self.row() for name in names}

    def seed(self) -> Call:
        any_seed = st.integers(-(2**63), 2**63 - 1)
        seeds = torch.tensor([self.of(any_seed) for _ in range(self.b)], dtype=torch.int64)
        return {"seed": seeds, "offset": self.of(st.integers(0, 2**63 - 1))}


def _flow_logp(draw: Draw) -> Call:
    call = draw.flow("acwb")
    noise = draw(*call["x"].shape, dtype=call["x"].dtype)
    return call | {"x_next": noise} | ({"delta": call["v"]} if draw.of(st.booleans()) else {})


def _guide(draw: Draw) -> Call:
    rows, dtype = draw.rows(), draw.of(DTYPES)
    both = {name: draw(*rows, dtype=dtype) for name in ("v_cond", "v_uncond")}
    return both | {"scale": 4 * draw.row(), "rescale": draw.of(st.booleans())}


def _guide_step(draw: Draw) -> Call:
    call = _guide(draw)
    call |= {"x": draw(*call["v_cond"].shape), "frozen": draw.of(st.booleans())} | draw.seed()
    return call | {name: draw.row() for name in "acswb"}


def _group(draw: Draw) -> Call:
    groups, members, k = draw.of(ROWS), draw.of(st.sampled_from([1, 2, 3, 17])), draw.of(ROWS)
    n = groups * members
    rewards = torch.randn((n, k), generator=draw.generator)
    valid = torch.rand((n, k), generator=draw.generator) < 0.95
    group = torch.arange(groups).repeat(members)
    options = {"std": ["group", "global"], "mode": ["zscore_sum", "sum_first", "gdpo"]}
    chosen = {name: draw.of(st.sampled_from(words)) for name, words in options.items()}
    how = draw.of(st.sampled_from(LAYOUTS))
    found = {"rewards": laid(rewards, how), "group": group, "weights": torch.ones(k) / max(k, 1)}
    return found | {"valid": valid, "num_groups": groups} | chosen


def _policy(draw: Draw) -> Call:
    names = ("logp", "logp_old", "advantage")
    return {name: draw.row() for name in names} | {"clip_low": 0.1, "clip_high": 0.2}


def _awm(draw: Draw) -> Call:
    weighting = draw.of(st.sampled_from(["uniform", "t", "t2", "huber", "ghuber"]))
    return draw.all("v noise x0", *draw.rows()) | {"time": draw.row(), "weighting": weighting}


def _qk(draw: Draw) -> Call:
    heads, keys = draw.of(st.sampled_from([1, 2, 3])), draw.of(st.sampled_from([1, 2]))
    dtype, d = draw.of(DTYPES), draw.d

    def stream(tokens: int) -> list[Any]:
        shapes = [(draw.b, tokens, n, d) for n in (heads, keys, keys)]
        angles = torch.randn((tokens, d // 2), generator=draw.generator)
        rope = torch.polar(torch.ones_like(angles), angles)
        return [draw(*shape, dtype=dtype) for shape in shapes] + [draw(d), draw(d), rope]

    call = dict(zip(("q", "k", "v", "q_weight", "k_weight", "rope"), stream(draw.s), strict=True))
    if draw.of(st.booleans()):
        call["text"] = ops.Stream(*stream(draw.of(TOKENS)))
    return call


def _lora(draw: Draw) -> Call:
    dtype, out, rank = draw.of(DTYPES), draw.of(WIDTHS), draw.of(st.sampled_from([1, 2, 5, 64]))
    factors = (draw(rank, draw.d), draw(out, rank), 0.5)
    call = {"x": draw(*draw.rows(), dtype=dtype), "weight": draw(out, draw.d, dtype=dtype)}
    return call | {"adapters": [factors] * draw.of(st.integers(0, 2))}


def _fp8_linear(draw: Draw) -> Call:
    draw.d, n = draw.of(MULTIPLES), draw.of(MULTIPLES)
    spans = draw.of(st.sampled_from(["row", "block", "tensor"]))
    q, scale = ops.fp8_quantize(
        torch.randn((n, draw.d), generator=draw.generator), granularity=spans
    )
    call = {"x": draw(*draw.rows()), "weight_q": q, "weight_scale": scale, "granularity": spans}
    return call | ({"bias": draw(n)} if draw.of(st.booleans()) else {})


def _fp8_quantize(draw: Draw) -> Call:
    types = st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2])
    spans = draw.of(st.sampled_from(["row", "block", "tensor"]))
    found = {"x": draw(*draw.rows()), "granularity": spans, "dtype": draw.of(types)}
    return found | {"transpose": draw.of(st.booleans())}


def _norm(draw: Draw) -> Call:
    return {"norm": draw.of(st.sampled_from(["layer", "rms"]))}


def _tokens(draw: Draw, names: str) -> Call:
    return draw.all(names, draw.b, draw.s, draw.d)


# Of each op: a call; what asks for a gradient; what has a row spoilt, where the results have rows.
CASES: dict[str, tuple[Callable[[Draw], Call], str, str]] = {
    "gelu": (lambda d: d.all("x", *d.rows()), "x", "x"),
    "swiglu": (lambda d: d.all("gate up", *d.rows()), "gate up", "gate up"),
    "norm_modulate": (
        lambda d: _tokens(d, "x") | d.modulation("scale shift") | _norm(d), "x scale shift", "x",
    ),
    "gate_residual": (
        lambda d: _tokens(d, "residual u") | d.modulation("gate") | {"tanh": d.of(st.booleans())},
        "residual u gate", "residual u gate",
    ),
    "gate_residual_norm_modulate": (
        lambda d: _tokens(d, "residual u") | d.modulation("gate scale shift") | _norm(d),
        "residual u gate scale shift", "residual u gate scale",
    ),
    "flow_step": (lambda d: d.flow("acswb") | d.seed(), "", "x v a b"),
    "flow_logp": (_flow_logp, "x v", "x v x_next w"),
    "guide": (_guide, "v_cond v_uncond", "v_cond v_uncond scale"),
    "guide_step": (_guide_step, "", "x v_cond v_uncond scale"),
    "group_advantage": (_group, "", ""),
    "policy_loss": (_policy, "logp", ""),
    "velocity_loss": (
        lambda d: d.all("v target", *d.rows()) | {"weight": d.row()}, "v", "",
    ),
    "nft_loss": (
        lambda d: d.all("v v_old v_ref x_t x0", *d.rows())
        | {"sigma": d.row(), "advantage": d.row(), "beta": 0.5}, "v", "",
    ),
    "awm_logp": (_awm, "v", "v noise x0 time"),
    "awm_loss": (lambda d: _awm(d) | _policy(d) | {"logp": None}, "v", ""),
    "qk_norm_rope": (_qk, "q k v q_weight k_weight", "q k v"),
    "lora_linear": (_lora, "x weight", ""),
    "fp8_quantize": (_fp8_quantize, "", ""),
    "fp8_linear": (_fp8_linear, "", ""),
}  # fmt: skip


Found = tuple[list[Tensor], list[Tensor]]


def outcome(op: str, call: Call, backend: str, wants: str) -> Found | str:
    """Results and gradients, or the op's error."""
    call = {k: v for k, v in call.items() if v is not None}
    leaves = [call[n].detach().requires_grad_() for n in wants.split()]
    call |= dict(zip(wants.split(), leaves, strict=True))
    try:
        with ops.use_backend(backend):
            found = getattr(ops, op)(**call)
    except (ValueError, ops.BackendError) as error:
        assert str(error).startswith(f"{op}: "), error
        return str(error)
    found = [t for t in ([found] if isinstance(found, Tensor) else found) if t is not None]
    moved = [t for t in found if t.requires_grad]
    gradients: tuple[Tensor | None, ...] = ()
    if moved:  # from one number throughout: an expanded tensor, without memory for each element
        ones = [t.new_full((), 0.5).expand(t.shape) for t in moved]
        gradients = torch.autograd.grad(moved, leaves, ones, allow_unused=True)
    return [t.detach() for t in found], [t for t in gradients if t is not None]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def agree(got: Tensor, wanted: Tensor, eps: float, exact: Callable[[], Tensor | None]) -> None:
    """exact: the same in float64, where the op takes that."""
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    if got.element_size() == 1:  # bool, and fp8, whose bits are promised
        assert torch.equal(bits(got), bits(wanted))
        return
    assert torch.equal(got.isnan(), wanted.isnan())
    got, wanted = got.double().nan_to_num(0.0), wanted.double().nan_to_num(0.0)
    if got.numel():
        rounding = LOOSE * eps * (1.0 + float(wanted.abs().max()))
        if float((got - wanted).abs().max()) > rounding:
            true = exact()
            assert true is not None, f"off the reference by {float((got - wanted).abs().max())}"
            true = true.nan_to_num(0.0)
            ours, theirs = (float((t - true).abs().max()) for t in (got, wanted))
            assert ours <= 2 * theirs + rounding


def in_float64(op: str, call: Call, wants: str, number: int) -> Tensor | None:
    """One of the results and gradients of the reference, of an op that takes float64."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.dtype in FLOATS else value
        for name, value in call.items()
    }
    found = outcome(op, wide, "reference", wants)
    return None if isinstance(found, str) else (found[0] + found[1])[number]


def floats(call: Call) -> list[Tensor]:
    return [t for t in call.values() if isinstance(t, Tensor) and t.is_floating_point()]


@fuzz
@pytest.mark.parametrize("op", CASES)
@given(data=st.data())
def test_any_call(op: str, data: st.DataObject) -> None:
    make, wants, by_row = CASES[op]
    draw = Draw(data)
    call = make(draw)
    got, wanted = (outcome(op, call, backend, wants) for backend in ("cpu", "reference"))
    if isinstance(got, str):  # the reference may take more dtypes, nothing else
        assert isinstance(wanted, str) or "takes torch.float" in got, got
        return
    assert not isinstance(wanted, str), wanted
    eps = max(torch.finfo(t.dtype).eps for t in floats(call) if t.element_size() > 1)
    for k, (a, b) in enumerate(zip(got[0] + got[1], wanted[0] + wanted[1], strict=True)):
        agree(a, b, eps, lambda k=k: in_float64(op, call, wants, k))
    for name in by_row.split():  # in place, in the same memory
        row = call[name][0]
        places = torch.rand(row.shape, generator=draw.generator) < 0.3
        row[places] = torch.tensor(data.draw(st.sampled_from(WILD))).to(row.dtype)
    after = outcome(op, call, "cpu", wants)
    if by_row and not isinstance(after, str):
        for a, b in zip(got[0], after[0], strict=True):
            assert torch.equal(bits(a[1:]), bits(b[1:]))


def test_every_op_is_there() -> None:
    public = {name for name in ops.__all__ if name.islower() and name != "use_backend"}
    assert public == set(CASES)
