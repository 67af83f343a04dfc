"""Memory of large outputs: reused when given back, never while anything looks at it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qirl_fast import _cpu, ops

pytestmark = pytest.mark.skipif(
    "ASAN_OPTIONS" in os.environ, reason="each output has a block of its own there"
)

MIB = 1 << 20
KEPT = 1 << 30  # kKeptBytes of csrc/cpu/recycled.h


def empty(*sizes: int) -> Tensor:
    """An output of an op: float32, uninitialised."""
    return _cpu.new_output(sizes, 0)


@pytest.fixture(autouse=True)
def _nothing_waits() -> None:
    """A request that nothing can serve has all that waits given back to the system."""
    with pytest.raises(
        MemoryError, match=r"no memory left for an output of 1125899906842624 bytes"
    ):
        empty(1 << 48)
    assert _cpu.kept_bytes() == 0


def test_a_block_given_back_goes_to_the_next_output_of_its_size() -> None:
    first = empty(2, MIB)
    address = first.data_ptr()
    other = empty(2, MIB)
    assert other.data_ptr() != address, "the first is in use"
    view = first[1:]
    del first
    assert empty(2, MIB).data_ptr() != address, "a view looks at it"
    del view
    assert empty(4, MIB).data_ptr() != address, "of another size"
    assert empty(MIB, 2).data_ptr() == address


def test_small_fake_and_empty_outputs_are_not_kept() -> None:
    for sizes in ((), (0,), (0, 5), (4, 4)):
        assert empty(*sizes).shape == sizes
    with FakeTensorMode():
        fake = torch.empty(4, 2048, 256)
        assert type(ops.gelu(fake)) is type(fake)
    assert _cpu.kept_bytes() == 0


def test_at_most_a_gibibyte_waits_and_the_oldest_goes_first() -> None:
    oldest = empty(300 * MIB // 4)
    rest = [empty(200 * MIB // 4) for _ in range(4)]
    addresses = [t.data_ptr() for t in rest]
    del oldest
    rest.clear()
    assert 0 < _cpu.kept_bytes() <= KEPT
    again = [empty(200 * MIB // 4) for _ in range(4)]
    assert {t.data_ptr() for t in again} == set(addresses)
    assert _cpu.kept_bytes() == 0, "the 300 MiB had to go"


def test_what_pytorch_does_not_take_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(capsule: object) -> None:
        raise BufferError("not today")

    monkeypatch.setattr("torch.utils.dlpack.from_dlpack", refuse)
    _cpu.hide_exchange(True)
    try:
        with pytest.raises(BufferError, match="not today"):
            empty(2, MIB)
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
