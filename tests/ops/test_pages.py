"""Huge pages are asked for under large outputs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qirl_fast import ops

SMAPS = Path("/proc/self/smaps")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asked(t: Tensor) -> bool:
    """Whether the middle of the tensor lies in memory marked for huge pages."""
    middle = t.data_ptr() + t.numel() * t.element_size() // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="each output has a block of its own there")
@pytest.mark.skipif(
    not SMAPS.exists() or not SETTING.exists() or "[never]" in SETTING.read_text(),
    reason="no transparent huge pages here",
)
def test_large_outputs_ask_for_huge_pages():
    x = torch.randn(2, 4096, 2048)  # 64 MiB: the C library maps its like afresh
    assert asked(ops.gelu(x))
    assert asked(ops.norm_modulate(x, torch.zeros(2, 2048)))
