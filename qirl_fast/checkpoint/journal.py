"""Cut a metrics file back to a checkpoint, so that a resumed run appends where it went on."""

from __future__ import annotations

import json
import os
from pathlib import Path


def truncate_metrics(path: str | os.PathLike[str], step: int) -> int:
    """Drop the lines of a JSONL file that lie after `step`, and return how many were dropped.

    A line stays if its "step" is at most `step`. A last line without its line break was cut off by
    a crash and is dropped. The file is replaced whole or not at all; a missing one stays missing.
    Raises ValueError naming file and line where any other line is no JSON object with a step.
    """
    path = Path(path)
    if not path.exists():
        return 0
    *lines, torn = path.read_bytes().split(b"\n")
    kept = [line for number, line in enumerate(lines, 1) if _step(line, path, number) <= step]
    dropped = len(lines) - len(kept) + (torn != b"")
    if dropped:
        beside = path.with_name(path.name + ".beside")
        with beside.open("wb") as file:
            file.write(b"".join(line + b"\n" for line in kept))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    return dropped


def _step(line: bytes, path: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}:{number}: no JSON object with a step ({error!r}): {line[:60]!r}; repair or "
            "remove the line"
        ) from error
