"""The same benchmark on another commit: built in a temporary worktree, run in another process.

The two processes are not interleaved, so times are compared relative to eager PyTorch, which is the
same code in both: a machine that is slower for a while slows that too.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT

SITE = "QIRL_BENCH_SITE"  # folder the child imports qirl_fast from


def use_site() -> None:
    """In the child: import qirl_fast from SITE, not from an editable install."""
    site = os.environ.get(SITE)
    if site:
        sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
        sys.path.insert(0, site)


def measure(commit: str, device: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Result of `python -m bench ops` with these arguments on the package of that commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree, site, out = (Path(folder) / name for name in ("tree", "site", "base.json"))
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), commit], check=True)
        try:
            _install(tree, site, cuda=device == "cuda")
            command = [
                sys.executable,
                "-m",
                "bench",
                "ops",
                "--device",
                device,
                *arguments,
                "--out",
                str(out),
            ]
            revision = ["git", "-C", str(tree), "rev-parse", "HEAD"]
            head = subprocess.run(revision, check=True, capture_output=True, text=True).stdout
            environment = {**os.environ, SITE: str(site), "QIRL_COMMIT": head.strip()}
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        return json.loads(out.read_text())


def _install(tree: Path, site: Path, cuda: bool) -> None:
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        found = shutil.which("pip")
        if found is None:
            raise RuntimeError("bench: --base builds that commit with pip, and there is none.")
        pip = [found, "--python", sys.executable]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(site)]
    # nvcc takes minutes for code that a CPU benchmark does not run.
    options += [f"--config-settings=cmake.define.QIRL_CUDA={'ON' if cuda else 'OFF'}"]
    subprocess.run([*pip, "install", *options, str(tree)], check=True)


def compare(result: dict[str, Any], base: dict[str, Any]) -> None:
    """Adds `base` and each row's speedup_vs_base to `result`."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        names = ("op", "device", "dtype", "mode", "provider", "sweep")
        return (*(row[name] for name in names), tuple(row["shape"]))

    before = {key(row): row for row in base["rows"]}
    for row in result["rows"]:
        old = before.get(key(row))
        if old and row["speedup_vs_eager"] and old["speedup_vs_eager"]:
            row["speedup_vs_base"] = row["speedup_vs_eager"] / old["speedup_vs_eager"]
    result["base"] = {"commit": base["commit"], "rows": base["rows"]}
