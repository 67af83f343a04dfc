"""Writes what an arena reads: <out>/<model>/prompts.jsonl with its pictures, and <out>/arena.yaml,
which is ready to serve. Form of the folders: study.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qirl_fast.arena.study import ROWS
from qirl_fast.config.wording import ConfigError
from qirl_fast.data.images import Decoder, header, over_white
from qirl_fast.data.prompts import Prompt
from qirl_fast.data.sources import ImageError
from qirl_fast.whole import write_text

HIDDEN = ("image", "images", "prompt", "metadata")  # of a row: written by other names, or not
STRANGE = re.compile(r"[^A-Za-z0-9_.+=-]+")

Picture = np.ndarray | Path  # uint8 [H, W, 3], or a PNG file


def write_study(
    out: Path, drawn: Mapping[str, Iterable[tuple[Prompt, Picture]]], chosen: Sequence[str]
) -> Path:
    """Write a folder a model, over one that is there, and arena.yaml, whose path is returned.

    drawn: prompts with what a model drew of them, by its name; of equal prompts the first counts.
    chosen: the models that are compared, the one that others are measured from first; the rest
    stands in arena.yaml as comments. Votes that are there stay. ConfigError for a source picture
    that cannot be read.
    """
    names: dict[str, str] = {}
    for model in drawn:
        plain = STRANGE.sub("-", model).lstrip(".+=-") or "model"
        while plain in names.values():
            plain += "_"
        names[model] = plain
    sources: dict[str, Path] = {}
    for model, rows in drawn.items():
        folder = out / names[model]
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "images").mkdir(parents=True)
        lines = {}
        for prompt, picture in rows:
            if prompt.id not in lines:
                row = _written(prompt, picture, folder, sources)
                lines[prompt.id] = json.dumps(row, ensure_ascii=False) + "\n"
        write_text(folder / ROWS, "".join(lines.values()))
    path = out / "arena.yaml"
    told = [f"# python -m qirl_fast.arena {path}", "models:"]
    told += [f"  {names[m]}: {json.dumps(str(out / names[m]))}" for m in chosen]
    told += [f"  # {n}: {json.dumps(str(out / n))}" for m, n in names.items() if m not in chosen]
    write_text(path, "\n".join([*told, f"database: {json.dumps(str(out / 'votes.db'))}"]) + "\n")
    return path


def _written(
    prompt: Prompt, picture: Picture, folder: Path, sources: dict[str, Path]
) -> dict[str, Any]:
    """A line of prompts.jsonl, its pictures written; sources: those that have been, by prompt."""
    name = f"{prompt.task}-{prompt.id}"
    category = f"{prompt.task}: {prompt.category}" if prompt.category else prompt.task
    row: dict[str, Any] = {"id": name, "prompt": prompt.prompt, "category": category}
    row["image"] = f"images/{name}.png"
    _place(picture, folder / row["image"])
    if prompt.images:
        row["source"] = f"images/{name}-source.png"
        _place(sources.get(prompt.id) or _source(prompt), folder / row["source"])
        sources[prompt.id] = folder / row["source"]
    row["metadata"] = {k: v for k, v in prompt.metadata.items() if k not in HIDDEN}
    return row


def _place(picture: Picture, file: Path) -> None:
    """A picture's file; one that is on the disk already is linked there if it can be."""
    if isinstance(picture, np.ndarray):
        Image.fromarray(picture).save(file)
        return
    try:
        os.link(picture, file)
    except OSError:  # another disk, or one without links
        shutil.copyfile(picture, file)


def _source(prompt: Prompt) -> np.ndarray:
    source = prompt.images[-1]
    try:
        head = header(source)
    except ImageError as error:
        raise ConfigError([str(error)]) from error
    found = Decoder("pil", threads=1)([source], [[(head.height, head.width)]])[0]
    if isinstance(found, ImageError):
        raise ConfigError([str(found)])
    return over_white(found[0])
