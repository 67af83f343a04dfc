"""python tests/fuzz/guided.py RUNS [READER] [libFuzzer options]: inputs guided by coverage.

Each reader, in a process of its own, is given RUNS inputs by atheris (SHARE: slow ones fewer),
from corpora/READER on. It fails at the first that crashes, takes over 20 s, or once memory grows.
An input that crashes is left in corpora/READER, where `make test` finds it; those that reach
something new are kept in found/READER, which git ignores: some of them, small, are in the corpus.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import logging
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import atheris
import readers

HERE = Path(__file__).parent
SHARE = {"recipes": 0.1, "checkpoints": 0.5, "requests": 5, "answers": 5}  # by how long one takes
GROWTH_MB = 128  # libFuzzer's own corpus and tables among it
READS = (  # whose branches guide
    "qirl_fast.data",
    "qirl_fast.config",
    "qirl_fast.section",
    "qirl_fast.rewards.png",
    "qirl_fast.rewards.wire",
    "qirl_fast.reward_app",
    "qirl_fast.checkpoint",
    "omegaconf",
    "yaml",
    "json",
    "h11",
    "uvicorn.protocols",
    "PIL",
)


def instrument() -> int:
    """Functions of READS that now report their branches. In place: atheris' own hook of imports
    does not see a package that is installed to be edited.
    """
    seen: set[int] = set()
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(READS):
            continue
        classes = [thing for thing in vars(module).values() if isinstance(thing, type)]
        for owner in (module, *classes):
            for thing in vars(owner).values():
                function = getattr(thing, "__func__", getattr(thing, "fget", thing))
                own = isinstance(function, types.FunctionType)
                if own and function.__module__ == name and id(function) not in seen:
                    atheris.instrument_func(function)
                    seen.add(id(function))
    return len(seen)


def memory_mb() -> float:
    """Resident memory of this process, without what is free and waits to be used again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def guide(name: str, runs: int, options: list[str]) -> None:
    """Feed one reader; never returns."""
    logging.disable(logging.CRITICAL)
    corpus, found = HERE / "corpora" / name, HERE / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    read = readers.readers(Path(tempfile.mkdtemp()))[name]
    count, warm, before, start = 0, max(runs // 5, 1), 0.0, time.monotonic()

    def once(data: bytes) -> None:
        nonlocal count, before
        try:
            read(data)
        except Exception:
            (corpus / f"crash-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
            raise
        count += 1
        if count == warm:
            before = memory_mb()
        if count == runs:
            grown = memory_mb() - before
            seconds = time.monotonic() - start
            print(f"{name}: {runs} inputs, {seconds:.0f} s, +{grown:.0f} MB", flush=True)
            assert grown < GROWTH_MB, f"memory grew by {grown:.0f} MB in {runs - warm} inputs"

    limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=4096", "-print_final_stats=1"]
    artifacts = f"-artifact_prefix={corpus}/"
    atheris.Setup(
        [name, f"-runs={runs}", artifacts, *limits, *options, str(found), str(corpus)], once
    )
    atheris.Fuzz()


def main(runs: str, *rest: str) -> int:
    """All readers, or one, each in a process that is forked once everything is imported."""
    names = [*readers.READERS, "http"]
    print(f"{instrument()} functions guide", flush=True)
    chosen = [rest[0]] if rest and rest[0] in names else names
    options = [word for word in rest if word not in names]
    failed = []
    for name in chosen:
        child = os.fork()
        if child == 0:
            guide(name, int(int(runs) * SHARE.get(name, 1)), options)
        _, status = os.waitpid(child, 0)
        if status:
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
