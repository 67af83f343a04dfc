"""What a result was measured on: machine, versions, commit, date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The checked-out commit, with + where the tree differs from it; $QIRL_COMMIT overrides it."""
    if os.environ.get("QIRL_COMMIT"):
        return os.environ["QIRL_COMMIT"]
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD") + ("+" if changed else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def version(package: str) -> str:
    """The installed version, '' when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def about(device: str) -> dict[str, object]:
    """The head of a result file."""
    from qirl_fast import _cpu

    machine: dict[str, object] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": _cpu.active_isa(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {"gpu": properties.name, "gpu_memory_gib": properties.total_memory / 2**30}
    packages = ("torch", "triton", "liger-kernel", "xformers", "flash-attn")
    versions = {name: version(name) for name in packages}
    return {
        "machine": machine,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
