"""group_advantage: what it refuses, and the op contract (opcheck, compile, every ISA)."""

import math

import pytest
import torch

from qirl_fast import _cpu, ops

BACKENDS = ["reference", "cpu"]


def batch(rows: int = 12, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """(rewards [rows, 2], group [rows] of three groups, weights [2])."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(rows, 2, generator=g, dtype=dtype)
    return rewards, torch.arange(rows) % 3, torch.tensor([0.3, 0.7], dtype=dtype)


def call(backend: str, *args: object, **options: object) -> ops.GroupAdvantage:
    with ops.use_backend(backend):
        return ops.group_advantage(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": torch.rand(6)}, r"\[N, K\]"),
        ({"rewards": torch.rand(0, 2)}, "at least one row"),
        ({"rewards": torch.rand(6, 0)}, "at least one row"),
        ({"rewards": torch.rand(6, 2).half()}, "float32 or float64"),
        ({"rewards": torch.ones(6, 2, dtype=torch.int64)}, "float32 or float64"),
        ({"group": torch.zeros(5, dtype=torch.int64)}, r"group .*\[6\]"),
        ({"group": torch.zeros(6, dtype=torch.int32)}, "int64"),
        ({"group": torch.tensor([0, 0, 0, 1, 1, -1])}, "row 5"),
        ({"group": torch.tensor([0, 0, 0, 2, 2, 2])}, "group 1 has no member"),
        ({"group": torch.tensor([0, 0, 0, 1, 1, 2])}, "group 2 has one member"),
        ({"weights": torch.ones(3)}, "weights"),
        ({"weights": torch.ones(6, 3)}, "weights"),
        ({"weights": torch.tensor([0.5, math.nan])}, "weights"),
        ({"weights": torch.tensor([0.0, 0.0])}, "all zero"),
        ({"weights": torch.eye(6, 2)}, "differ"),
        ({"valid": torch.ones(6, dtype=torch.bool)}, "valid"),
        ({"valid": torch.ones(6, 2)}, "bool"),
        ({"std": "batch"}, "'group' or 'global'"),
        ({"mode": "zscore"}, "'zscore_sum'"),
        ({"ddof": 2}, "0 or 1"),
        ({"eps": -1e-4}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"std_floor": -1.0}, "std_floor"),
        ({"clamp": 0.0}, "clamp"),
        ({"clamp": math.nan}, "clamp"),
        ({"min_range": -0.1}, "min_range"),
        ({"min_range": math.nan}, "min_range"),
        ({"num_groups": 1}, "row 3"),
        ({"num_groups": 3}, "group 2 has no member"),
        ({"num_groups": 0}, "num_groups"),
    ],
)
def test_bad_input_is_named(backend: str, change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "rewards": torch.rand(6, 2),
        "group": torch.tensor([0, 0, 0, 1, 1, 1]),
        "weights": torch.tensor([0.5, 0.5]),
    }
    call(backend, **arguments)
    with pytest.raises(ValueError, match=words):
        call(backend, **(arguments | change))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *((v, d) for v in (math.nan, math.inf, -math.inf) for d in (torch.float32, torch.float64)),
        (1e70, torch.float64),
    ],
)
def test_a_bad_reward_names_its_row_and_column(
    backend: str, value: float, dtype: torch.dtype
) -> None:
    rewards, group, weights = batch(dtype=dtype)
    rewards[5, 1] = value
    with pytest.raises(ValueError, match="row 5, column 1"):
        call(backend, rewards, group, weights)
    with pytest.raises(ValueError, match="weights"):
        call(backend, torch.ones_like(rewards), group, rewards)


def test_rewards_that_want_a_gradient_are_refused() -> None:
    rewards, group, weights = batch()
    with pytest.raises(ValueError, match="no gradient"):
        ops.group_advantage(rewards.requires_grad_(), group, weights)


def test_same_bits_on_every_instruction_set(isa: str) -> None:
    rewards, group, weights = batch(96)
    ours = call("cpu", rewards, group, weights, mode="gdpo", std="global")
    assert _cpu.last_isa() == isa
    _cpu.force_isa("base")
    base = call("cpu", rewards, group, weights, mode="gdpo", std="global")
    assert all(torch.equal(a, b) for a, b in zip(ours, base, strict=True))


def test_the_kernel_writes_every_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN (and True), so an element that was left out would show."""
    rewards, group, weights = batch()
    expected = call("cpu", rewards, group, weights, min_range=10.0)
    fresh = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        out = fresh(self, *args, **kwargs)
        return out.fill_(True if out.dtype == torch.bool else math.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    again = call("cpu", rewards, group, weights, min_range=10.0)
    assert not expected.keep.any()
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    rewards, group, weights = batch()
    valid = torch.ones(rewards.shape, dtype=torch.bool)
    options = ("gdpo", "global", 1, 1e-4, 0.0, 5.0, 0.0, backend)
    op = torch.ops.qirl.group_advantage.default
    for r in (rewards, rewards.t().contiguous().t()):
        torch.library.opcheck(op, (r, group, weights.double().expand(12, 2), valid, 3, *options))


def test_compiles_without_a_graph_break() -> None:
    rewards, group, weights = batch()
    compiled = torch.compile(
        lambda r, g, w: ops.group_advantage(r, g, w, num_groups=3), fullgraph=True, backend="eager"
    )
    ours = compiled(rewards, group, weights)
    plain = call("cpu", rewards, group, weights)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
