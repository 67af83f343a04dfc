"""What is compared: the prompts that all models have drawn, read from one folder a model.

<folder>/prompts.jsonl, one row a line:

    {"id": text, "prompt": text, "image": file, "category"?: text, "source"?: file, ...}

`image` is what the model drew, `source` the picture that was to be edited; both are paths below the
folder. Equal ids are the same prompt in every folder. Other keys, and those of an object "metadata"
over them, are for judges.

Only prompts that every model has are shown, and only where each picture can be read; `notes` says
how many were left out and why. Pictures of one prompt must have one size, or (sizes: scale) one
shape, and are then all shown at the smallest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from qirl_fast.config.wording import ConfigError
from qirl_fast.data.grouped import source_in
from qirl_fast.data.images import Size, header
from qirl_fast.data.sources import ImageError, Source

ROWS = "prompts.jsonl"
TEXTS = {"id": True, "prompt": True, "image": True, "category": False, "source": False}
LONGEST_ID = 200


@dataclass(frozen=True, order=True)
class Item:
    """A question: which of two models' pictures of a prompt. a < b in the alphabet."""

    prompt: str
    a: str
    b: str


@dataclass(frozen=True)
class Row:
    """A line of prompts.jsonl."""

    id: str
    prompt: str
    category: str
    image: Source
    source: Source | None
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt that all models have drawn. size: at which its pictures are shown."""

    id: str
    prompt: str
    category: str
    images: dict[str, Source]
    source: Source | None
    size: Size
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """models: in the order of the settings; the first is what the others are measured from."""

    models: tuple[str, ...]
    prompts: dict[str, Prompt]
    notes: tuple[str, ...]

    @property
    def items(self) -> list[Item]:
        """Every pair of models on every prompt."""
        pairs = list(combinations(sorted(self.models), 2))
        return [Item(prompt, a, b) for prompt in self.prompts for a, b in pairs]

    def digests(self) -> dict[tuple[str, str], str]:
        """SHA-256 of every picture by (prompt, model)."""
        return {
            (p.id, model): source.sha256()
            for p in self.prompts.values()
            for model, source in p.images.items()
        }


def load_study(models: Mapping[str, str], sizes: str = "refuse") -> Study:
    """Read the folders. Raises ConfigError naming what is wrong."""
    rows = {name: read_rows(Path(folder)) for name, folder in models.items()}
    first = next(iter(rows.values()))
    common = [i for i in first if all(i in of for of in rows.values())]
    notes = []
    if any(len(of) != len(common) for of in rows.values()):
        have = ", ".join(f"{name} {len(of)}" for name, of in rows.items())
        notes.append(f"only the {len(common)} prompts that all models have are shown: {have}")
    if not common:
        have = ", ".join(f"{name} ({next(iter(of))} ...)" for name, of in rows.items())
        raise ConfigError(
            [f"models: no prompt is in every folder: {have}; wanted equal ids in {ROWS}"]
        )
    prompts, unread, misfits = {}, [], []
    for i in common:
        of = {name: rows[name][i] for name in models}
        _same(i, of)
        try:
            prompts[i] = _prompt(of, sizes)
        except ImageError as error:
            unread.append(str(error))
        except ValueError as error:
            misfits.append(str(error))
    if misfits:
        raise ConfigError([f"{misfits[0]} ({len(misfits)} prompts are so)"])
    if unread:
        notes.append(f"{len(unread)} prompts are left out, as pictures cannot be read: {unread[0]}")
    if not prompts:
        raise ConfigError([f"models: nothing is left to show; {notes[-1]}"])
    return Study(tuple(models), prompts, tuple(notes))


def read_rows(folder: Path) -> dict[str, Row]:
    """The rows of a model's folder by id."""
    path = folder / ROWS
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read ({error}); wanted JSON lines"]) from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break
        row = _row(line, f"{path}:{number}", folder)
        if row.id in rows:
            raise ConfigError([f"{path}:{number}: id {row.id!r} is there twice; wanted once"])
        rows[row.id] = row
    if not rows:
        raise ConfigError([f"{path}: holds no row; wanted one JSON object a line"])
    return rows


def _row(line: str, where: str, folder: Path) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            [f"{where}: malformed JSON ({error}); wanted one object a line"]
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("metadata", {}), dict):
        raise ConfigError([f"{where}: got {line[:60]!r}; wanted an object, as is its metadata"])
    for key, needed in TEXTS.items():
        value = row.get(key)
        if value is None and not needed:
            continue
        if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
            raise ConfigError([f"{where}: {key} is {str(value)[:60]!r}; wanted a text"])
    if len(row["id"]) > LONGEST_ID:
        raise ConfigError([f"{where}: the id has {len(row['id'])} characters; wanted {LONGEST_ID}"])
    source = row.get("source")
    other = {key: value for key, value in row.items() if key not in (*TEXTS, "metadata")}
    category = row.get("category") or ""
    return Row(
        row["id"],
        row["prompt"],
        category,
        source_in(folder, row["image"]),
        None if source is None else source_in(folder, source),
        other | row.get("metadata", {}) | {"prompt": row["prompt"]},
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _same(i: str, rows: Mapping[str, Row]) -> None:
    """Refuse rows of one id that are of different prompts."""
    (first, of_first), *others = rows.items()
    for name, row in others:
        for key in ("prompt", "category"):
            was, came = getattr(of_first, key), getattr(row, key)
            if was != came:
                raise ConfigError(
                    [f"prompt {i!r}: its {key} is {was!r} in {first} and {came!r} in {name}"]
                )
        if (of_first.source is None) != (row.source is None):
            raise ConfigError([f"prompt {i!r}: has a source in one of {first} and {name} alone"])


def _prompt(rows: Mapping[str, Row], sizes: str) -> Prompt:
    """ImageError where a picture cannot be read, ValueError where they do not go together."""
    first = next(iter(rows.values()))
    found: dict[str, Size] = {}
    for name, row in rows.items():
        head = header(row.image)
        found[name] = (head.height, head.width)
    sources = {row.source.sha256() for row in rows.values() if row.source is not None}
    if first.source is not None:
        header(first.source)
    said = ", ".join(f"{name} {w}x{h}" for name, (h, w) in found.items())
    if len(sources) > 1:
        raise ValueError(f"prompt {first.id!r}: the models have edited different pictures")
    size = min(found.values())
    if len(set(found.values())) > 1:
        if sizes == "refuse":
            raise ValueError(
                f"prompt {first.id!r}: the pictures have different sizes: {said}; draw them at one "
                "size, or set sizes=scale to show them all at the smallest"
            )
        if any(abs(h / w * size[1] / size[0] - 1) > 0.02 for h, w in found.values()):
            raise ValueError(f"prompt {first.id!r}: the pictures have different shapes: {said}")
    return Prompt(
        first.id,
        first.prompt,
        first.category,
        {name: row.image for name, row in rows.items()},
        first.source,
        size,
        first.metadata,
    )
