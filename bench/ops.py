"""Each op against eager PyTorch, torch.compile of that, and other libraries where installed.

A case is checked against the op's reference backend first, values and gradients; one that is wrong
is reported and not timed. Then forward (without autograd), backward and both are timed, all
providers and a copy of the bytes the job must move in the same rounds. `pct_copy` is that copy's
time over the provider's; it can pass 100 where a job reads more than it writes or hits the cache.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from bench.cases import CASES, Case, Make, Shape
from bench.machine import about
from bench.timing import Times, captured, copy_call, copy_gbps, interleaved, peak_bytes
from qirl_fast import ops

MODES = ("forward", "backward", "both")
DTYPES = (torch.float32, torch.bfloat16)
Function = Callable[..., object]
# A GPU's caches hold the small shapes: there, larger ones stand beside them.
LARGE = {(4, 4096, 64): (64, 4096, 64), (1, 4352, 3072): (8, 4352, 3072)}
SWEEP = {
    (4, 4096, 64): [(1, 1024, 64), (2, 4096, 64), (4, 4096, 64), (16, 4096, 64)],
    (1, 4352, 3072): [(1, 256, 3072), (1, 1024, 3072), (1, 4352, 3072), (2, 4352, 3072)],
}


@dataclass
class Options:
    """What `python -m bench ops` was asked for."""

    device: str = "cpu"
    only: Sequence[str] | None = None
    rounds: int = 15
    seconds: float = 20.0
    compiled: bool = True
    sweep: bool = True
    out: Path | None = None


def run(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The result. options.out is rewritten after each case: a stopped run leaves what it had."""
    torch._functorch.config.donated_buffer = False  # the backward pass is run many times
    result = about(options.device) | {"copy_gbps": copy_gbps(options.device)}
    result |= {"rows": [], "wrong": [], "skipped": []}
    for name, shape, dtype, sweep in _jobs(options):
        title = f"{name} {shape} {str(dtype).removeprefix('torch.')}"
        if not hasattr(ops, name.split(",")[0]):
            _note(result["skipped"], name, "this build has no such op", say)
            continue
        try:
            case = CASES[name][0](shape, Make(dtype, options.device))
            rows = _bench(case, name, dtype, options, sweep, result, say)
        except Exception as error:  # one broken case must not lose the others
            _note(result["wrong"], title, f"{type(error).__name__}: {error}", say)
            continue
        result["rows"] += rows
        for row in rows:
            say(_line(row))
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        torch._dynamo.reset()
    return result


def _jobs(options: Options) -> Iterator[tuple[str, Shape, torch.dtype, bool]]:
    chosen = [n for n in CASES if options.only is None or n.split(",")[0] in options.only]
    for name in chosen:
        shape = CASES[name][1]
        for dtype in DTYPES if shape in SWEEP else DTYPES[:1]:
            yield name, LARGE.get(shape, shape) if options.device == "cuda" else shape, dtype, False
    for name in chosen if options.sweep else ():
        for shape in SWEEP.get(CASES[name][1], ()):
            yield name, shape, torch.bfloat16, True


def _note(notes: list[str], title: str, why: str, say: Callable[[str], None]) -> None:
    text = f"{title}: {why.splitlines()[0]}"
    if text not in notes:
        notes.append(text)
        say(text)


# ---- providers ----------------------------------------------------------------------------------
def _forced(backend: str, function: Function) -> Function:
    def call(*inputs: object) -> object:
        with ops.use_backend(backend):
            return function(*inputs)

    return call


def _providers(case: Case, options: Options, sweep: bool) -> dict[str, Function]:
    if options.device == "cuda":
        found = {f"ours-{name}": _forced(name, case.ours) for name in ("triton", "cuda")}
        found |= case.rivals  # all of them are for GPUs
    else:
        found = {"ours": case.ours}
    found["eager"] = case.eager
    if options.compiled and not sweep and case.op != "group_advantage":  # eager loops over groups
        found["compile"] = torch.compile(case.eager, dynamic=False)
    return found


# ---- correctness --------------------------------------------------------------------------------
def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


def _with_leaves(case: Case) -> tuple[list[object], list[Tensor]]:
    inputs = list(case.inputs)
    leaves = []
    for i in case.leaves:
        inputs[i] = inputs[i].detach().requires_grad_()  # type: ignore[attr-defined]
        leaves.append(inputs[i])
    return inputs, leaves  # type: ignore[return-value]


def _output_gradients(outputs: list[Tensor]) -> list[Tensor]:
    """1 for a loss, as loss.backward() has it, else normal."""
    g = torch.Generator().manual_seed(1)
    return [
        torch.ones_like(t) if t.ndim == 0 else torch.randn(t.shape, generator=g).to(t)
        for t in outputs
    ]


def _results(case: Case, function: Function) -> list[Tensor]:
    inputs, leaves = _with_leaves(case)
    outputs = _tensors(function(*inputs))
    if not leaves:
        return outputs
    grads = torch.autograd.grad(outputs, leaves, _output_gradients(outputs))
    return [t.detach() for t in (*outputs, *grads)]


def _fault(got: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> str:
    """What is wrong with these results, or ''."""
    for i, (mine, true) in enumerate(zip(got, truth, strict=True)):
        if mine.shape != true.shape or mine.dtype != true.dtype:
            return f"result {i} is {mine.dtype} {tuple(mine.shape)}, not {true.dtype}"
        error = (mine.float() - true.float()).abs().max() / true.float().abs().max().clamp(min=1e-9)
        if not bool(error <= tolerance):  # NaN is wrong too
            return f"result {i} is off by {float(error):.1e} of the largest true value"
    return ""


def _right_ones(
    case: Case,
    found: dict[str, Function],
    tolerance: float,
    note: Callable[[str, str], None],
) -> dict[str, Function]:
    """The providers that run and, where they do the same job, give the reference's results."""
    truth = _results(case, _forced("reference", case.ours))
    right = {}
    for provider, function in found.items():
        try:
            results = _results(case, function)
        except ImportError as error:
            note(provider, f"not installed ({error})")
            continue
        except ops.BackendError as error:
            note(provider, str(error))
            continue
        ours = provider.startswith("ours")
        fault = ""
        if ours or case.same_job:  # the others round their intermediates to storage
            fault = _fault(results, truth, tolerance if ours else 8 * tolerance)
        if fault:
            note(provider, f"WRONG, not timed: {fault}")
        else:
            right[provider] = function
    return right


# ---- timing -------------------------------------------------------------------------------------
def _call(case: Case, function: Function, mode: str) -> Callable[[], object]:
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(*case.inputs)

        return forward
    inputs, leaves = _with_leaves(case)
    outputs = _tensors(function(*inputs))
    grads = _output_gradients(outputs)
    if mode == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(_tensors(function(*inputs)), leaves, grads)


def _bench(
    case: Case,
    name: str,
    dtype: torch.dtype,
    options: Options,
    sweep: bool,
    result: dict[str, Any],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    label = f"{name} {case.shape} {str(dtype).removeprefix('torch.')}"

    def note(provider: str, why: str) -> None:
        kind = "wrong" if "WRONG" in why else "skipped"
        _note(result[kind], f"{label if kind == 'wrong' else name}, {provider}", why, say)

    tolerance = case.tolerance or (2e-2 if dtype == torch.bfloat16 else 2e-5)
    right = _right_ones(case, _providers(case, options, sweep), tolerance, note)
    if not any(provider.startswith("ours") for provider in right):
        return []
    rows = []
    for mode in MODES if case.leaves and not sweep else MODES[:1]:
        moved = {"forward": case.forward_bytes, "backward": case.backward_bytes}
        moved["both"] = sum(moved.values())
        calls = {p: _call(case, f, mode) for p, f in right.items()}
        calls["copy"] = copy_call(moved[mode], options.device)
        peaks = {p: peak_bytes(call, options.device) for p, call in calls.items()}
        if options.device == "cuda":
            for provider, call in calls.items():
                try:
                    calls[provider] = captured(call)
                except RuntimeError as error:
                    note(provider, f"no CUDA graph ({mode}), timed with Python: {error}")
        with torch.no_grad() if mode == "forward" else nullcontext():
            times = interleaved(calls, options.rounds, options.device, options.seconds)
        copy = times.pop("copy")
        head = {"op": name, "device": options.device, "dtype": str(dtype).removeprefix("torch.")}
        head |= {"shape": list(case.shape), "mode": mode, "sweep": sweep}
        rows += [
            head
            | {"provider": p}
            | _figures(t, copy, times, moved[mode])
            | {"peak_mb": peaks[p] / 1e6}
            for p, t in times.items()
        ]
    return rows


def _figures(time: Times, copy: Times, times: dict[str, Times], moved: int) -> dict[str, Any]:
    def speedup(other: str) -> float | None:
        return times[other].p50 / time.p50 if other in times else None

    return {
        "ms_p20": time.p20,
        "ms_p50": time.p50,
        "ms_p80": time.p80,
        "gbps": moved / time.p50 / 1e6,
        "pct_copy": 100 * copy.p50 / time.p50,
        "speedup_vs_eager": speedup("eager"),
        "speedup_vs_compile": speedup("compile"),
    }


def _line(row: dict[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"]))
    speed = "".join(
        f" {row[key]:6.2f}x {key.removeprefix('speedup_')}"
        for key in ("speedup_vs_eager", "speedup_vs_compile")
        if row[key] is not None
    )
    return (
        f"{row['op']:28} {row['dtype']:9} {shape:14} {row['mode']:9} {row['provider']:11} "
        f"{row['ms_p50']:9.3f} ms {row['pct_copy']:5.0f} % of copy{speed}"
    )
