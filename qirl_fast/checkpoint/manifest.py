"""The manifest of a checkpoint: size and SHA-256 of every file, and of itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
# What reading JSON that may say anything ends in, where it does not say what is wanted.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or a state that cannot be saved."""


def write_manifest(folder: Path, step: int, known: Mapping[str, Entry] | None = None) -> None:
    """Sync every file and folder to disk and list the files in manifest.json, written last.

    known: entries of files by name, which need not be read for theirs.
    """
    paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files = {name: (known or {}).get(name) or entry(path) for name, path in paths.items()}
    manifest = folder / "manifest.json"
    manifest.write_text(_manifest_text({"step": step, "files": files}), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _manifest_text(content: dict[str, Any]) -> str:
    """Return the manifest's one spelling; with its own SHA-256 in it no byte changes unseen."""
    plain = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True, indent=1) + "\n"


def entry(path: Path) -> Entry:
    """Size and SHA-256 of a file."""
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def verify(folder: Path, but: str = "") -> int:
    """Return the step of a whole checkpoint, or raise CheckpointError.

    but: start of the names of files that are not looked at.
    """
    manifest = folder / "manifest.json"
    try:
        text = manifest.read_bytes().decode("ascii")
        content = json.loads(text)
        del content["sha256"]
        if _manifest_text(content) != text:
            raise ValueError("its SHA-256 differs")
        step = int(content["step"])
        files = {str(n): (int(e["size"]), str(e["sha256"])) for n, e in content["files"].items()}
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{manifest} is missing or damaged ({error!r})") from error
    for name, (size, digest) in files.items():
        path = folder / name
        if but and name.startswith(but):
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} is damaged: {path.stat().st_size} bytes, {size} were written"
            )
        if _digest(path) != digest:
            raise CheckpointError(f"{path} is damaged: SHA-256 differs from the manifest's")
    return step


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
