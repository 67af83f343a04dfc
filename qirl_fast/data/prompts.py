"""Read prompts, with the images they edit: JSONL, plain text, folders, WebDataset tar shards.

A JSONL row is `{"prompt", "image" | "images", "category", "metadata", ...}`; only `prompt` is
needed. The GenEval keys `{"tag", "include": [{"class", "count", "color"?, "position"?: [relation,
index]}], "exclude"?: [...]}` (arXiv 2310.11513) are checked; `tag` is another name of `category`.
The keys of `metadata` come below those of the row, and the whole is what the judges read; other
keys are kept as they are. Folders and shards: grouped.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qirl_fast.data.grouped import Group, folder_groups, shard_groups, side_text, source_in
from qirl_fast.data.sources import PromptError, Source

__all__ = ["Prompt", "PromptError", "load_prompts", "row_id"]

ROW_FILE = "metadata.jsonl"  # in a folder, as Hugging Face's imagefolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    id: 16 hexadecimal digits of SHA-256 over the row; equal rows have equal ids.
    category: the row's category or tag, None where it has none (always for plain text).
    metadata: the row over its `metadata`, {"prompt": text} for plain text; not to be changed.
    images: the condition images in order, the last one being edited; empty for text to image.
    """

    id: str
    prompt: str
    category: str | None
    metadata: dict[str, Any] = field(compare=False)
    images: tuple[Source, ...] = ()

    @property
    def task(self) -> str:
        """The row's `task`; without one "edit" for a prompt with condition images, else "t2i"."""
        return str(self.metadata.get("task") or ("edit" if self.images else "t2i"))


def load_prompts(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> list[Prompt]:
    """Read a .jsonl or .txt file (UTF-8, with or without byte-order mark, LF or CRLF), a folder
    (metadata.jsonl with `file_name`, or images with .txt / .json of the same name), or tar shards
    (`x.tar`, `x-{000..010}.tar`).

    images: the folder that the image paths of a .jsonl file start from; None: the file's own.
    Rows keep their order; repeated prompts are kept and their number is logged. In plain text,
    space around a prompt is dropped and blank lines are refused, as blank prompts are in JSONL; a
    line break at the end of the file is no row. Image files are not opened: see images.header.
    Raises PromptError naming file and line: not readable, not UTF-8, no rows, malformed JSON,
    missing or blank prompt, wrong types. An image path or link that leaves the folder is for
    `Source.open` to refuse.
    """
    path = Path(path)
    if images is not None and path.suffix != ".jsonl":
        raise PromptError(f"{path}: got a folder of images ({images}); only .jsonl rows name them")
    if path.is_dir() and (path / ROW_FILE).exists():
        prompts = _jsonl(path / ROW_FILE, path)
    elif path.is_dir() and path.suffix not in (".jsonl", ".txt"):
        prompts = [_grouped(group) for group in folder_groups(path)]
    elif path.suffix == ".tar":
        prompts = [_grouped(group) for group in shard_groups(path)]
    elif path.suffix == ".jsonl":
        prompts = _jsonl(path, path.parent if images is None else Path(images))
    elif path.suffix == ".txt":
        rows = _lines(path)
        prompts = [_prompt({"prompt": row.strip()}, f"{path}:{n}") for n, row in rows]
    else:
        raise PromptError(
            f"{path}: got a {path.suffix or 'bare'} file; wanted .jsonl or .txt, a folder or .tar"
        )
    repeats = len(prompts) - len({(prompt.prompt, prompt.images) for prompt in prompts})
    if repeats:
        log.warning("%s: %d of %d prompts repeat an earlier one", path, repeats, len(prompts))
    return prompts


def _jsonl(path: Path, root: Path) -> list[Prompt]:
    prompts = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        row = _object(line, where)
        names = _image_names(row, where, folder=path.name == ROW_FILE)
        sources = tuple(source_in(root, name) for name in names)
        prompts.append(_prompt(row, where, sources))
    return prompts


def _image_names(row: dict[str, Any], where: str, folder: bool) -> list[str]:
    """The images a row names; `folder`: `file_name` is one of the keys."""
    keys = ("image", "images", "file_name") if folder else ("image", "images")
    found = [key for key in keys if key in row]
    if len(found) > 1:
        raise PromptError(f"{where}: got {' and '.join(map(repr, found))}; wanted one of them")
    if not found:
        return []
    if found[0] != "images":
        _want(row, found[0], str, "the path of an image", where)
        return [row[found[0]]]
    _want(row, "images", list, "a list of paths", where)
    names = row["images"]
    if not names or not all(isinstance(name, str) for name in names):
        raise PromptError(
            f"{where}: 'images' is {_kind(names)}; wanted a list of one or more paths"
        )
    return list(names)


def _grouped(group: Group) -> Prompt:
    """The row of a folder or shard: its .json, with the prompt of its .txt and its images."""
    row: dict[str, Any] = {}
    where = group.images[0].name
    if ".json" in group.side:
        where = group.side[".json"].name
        row = _object(side_text(group.side[".json"]), where)
        if "image" in row or "images" in row:
            raise PromptError(f"{where}: names images, but those of a row are its own files")
    if ".txt" in group.side:
        where = group.side[".txt"].name
        text = side_text(group.side[".txt"]).strip()
        if row.get("prompt", text) != text:
            raise PromptError(
                f"{where}: its prompt and that of {group.side['.json'].name} differ; keep one"
            )
        row["prompt"] = text
    row["images"] = [source.name for source in group.images]
    return _prompt(row, where, group.images)


def _lines(path: Path) -> list[tuple[int, str]]:
    """The numbered rows; only LF and CRLF end a row, as other breaks occur in prompts."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror}); wanted a file") from error
    lines = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise PromptError(
                f"{path}:{number}: byte {error.start} is not UTF-8 ({error.reason}); "
                "save the file as UTF-8"
            ) from error
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise PromptError(f"{path}: the file is empty; wanted at least one prompt")
    return list(enumerate(lines, start=1))


def _object(row: str, where: str) -> dict[str, Any]:
    if not row.strip():
        raise PromptError(f"{where}: got a blank line; wanted a JSON object")
    try:
        data = json.loads(row, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{where}: malformed JSON at column {error.colno} ({error.msg}): {_short(row)}; "
            "wanted one JSON object a line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: {error}") from error
    if not isinstance(data, dict):
        raise PromptError(f"{where}: got {_kind(data)}; wanted a JSON object with a prompt")
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"got {name}; wanted a finite number")


def _prompt(data: dict[str, Any], where: str, images: tuple[Source, ...] = ()) -> Prompt:
    """Check a row, whatever it was read from."""
    _want(data, "metadata", dict, "an object", where)
    row = {**data.get("metadata", {}), **data}
    if "prompt" not in row:
        keys = ", ".join(row) or "none"
        raise PromptError(f"{where}: no 'prompt' among the keys ({keys}); wanted a text")
    _want(row, "prompt", str, "a text", where)
    if not row["prompt"].strip():
        raise PromptError(f"{where}: the prompt is blank; wanted a text")
    try:
        row["prompt"].encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: the prompt holds half a character ({error.object[error.start]!r} at "
            f"{error.start}), which no tokenizer takes; wanted Unicode text"
        ) from error
    for name in ("tag", "category"):
        _want(row, name, str, "a text", where)
    category = row.get("category", row.get("tag"))
    if row.get("tag", category) != category:
        raise PromptError(f"{where}: tag {row['tag']!r} and category {category!r}; wanted one")
    for name in ("include", "exclude"):
        _want(row, name, list, "a list of objects", where)
        for index, item in enumerate(row.get(name, ())):
            _check_object(item, len(row[name]), f"{where}: {name}[{index}]")
    return Prompt(row_id(data), row["prompt"], category, row, images)


def row_id(row: dict[str, Any]) -> str:
    """The id of a row as it stands in its file."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _check_object(item: Any, objects: int, where: str) -> None:
    """Check one entry of include or exclude; `objects`: entries of that list, for position."""
    if not isinstance(item, dict):
        raise PromptError(f"{where}: got {_kind(item)}; wanted an object with class and count")
    for name in ("class", "count"):
        if name not in item:
            raise PromptError(f"{where}: no {name!r} among the keys ({', '.join(item) or 'none'})")
    _want(item, "class", str, "a text", where)
    _want(item, "count", int, "a whole number", where)
    if item["count"] < 0:
        raise PromptError(f"{where}: got count {item['count']}; wanted 0 or more")
    _want(item, "color", str, "a text", where)
    if "position" in item:
        position = item["position"]
        if not (
            isinstance(position, list)
            and [type(part) for part in position] == [str, int]
            and 0 <= position[1] < objects
        ):
            raise PromptError(
                f"{where}: got position {_short(json.dumps(position))}; wanted [relation, index of "
                f'another object], such as ["left of", 0], with an index from 0 to {objects - 1}'
            )


def _want(row: dict[str, Any], name: str, kind: type, words: str, where: str) -> None:
    """Raise unless row[name], where present, is of exactly this type (so true is no number)."""
    if name in row and type(row[name]) is not kind:
        raise PromptError(f"{where}: {name!r} is {_kind(row[name])}; wanted {words}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a true/false value"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return f"{names[type(value)]} ({_short(json.dumps(value, ensure_ascii=False))})"


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
