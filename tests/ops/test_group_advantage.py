"""group_advantage: both backends against a NumPy oracle, edge rules."""

import math

import numpy as np
import pytest
import torch

from qirl_fast import ops

BACKENDS = ["reference", "cpu"]
MODES = ["zscore_sum", "sum_first", "gdpo"]


def oracle(
    rewards: np.ndarray,
    group: np.ndarray,
    weights: np.ndarray,
    *,
    std: str = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    std_floor: float = 0.0,
    clamp: float | None = 5.0,
    mode: str = "zscore_sum",
) -> np.ndarray:
    """Advantage [N] of complete batches, one vectorised line per definition."""
    r_NK = rewards.astype(np.float64)
    w_NK = np.broadcast_to(weights, r_NK.shape).astype(np.float64)
    if mode == "sum_first":
        r_NK = (w_NK * r_NK).sum(1, keepdims=True)
        w_NK = np.ones_like(r_NK)
    one_hot = group[:, None] == np.arange(group.max() + 1)
    total = np.zeros(len(group))
    for r, w in zip(r_NK.T, w_NK.T, strict=True):
        mean = np.array([r[m].mean() for m in one_hot.T])[group]
        spread = np.array([r[m].std(ddof=ddof) for m in one_hot.T])[group]
        used = r[w != 0]
        divisor = used.std(ddof=ddof) if std == "global" else spread
        total += np.where(spread < std_floor, 0.0, w * (r - mean) / (divisor + eps))
    if mode == "gdpo":
        total = (total - total.mean()) / (total.std(ddof=ddof) + eps)
    return total if clamp is None else np.clip(total, -clamp, clamp)


def batch(
    sizes: list[int], columns: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rewards [N,K], group [N] shuffled, weights [N,K] equal inside a group)."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rewards = rng.uniform(0, 1, (len(group), columns)) * np.linspace(0.1, 2, columns)
    weights = rng.uniform(0.1, 1, (len(sizes), columns))
    weights /= weights.sum(1, keepdims=True)
    return (
        torch.tensor(rewards, dtype=dtype),
        torch.tensor(group),
        torch.tensor(weights[group], dtype=dtype),
    )


def call(backend: str, *args: object, **options: object) -> "ops.GroupAdvantage":
    with ops.use_backend(backend):
        return ops.group_advantage(*args, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
@pytest.mark.parametrize("sizes", [[2], [4, 4, 4], [2, 7, 3, 16, 5]])
def test_against_the_oracle(
    backend: str, mode: str, std: str, ddof: int, eps: float, sizes: list[int]
) -> None:
    rewards, group, weights = batch(sizes, columns=3)
    options = {"mode": mode, "std": std, "ddof": ddof, "eps": eps, "clamp": None}
    out = call(backend, rewards, group, weights, **options)
    expected = oracle(rewards.numpy(), group.numpy(), weights.numpy(), **options)
    # Float64 sums of at most 33 terms: 33 ulp, with room for the cancellation in x - mean.
    np.testing.assert_allclose(out.advantage.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert out.keep.all() and out.keep.dtype == torch.bool


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_statistics(backend: str, dtype: torch.dtype) -> None:
    rewards, group, weights = batch([3, 5, 2], columns=2, dtype=dtype)
    out = call(backend, rewards, group, weights, ddof=1)
    assert {t.dtype for t in (out.advantage, out.mean, out.std, out.reward_range)} == {dtype}
    for m in range(3):
        members = rewards[group == m].double()
        combined = (weights[group == m].double() * members).sum(1)
        # Double inside, rounded to the dtype once: half an ulp (float32 2^-24) and a little.
        rtol = 1e-12 if dtype == torch.float64 else 2**-23
        torch.testing.assert_close(out.mean[m].double(), members.mean(0), rtol=rtol, atol=1e-15)
        torch.testing.assert_close(out.std[m].double(), members.std(0), rtol=rtol, atol=1e-15)
        spread = combined.max() - combined.min()
        torch.testing.assert_close(out.reward_range[m].double(), spread, rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("std", ["group", "global"])
def test_cpu_matches_reference_with_failures(mode: str, std: str) -> None:
    rewards, group, weights = batch([6] * 20, columns=4, seed=3)
    valid = torch.rand(rewards.shape, generator=torch.Generator().manual_seed(1)) > 0.01
    weights[group % 4 == 0, 2] = 0.0
    options = {"mode": mode, "std": std, "std_floor": 0.05, "clamp": 1.0, "min_range": 0.2}
    ours = call("cpu", rewards, group, weights, valid=valid, **options)
    wanted = call("reference", rewards, group, weights, valid=valid, **options)
    assert 0 < int(ours.keep.sum()) < len(group)
    assert torch.equal(ours.keep, wanted.keep)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_float32_error_against_plain_float32() -> None:
    """Error at most twice that of the same formula in float32 PyTorch, worst case over batches."""
    for seed in range(5):
        rewards, group, weights = batch([24] * 48, columns=3, seed=seed, dtype=torch.float32)
        exact = call("reference", rewards.double(), group, weights.double(), clamp=None).advantage
        ours = call("cpu", rewards, group, weights, clamp=None).advantage
        plain = torch.zeros_like(ours)
        for m in range(48):
            r = rewards[group == m]
            z = (r - r.mean(0)) / (r.std(0, correction=0) + 1e-4)
            plain[group == m] = (weights[group == m] * z).sum(1)
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_weight_vector_is_the_same_as_equal_rows(backend: str) -> None:
    rewards, group, _ = batch([4, 5], columns=3)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    one = call(backend, rewards, group, weights)
    rows = call(backend, rewards, group, weights.expand(9, 3))
    for a, b in zip(one, rows, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failure_drops_the_group_and_is_not_zero(backend: str) -> None:
    rewards, group, weights = batch([4, 4, 4], columns=2)
    valid = torch.ones(rewards.shape, dtype=torch.bool)
    row = int((group == 1).nonzero()[2])
    valid[row, 1] = False
    alone = rewards.clone()
    rewards[row, 1] = math.nan
    out = call(backend, rewards, group, weights, valid=valid)
    dropped = group == 1
    assert not out.keep[dropped].any() and out.keep[~dropped].all()
    assert (out.advantage[dropped] == 0).all()
    assert out.mean[1, 1].isnan() and out.std[1, 1].isnan() and out.reward_range[1].isnan()
    assert torch.isfinite(out.mean[1, 0])
    complete = call(backend, alone, group, weights)
    assert torch.equal(out.advantage[~dropped], complete.advantage[~dropped])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_batch_statistics_leave_failed_groups_out(backend: str, mode: str) -> None:
    rewards, group, weights = batch([4, 4, 4], columns=2)
    valid = torch.ones(rewards.shape, dtype=torch.bool)
    valid[(group == 2).nonzero()[0], 0] = False
    with_failure = call(backend, rewards, group, weights, valid=valid, std="global", mode=mode)
    rest = group < 2
    without = call(backend, rewards[rest], group[rest], weights[rest], std="global", mode=mode)
    assert torch.equal(with_failure.advantage[rest], without.advantage)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_reward_of_weight_zero_is_not_needed(backend: str) -> None:
    rewards, group, weights = batch([4, 4], columns=2)
    weights[group == 0] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    valid = torch.ones(rewards.shape, dtype=torch.bool)
    valid[group == 0, 1] = False
    rewards[group == 0, 1] = math.nan
    for std in ("group", "global"):
        out = call(backend, rewards, group, weights, valid=valid, std=std)
        assert out.keep.all() and torch.isfinite(out.advantage).all()
        assert (out.advantage != 0).all()
        assert out.mean[0, 1].isnan() and torch.isfinite(out.reward_range).all()
    one_reward = call(backend, rewards[group == 0, :1], group[group == 0], torch.ones(1).double())
    grouped = call(backend, rewards, group, weights, valid=valid)
    assert torch.equal(grouped.advantage[group == 0], one_reward.advantage)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_equal_rewards_give_exactly_zero(backend: str, mode: str, eps: float) -> None:
    """0.1 and 0.7 are not dyadic: a mean that is off by an ulp would be divided by eps."""
    rewards = torch.tensor([[0.1, 0.7]] * 7, dtype=torch.float32)
    group = torch.zeros(7, dtype=torch.int64)
    out = call(backend, rewards, group, torch.tensor([0.3, 0.7]), mode=mode, eps=eps)
    assert (out.advantage == 0).all() and (out.std == 0).all() and (out.reward_range == 0).all()
    assert torch.equal(out.mean[0], rewards[0])
    assert out.keep.all()
    flat = call(backend, rewards, group, torch.tensor([0.3, 0.7]), mode=mode, min_range=1e-12)
    assert not flat.keep.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_std_floor_is_exactly_zero_below_and_unchanged_above(backend: str) -> None:
    rewards = torch.tensor(
        [[0.5, 0.0], [0.5 + 1e-6, 1.0], [0.2, 0.3], [0.8, 0.9]], dtype=torch.float64
    )
    group = torch.tensor([0, 0, 1, 1])
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    plain = call(backend, rewards, group, weights, eps=1e-8)
    floored = call(backend, rewards, group, weights, eps=1e-8, std_floor=1e-3)
    second_only = call(backend, rewards[:2, 1:], group[:2], weights[1:], eps=1e-8)
    assert torch.equal(floored.advantage[:2], second_only.advantage)
    assert torch.equal(floored.advantage[2:], plain.advantage[2:])
    assert (plain.advantage[:2] - floored.advantage[:2]).abs().min() > 0.1
    everything = call(backend, rewards, group, weights, std_floor=10.0)
    assert (everything.advantage == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_range_filters_on_the_weighted_reward(backend: str) -> None:
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    out = call(backend, rewards, group, weights, min_range=0.5)
    assert out.reward_range.tolist() == [0.0, 1.0]
    assert out.keep.tolist() == [False, False, True, True]
    edge = call(backend, rewards, group, weights, min_range=1.0)
    assert not edge.keep.any() and (edge.advantage == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamp(backend: str) -> None:
    rewards = torch.zeros(100, 1, dtype=torch.float64)
    rewards[0] = 1.0
    group = torch.zeros(100, dtype=torch.int64)
    weight = torch.ones(1, dtype=torch.float64)
    free = call(backend, rewards, group, weight, clamp=None).advantage
    assert 9.9 < float(free[0]) < 10.0
    assert torch.equal(free, call(backend, rewards, group, weight, clamp=math.inf).advantage)
    assert float(call(backend, rewards, group, weight).advantage[0]) == 5.0
    low = call(backend, -rewards, group, weight, clamp=2.5).advantage
    assert float(low[0]) == -2.5
    assert torch.equal(low[1:], -free[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_does_not_depend_on_its_batch(backend: str) -> None:
    rewards, group, weights = batch([5, 9, 3, 12], columns=3, dtype=torch.float32)
    together = call(backend, rewards, group, weights)
    for m in range(4):
        rows = group == m
        alone = call(backend, rewards[rows], torch.zeros_like(group[rows]), weights[rows])
        assert torch.equal(together.advantage[rows], alone.advantage)
        assert torch.equal(together.mean[m], alone.mean[0])
        assert torch.equal(together.std[m], alone.std[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    rewards, group, weights = batch([5, 9], columns=3, dtype=torch.float32)
    valid = torch.ones(rewards.shape, dtype=torch.bool)
    plain = call(backend, rewards, group, weights, valid=valid)
    strided = call(
        backend,
        rewards.t().contiguous().t(),
        torch.stack([group, group], 1)[:, 0],
        torch.cat([weights, weights], 1)[:, :3],
        valid=valid.t().contiguous().t(),
    )
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)


def test_repeatable_and_threads_do_not_matter() -> None:
    rewards, group, weights = batch([16] * 64, columns=3, dtype=torch.float32)
    first = call("cpu", rewards, group, weights, std="global")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = call("cpu", rewards, group, weights, std="global")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)
