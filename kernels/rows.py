"""What the losses share: rows in blocks of BLOCK elements, and the totals of a row's block sums.

A program adds the squares of one block (in Triton's order, which the shape fixes); one program
then adds the blocks of all rows in float64, ROWS rows by CHUNK blocks at a time. A row's total does
not depend on the other rows.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4
ROWS, CHUNK = 16, 32
BUDGET = []  # functions of other kernels only


@triton.jit
def row_totals(sums_ptr, row, rows, blocks, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """float64 [ROWS]: the totals of rows `row` of sums [rows, blocks]; 0 for rows out of range."""
    total = tl.zeros([ROWS], tl.float64)
    first = 0
    while first < blocks:  # the interpreter cannot make a range of a runtime number
        block = first + tl.arange(0, CHUNK)
        at = row[:, None].to(tl.int64) * blocks + block[None, :]
        inside = (row < rows)[:, None] & (block < blocks)[None, :]
        total += tl.sum(tl.load(sums_ptr + at, mask=inside, other=0.0).to(tl.float64), axis=1)
        first += CHUNK
    return total


def block_count(x: Tensor) -> tuple[int, int]:
    """Elements a row, blocks a row."""
    size = x.numel() // x.shape[0]
    return size, triton.cdiv(size, BLOCK)


def strided(x: Tensor) -> tuple[Tensor, int]:
    """x as [rows, elements] with dense rows, copied where it has none; and its row stride."""
    flat = x.reshape(x.shape[0], -1)
    if flat.shape[1] > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)
