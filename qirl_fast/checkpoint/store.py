"""Checkpoints that a crash cannot spoil and that show when they were altered.

    <run>/checkpoints/checkpoint-N/
        lora/adapter_model.safetensors, lora/adapter_config.json   PEFT
        pytorch_lora_weights.safetensors                           diffusers' load_lora_weights
        state.safetensors                                          tensors of the state
        shards/part-*.safetensors                                  those that processes share out
        state.json                                                 everything else of the state
        manifest.json                                              size and SHA-256 of each file
    <run>/checkpoints/latest -> checkpoint-N

A checkpoint is written beside its place, synced to disk, then renamed; `latest` moves after that.
safetensors loads a flipped bit in silence, so every file is checked against the manifest, and the
manifest against itself.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qirl_fast.checkpoint.lora import Lora, write_lora
from qirl_fast.checkpoint.manifest import (
    MALFORMED,
    CheckpointError,
    Entry,
    sync,
    verify,
    write_manifest,
)
from qirl_fast.checkpoint.shards import SHARDS, read_shards
from qirl_fast.tensors import save_file

FORMAT, SHARED = 2, 3  # of a state in one piece, of one that processes share out
LATEST = "latest"
MARGIN = 1 << 20  # bytes beside the tensors: JSON, headers, folders
BESIDE = ".beside-"  # prefix of folders being written or deleted; never read

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, step, tensors by name (CPU) and JSON state.

    shards: where tensors are that were not read, None where there are none.
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    shards: Path | None = None


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
    if the disk refuses, before anything is written where too little is free; the checkpoints
    already there stay as they were.
    """
    if keep < 1:
        raise CheckpointError(f"got keep {keep}; wanted 1 or more")
    begin_checkpoint(run_dir, step, tensors, state, lora)
    return finish_checkpoint(run_dir, step, keep)


def begin_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    lora: Lora | None,
    shards: int = 0,
) -> Path:
    """Write these beside the place of checkpoint `step`, and return where: it is none yet.

    shards: bytes that others will write beside. Arguments and errors as `save_checkpoint`'s.
    """
    if step < 0:
        raise CheckpointError(f"got step {step}; wanted 0 or more")
    text = _exact_json({"format": SHARED if shards else FORMAT, "step": step, "state": dict(state)})
    root = Path(run_dir) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    _clean(root)
    exported = [] if lora is None else 2 * list(lora[0].values())  # in two formats
    _require_space(root, step, shards + sum(t.nbytes for t in [*tensors.values(), *exported]))
    beside = beside_of(run_dir, step)
    beside.mkdir()
    try:
        save_file(_separate(tensors), beside / "state.safetensors")
        (beside / "state.json").write_text(text, encoding="utf-8")
        if lora is not None:
            write_lora(beside, lora)
        if shards:
            (beside / SHARDS).mkdir()
    except BaseException:
        shutil.rmtree(beside)
        raise
    return beside


def beside_of(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Where checkpoint `step` is written before it is one."""
    return Path(run_dir) / "checkpoints" / f"{BESIDE}{step}"


def finish_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    keep: int,
    known: Mapping[str, Entry] | None = None,
) -> Path:
    """Make a checkpoint of what was begun: manifest, name, `latest`, retention; return its folder.

    known: entries of files in the manifest that need not be computed.
    """
    beside = beside_of(run_dir, step)
    root = beside.parent
    try:
        write_manifest(beside, step, known)
    except BaseException:
        shutil.rmtree(beside)
        raise
    before = _named_step(root)
    final = _place(beside, root / f"checkpoint-{step}")
    _point_latest(root, final.name)
    _prune(root, step, before, keep)
    return final


def _require_space(root: Path, step: int, size: int) -> None:
    """OSError where so many bytes, and a little, are more than the disk has free."""
    needed, free = size + MARGIN, shutil.disk_usage(root).free
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
    sync(final.parent)
    return final


def _point_latest(root: Path, name: str) -> None:
    link = root / f"{BESIDE}{LATEST}"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(root / LATEST)
    sync(root)


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
    run_dir: str | os.PathLike[str],
    log: Callable[[str], None] = log.warning,
    shards: Literal["read", "check"] = "read",
) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run, None if it has none at all.

    Starts from the one `latest` names; where that one is truncated, altered or incomplete, says so
    through `log`, takes the one before and moves `latest` to it. Raises CheckpointError if there
    are checkpoints and none of them is whole: starting over unasked would throw the run away.
    shards: as for `load_checkpoint`.
    """
    root = Path(run_dir) / "checkpoints"
    candidates = _candidates(root) if root.is_dir() else []
    named = _named_step(root)
    if candidates and named is None:
        log(f"{root / LATEST} is missing or names no checkpoint; taking the newest one")
    damage = []
    for path in (path for step, path in candidates if named is None or step <= named):
        try:
            checkpoint = load_checkpoint(path, shards)
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


def load_checkpoint(
    path: str | os.PathLike[str], shards: Literal["read", "check", "leave"] = "read"
) -> Checkpoint:
    """Verify a checkpoint folder (or a link to one) file by file and load it.

    shards: what processes shared out is put together in memory; or verified only, to be read by
    `fill_from`; or left to another process to verify.
    Raises CheckpointError naming the file: missing, of another size, altered, no such state.
    """
    folder = Path(path).resolve()
    step = verify(folder, but=f"{SHARDS}/" if shards == "leave" else "")
    try:  # sound as the manifest has it does not say that it was written here
        data = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version, state = data["format"], dict(data["state"])
        if version in (FORMAT, SHARED):
            tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise CheckpointError(f"{folder} holds no state of a run ({error!r})") from error
    if version not in (FORMAT, SHARED):
        raise CheckpointError(
            f"{folder}: format {version}; this version reads {FORMAT} and {SHARED}"
        )
    parts = folder / SHARDS if (folder / SHARDS).is_dir() else None
    if parts is not None and shards == "read":
        tensors |= read_shards(parts)
    return Checkpoint(folder, step, tensors, state, parts)
