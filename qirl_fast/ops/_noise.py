"""Counter-based normal noise in plain PyTorch: the definition the kernels are tested against.

Element i of a row: Philox4x32-10 with key = (seed low, seed high) and counter = (i // 4, 0, offset
low, offset high); words (0, 1) give elements 4j and 4j + 1 by Box-Muller, words (2, 3) the others:

    u = ((p >> 8) + 1) / 2^24, t = 2 pi (q >> 8) / 2^24, (sqrt(-2 ln u) cos t, sqrt(-2 ln u) sin t)

|noise| is at most 5.77, as in PyTorch's own float32 CPU generator. Words are held in int64.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32: the four words for a counter of four and a key of two, int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_wide(c0, 0xD2511F53)
        high1, low1 = _multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _multiply_wide(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of a * m, without overflowing int64."""
    low_product, high_product = (a & 0xFFFF) * m, (a >> 16) * m
    middle = (low_product >> 16) + high_product  # below 2^49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox_words(seed_B: Tensor, offset: int, groups: int) -> Tensor:
    """The words of elements 4j .. 4j + 3, int64 [B, groups, 4], for j < groups."""
    j = torch.arange(groups, device=seed_B.device).expand(seed_B.shape[0], groups)
    zero = torch.zeros_like(j)
    counter = (j, zero, zero + (offset & _MASK), zero + ((offset >> 32) & _MASK))
    key = ((seed_B & _MASK)[:, None], ((seed_B >> 32) & _MASK)[:, None])
    return torch.stack(philox4x32(counter, key), dim=-1)


def reference_noise(seed_B: Tensor, offset: int, size: int) -> Tensor:
    """Noise [B, size] in float64 for seeds int64 [B]."""
    words = philox_words(seed_B, offset, (size + 3) // 4)
    p, q = words[..., 0::2], words[..., 1::2]  # [B, groups, 2]
    radius = torch.sqrt(-2.0 * torch.log(((p >> 8) + 1).double() / 2**24))
    angle = (2.0 * math.pi / 2**24) * (q >> 8).double()
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :size]
