"""The CUDA emulator: it finds what is wrong with a kernel, and leaves right ones alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qirl_fast import ops


def selftest(module, name, out=None):
    out = torch.zeros(1024) if out is None else out
    module.selftest(name, out)
    return out


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("left_behind", r"waits in __syncthreads for ever \(1 of 64 threads have left\) at .*\.cu"),
        ("two_barriers", "wait at different barriers"),
        ("half_a_warp", "waits for lane .* which has left or does not exist"),
        ("outside_the_mask", "not in the mask"),
        ("barrier_against_shuffle", "for ever"),
        ("misaligned", "16 bytes at a misaligned address"),
        ("no_blocks", "invalid configuration"),
        ("too_many_blocks", "invalid configuration"),
    ],
)
def test_a_wrong_kernel_is_an_error_and_the_next_one_runs(emulated_cuda, kernel, message):
    for _ in range(3):
        with pytest.raises(RuntimeError, match=message):
            selftest(emulated_cuda, kernel)
        selftest(emulated_cuda, "sums")


def test_shared_memory_nobody_wrote_is_nan(emulated_cuda):
    out = selftest(emulated_cuda, "unwritten_shared")[:256].reshape(4, 32, 2)
    assert bool((out[..., 0] == 1).all()) and bool(torch.isnan(out[..., 1]).all())


def test_a_missing_barrier_shows(emulated_cuda):
    out = selftest(emulated_cuda, "missing_barrier")[:64]
    assert bool(torch.isnan(out).any())


def test_blocks_run_in_another_order_each_time_and_repeat_by_seed(emulated_cuda):
    def orders():
        emulated_cuda.seed_order(7)
        out = torch.zeros(2, 1024)
        for row in out:
            selftest(emulated_cuda, "block_order", row)
        return out[:, 1000].tolist()

    first = orders()
    assert orders() == first and first[0] != first[1]


def test_reductions_and_shuffles(emulated_cuda):
    out = selftest(emulated_cuda, "sums").tolist()
    thread = 90
    group = sum(range(thread // 8 * 8, thread // 8 * 8 + 8))
    assert out[:6] == [95 * 96 / 2, 96, 95 * 96 / 2, 95, group, thread // 16 * 16 + 5]
    assert np.isnan(out[6]) and out[7] == 1


@pytest.mark.parametrize("storage", ["float", "bf16"])
def test_vectors_of_any_length_at_any_address(emulated_cuda, storage):
    out = torch.zeros(1024)
    special = [1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("inf"), -0.0, float("nan"), 1e-40, -1.7]
    out[:8] = torch.tensor(special)
    selftest(emulated_cuda, f"round_trip_{storage}", out)
    assert out[64:80].tolist() == [0.0] * 16


# ---- flow_step, flow_logp: the kernels claim the bits of the CPU backend ------------------------
def flow_inputs(shape, x_dtype, v_dtype, delta_dtype):
    g = torch.Generator().manual_seed(3)
    rows = shape[0]
    x, v, delta = (torch.randn(shape, generator=g) for _ in range(3))
    a, c, s = (torch.rand(rows, generator=g) + 0.1 for _ in range(3))
    w, b = 1 / (2 * s * s), torch.log(s)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g)
    delta = None if delta_dtype is None else delta.to(delta_dtype)
    return x.to(x_dtype), v.to(v_dtype), (a, -c, s, w, b), seed, delta


def run_flow(x, v, coefficients, seed, delta):
    a, c, _, w, b = coefficients
    x_next, logp = ops.flow_step(x, v, *coefficients, seed=seed, offset=2**33 + 5, delta=delta)
    x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
    replayed = ops.flow_logp(x, x_next, v, a, c, w, b, delta=delta)
    replayed.backward(torch.linspace(-1, 2, len(a)))
    assert x.grad is not None and v.grad is not None
    return x_next, logp, replayed.detach(), x.grad, v.grad


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 1024), (2, 4, 33, 31), (5, 2056), (2, 9)])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta_dtype", [None, torch.float32, torch.bfloat16])
def test_flow_gives_the_bits_of_the_cpu_backend(
    emulated_cuda, poisoned, shape, x_dtype, v_dtype, delta_dtype
):
    args = flow_inputs(shape, x_dtype, v_dtype, delta_dtype)
    want = run_flow(*args)
    with ops.use_backend("cuda"):
        got = run_flow(*args)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_flow_takes_rows_of_any_stride_and_alignment(emulated_cuda, poisoned):
    x, v, coefficients, seed, _ = flow_inputs((3, 1100), torch.float32, torch.bfloat16, None)
    want = run_flow(x, v, coefficients, seed, None)
    for stride, start in ((1101, 0), (1104, 3), (1104, 8)):
        wide = torch.full((3, stride + start), float("nan"))
        wide[:, start : start + 1100] = x
        with ops.use_backend("cuda"):
            got = ops.flow_step(
                wide[:, start : start + 1100], v, *coefficients, seed=seed, offset=2**33 + 5
            )
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
