"""Fixtures for the op tests. Helpers are fixtures: tests are imported by path, not as a package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output an op allocates starts as NaN (all ones): an element left unwritten shows."""
    real = Tensor.new_empty

    def new_nan(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = real(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(1)

    monkeypatch.setattr(Tensor, "new_empty", new_nan)


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


class Beside:
    """Long commands, run one after another beside the tests, on the core these do not use.

    All that the collected tests will ask for are begun as soon as they are known.
    """

    def __init__(self) -> None:
        self._turns = ThreadPoolExecutor(1)
        self._jobs: dict[tuple[str, ...], Future[subprocess.CompletedProcess[str]]] = {}
        self._running: subprocess.Popen[str] | None = None

    def start(self, command: tuple[str, ...], env: Mapping[str, str]) -> None:
        """Queue a command that is not yet there."""
        if command not in self._jobs:
            self._jobs[command] = self._turns.submit(self._run, command, {**os.environ, **env})

    def __call__(
        self, command: tuple[str, ...], env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Wait until the command has run."""
        self.start(command, env)
        return self._jobs[command].result()

    def _run(
        self, command: tuple[str, ...], env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as process:
            self._running = process
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def stop(self) -> None:
        self._turns.shutdown(wait=False, cancel_futures=True)
        if self._running is not None:
            self._running.kill()


BESIDE = Beside()
EMULATED = str(REPOSITORY / "build/emulated")
BUILD = (str(REPOSITORY / ".ci/build-cpp"), EMULATED, "_cuda_emulated", "-DQIRL_CUDA=OFF")
BUILD_ENV = {"QIRL_BUILD_PYTHON": sys.executable}
INTERPRETER_ENV = {"TRITON_INTERPRET": "1"}


def interpreter(cases: str) -> tuple[str, ...]:
    """The command that runs a file of tests/ops in a pytest of its own."""
    file = str(Path(__file__).with_name(cases))
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    for item in session.items:
        if "emulated_module" in getattr(item, "fixturenames", ()) and not emulated_elsewhere():
            BESIDE.start(BUILD, BUILD_ENV)
    for item in session.items:
        skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
        if "in_the_interpreter" in getattr(item, "fixturenames", ()) and not skipped:
            BESIDE.start(interpreter(item.callspec.params["cases"]), INTERPRETER_ENV)


def pytest_sessionfinish() -> None:
    BESIDE.stop()


@pytest.fixture
def in_the_interpreter() -> Callable[[str], subprocess.CompletedProcess[str]]:
    """`in_the_interpreter(cases)`: that file of tests/ops has run in Triton's interpreter."""
    return lambda cases: BESIDE(interpreter(cases), INTERPRETER_ENV)


def emulated_elsewhere() -> str | None:
    """QIRL_EMULATED_DIR: a folder that holds a build of another kind (make asan)."""
    return os.environ.get("QIRL_EMULATED_DIR")


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """csrc/cuda and its bindings, built by the C++ compiler to run on the host (csrc/emulate)."""
    folder = emulated_elsewhere()
    if folder is None:
        folder = EMULATED
        built = BESIDE(BUILD, BUILD_ENV)
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
