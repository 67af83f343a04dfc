"""The noise: words against published vectors, normals against float64, no trace of the layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qirl_fast import ops
from qirl_fast.ops._noise import philox4x32, philox_words, reference_noise

# Known answers of Random123 (kat_vectors, philox4x32 10): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63), 987654321987654321])


def kernel_noise(seed: torch.Tensor, offset: int, size: int) -> torch.Tensor:
    """x' of a step whose mean is 0 and whose s is 1."""
    zeros, rows = torch.zeros(len(seed), size), torch.zeros(len(seed))
    return ops.flow_step(zeros, zeros, rows, rows, rows + 1, rows, rows, seed=seed, offset=offset)[
        0
    ]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_reference_words_are_the_published_ones(counter, key, words):
    result = philox4x32(
        tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key)
    )
    assert tuple(int(w) for w in result) == words


@pytest.mark.parametrize("offset", [0, 1, 2**32 + 7, 2**63 - 1])
def test_kernel_words_equal_the_reference(isa, offset):
    """The words themselves are not an output; the noise gives them away.

    A wrong word moves its pair of normals by far more than 4 ulp, so agreement within 4 ulp at
    6 x 4099 elements leaves no room for one.
    """
    noise = kernel_noise(SEEDS, offset, 4099).double().numpy()
    truth = reference_noise(SEEDS, offset, 4099).numpy()
    ulp = np.spacing(np.abs(truth.astype(np.float32))).astype(np.float64)
    assert (np.abs(noise - truth) / ulp).max() <= 4


def test_noise_is_bounded():
    """2^24 radii: the largest |noise| is sqrt(48 ln 2), and u = 1 gives 0, not NaN."""
    noise = kernel_noise(torch.arange(64), 1, 2**16)
    assert bool(torch.isfinite(noise).all())
    assert float(noise.abs().max()) <= (48 * math.log(2)) ** 0.5


def test_noise_is_standard_normal(isa):
    """Moments and tails of 2^21 draws within 5 standard errors; words are uncorrelated."""
    noise = kernel_noise(torch.arange(8), 3, 2**18).double().flatten()
    n = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean() - moment) < 5 * (variance / n) ** 0.5
    tail = 0.0026997960632601866  # P(|z| > 3)
    assert abs((noise.abs() > 3).double().mean() - tail) < 5 * (tail / n) ** 0.5
    words = noise.reshape(-1, 4)
    correlation = torch.corrcoef(words.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / words.shape[0] ** 0.5
    squares = torch.corrcoef(words.square().T) - torch.eye(4)
    assert squares.abs().max() < 5 / words.shape[0] ** 0.5


def test_seeds_and_offsets_give_different_noise():
    base = kernel_noise(torch.tensor([5]), 0, 256)
    for seed, offset in ((6, 0), (5, 1), (5 + 2**32, 0), (5, 2**32)):
        assert not torch.equal(kernel_noise(torch.tensor([seed]), offset, 256), base)


def test_a_shorter_row_sees_the_same_noise(isa):
    long = kernel_noise(SEEDS, 2, 3000)
    for size in (1, 2, 3, 4, 5, 63, 127, 129, 1023, 1025, 2999):
        assert torch.equal(kernel_noise(SEEDS, 2, size), long[:, :size])


def test_words_use_the_documented_counter():
    seed, offset = torch.tensor([0x0123456789ABCDEF]), 0x1122334455667788
    words = philox_words(seed, offset, 3)[0, 2]
    expected = philox4x32(
        tuple(torch.tensor([c]) for c in (2, 0, 0x55667788, 0x11223344)),
        (torch.tensor([0x89ABCDEF]), torch.tensor([0x01234567])),
    )
    assert words.tolist() == [int(w) for w in expected]
