"""The protocol of remote rewards: JSON and PNG bytes, no pickle, every claim checked.

Request, POST /score, body, lengths little-endian:

    b"QIRLRWRD" | uint32 n | n bytes of JSON | the images, one PNG after the other
    JSON: {"version": 1, "request": text, "judge": name, "images": [bytes of each PNG],
           "rows": [{"id": text, "metadata": {...}, "sources": count or null}]}

A row's image is followed by its condition images: `sources` of them, which the judge finds in the
metadata under SOURCES; null where the metadata have no such key. `request` names one question: sent
again with the same bytes it is the same question, and the server does not compute it twice. NaN and
infinity are no JSON. The answer is in `wire_answer`.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from qirl_fast.rewards import png
from qirl_fast.rewards.judge import SOURCES, Row
from qirl_fast.section import Count, Natural, Section

VERSION = 1
MAGIC = b"QIRLRWRD"
PREFIX = len(MAGIC) + 4
MEDIA_TYPE = "application/x-qirl-reward"
HEADER_BYTES = 2**22

Name = Annotated[str, Field(min_length=1, max_length=200)]


class WireError(ValueError):
    """Bytes that are no such message; the text says what came and what is wanted."""


class TooLarge(WireError):
    """A message over a limit."""


class Limits(Section):
    """What a server takes."""

    body_bytes: Count = Field(default=2**28, description="bytes of one request")
    rows: Count = Field(default=1024, description="rows of one request")
    image_pixels: Annotated[int, Field(ge=1, le=png.MAX_PIXELS)] = Field(
        default=2**24, description="pixels of one image"
    )
    request_pixels: Count = Field(
        default=2**26, description="pixels of all images of a request, 3 bytes each once unpacked"
    )


class _Row(Section):
    id: Name
    metadata: dict[str, Any]
    sources: Natural | None


class _Header(Section):
    version: int
    request: Name
    judge: Name
    images: list[Count]
    rows: Annotated[list[_Row], Field(min_length=1)]


@dataclass(frozen=True)
class Question:
    """A request whose claims were checked; the images are still packed."""

    request: str
    judge: str
    ids: list[str]
    _rows: list[_Row]
    _files: list[memoryview]
    _limits: Limits

    def unpack(self) -> tuple[list[np.ndarray], list[Row]]:
        """Images, uint8 [h, w, 3] each, and metadata with their condition images under SOURCES.

        WireError, naming the row, where pixels are damaged.
        """
        files = iter(self._files)
        images: list[np.ndarray] = []
        rows: list[Row] = []
        for row in self._rows:
            try:
                images.append(png.decode(next(files), self._limits.image_pixels))
                more = {}
                if row.sources is not None:
                    more[SOURCES] = [
                        png.decode(next(files), self._limits.image_pixels)
                        for _ in range(row.sources)
                    ]
            except png.BadImage as error:
                raise WireError(f"row {row.id!r}: {error}") from error
            rows.append(row.metadata | more)
        return images, rows


def check_row(row: Mapping[str, Any]) -> None:
    """WireError for metadata that JSON would refuse or change, or strange condition images."""
    plain = {key: value for key, value in row.items() if key != SOURCES}
    try:
        same = _loads(json.dumps(plain, allow_nan=False), "text") == plain
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(
            f"metadata cannot travel as JSON ({error}); wanted text, finite numbers, true, false, "
            "null, lists, and mappings with text keys"
        ) from error
    if not same:
        raise WireError(
            "metadata change on their way through JSON; wanted lists in place of tuples, and "
            "mappings with text keys alone"
        )
    sources = row.get(SOURCES, [])
    if not isinstance(sources, list):
        raise WireError(f"{SOURCES!r} is a {type(sources).__name__}; wanted a list of images")
    for i, image in enumerate(sources):
        try:
            png.check_pixels(image)
        except png.BadImage as error:
            raise WireError(f"{SOURCES!r}[{i}]: {error}") from error


def encode(
    request: str, judge: str, ids: Sequence[str], images: Sequence[np.ndarray], rows: Sequence[Row]
) -> bytes:
    """The body of a request. WireError, naming the row, for what cannot be sent."""
    files: list[bytes] = []
    described = []
    for name, image, row in zip(ids, images, rows, strict=True):
        sources = row.get(SOURCES)
        try:
            check_row(row)
            files += [png.encode(part) for part in [image, *(sources or [])]]
        except ValueError as error:
            raise WireError(f"row {name!r}: {error}") from error
        described.append(
            {
                "id": name,
                "metadata": {k: v for k, v in row.items() if k != SOURCES},
                "sources": None if sources is None else len(sources),
            }
        )
    header = {
        "version": VERSION,
        "request": request,
        "judge": judge,
        "images": [len(file) for file in files],
        "rows": described,
    }
    text = json.dumps(header, allow_nan=False).encode()
    if len(text) > HEADER_BYTES:
        raise TooLarge(
            f"the metadata of {len(rows)} rows are {len(text)} bytes; at most {HEADER_BYTES} "
            "travel: send fewer rows at a time"
        )
    return b"".join([MAGIC, struct.pack("<I", len(text)), text, *files])


def decode(body: bytes | memoryview, limits: Limits) -> Question:
    """The question in a body. Raises TooLarge for what is over a limit, WireError otherwise."""
    view = memoryview(body)
    if len(view) > limits.body_bytes:
        raise TooLarge(f"the body has {len(view)} bytes; at most {limits.body_bytes} are taken")
    if len(view) < PREFIX or view[: len(MAGIC)] != MAGIC:
        raise WireError(
            f"the body, {len(view)} bytes, begins {bytes(view[:8])!r}; wanted {MAGIC!r}, the "
            "length of the JSON, the JSON, and PNG images"
        )
    (length,) = struct.unpack_from("<I", view, len(MAGIC))
    if length > HEADER_BYTES:
        raise TooLarge(f"the JSON has {length} bytes; at most {HEADER_BYTES} are taken")
    if length > len(view) - PREFIX:
        raise WireError(
            f"the JSON should have {length} bytes; {len(view) - PREFIX} came: the body was cut"
        )
    header = checked(_Header, bytes(view[PREFIX : PREFIX + length]), "request")
    rows, ids = header.rows, [row.id for row in header.rows]
    if len(rows) > limits.rows:
        raise TooLarge(f"{len(rows)} rows came; at most {limits.rows} are taken in one request")
    if len(set(ids)) < len(ids):
        doubled = next(name for name in ids if ids.count(name) > 1)
        raise WireError(f"row id {doubled!r} came {ids.count(doubled)} times; wanted each once")
    for row in rows:
        if SOURCES in row.metadata:
            raise WireError(
                f"row {row.id!r}: metadata hold {SOURCES!r}; condition images are sent as PNG, "
                "their count as `sources`"
            )
    files = _files(view[PREFIX + length :], header)
    _check_pixels(files, rows, limits)
    return Question(header.request, header.judge, ids, rows, files, limits)


def _files(rest: memoryview, header: _Header) -> list[memoryview]:
    """The bytes of each image."""
    wanted = sum(1 + (row.sources or 0) for row in header.rows)
    if len(header.images) != wanted:
        raise WireError(
            f"{len(header.images)} images came; the rows have {wanted}: one each and `sources`"
        )
    if sum(header.images) != len(rest):
        raise WireError(
            f"the images should have {sum(header.images)} bytes; {len(rest)} bytes came"
        )
    files, start = [], 0
    for length in header.images:
        files.append(rest[start : start + length])
        start += length
    return files


def _check_pixels(files: Sequence[memoryview], rows: Sequence[_Row], limits: Limits) -> None:
    """Every file's header and chunks; nothing is unpacked."""
    total, todo = 0, iter(files)
    for row in rows:
        for _ in range(1 + (row.sources or 0)):
            try:
                height, width = png.size(next(todo), limits.image_pixels)
            except png.TooManyPixels as error:
                raise TooLarge(f"row {row.id!r}: {error}") from error
            except png.BadImage as error:
                raise WireError(f"row {row.id!r}: {error}") from error
            total += height * width
    if total > limits.request_pixels:
        raise TooLarge(
            f"the images have {total} pixels; at most {limits.request_pixels} are taken in one "
            "request: send fewer rows at a time"
        )


Message = TypeVar("Message", bound=Section)


def checked(model: type[Message], text: bytes, what: str) -> Message:
    """The message of a JSON text; WireError says which version or which keys are wrong."""
    raw = _loads(text, what)
    if not isinstance(raw, dict):
        raise WireError(f"the {what} is a {type(raw).__name__}; wanted a JSON object")
    if raw.get("version") != VERSION or isinstance(raw["version"], bool):
        raise WireError(
            f"the {what} is of protocol version {raw.get('version')!r}; this side speaks "
            f"{VERSION}: use one qirl_fast on both sides"
        )
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in wrong[:3]]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WireError(f"the {what} has wrong keys: {'; '.join(lines)}{more}") from error


def _loads(text: str | bytes, what: str) -> Any:
    """JSON without NaN and infinity, of any depth Python reads; WireError otherwise."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number[:40]} is too large for a number")
        return value

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        begin = text[:60]
        raise WireError(f"the {what} is no JSON ({error}); it begins {begin!r}") from error
