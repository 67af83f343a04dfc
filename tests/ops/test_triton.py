"""The Triton kernels in the interpreter, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = sorted(file.name for file in HERE.glob("triton_*_cases.py"))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (extra 'triton')")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without GPU")
@pytest.mark.parametrize("cases", CASES)
def test_the_kernels(cases):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / cases]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
