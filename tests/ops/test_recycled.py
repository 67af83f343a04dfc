"""Memory of large outputs: reused when given back, never while anything looks at it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qirl_fast import _cpu, ops
from qirl_fast.ops._recycled import empty

pytestmark = pytest.mark.skipif(
    "ASAN_OPTIONS" in os.environ, reason="each output has a block of its own there"
)

MIB = 1 << 20
LIKE = torch.empty(0)
KEPT = 1 << 30  # kKeptBytes of csrc/cpu/recycled.h


@pytest.fixture(autouse=True)
def _nothing_waits() -> None:
    """A request that nothing can serve has all that waits given back to the system."""
    with pytest.raises(
        MemoryError, match=r"no memory left for an output of 1125899906842624 bytes"
    ):
        empty(LIKE, 1 << 48)
    assert _cpu.kept_bytes() == 0


def test_a_block_given_back_goes_to_the_next_output_of_its_size() -> None:
    first = empty(LIKE, (2, MIB))
    address = first.data_ptr()
    other = empty(LIKE, (2, MIB))
    assert other.data_ptr() != address, "the first is in use"
    view = first[1:]
    del first
    assert empty(LIKE, (2, MIB)).data_ptr() != address, "a view looks at it"
    del view
    assert empty(LIKE, (4, MIB)).data_ptr() != address, "of another size"
    assert empty(LIKE, (MIB, 2)).data_ptr() == address


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float8_e4m3fn]
)
def test_outputs_are_plain_contiguous_tensors(dtype: torch.dtype) -> None:
    y = empty(LIKE, (3, 5, MIB), dtype)
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (3, 5, MIB), True)
    assert y.data_ptr() % 64 == 0 and not y.requires_grad
    y.view(torch.uint8).fill_(7)
    assert torch.equal(y.clone().view(torch.uint8), y.view(torch.uint8))


def test_small_fake_and_empty_outputs_are_not_kept() -> None:
    for shape in ((), 0, (0, 5), (4, 4)):
        assert empty(LIKE, shape).shape == LIKE.new_empty(shape).shape
    with FakeTensorMode():
        fake = torch.empty(4, 2048, 256)
        assert type(ops.gelu(fake)) is type(fake)
    assert _cpu.kept_bytes() == 0


def test_at_most_a_gibibyte_waits_and_the_oldest_goes_first() -> None:
    oldest = empty(LIKE, 300 * MIB // 4)
    rest = [empty(LIKE, 200 * MIB // 4) for _ in range(4)]
    addresses = [t.data_ptr() for t in rest]
    del oldest
    rest.clear()
    assert 0 < _cpu.kept_bytes() <= KEPT
    again = [empty(LIKE, 200 * MIB // 4) for _ in range(4)]
    assert {t.data_ptr() for t in again} == set(addresses)
    assert _cpu.kept_bytes() == 0, "the 300 MiB had to go"


def test_what_pytorch_does_not_take_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(capsule: object) -> None:
        raise BufferError("not today")

    monkeypatch.setattr("torch.utils.dlpack.from_dlpack", refuse)
    _cpu.hide_exchange(True)
    try:
        with pytest.raises(BufferError, match="not today"):
            empty(LIKE, (2, MIB))
    finally:
        _cpu.hide_exchange(False)
    assert _cpu.kept_bytes() == 8 * MIB


def test_threads_share_the_blocks() -> None:
    x = torch.randn(4, 128, 1024)
    wanted = ops.gelu(x)

    def work(_: int) -> bool:
        return all(torch.equal(ops.gelu(x), wanted) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_values_outlive_later_outputs() -> None:
    x = torch.randn(3, 256, 1024, dtype=torch.bfloat16)
    scale = torch.zeros(3, 1024, dtype=torch.bfloat16)
    kept = ops.norm_modulate(x, scale)
    copy = kept.clone()
    for _ in range(5):
        ops.norm_modulate(-x, scale + 1)
    assert torch.equal(kept, copy)
