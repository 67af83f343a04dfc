"""Fixtures for the op tests. Helpers are fixtures: tests are imported by path, not as a package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from qirl_fast import _cpu
from qirl_fast.ops import _cuda
from qirl_fast.ops.dispatch import Op

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this CPU has, forced for the test."""
    _cpu.force_isa(request.param)
    yield request.param
    _cpu.unforce_isa()
    if os.environ.get("QIRL_CPU_ISA"):
        _cpu.force_isa(os.environ["QIRL_CPU_ISA"])


@pytest.fixture
def threads() -> Iterator[Callable[[int], object]]:
    """`with threads(n):` sets torch's thread count inside the block."""

    @contextmanager
    def use(count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    yield use


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every output an op allocates starts as NaN (all ones): an element left unwritten shows."""
    real = Tensor.new_empty

    def new_nan(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = real(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(1)

    monkeypatch.setattr(Tensor, "new_empty", new_nan)
    _cpu.poison(True)
    yield
    _cpu.poison(False)


def max_error(result: Tensor, truth: Tensor) -> float:
    assert result.shape == truth.shape
    assert bool(torch.isfinite(result).all())
    return float((result.double() - truth.double()).abs().max())


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """no_worse(result, same_dtype, truth): error at most 2x that of the same-dtype PyTorch version.

    Both errors are against the float64 truth. One unit in the last place of the largest true value
    is allowed in any case: rounding the truth itself to the dtype costs half of that, and a PyTorch
    result that happens to be exact would leave no room.
    """

    def check(result: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
        ulp = torch.finfo(result.dtype).eps * float(truth.abs().max())
        assert max_error(result, truth) <= max(2.0 * max_error(same_dtype, truth), ulp)

    return check


EMULATED = str(REPOSITORY / "build/emulated")
BUILD = (str(REPOSITORY / ".ci/build-cpp"), EMULATED, "_cuda_emulated", "-DQIRL_CUDA=OFF")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: begun last it would run alone, on one core, while others wait."""
    items.sort(key=lambda item: item.path.name != "test_triton.py")


def emulated_elsewhere() -> str | None:
    """QIRL_EMULATED_DIR: a folder that holds a build of another kind (make asan)."""
    return os.environ.get("QIRL_EMULATED_DIR")


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """csrc/cuda and its bindings, built by the C++ compiler to run on the host (csrc/emulate)."""
    folder = emulated_elsewhere()
    if folder is None:
        folder = EMULATED
        env = {**os.environ, "QIRL_BUILD_PYTHON": sys.executable}
        built = subprocess.run(BUILD, env=env, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
    path = Path(folder) / "csrc/emulate/_cuda_emulated.so"
    spec = spec_from_file_location("emulated._cuda", path)  # the module inside is named _cuda
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated_cuda(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The `cuda` backends run on CPU tensors: as <op>_cuda(...) and under use_backend("cuda")."""
    stand_ins = {
        _cuda.cuda_module: lambda: emulated_module,
        _cuda.stream_of: lambda x: 0,
        _cuda.device_of: lambda x: nullcontext(),
    }
    # Launchers import the three by name, so each module of ops holds its own references.
    for name, module in list(sys.modules.items()):
        if not name.startswith("qirl_fast.ops"):
            continue
        for attribute, value in list(vars(module).items()):
            if callable(value) and value in stand_ins:
                monkeypatch.setattr(module, attribute, stand_ins[value])
            if isinstance(value, Op) and "cuda" in value.backends:
                served = replace(
                    value.backends["cuda"], devices=("cpu", "cuda"), missing=lambda: None
                )
                monkeypatch.setitem(value.backends, "cuda", served)
    emulated_module.seed_order(1)
    return emulated_module
