"""Folders for an arena from what `python -m qirl_fast.pipeline` keeps.

<pipeline>/evaluation/<task>-<model>.npz (prompts: ids, image_i: uint8 [H, W, 3]) and
mixed-heldout.jsonl (the rows) become the folders of folders.py. The tasks are one study: a
category is "task: category".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qirl_fast.arena.folders import write_study
from qirl_fast.config.wording import ConfigError
from qirl_fast.data.prompts import Prompt, PromptError, load_prompts, row_id

HELDOUT = "mixed-heldout.jsonl"


def export(pipeline: Path, out: Path, models: Sequence[str] = ()) -> Path:
    """Write the folders and arena.yaml, whose path is returned.

    models: those to compare, all having folders; by default base and student, or else all.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError([f"{out}: is not empty; wanted a new folder"])
    files = sorted((pipeline / "evaluation").glob("*.npz"))
    if not files:
        raise ConfigError([f"{pipeline}/evaluation: holds no .npz; wanted a finished pipeline"])
    prompts = _prompts(pipeline)
    found: dict[str, list[tuple[Prompt, np.ndarray]]] = {}
    for file in files:
        rows = _rows(file, prompts)
        model = file.stem.removeprefix(f"{rows[0][0].task}-")
        found.setdefault(model, []).extend(rows)
    chosen = list(models) or [m for m in ("base", "student") if m in found]
    chosen = chosen if len(chosen) > 1 else list(found)
    if strange := [m for m in chosen if m not in found]:
        raise ConfigError([f"models: there is no {strange[0]!r}; there are {', '.join(found)}"])
    return write_study(out, found, chosen)


def _prompts(pipeline: Path) -> dict[str, Prompt]:
    """The held-out prompts by id, with and without the `task` that mixing added to a row."""
    images = None
    note = pipeline / "stages" / "student.json"
    try:
        words = json.loads(note.read_text(encoding="utf-8"))
        key = "data.heldout_images="
        images = next((w.removeprefix(key) for w in words if str(w).startswith(key)), None)
        mixed = load_prompts(pipeline / HELDOUT, images)
    except (OSError, ValueError, PromptError) as error:
        raise ConfigError([f"{pipeline}: is no finished pipeline ({error})"]) from error
    found = {prompt.id: prompt for prompt in mixed}
    for prompt, line in zip(
        mixed, (pipeline / HELDOUT).read_text(encoding="utf-8").splitlines(), strict=True
    ):
        row = json.loads(line)
        row.pop("task", None)
        found.setdefault(row_id(row), prompt)
    return found


def _rows(file: Path, prompts: dict[str, Prompt]) -> list[tuple[Prompt, np.ndarray]]:
    """A file's prompts, one at least, with what was drawn of them."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            ids = [str(i) for i in kept["prompts"]]
            images = [kept[f"image_{i}"] for i in range(len(ids))]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError([f"{file}: cannot be read ({error})"]) from error
    if not ids or (missing := [i for i in ids if i not in prompts]):
        said = f"prompt {missing[0]} is not in {HELDOUT}" if ids else "holds no prompt"
        raise ConfigError([f"{file}: {said}; wanted what the pipeline kept"])
    return [(prompts[i], image) for i, image in zip(ids, images, strict=True)]
