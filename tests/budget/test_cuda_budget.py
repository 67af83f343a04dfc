"""Every CUDA C++ kernel compiles for sm_80, sm_90a and sm_100 without spills or a local stack."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH and CUDACXX is not set")
def test_no_kernel_spills():
    done = subprocess.run(
        [REPOSITORY / ".ci/cuda-check"],
        env={**os.environ, "QIRL_BUILD_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads((REPOSITORY / "build/cuda-check/resources.json").read_text())["kernels"]
    for source in (REPOSITORY / "csrc/cuda").glob("*.cu"):
        if not re.search(r"__global__", source.read_text()):
            continue
        mine = [k for k in kernels if k["file"] == source.stem]
        assert {k["target"] for k in mine} == {"sm_80", "sm_90a", "sm_100"}, source.name
    assert all(k["spills"] == 0 and k["stack"] == 0 and k["registers"] > 0 for k in kernels)


def test_a_spill_is_a_failure(tmp_path):
    log = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'\n"
        "    {0} bytes stack frame, {1} bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem\n"
    )
    source = next(iter((REPOSITORY / "csrc/cuda").glob("*.cu"))).name
    for stack, spills, status in ((0, 0, 0), (8, 0, 1), (8, 8, 1)):
        (tmp_path / f"{source}.o.ptxas").write_text(log.format(stack, spills))
        done = subprocess.run([sys.executable, REPOSITORY / ".ci/cuda_resources.py", tmp_path])
        assert done.returncode == status
        record = json.loads((tmp_path / "resources.json").read_text())["kernels"][0]
        assert record["registers"] == 40 and record["spills"] == spills
