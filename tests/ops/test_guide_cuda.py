"""The CUDA kernels of guide on the host: the bits of the CPU kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qirl_fast import ops

DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(got: Tensor, wanted: Tensor) -> bool:
    """Equal bits, except that any NaN equals any other."""
    nan = wanted.isnan()
    store = torch.int16 if got.dtype == torch.bfloat16 else torch.int32
    bits, expected = (t.contiguous().view(store)[~nan] for t in (got, wanted))
    return torch.equal(got.isnan(), nan) and torch.equal(bits, expected)


def results(backend: str, c: Tensor, u: Tensor, scale: Tensor, dy: Tensor, rescale: bool):
    with ops.use_backend(backend):
        leaves = [t.detach().requires_grad_() for t in (c, u)]
        y = ops.guide(*leaves, scale, rescale=rescale)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def inputs(shape, dtype, spaced):
    c, u, dy = (normal(*shape, seed=seed).to(dtype) for seed in range(3))
    if c.numel() > 200:
        c[0].view(-1)[5] = math.nan
        c[-1, ..., -1, :], u[-1, ..., -1, :] = 0, 0  # a token whose factor is 0 / 0
    if spaced:
        c, u, dy = (torch.cat((t, t), dim=1)[:, : t.shape[1]] for t in (c, u, dy))
    return c, u, 1 + 4 * torch.rand(shape[0], generator=torch.Generator().manual_seed(7)), dy


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 17), (2, 5, 64), (3, 2, 7, 33), (1, 3, 4099), (2, 130, 16), (5, 9, 1)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("spaced", [False, True])
def test_bits_are_those_of_the_cpu_kernels(emulated_cuda, poisoned, shape, dtype, rescale, spaced):
    arguments = inputs(shape, dtype, spaced)
    got, wanted = (results(backend, *arguments, rescale) for backend in ("cuda", "cpu"))
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("rescale", [False, True])
def test_a_row_alone_is_that_row_of_the_batch(emulated_cuda, rescale):
    c, u, scale, dy = inputs((4, 7, 33), torch.bfloat16, False)
    batch = results("cuda", c, u, scale, dy, rescale)
    alone = results("cuda", c[2:3], u[2:3], scale[2:3], dy[2:3], rescale)
    assert all(same(a, b[2:3]) for a, b in zip(alone, batch, strict=True))
