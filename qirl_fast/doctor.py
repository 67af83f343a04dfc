"""`python -m qirl_fast.doctor [recipe.yaml] [key=value ...]`: is this machine ready, or why not.

Looks at the interpreter and packages, the compiled kernels, GPUs, optional packages, limits of the
system and, with a recipe, at the folders and the disk it needs. Every op's default backend runs on
every device and is compared with its reference. Nothing is written but one file that is removed
again. Exit status 0: ready; 1: something must be mended; 2: the recipe is wrong.
"""

import importlib
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qirl_fast import __version__, _cpu, ops
from qirl_fast.config import Config, ConfigError, load_config
from qirl_fast.data.prompts import PromptError
from qirl_fast.memory import plan
from qirl_fast.tiny import packaged

State = Literal["ok", "note", "mend"]
COLOURS = {"ok": "green", "note": "yellow", "mend": "red"}
NEEDED = {  # tested from, below
    "torch": ("2.10", "2.14"),
    "diffusers": ("0.42", "1"),
    "transformers": ("5.17", "6"),
    "peft": ("0.18", "1"),
}
EXTRAS = {  # module -> extra of the package, what it is for
    "triton": ("triton", "kernels on GPUs"),
    "flash_attn": ("flash-attn", "model.attention=flash"),
    "xformers": ("xformers", "model.attention=xformers"),
    "transformer_engine": ("te", "model.fp8.library=te"),
    "nvidia.dali": ("dali", "data.decoder=dali"),
    "rapidocr": ("ocr", "judges of kind ocr"),
    "onnxruntime": ("face", "judges of faces, OCR"),
    "starlette": ("server", "python -m qirl_fast.reward_server"),
    "wandb": ("wandb", "tracking.wandb"),
}
FILES = 4096  # open files that a run with workers, caches and shards may come to
SHARED_MEMORY = 1 << 30  # bytes of /dev/shm that NCCL and DALI ask for


@dataclass(frozen=True)
class Found:
    """One thing looked at: what it is, how it is, what to do."""

    state: State
    what: str
    how: str
    mend: str = ""


def numbers(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cu130"."""
    parts = text.split("+")[0].split(".")
    return tuple(int(p) for p in parts if p.isdecimal())


def software() -> Iterator[Found]:
    """Interpreter, packages, optional packages."""
    yield Found("ok", "qirl_fast", f"{__version__}, Python {platform.python_version()}")
    for name, (low, high) in NEEDED.items():
        own = version(name)
        fits = numbers(low) <= numbers(own) < numbers(high)
        mend = "" if fits else f"pip install '{name}>={low},<{high}'"
        yield Found("ok" if fits else "note", name, own if fits else f"{own}, not tested", mend)
    for module, (extra, use) in EXTRAS.items():
        install = f"pip install 'qirl-fast[{extra}]'"
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            yield Found("note", module, f"not there; only for {use}", install)
        except Exception as error:  # a package that is there in part may raise anything
            yield Found(
                "mend", module, f"cannot be imported: {error!r}", f"{install}, or remove it"
            )
        else:
            yield Found("ok", module, getattr(found, "__version__", "there"))


def kernels() -> Iterator[Found]:
    """Compiled modules, and whether their numbers are right."""
    isas = _cpu.available_isas()
    yield Found("ok", "CPU kernels", f"{isas[-1]} of {', '.join(isas)}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        how = f"none: torch {torch.__version__} " + (
            f"is built for CUDA {built}, and no driver answers" if built else "is a CPU build"
        )
        yield Found("note", "GPU", how, "for a GPU: its driver, and a CUDA build of torch")
    else:
        for i in range(torch.cuda.device_count()):
            own = torch.cuda.get_device_properties(i)
            capability = f"sm_{own.major}{own.minor}"
            how = f"{own.name}, {capability}, {own.total_memory / 2**30:.0f} GiB"
            old = (own.major, own.minor) < (8, 0)
            yield Found("mend" if old else "ok", f"GPU {i}", how, "wanted sm_80 or newer" * old)
        try:
            importlib.import_module("qirl_fast._cuda")
        except ImportError as error:
            again = "QIRL_CUDA=ON make setup, with nvcc on PATH; Triton serves in its place"
            yield Found("note", "CUDA kernels", f"not built ({error})", again)
        else:
            yield Found("ok", "CUDA kernels", "built")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield right(device)


def right(device: str) -> Found:
    """A noise step and its log-prob by the default backend and by the reference."""
    x, v = (torch.randn(4, 4096, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    x, v = x.to(device), v.to(device)
    a, c, s, w, b = (torch.full((4,), n, device=device) for n in (0.9, -0.1, 0.2, 25.0, 0.0))
    seeds = torch.arange(4, device=device)
    try:
        x_next, logp = ops.flow_step(x, v, a, c, s, w, b, seed=seeds, offset=0)
        with ops.use_backend("reference"):
            again = ops.flow_logp(x, x_next, v, a, c, w, b)
    except Exception as error:  # whatever a broken build raises
        mend = "make setup; if it stays, an issue with this table"
        return Found("mend", f"ops on {device}", f"do not run: {error!r}", mend)
    off = ((logp - again).abs() / again.abs()).max().item()
    if not off < 1e-4:  # float32 sums of 4096 terms; NaN is no less
        return Found("mend", f"ops on {device}", f"log-prob off by {off:.1e}", "an issue, please")
    return Found("ok", f"ops on {device}", f"agree with the reference to {off:.0e}")


def system() -> Iterator[Found]:
    """Cores, memory, limits."""
    cores = len(os.sched_getaffinity(0))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Found("ok", "machine", f"{cores} cores, {pages / 2**30:.0f} GiB, {platform.machine()}")
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = files < FILES
    raised = f"ulimit -n {FILES if most < 0 else min(FILES, most)}"
    yield Found("note" if low else "ok", "open files", f"at most {files}", raised * low)
    if torch.cuda.is_available():
        size = shutil.disk_usage("/dev/shm").total
        low = size < SHARED_MEMORY
        wanted = f"containers: --shm-size {SHARED_MEMORY >> 30}g" * low
        yield Found("note" if low else "ok", "/dev/shm", f"{size / 2**30:.1f} GiB", wanted)


def recipe(cfg: Config) -> Iterator[Found]:
    """The folders of a recipe, its disk and its memory."""
    yield Found("ok", "model", str(packaged(cfg.model.path)))
    planned = plan(cfg)  # reads model and prompts; raises what is wrong with them
    total = sum(planned.values())
    on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    have = (
        torch.cuda.get_device_properties(0).total_memory
        if on_gpu
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    less = "train.recompute_blocks, rollout.max_rows or model.adapter=lora take less"
    fits = total < have
    how = f"{total / 2**30:.2f} GiB planned of {have / 2**30:.0f}"
    yield Found("ok" if fits else "mend", "memory", how, less * (not fits))
    output = Path(cfg.output)
    there = next(p for p in (output, *output.absolute().parents) if p.exists())
    probe = there / f".doctor-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        how = f"{there} cannot be written to ({error.strerror})"
        yield Found("mend", "output", how, "another by output=PATH")
        return
    trained = planned.get("adapter", planned.get("weights of the reference", 0))
    needed = (cfg.tracking.keep_checkpoints + 1) * 6 * trained  # weights, moments, average, exports
    free = shutil.disk_usage(there).free
    how = f"{free / 2**30:.1f} GiB free, checkpoints take {needed / 2**30:.2f}"
    short = needed > free
    yield Found("mend" if short else "ok", "disk", how, "fewer tracking.keep_checkpoints" * short)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    args = sys.argv[1:] if argv is None else argv
    if "-h" in args or "--help" in args:
        print(__doc__)
        return 0
    console, errors = Console(soft_wrap=False), Console(stderr=True, soft_wrap=True)
    found = [*software(), *kernels(), *system()]
    status = 0
    try:
        if args:
            found += recipe(load_config(args))
    except (ConfigError, PromptError, FileNotFoundError, ValueError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        status = 2
    table = Table(box=None, pad_edge=False)
    for name in ("", "what", "how it is", "what to do"):
        table.add_column(name)
    for one in found:
        state = Text(one.state, style=COLOURS[one.state])
        table.add_row(state, *map(Text, (one.what, one.how, one.mend)))
    console.print(table)
    mends = sum(one.state == "mend" for one in found)
    console.print(f"{mends} to mend" if mends else "ready" if not status else "the recipe is wrong")
    return status or int(mends > 0)


if __name__ == "__main__":
    sys.exit(main())
