"""dispatch: a table per op, forced backends that raise, one log line, forced CPU kernels."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qirl_fast import _cpu, ops
from qirl_fast.ops import dispatch, flow_logp, flow_step, group_advantage, guide, policy_loss
from qirl_fast.ops.dispatch import BACKENDS, Backend, BackendError, Op

CPU = torch.device("cpu")
FLOATS = (torch.float32,)


def make_op(**more: Backend) -> Op:
    table = {"reference": Backend(lambda: "r", ("cpu", "cuda"), FLOATS), **more}
    return Op("toy", table, {"cpu": "reference"})


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


def tables() -> list[Op]:
    modules = [
        sys.modules[f"qirl_fast.ops.{f.__name__}"]
        for f in (flow_step, flow_logp, guide, group_advantage, policy_loss)
    ]
    return [op for m in modules for op in vars(m).values() if isinstance(op, Op)]


def test_every_op_has_reference_and_cpu_and_a_default_per_device():
    assert len(tables()) >= 5
    for op in tables():
        assert {"reference", "cpu"} <= set(op.backends) <= set(BACKENDS)
        assert op.default["cpu"] == "cpu"
        for device, name in op.default.items():
            assert device in op.backends[name].devices


def test_the_default_follows_the_device():
    op = make_op()
    assert op.choose("", CPU, torch.float32) == "reference"
    with pytest.raises(BackendError, match=r"toy: no backend for device type 'xpu'; it serves cpu"):
        op.choose("", torch.device("xpu"), torch.float32)


def test_a_forced_backend_that_cannot_serve_raises():
    op = make_op(
        triton=Backend(lambda: "t", ("cuda",), FLOATS, lambda: "triton is not installed."),
        cuda=Backend(lambda: "c", ("cuda",), FLOATS),
    )
    for name, message in (
        ("cpu", "does not exist for this op; it has reference, triton, cuda"),
        ("triton", "is not available: triton is not installed"),
        ("cuda", "serves tensors on cuda; these are on 'cpu'"),
    ):
        with pytest.raises(BackendError, match=message):
            op.choose(name, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"takes torch.float32; got torch.float16"):
        op.choose("reference", CPU, torch.float16)


def test_a_backend_the_op_lacks_is_refused_by_the_public_function():
    x = torch.ones(2, 8)
    with ops.use_backend("triton"), pytest.raises(BackendError, match="guide: backend 'triton'"):
        ops.guide(x, x, 2.0)


def test_use_backend_nests_and_is_undone_by_errors():
    assert dispatch.forced_backend() == ""
    with ops.use_backend("cpu"):
        with pytest.raises(RuntimeError), ops.use_backend("reference"):
            assert dispatch.forced_backend() == "reference"
            raise RuntimeError
        assert dispatch.forced_backend() == "cpu"
    assert dispatch.forced_backend() == ""
    with pytest.raises(ValueError, match="unknown backend 'gpu'; choose from reference, cpu"):
        ops.use_backend("gpu").__enter__()


def test_backward_uses_the_backend_of_its_forward(monkeypatch):
    ran = []
    for table in tables():
        if table.name == "guide_backward":
            for name, backend in table.backends.items():
                spy = Backend(
                    lambda *a, _name=name, _run=backend.run: (ran.append(_name), _run(*a))[1],
                    backend.devices,
                    backend.dtypes,
                )
                monkeypatch.setitem(table.backends, name, spy)
    x = torch.ones(2, 8, requires_grad=True)
    with ops.use_backend("reference"):
        y = ops.guide(x, torch.zeros(2, 8), 2.0)
    y.sum().backward()
    assert ran == ["reference"]


def test_forcing_is_seen_by_compiled_code():
    x = torch.randn(2, 8)
    compiled = torch.compile(lambda t: ops.guide(t, -t, 2.0), fullgraph=True, backend="aot_eager")
    compiled(x)
    before = _cpu.last_isa()
    assert before != ""
    with ops.use_backend("triton"), pytest.raises(BackendError, match="triton"):
        compiled(x)


class Toy:
    """The op `qirl::toy`; way: how its last tensor came to the kernel."""

    def __init__(self) -> None:
        op = Op("toy", {"cpu": Backend(self.run, ("cpu",), FLOATS)}, {"cpu": "cpu"})
        self.registered = op.register("(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
        self.way = ""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        called_by = sys._getframe(1).f_code.co_name
        self.way = {"call": "at once", "run": "by the dispatcher"}[called_by]
        return x.clone()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.registered(x, "")

    def way_of(self, x: torch.Tensor) -> str:
        assert torch.equal(self(x), x.clone())
        return self.way


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def test_a_second_call_needs_no_dispatcher(toy):
    x = torch.randn(3)
    toy(x)
    assert toy.way_of(x) == toy.way_of(nn.Parameter(x)) == toy.way_of(torch.ones(2, 2)) == "at once"
    with torch.no_grad(), torch.autocast("cpu"):
        assert toy.way_of(x) == "at once"


def test_what_has_to_see_ops_sees_them(toy):
    """Modes, transforms, traces, the profiler; and the dispatcher what is no plain tensor."""
    x = torch.randn(3)
    toy(x)
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in (Dispatch, Function):
        seen.clear()
        with mode():
            assert toy.way_of(x) == "by the dispatcher"
        assert "qirl.toy.default" in seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        toy(x)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(toy.way_of, x).result() == "by the dispatcher"
    assert "qirl::toy" in {event.key for event in profile.key_averages()}
    assert "qirl.toy" in make_fx(toy)(x).code
    assert "qirl::toy" in str(torch.jit.trace(lambda t: toy(t), x).graph)
    assert torch.equal(torch.vmap(toy)(x), x) and toy.way == "by the dispatcher"
    assert torch.compile(lambda t: toy.registered(t, ""), fullgraph=True, backend="eager")(x).equal(
        x
    )
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg() and toy.way_of(negated) == "by the dispatcher"
    assert toy.way_of(torch._efficientzerotensor((3,))) == "by the dispatcher"
    assert toy(x.to("meta")).device.type == "meta"
    assert toy.way_of(x) == "at once"


def test_a_trace_of_a_number_for_guidance_serves_other_batches():
    """The number becomes a tensor in the graph, not one of the traced batch's size."""
    v, more = torch.randn(2, 3, 8), torch.randn(5, 3, 8)
    for trace in (torch.jit.trace, lambda f, x: make_fx(f, tracing_mode="symbolic")(x)):
        graph = trace(lambda t: ops.guide(t, -t, 3.0), v)
        assert torch.equal(graph(more), ops.guide(more, -more, 3.0))


def test_a_tangent_is_refused_not_zeroed(toy):
    x = torch.randn(2, 8)
    for function in (toy, ops.gelu, lambda t: ops.guide(t, -t, 2.0)):
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=r"no forward-mode derivative \(jvp\)"):
                torch.func.jvp(function, (x,), (x,))

    def by_factor(a: torch.Tensor) -> torch.Tensor:
        return ops.lora_linear(x, torch.ones(8, 8), None, [(a, torch.ones(8, 2), 1.0)])

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(by_factor, (torch.ones(2, 8),), (torch.ones(2, 8),))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.compile(lambda t: torch.func.jvp(ops.gelu, (t,), (t,)), backend="eager")(x)
    with forward_ad.dual_level():
        assert ops.gelu(x).equal(ops.gelu(x.clone())), "nobody asks for the derivative to x"


def test_the_choice_is_logged_once(caplog):
    op = make_op()
    with caplog.at_level(logging.INFO, logger="qirl_fast.ops"):
        for _ in range(3):
            op.choose("", CPU, torch.float32)
    assert [r.getMessage() for r in caplog.records] == ["toy on cpu: backend reference"]


def test_environment_forces_a_backend():
    show = "from qirl_fast.ops import dispatch; print(dispatch.forced_backend())"
    assert run_python(show, QIRL_BACKEND="reference").stdout.strip() == "reference"
    wrong = run_python(show, QIRL_BACKEND="fast")
    assert wrong.returncode != 0 and "QIRL_BACKEND: unknown backend 'fast'" in wrong.stderr


def test_environment_forces_an_instruction_set():
    show = (
        "import torch; from qirl_fast import _cpu, ops; x = torch.ones(1, 4);"
        "ops.guide(x, x, 2.0); print(_cpu.last_isa())"
    )
    for name in _cpu.available_isas():
        assert run_python(show, QIRL_CPU_ISA=name).stdout.strip() == name
    wrong = run_python(show, QIRL_CPU_ISA="sse9")
    assert wrong.returncode != 0 and "QIRL_CPU_ISA='sse9' cannot run here" in wrong.stderr


def test_a_missing_instruction_set_cannot_be_forced():
    missing = {"base", "avx2", "avx512"} - set(_cpu.available_isas())
    for name in (*missing, "nonsense"):
        with pytest.raises(ValueError, match=rf"'{name}' cannot run here: built are .*supports"):
            _cpu.force_isa(name)
    assert _cpu.active_isa() == _cpu.available_isas()[-1]
