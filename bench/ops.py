"""Each op against eager PyTorch, torch.compile of that, and other libraries where installed.

A case is checked against the op's reference backend first, values and gradients; one that is wrong
is reported and not timed. Then forward (without autograd), backward and both are timed, all
providers and a copy of the bytes the job must move in the same rounds. `pct_copy` is that copy's
time over the provider's; it can pass 100 where a job reads more than it writes or hits the cache.

On a CPU each op has processes of its own, several one after the other, whose rounds are pooled:
what eager PyTorch pays for the memory of its intermediates, pages it kept or new ones, depends on
what that process allocated before and differs by up to five times from one process to the next.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from bench.cases import CASES, Case, Make, Shape
from bench.cases.case import Function
from bench.check import forced, output_gradients, right_ones, tensors, tolerance, with_leaves
from bench.machine import about
from bench.timing import captured, copy_call, copy_gbps, interleaved_ms, peak_bytes, quantiles
from qirl_fast import ops

MODES = ("forward", "backward", "both")
DTYPES = (torch.float32, torch.bfloat16)
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
    dtypes: Sequence[torch.dtype] = DTYPES
    rounds: int = 15
    seconds: float = 20.0
    processes: int = 3  # for each op, on a CPU
    compiled: bool = True
    sweep: bool = True
    out: Path | None = None


@dataclass
class Timed:
    """One case in one mode: milliseconds of each provider's rounds, and of a copy's."""

    head: dict[str, Any]
    moved: int
    peaks: dict[str, int]
    times_ms: dict[str, list[float]]


def run(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The result, on a CPU by processes for each op; options.out as in measure()."""
    if options.device != "cpu":
        return measure(options, say)
    result: dict[str, Any] = {}
    for op in dict.fromkeys(name.split(",")[0] for name in _chosen(options)):
        runs = []
        for turn in range(options.processes):
            alone = replace(options, only=[op], out=None, sweep=options.sweep and turn == 0)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                runs.append(process.submit(_timings, alone, say).result())
        result = result or runs[0][0] | {"processes": options.processes}
        for part, _ in runs:
            for kind in ("wrong", "skipped"):
                result[kind] += [text for text in part[kind] if text not in result[kind]]
        _add_rows(result, _pooled([timed for _, timed in runs]), options, say)
    return result


def measure(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The result of this process. options.out is rewritten after each case: a stopped run leaves
    what it had."""
    result, _ = _timings(
        options, say, done=lambda result, timed: _add_rows(result, timed, options, say)
    )
    return result


def _timings(
    options: Options,
    say: Callable[[str], None],
    done: Callable[[dict[str, Any], list[Timed]], None] = lambda *_: None,
) -> tuple[dict[str, Any], list[Timed]]:
    """A result without rows, and what its rows are made of; done: called with those of a case."""
    torch._functorch.config.donated_buffer = False  # the backward pass is run many times
    result = about(options.device) | {"copy_gbps": copy_gbps(options.device)}
    result |= {"rows": [], "wrong": [], "skipped": []}
    all_timed = []
    for name, shape, dtype, sweep in _jobs(options):
        title = f"{name} {shape} {str(dtype).removeprefix('torch.')}"
        if not hasattr(ops, name.split(",")[0]):
            _note(result["skipped"], name, "this build has no such op", say)
            continue
        try:
            case = CASES[name][0](shape, Make(dtype, options.device))
            timed = _bench(case, name, dtype, options, sweep, result, say)
        except Exception as error:  # one broken case must not lose the others
            _note(result["wrong"], title, f"{type(error).__name__}: {error}", say)
            continue
        all_timed += timed
        done(result, timed)
        torch._dynamo.reset()
    return result, all_timed


def _pooled(runs: Sequence[list[Timed]]) -> list[Timed]:
    """The same cases of several processes as one, each process giving as many rounds."""
    same: dict[str, list[Timed]] = {}
    for timed in (t for run in runs for t in run):
        same.setdefault(json.dumps(timed.head), []).append(timed)
    pooled = []
    for group in same.values():
        rounds = min(len(values) for timed in group for values in timed.times_ms.values())
        times_ms: dict[str, list[float]] = {}
        for timed in group:
            for provider, values in timed.times_ms.items():
                times_ms.setdefault(provider, []).extend(values[:rounds])
        pooled.append(replace(group[0], times_ms=times_ms))
    return pooled


def _add_rows(
    result: dict[str, Any], timed: list[Timed], options: Options, say: Callable[[str], None]
) -> None:
    for row in (row for one in timed for row in _rows(one)):
        result["rows"].append(row)
        say(_line(row))
    _keep(result, options)


def _keep(result: dict[str, Any], options: Options) -> None:
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _chosen(options: Options) -> list[str]:
    known = dict.fromkeys(name.split(",")[0] for name in CASES)
    if unknown := [name for name in options.only or () if name not in known]:
        raise ValueError(f"no op {', '.join(unknown)}; there are {', '.join(known)}")
    return [n for n in CASES if options.only is None or n.split(",")[0] in options.only]


def _jobs(options: Options) -> Iterator[tuple[str, Shape, torch.dtype, bool]]:
    chosen = _chosen(options)
    for name in chosen:
        shape = CASES[name][1]
        for dtype in options.dtypes if shape in SWEEP else DTYPES[:1]:
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
def _providers(case: Case, options: Options, sweep: bool) -> dict[str, Function]:
    if options.device == "cuda":
        found = {f"ours-{name}": forced(name, case.ours) for name in ("triton", "cuda")}
        found |= case.rivals  # all of them are for GPUs
    else:
        found = {"ours": case.ours}
    found["eager"] = case.eager
    if options.compiled and not sweep and case.op != "group_advantage":  # eager loops over groups
        found["compile"] = torch.compile(case.eager, dynamic=False)
    return found


# ---- timing -------------------------------------------------------------------------------------
def _call(case: Case, function: Function, mode: str) -> Callable[[], object]:
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(*case.inputs)

        return forward
    inputs, leaves = with_leaves(case)
    outputs = tensors(function(*inputs))
    grads = output_gradients(outputs)
    if mode == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(tensors(function(*inputs)), leaves, grads)


def _bench(
    case: Case,
    name: str,
    dtype: torch.dtype,
    options: Options,
    sweep: bool,
    result: dict[str, Any],
    say: Callable[[str], None],
) -> list[Timed]:
    label = f"{name} {case.shape} {str(dtype).removeprefix('torch.')}"

    def note(provider: str, why: str) -> None:
        kind = "wrong" if "WRONG" in why else "skipped"
        _note(result[kind], f"{label if kind == 'wrong' else name}, {provider}", why, say)

    found = _providers(case, options, sweep)
    right = right_ones(case, found, tolerance(case, dtype), note)
    if not any(provider.startswith("ours") for provider in right):
        return []
    timed = []
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
            times_ms = interleaved_ms(calls, options.rounds, options.device, options.seconds)
        head = {"op": name, "device": options.device, "dtype": str(dtype).removeprefix("torch.")}
        head |= {"shape": list(case.shape), "mode": mode, "sweep": sweep}
        timed.append(Timed(head, moved[mode], peaks, times_ms))
    return timed


def _rows(timed: Timed) -> list[dict[str, Any]]:
    """A row for each provider, with the keys that the module's JSON has."""
    times = {provider: quantiles(values) for provider, values in timed.times_ms.items()}
    copy = times.pop("copy")

    def speedup(time: float, other: str) -> float | None:
        return times[other].p50 / time if other in times else None

    return [
        timed.head
        | {
            "provider": provider,
            "ms_p20": time.p20,
            "ms_p50": time.p50,
            "ms_p80": time.p80,
            "gbps": timed.moved / time.p50 / 1e6,
            "pct_copy": 100 * copy.p50 / time.p50,
            "speedup_vs_eager": speedup(time.p50, "eager"),
            "speedup_vs_compile": speedup(time.p50, "compile"),
            "peak_mb": timed.peaks[provider] / 1e6,
        }
        for provider, time in times.items()
    ]


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
