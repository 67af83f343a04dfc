"""Bad input of every op: each kind of wrong tensor, in each argument, is refused by name.

A case replaces one argument of a call that works. Whatever the fault, the answer is a ValueError
(BackendError is one kind of answer to a device nothing serves) that begins with the op's name: no
wrong number, no crash, no TypeError from the depths. `WORKS` lists the replacements that are legal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qirl_fast import ops

B, S, D = 2, 4, 16
Call = dict[str, Any]


def _rows(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape)


def _per_row(value: float = 0.5) -> Tensor:
    return torch.full((B,), value)


def _flow() -> Call:
    names = {"x": _rows(B, D), "v": _rows(B, D), "delta": _rows(B, D)}
    return names | {name: _per_row() for name in ("a", "c", "w", "b")}


def _fp8_linear() -> Call:
    w_q, w_scale = ops.fp8_quantize(_rows(D, D))
    return {"x": _rows(B, D), "weight_q": w_q, "weight_scale": w_scale, "bias": _rows(D)}


def _awm() -> Call:
    return {name: _rows(B, D) for name in ("v", "noise", "x0")} | {"time": _per_row()}


def _modulation(*names: str) -> Call:
    rows = {name: _rows(B, D) for name in names}
    t0 = torch.tensor([[True, False, False, True]] * B)
    return rows | {f"{name}_t0": _rows(B, D) for name in names} | {"t0": t0}


CALLS: dict[str, Callable[[], Call]] = {
    "norm_modulate": lambda: {"x": _rows(B, S, D)} | _modulation("scale", "shift"),
    "gate_residual": lambda: (
        {"residual": _rows(B, S, D), "u": _rows(B, S, D)} | _modulation("gate")
    ),
    "gate_residual_norm_modulate": lambda: (
        {"residual": _rows(B, S, D), "u": _rows(B, S, D)} | _modulation("gate", "scale", "shift")
    ),
    "flow_step": lambda: _flow() | {"s": _per_row(), "seed": torch.arange(B), "offset": 0},
    "flow_logp": lambda: _flow() | {"x_next": _rows(B, D)},
    "guide": lambda: {"v_cond": _rows(B, D), "v_uncond": _rows(B, D), "scale": _per_row()},
    "guide_step": lambda: (
        {"x": _rows(B, D), "v_cond": _rows(B, D), "v_uncond": _rows(B, D), "scale": _per_row()}
        | {name: _per_row() for name in "acswb"}
        | {"seed": torch.arange(B), "offset": 0}
    ),
    "group_advantage": lambda: {
        "rewards": _rows(4, 2),
        "group": torch.tensor([0, 0, 1, 1]),
        "weights": torch.ones(4, 2),
        "valid": torch.ones(4, 2, dtype=torch.bool),
        "num_groups": 2,
    },
    "policy_loss": lambda: {
        "logp": _per_row(),
        "logp_old": _per_row(),
        "advantage": _per_row(),
        "clip_low": 0.1,
        "clip_high": 0.1,
    },
    "velocity_loss": lambda: {
        "v": _rows(B, D),
        "target": _rows(B, D),
        "weight": _per_row(),
    },
    "nft_loss": lambda: (
        {name: _rows(B, D) for name in ("v", "v_old", "v_ref", "x_t", "x0")}
        | {"sigma": _per_row(), "advantage": _per_row(), "beta": 0.1}
    ),
    "awm_logp": _awm,
    "awm_loss": lambda: (
        _awm()
        | {"logp_old": _per_row(), "advantage": _per_row(), "clip_low": 0.1, "clip_high": 0.1}
    ),
    "qk_norm_rope": lambda: (
        {name: _rows(B, S, 2, D) for name in ("q", "k", "v")}
        | {"q_weight": _rows(D), "k_weight": _rows(D), "rope": torch.ones(S, D // 2) + 0j}
    ),
    "lora_linear": lambda: {
        "x": _rows(B, D),
        "weight": _rows(D, D),
        "bias": _rows(D),
        "adapters": [(_rows(2, D), _rows(D, 2), 0.5)],
    },
    "gelu": lambda: {"x": _rows(B, D)},
    "swiglu": lambda: {"gate": _rows(B, D), "up": _rows(B, D)},
    "fp8_quantize": lambda: {"x": _rows(B, D)},
    "fp8_linear": _fp8_linear,
}

# What is done to a tensor argument.
FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda t: 3.0,
    "a list": lambda t: t.tolist(),
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int32),
    "another device": lambda t: t.to("meta"),
    "no rows": lambda t: t[:0],
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "one dimension more": lambda t: t.unsqueeze(-1).expand(*t.shape, 3),
    "a scalar": lambda t: t.flatten()[0],
    "sparse": lambda t: t.to_sparse(),
}

# Replacements that make another legal call.
WORKS = {
    ("guide", "scale", "a number"),
    ("guide_step", "scale", "a number"),
    ("gelu", "x", "another device"),  # "meta" computes shapes alone
    ("fp8_quantize", "x", "another device"),
    ("qk_norm_rope", "rope", "complex"),
    ("gelu", "x", "one row more"),
    ("gelu", "x", "one dimension more"),
    ("fp8_quantize", "x", "one row more"),
    ("fp8_quantize", "x", "one dimension more"),
    ("fp8_linear", "x", "one row more"),
    ("lora_linear", "x", "one row more"),
}

# Second factors and scales that do not fit a first factor [2, D]; what spoils that first factor.
_LORA = [(_rows(D, 3), 1.0), (_rows(D - 1, 2), 1.0), (None, 1.0), (_rows(D, 2), math.nan)]
_LORA += [(_rows(D, 2), "1"), (_rows(D, 2), torch.ones(()))]
_SPOIL = list(FAULTS.values())

# A wrong value or option, by op and argument.
VALUES: list[tuple[str, str, Any]] = [
    *(("flow_step", name, bad) for name in "acswb" for bad in (math.nan, math.inf, -math.inf)),
    *(("flow_logp", name, bad) for name in "acwb" for bad in (math.nan, math.inf)),
    *(("flow_step", "offset", bad) for bad in (-1, 2**63)),
    *(("guide", "scale", bad) for bad in (math.nan, math.inf, "4")),
    *(("guide_step", "scale", bad) for bad in (math.nan, math.inf, "4")),
    *(("guide_step", name, bad) for name in "acswb" for bad in (math.nan, math.inf)),
    *(("guide_step", "offset", bad) for bad in (-1, 2**63)),
    *(("policy_loss", "clip_low", bad) for bad in (0.0, -1.0, 1.5, math.nan)),
    *(("policy_loss", "clip_high", bad) for bad in (0.0, -1.0, math.nan)),
    *(("velocity_loss", "weight", bad) for bad in (math.nan, math.inf)),
    *(("nft_loss", "sigma", bad) for bad in (math.nan, math.inf)),
    *(("nft_loss", name, bad) for name in ("beta", "adv_clip") for bad in (0.0, math.nan)),
    *(("nft_loss", "ref_weight", bad) for bad in (-1.0, math.nan)),
    *(("awm_logp", "time", bad) for bad in (math.nan, math.inf)),
    *(("awm_logp", "power", bad) for bad in (0.0, 2.0, math.nan)),
    ("awm_logp", "weighting", "t3"),
    *(("group_advantage", name, -1.0) for name in ("eps", "std_floor", "min_range", "clamp")),
    *(("group_advantage", name, math.nan) for name in ("eps", "std_floor", "min_range", "clamp")),
    *(("group_advantage", name, "none") for name in ("mode", "std", "ddof")),
    *(("group_advantage", "num_groups", bad) for bad in (0, 1, 3)),
    *(("group_advantage", "rewards", bad) for bad in (math.nan, math.inf)),
    *(("group_advantage", "weights", bad) for bad in (math.nan, math.inf)),
    *(("group_advantage", "group", bad) for bad in (-1, 7)),
    *(("norm_modulate", "eps", bad) for bad in (-1.0, math.nan)),
    ("norm_modulate", "norm", "batch"),
    ("gate_residual_norm_modulate", "norm", "batch"),
    *(("qk_norm_rope", "eps", bad) for bad in (-1.0, math.nan)),
    *(("lora_linear", "adapters", bad) for bad in (3.0, "ab", [3.0], [(1, 2)])),
    *(("lora_linear", "adapters", [(_rows(2, D), b, s)]) for b, s in _LORA),
    *(("lora_linear", "adapters", [(fault(_rows(2, D)), _rows(D, 2), 1.0)]) for fault in _SPOIL),
    ("fp8_quantize", "granularity", "column"),
    ("fp8_quantize", "dtype", torch.int8),
    ("fp8_linear", "granularity", "block"),
]

# Arguments without a gradient: one that asks for it is told so.
CONSTANTS = [
    *(("flow_logp", name) for name in ("x_next", "delta", "a", "c", "w", "b")),
    ("guide", "scale"),
    ("guide_step", "scale"),
    *(("policy_loss", name) for name in ("logp_old", "advantage")),
    *(("velocity_loss", name) for name in ("target", "weight")),
    *(("nft_loss", name) for name in ("v_old", "v_ref", "x_t", "x0", "sigma", "advantage")),
    *(("awm_logp", name) for name in ("noise", "x0", "time")),
    *(("awm_loss", name) for name in ("noise", "x0", "time", "logp_old", "advantage")),
    *(("group_advantage", name) for name in ("rewards", "weights")),
    ("qk_norm_rope", "rope"),
    ("fp8_quantize", "x"),
    *(("fp8_linear", name) for name in ("weight_scale", "bias")),
]

TENSOR_CASES = [
    (op, argument, fault)
    for op, make in CALLS.items()
    for argument, value in make().items()
    if isinstance(value, Tensor)
    for fault in FAULTS
]


def _call(op: str, arguments: Call) -> Any:
    return getattr(ops, op)(**arguments)


def _refused(op: str, arguments: Call) -> str:
    with pytest.raises((ValueError, ops.BackendError)) as error:
        _call(op, arguments)
    assert str(error.value).startswith(f"{op}: "), error.value
    return str(error.value)


def test_there_are_enough_cases() -> None:
    assert len(TENSOR_CASES) + len(VALUES) + len(CONSTANTS) >= 200
    public = {name for name in ops.__all__ if name.islower() and name != "use_backend"}
    assert public == set(CALLS), "an op without bad input"


@pytest.mark.parametrize("op", CALLS)
def test_the_call_that_is_spoilt_works(op: str) -> None:
    _call(op, CALLS[op]())


@pytest.mark.parametrize(("op", "argument", "fault"), TENSOR_CASES)
def test_a_wrong_tensor(op: str, argument: str, fault: str) -> None:
    arguments = CALLS[op]()
    try:
        arguments[argument] = FAULTS[fault](arguments[argument])
    except (NotImplementedError, RuntimeError):
        pytest.skip("PyTorch has no such tensor of this dtype")
    if (op, argument, fault) in WORKS:
        _call(op, arguments)
    else:
        _refused(op, arguments)


@pytest.mark.parametrize(("op", "argument", "value"), VALUES)
def test_a_wrong_value(op: str, argument: str, value: Any) -> None:
    arguments = CALLS[op]()
    old = arguments.get(argument)
    if isinstance(old, Tensor) and not isinstance(value, str):
        arguments[argument] = old.clone()
        arguments[argument].view(-1)[0] = value
    else:
        arguments[argument] = value
    _refused(op, arguments)


@pytest.mark.parametrize(("op", "argument"), CONSTANTS)
def test_a_constant_that_requires_grad(op: str, argument: str) -> None:
    arguments = CALLS[op]()
    arguments[argument] = arguments[argument].clone().requires_grad_()
    assert "requires grad" in _refused(op, arguments)
