"""The Triton kernels in the interpreter, where there is no GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CASES = sorted(file.name for file in Path(__file__).parent.glob("triton_*_cases.py"))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (extra 'triton')")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without GPU")
@pytest.mark.timeout(1800)  # it waits for its turn in the background, too
@pytest.mark.parametrize("cases", CASES)
def test_the_kernels(in_the_interpreter, cases):
    done = in_the_interpreter(cases)
    assert done.returncode == 0, done.stdout + done.stderr
