"""Every op's `triton` and `cuda` backends on a CUDA device, through the benchmark's cases.

A new op joins by its case in bench/cases. What needs no device (interpreter, emulator, compilation)
is tested elsewhere. bench/gpu.sh runs this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from torch import Tensor

from bench.cases import CASES, Case, Make
from bench.check import fault, forced, output_gradients, results, tensors, tolerance, with_leaves
from qirl_fast import ops

if not torch.cuda.is_available():
    pytest.skip("torch.cuda.is_available() is False: no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]
# By the benchmark's shape: a small odd one, and one of many blocks. Widths of the transformer ops
# stay multiples of 128, which qk_norm_rope's heads and fp8's GEMM want; ODD_WIDTH has the others.
SHAPES = {
    (4, 4096, 64): [(3, 37, 33), (2, 1500, 64)],
    (1, 4352, 3072): [(2, 67, 384), (2, 700, 1536)],
    (1152,): [(5 * 24,), (1152,)],
}
ODD_WIDTH = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate", "gelu", "swiglu")
ODD_WIDTH += ("lora_linear", "fp8_quantize", "norm_modulate, fp8", "swiglu, fp8")


def op_of(name: str) -> str:
    return name.split(",")[0]


def require_backend(op: str, backend: str) -> None:
    """Skips where this build lacks the op or the op lacks the backend."""
    if not hasattr(ops, op):
        pytest.skip(f"this build has no op {op}")
    module = import_module(f"qirl_fast.ops.{op}")
    if hasattr(module, "OP") and backend not in module.OP.backends:  # else composed of other ops
        pytest.skip(f"{op} has no backend {backend}")


def calls():
    """(case name, backend, shape, dtype) of every test."""
    for name, (_, shape) in CASES.items():
        shapes = list(SHAPES[shape])
        if name in ODD_WIDTH:
            shapes.append((3, 5, 101))
        for size in shapes:
            for dtype in DTYPES if len(size) > 1 else DTYPES[:1]:
                for backend in ("triton", "cuda"):
                    kind = str(dtype).removeprefix("torch.")
                    label = f"{name}-{backend}-{'x'.join(map(str, size))}-{kind}"
                    yield pytest.param(name, backend, size, dtype, id=label.replace(", ", "_"))


@pytest.fixture
def prepared() -> Callable[..., tuple[Case, Callable[..., object]]]:
    """prepared(name, backend, shape, dtype): the case and its function on that backend."""

    def make(name, backend, shape, dtype):
        require_backend(op_of(name), backend)
        case = CASES[name][0](shape, Make(dtype, "cuda"))
        return case, forced(backend, case.ours)

    return make


@contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(function, inputs, leaves, grads) -> list[Tensor]:
    outputs = tensors(function(*inputs))
    if not leaves:
        return outputs
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in pairs)


def bits(tensors_: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().reshape(-1) for t in tensors_]


@pytest.mark.parametrize(("name", "backend", "shape", "dtype"), list(calls()))
def test_matches_the_reference(name, backend, shape, dtype, prepared):
    case, function = prepared(name, backend, shape, dtype)
    truth = results(case, forced("reference", case.ours))
    assert fault(results(case, function), truth, tolerance(case, dtype)) == ""


@pytest.mark.parametrize(("name", "backend", "shape", "dtype"), list(calls()))
def test_same_bits_without_sync_and_in_a_graph(name, backend, shape, dtype, prepared):
    """Run to run; no host sync, forward or backward; captured as a CUDA graph and replayed."""
    case, function = prepared(name, backend, shape, dtype)
    inputs, leaves = with_leaves(case)
    grads = output_gradients(tensors(function(*inputs))) if leaves else []
    first = bits(run(function, inputs, leaves, grads))
    with no_host_sync():
        again = run(function, inputs, leaves, grads)
    assert same_bits(first, bits(again))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(function, inputs, leaves, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(function, inputs, leaves, grads)
    for t in captured:
        t.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(first, bits(captured))


@pytest.mark.parametrize("op", ["norm_modulate", "gate_residual_norm_modulate", "gelu", "swiglu"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(3, 5, 101), (2, 67, 384), (1, 40, 8192), (2, 3, 12288)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_in_fp8_is_the_output_quantized(op, backend, shape, dtype):
    """y is the op's own and (q, scale) are those of fp8_quantize(y), bit for bit."""
    if "norm" in op and shape[-1] > 8192:
        pytest.skip("rows of at most 8192 under a norm")
    large = 1 if op in ("norm_modulate", "gelu") else 2
    rows = {"norm_modulate": 2, "gate_residual_norm_modulate": 3}.get(op, 0)
    make = Make(dtype, "cuda")
    given = [make.large(*shape) for _ in range(large)]
    given += [make.large(shape[0], shape[-1]) for _ in range(rows)]
    with ops.use_backend(backend):
        plain = getattr(ops, op)(*given)
        plain = plain if isinstance(plain, Tensor) else plain[0]
        for quantize in ("row", "block"):
            result = getattr(ops, op)(*given, quantize=quantize)
            result = result if isinstance(result, ops.Quantized) else result[0]
            wanted = [plain, *ops.fp8_quantize(plain, granularity=quantize)]
            assert same_bits(bits(list(result)), bits(wanted))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_non_contiguous_input_is_read_right(name, backend, prepared):
    """Each large input as every second element of a wider buffer."""
    shape = SHAPES[CASES[name][1]][0]
    case, function = prepared(name, backend, shape, torch.float32)
    first = bits(tensors(function(*case.inputs)))

    def spread(t: object) -> object:
        if not isinstance(t, Tensor) or t.ndim < 2 or t.dtype != torch.float32:
            return t
        return torch.stack((t, t), dim=-1)[..., 0]

    again = bits(tensors(function(*(spread(t) for t in case.inputs))))
    if op_of(name) in ("lora_linear", "fp8_linear"):  # another layout is another library GEMM
        assert fault(again, first, tolerance(case, torch.float32)) == ""
    else:
        assert same_bits(first, again)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_compiles_with_inductor(name, backend, prepared):
    """torch.compile(fullgraph=True): same bits as uncompiled."""
    shape = SHAPES[CASES[name][1]][0]
    case, _ = prepared(name, backend, shape, torch.float32)
    with ops.use_backend(backend):
        expected = results(case, case.ours)
        torch._dynamo.reset()
        compiled = results(case, torch.compile(case.ours, fullgraph=True))
    assert same_bits(bits(expected), bits(compiled))
