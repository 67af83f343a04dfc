"""Read prompt files: GenEval's JSONL form, or plain text with one prompt a line.

A JSONL row is `{"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}],
"exclude"?: [...], "prompt"}` (GenEval, arXiv 2310.11513). Only `prompt` is needed; `tag`, where
present, is the prompt's category, and the whole row is its metadata, which the judges read. Types
of the GenEval keys are checked, other keys are kept as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class PromptError(ValueError):
    """A prompt file that cannot be used; the message is 'file:line: what came; what is wanted'."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    id: 16 hexadecimal digits of SHA-256 over prompt and metadata; equal rows have equal ids.
    category: the row's tag, None where it has none (always for plain text).
    metadata: the whole JSONL row, {"prompt": text} for plain text; not to be changed.
    """

    id: str
    prompt: str
    category: str | None
    metadata: dict[str, Any] = field(compare=False)


def load_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read a .jsonl or .txt prompt file (UTF-8, with or without byte-order mark, LF or CRLF).

    Rows keep their order; repeated prompts are kept and their number is logged. In plain text,
    space around a prompt is dropped and blank lines are refused, as blank prompts are in JSONL; a
    line break at the end of the file is no row.
    Raises PromptError naming file and line: not readable, not UTF-8, no rows, malformed JSON,
    missing or blank prompt, wrong types.
    """
    path = Path(path)
    parsers: dict[str, Callable[[str, str], Prompt]] = {".jsonl": _parse_json, ".txt": _parse_text}
    if path.suffix not in parsers:
        raise PromptError(f"{path}: got a {path.suffix or 'bare'} file; wanted .jsonl or .txt")
    rows = _lines(path)
    if not rows:
        raise PromptError(f"{path}: the file is empty; wanted at least one prompt")
    prompts = [parsers[path.suffix](row, f"{path}:{n}") for n, row in enumerate(rows, start=1)]
    repeats = len(prompts) - len({prompt.prompt for prompt in prompts})
    if repeats:
        log.warning("%s: %d of %d prompts repeat an earlier one", path, repeats, len(prompts))
    return prompts


def _lines(path: Path) -> list[str]:
    """Return the rows of the file; only LF and CRLF end a row, as other breaks occur in prompts."""
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
    return lines[:-1] if not lines[-1] else lines


def _parse_text(row: str, where: str) -> Prompt:
    return _prompt({"prompt": row.strip()}, where)


def _parse_json(row: str, where: str) -> Prompt:
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
    return _prompt(data, where)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"got {name}; wanted a finite number")


def _prompt(row: dict[str, Any], where: str) -> Prompt:
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
    _want(row, "tag", str, "a text", where)
    for name in ("include", "exclude"):
        _want(row, name, list, "a list of objects", where)
        for index, item in enumerate(row.get(name, ())):
            _check_object(item, len(row[name]), f"{where}: {name}[{index}]")
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Prompt(digest, row["prompt"], row.get("tag"), row)


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
