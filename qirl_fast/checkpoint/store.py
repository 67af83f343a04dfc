"""Checkpoints that a crash cannot spoil and that show when they were altered.

    <run>/checkpoints/checkpoint-N/
        lora/adapter_model.safetensors, lora/adapter_config.json   PEFT
        pytorch_lora_weights.safetensors                           diffusers' load_lora_weights
        state.safetensors                                          every tensor of the state
        state.json                                                 everything else of the state
        manifest.json                                              size and SHA-256 of each file
    <run>/checkpoints/latest -> checkpoint-N

A checkpoint is written beside its place, synced to disk, then renamed; `latest` moves after that.
safetensors loads a flipped bit in silence, so every file is checked against the manifest, and the
manifest against itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qirl_fast.checkpoint.lora import Lora, write_lora

FORMAT = 2
LATEST = "latest"
MARGIN = 1 << 20  # bytes beside the tensors: JSON, headers, folders
BESIDE = ".beside-"  # prefix of folders being written or deleted; never read

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or a state that cannot be saved."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, step, tensors by name (CPU) and JSON state."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    lora: Lora | None,
    keep: int,
) -> Path:
    """Write checkpoint `step`, move `latest` to it, then delete the ones no longer wanted.

    tensors: any names and dtypes. state: plain JSON (see `pack` for anything else). lora: what
    `lora_state` returns, None without an adapter. keep: newest checkpoints kept, 1 or more; 2 or
    more leave one to fall back on. Later steps than `step` belong to a course that was abandoned
    by resuming before them and are deleted, which is logged. One process at a time may write.
    Returns the checkpoint's folder. Raises CheckpointError for a state that JSON changes, OSError
    or SafetensorError if the disk refuses, before anything is written where too little is free; the
    checkpoints already there stay as they were.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"got step {step}, keep {keep}; wanted step >= 0 and keep >= 1")
    text = _exact_json({"format": FORMAT, "step": step, "state": dict(state)})
    root = Path(run_dir) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    _clean(root)
    exported = [] if lora is None else 2 * list(lora[0].values())  # in two formats
    _require_space(root, step, [*tensors.values(), *exported])
    beside = root / f"{BESIDE}{step}"
    beside.mkdir()
    try:
        save_file(_separate(tensors), beside / "state.safetensors")
        (beside / "state.json").write_text(text, encoding="utf-8")
        if lora is not None:
            write_lora(beside, lora)
        _write_manifest(beside, step)
    except BaseException:
        shutil.rmtree(beside)
        raise
    before = _named_step(root)
    final = _place(beside, root / f"checkpoint-{step}")
    _point_latest(root, final.name)
    _prune(root, step, before, keep)
    return final


def _require_space(root: Path, step: int, tensors: Sequence[Tensor]) -> None:
    """OSError where these tensors, and a little, are more than the disk has free."""
    needed, free = sum(t.nbytes for t in tensors) + MARGIN, shutil.disk_usage(root).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"checkpoint-{step} takes {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; free "
            "some, or keep fewer (tracking.keep_checkpoints); nothing was written",
            str(root),
        )


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous on the CPU; ones that share memory are copied apart."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        apart[name] = plain
    return apart


def _exact_json(value: dict[str, Any]) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state is no plain JSON ({error}); run it through pack") from error
    back = json.loads(text)
    if back != value:
        names = [name for name in value["state"] if back["state"].get(name) != value["state"][name]]
        raise CheckpointError(f"state changes in JSON, run it through pack: {names}")
    return text


def _place(beside: Path, final: Path) -> Path:
    """Rename the finished folder into place; one already there steps aside and stays readable."""
    if final.exists():
        aside = final.with_name(final.name + ".replaced")
        if aside.exists():
            shutil.rmtree(aside)
        final.rename(aside)
    beside.rename(final)
    _sync(final.parent)
    return final


def _point_latest(root: Path, name: str) -> None:
    link = root / f"{BESIDE}{LATEST}"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(root / LATEST)
    _sync(root)


def _prune(root: Path, step: int, before: int | None, keep: int) -> None:
    """Delete what the new checkpoint `step` makes superfluous; a deletion is never half visible.

    before: what `latest` named so far; anything between it and `step` was found damaged.
    """
    steps = sorted({found for found, _ in _candidates(root)}, reverse=True)
    sound = [found for found in steps if found == step or before is None or found <= before]
    wanted = [found for found in sound if found <= step][:keep]
    for found, path in _candidates(root):
        if found > step:
            log.warning("%s is deleted: the run was resumed before it", path)
        if found not in wanted or (found == step and path.name.endswith(".replaced")):
            path.rename(root / f"{BESIDE}delete-{path.name}")
    _clean(root)


def _clean(root: Path) -> None:
    """Remove what an interrupted save or deletion left."""
    for path in root.glob(f"{BESIDE}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _candidates(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of all checkpoints, newest first; a replaced one after its heir."""
    found = []
    for path in root.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-").removesuffix(".replaced")
        if number.isdecimal() and path.is_dir():
            found.append((int(number), path))
    return sorted(found, key=lambda item: (-item[0], item[1].name))


def find_latest(
    run_dir: str | os.PathLike[str], log: Callable[[str], None] = log.warning
) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run, None if it has none at all.

    Starts from the one `latest` names; where that one is truncated, altered or incomplete, says so
    through `log`, takes the one before and moves `latest` to it. Raises CheckpointError if there
    are checkpoints and none of them is whole: starting over unasked would throw the run away.
    """
    root = Path(run_dir) / "checkpoints"
    candidates = _candidates(root) if root.is_dir() else []
    named = _named_step(root)
    if candidates and named is None:
        log(f"{root / LATEST} is missing or names no checkpoint; taking the newest one")
    damage = []
    for path in (path for step, path in candidates if named is None or step <= named):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            damage.append(str(error))
            log(f"{error}; trying the one before")
            continue
        if damage:
            log(f"using {checkpoint.path} in place of the damaged one")
            _point_latest(root, path.name)
        return checkpoint
    if damage:
        raise CheckpointError(
            "no whole checkpoint is left: " + "; ".join(damage) + "; restore one, or remove "
            f"{root} to start over"
        )
    return None


def _named_step(root: Path) -> int | None:
    """Return the step of the checkpoint that `latest` names, None if there is no such folder."""
    link = root / LATEST
    name = os.readlink(link).removesuffix(".replaced") if link.is_symlink() else ""
    named = (s for s, path in _candidates(root) if path.name.removesuffix(".replaced") == name)
    return next(named, None)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Verify a checkpoint folder (or a link to one) file by file and load it.

    Raises CheckpointError naming the file: missing, of another size, altered.
    """
    folder = Path(path).resolve()
    step = _verify(folder)
    data = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if data["format"] != FORMAT:
        raise CheckpointError(f"{folder}: format {data['format']}; this version reads {FORMAT}")
    return Checkpoint(folder, step, load_file(folder / "state.safetensors"), data["state"])


def _write_manifest(folder: Path, step: int) -> None:
    """Sync every file and folder to disk and list the files in manifest.json, written last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in paths
    }
    manifest = folder / "manifest.json"
    manifest.write_text(_manifest_text({"step": step, "files": files}), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _manifest_text(content: dict[str, Any]) -> str:
    """Return the manifest's one spelling; with its own SHA-256 in it no byte changes unseen."""
    plain = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True, indent=1) + "\n"


def _verify(folder: Path) -> int:
    """Return the step of a whole checkpoint, or raise CheckpointError."""
    manifest = folder / "manifest.json"
    try:
        text = manifest.read_bytes().decode("ascii")
        content = json.loads(text)
        del content["sha256"]
        if _manifest_text(content) != text:
            raise ValueError("its SHA-256 differs")
        step, files = int(content["step"]), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} is missing or damaged ({error})") from error
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{path} is damaged: {path.stat().st_size} bytes, {entry['size']} were written"
            )
        if _digest(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: SHA-256 differs from the manifest's")
    return step


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
