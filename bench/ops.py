"""Each op: qirl_fast, eager PyTorch as the trainers write it, and torch.compile of that.

Per op one table row: median ms of each, speed-ups, and the share of the copy ceiling: the time a
copy of the same number of bytes takes in the same rounds, divided by the op's time. It can pass
100 % where the op reads more than it writes, or finds its data in the cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.timing import copy_call, interleaved
from qirl_fast import _cpu, ops

Shape = tuple[int, int, int]


@dataclass
class Case:
    """ours and eager do the same job; `bytes` is what it must at least read and write."""

    name: str
    ours: Callable[[], object]
    eager: Callable[..., object]
    arguments: tuple[object, ...]
    bytes: int


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _eager_logp(x, x_next, v, a, c, w, b):
    x, x_next, v = x.float(), x_next.float(), v.float()
    mean = _per_row(a, x) * x + _per_row(c, x) * v
    return (-_per_row(w, x) * (x_next - mean) ** 2 - _per_row(b, x)).flatten(1).mean(1)


def _eager_step(x, v, a, c, s, w, b):
    mean = _per_row(a, x) * x.float() + _per_row(c, x) * v.float()
    x_next = (mean + _per_row(s, x) * torch.randn_like(mean)).to(x.dtype)
    logp = (-_per_row(w, x) * (x_next.float() - mean) ** 2 - _per_row(b, x)).flatten(1).mean(1)
    return x_next, logp


def _eager_guide(v_cond, v_uncond, scale):
    comb = v_uncond + scale * (v_cond - v_uncond)
    norm, comb_norm = (torch.norm(t, dim=-1, keepdim=True) for t in (v_cond, comb))
    return comb * (norm / comb_norm)


def _gradient(function: Callable[..., Tensor], v: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        leaf = v.detach().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]

    return call


def cases(shape: Shape, dtype: torch.dtype) -> list[Case]:
    """The benchmarked ops at [rows, tokens, channels] in one dtype."""
    torch.manual_seed(0)
    rows, count = shape[0], math.prod(shape)
    x, v, u = (torch.randn(shape).to(dtype) for _ in range(3))
    a, c, s = torch.full((rows,), 1.01), torch.full((rows,), -0.1), torch.full((rows,), 0.3)
    w, b = 1 / (2 * s * s), torch.log(s)
    seed = torch.arange(rows)
    x_next, _ = ops.flow_step(x, v, a, c, s, w, b, seed=seed, offset=0)
    size = x.element_size() * count
    with_grad = _gradient(lambda t: ops.flow_logp(x, x_next, t, a, c, w, b), v)
    return [
        Case(
            "flow_step",
            lambda: ops.flow_step(x, v, a, c, s, w, b, seed=seed, offset=0),
            _eager_step,
            (x, v, a, c, s, w, b),
            3 * size,
        ),
        Case(
            "flow_logp",
            lambda: ops.flow_logp(x, x_next, v, a, c, w, b),
            _eager_logp,
            (x, x_next, v, a, c, w, b),
            3 * size,
        ),
        Case(
            "flow_logp + backward",
            with_grad,
            lambda *t: _gradient(lambda leaf: _eager_logp(x, x_next, leaf, a, c, w, b), v)(),
            (),
            7 * size,
        ),
        Case(
            "guide, rescaled",
            lambda: ops.guide(v, u, 4.0, rescale=True),
            _eager_guide,
            (v, u, 4.0),
            3 * size,
        ),
    ]


def run(shape: Shape, rounds: int, compiled: bool, only: list[str] | None) -> None:
    """Print one table per dtype."""
    console = Console()
    console.print(
        f"{shape} rows x tokens x channels, {torch.get_num_threads()} threads, "
        f"kernels {_cpu.active_isa()}, torch {torch.__version__}, {rounds} rounds"
    )
    for dtype in (torch.float32, torch.bfloat16):
        heads = ("op", "ours ms", "eager ms", "compile ms", "vs eager", "vs compile", "of copy")
        table = Table(*heads, title=str(dtype))
        for case in cases(shape, dtype):
            if only is None or case.name.split()[0].rstrip(",") in only:
                table.add_row(case.name, *_measure(case, rounds, compiled))
        console.print(table)


def _measure(case: Case, rounds: int, compiled: bool) -> list[str]:
    variants: dict[str, Callable[[], object]] = {
        "ours": case.ours,
        "eager": lambda: case.eager(*case.arguments),
        "copy": copy_call(case.bytes),
    }
    if compiled and case.arguments:  # a closure over a gradient does not compile as one graph
        graph = torch.compile(case.eager)
        variants["compile"] = lambda: graph(*case.arguments)
    ms = interleaved(variants, rounds)
    has_graph = "compile" in ms
    return [
        f"{ms['ours']:.3f}",
        f"{ms['eager']:.3f}",
        f"{ms['compile']:.3f}" if has_graph else "-",
        f"{ms['eager'] / ms['ours']:.1f}x",
        f"{ms['compile'] / ms['ours']:.1f}x" if has_graph else "-",
        f"{100 * ms['copy'] / ms['ours']:.0f} %",
    ]
