"""Folders for an arena from what `python -m qirl_fast.pipeline` keeps.

<pipeline>/evaluation/<task>-<model>.npz (prompts: ids, image_i: uint8 [H, W, 3]) and
mixed-heldout.jsonl (the rows) become <out>/<model>/prompts.jsonl with PNG files, and
<out>/arena.yaml, which is ready to serve. The tasks are one study: a category is "task: category".
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qirl_fast.arena.study import ROWS
from qirl_fast.config.wording import ConfigError
from qirl_fast.data.images import Decoder, over_white
from qirl_fast.data.images import header as header_of
from qirl_fast.data.prompts import Prompt, PromptError, load_prompts, row_id
from qirl_fast.data.sources import ImageError
from qirl_fast.whole import write_text

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
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        task, rows = _rows(file, prompts)
        model = file.stem.removeprefix(f"{task}-")
        for prompt, image in rows:
            folder = out / model
            found.setdefault(model, []).append(_written(prompt, image, folder))
    for model, written in found.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
        write_text(out / model / ROWS, lines)
    chosen = list(models) or [m for m in ("base", "student") if m in found]
    chosen = chosen if len(chosen) > 1 else list(found)
    if strange := [m for m in chosen if m not in found]:
        shutil.rmtree(out)
        raise ConfigError([f"models: there is no {strange[0]!r}; there are {', '.join(found)}"])
    return _settings(out, chosen, [m for m in found if m not in chosen])


def _settings(out: Path, chosen: Sequence[str], others: Sequence[str]) -> Path:
    lines = ["# python -m qirl_fast.arena " + str(out / "arena.yaml"), "models:"]
    lines += [f"  {name}: {json.dumps(str(out / name))}" for name in chosen]
    lines += [f"  # {name}: {json.dumps(str(out / name))}" for name in others]
    lines += [f"database: {json.dumps(str(out / 'votes.db'))}"]
    path = out / "arena.yaml"
    write_text(path, "\n".join(lines) + "\n")
    return path


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


def _rows(file: Path, prompts: dict[str, Prompt]) -> tuple[str, list[tuple[Prompt, np.ndarray]]]:
    """The task of a file, and its prompts with what was drawn of them."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            ids = [str(i) for i in kept["prompts"]]
            images = [kept[f"image_{i}"] for i in range(len(ids))]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError([f"{file}: cannot be read ({error})"]) from error
    if not ids or (missing := [i for i in ids if i not in prompts]):
        said = f"prompt {missing[0]} is not in {HELDOUT}" if ids else "holds no prompt"
        raise ConfigError([f"{file}: {said}; wanted what the pipeline kept"])
    rows = [(prompts[i], image) for i, image in zip(ids, images, strict=True)]
    return rows[0][0].task, rows


def _written(prompt: Prompt, image: np.ndarray, folder: Path) -> dict[str, Any]:
    """A line of prompts.jsonl, its pictures written."""
    name = f"{prompt.task}-{prompt.id}"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    file = folder / "images" / f"{name}.png"
    Image.fromarray(image).save(file)
    category = f"{prompt.task}: {prompt.category}" if prompt.category else prompt.task
    row: dict[str, Any] = {"id": name, "prompt": prompt.prompt, "category": category}
    row["image"] = f"images/{name}.png"
    if prompt.images:
        source = folder / "images" / f"{name}-source.png"
        Image.fromarray(_source(prompt)).save(source)
        row["source"] = f"images/{source.name}"
    hidden = ("image", "images", "prompt", "metadata")
    row["metadata"] = {k: v for k, v in prompt.metadata.items() if k not in hidden}
    return row


def _source(prompt: Prompt) -> np.ndarray:
    source = prompt.images[-1]
    try:
        head = header_of(source)
    except ImageError as error:
        raise ConfigError([str(error)]) from error
    found = Decoder("pil", threads=1)([source], [[(head.height, head.width)]])[0]
    if isinstance(found, ImageError):
        raise ConfigError([str(found)])
    return over_white(found[0])
