"""Editing sets without a row file: folders of pairs, and WebDataset tar shards.

Files are grouped by key, the name without its endings: `7.jpg` and `7.txt` are row `7`; several
condition images are `7.0.png`, `7.1.png`, in the order of their numbers. `.txt` holds the prompt,
`.json` a row as in a JSONL file, without its images. As in WebDataset, except that only a number
between two dots is an ending of its own: the key of `a.b.jpg` is `a.b`.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qirl_fast.data.sources import ImageError, PromptError, Source

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SIDE_ENDINGS = (".txt", ".json")
_NUMBERED = re.compile(r"(.+)\.(\d+)")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")

log = logging.getLogger(__name__)


@dataclass
class Group:
    """One row: its images by number (-1: an image without one), its side files by ending."""

    where: str
    numbered: dict[int, Source] = field(default_factory=dict)
    side: dict[str, Source] = field(default_factory=dict)

    @property
    def images(self) -> tuple[Source, ...]:
        return tuple(self.numbered[number] for number in sorted(self.numbered))

    def put(self, place: dict[Any, Source], key: int | str, source: Source) -> None:
        """PromptError: the place is taken."""
        if key in place:
            raise PromptError(
                f"{source.name}: the same row has {place[key].name} already; wanted one file for "
                "each place, several images as .0.png, .1.png"
            )
        place[key] = source


def folder_groups(folder: Path) -> list[Group]:
    """The rows of a folder and its subfolders, sorted by name; files with a leading dot are none.

    An image whose link leaves the folder is a source that refuses. PromptError: see `_groups`.
    """
    sources = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and path.is_dir():
            raise PromptError(f"{folder}: {name} is a link to a folder; wanted the folder itself")
        if not path.is_dir() and not path.name.startswith("."):
            sources.append(source_in(folder, name))
    return _groups(sources, str(folder))


def shard_groups(pattern: Path) -> list[Group]:
    """The rows of `x.tar`, or of all shards of `x-{000..010}.tar`, in the order they lie there.

    An image that is a link, whose name leaves the shard or comes twice is a source that refuses.
    PromptError: a shard that is missing, cut off or compressed, or what `_groups` refuses.
    """
    groups: list[Group] = []
    for shard in expand(pattern):
        groups += _groups(_members(shard), str(shard))
    return groups


def expand(pattern: Path) -> list[Path]:
    """x-{008..010}.tar -> x-008.tar, x-009.tar, x-010.tar; a path without braces is itself."""
    text = str(pattern)
    found = _BRACES.search(text)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if int(first) > int(last):
        raise PromptError(f"{pattern}: got {found[0]}; wanted the smaller number first")
    numbers = range(int(first), int(last) + 1)
    return [
        path
        for number in numbers
        for path in expand(
            Path(f"{text[: found.start()]}{number:0{len(first)}}{text[found.end() :]}")
        )
    ]


def source_in(root: Path, name: str) -> Source:
    """The image `name` of the dataset at `root`; it refuses where the path, or a link on it, leads
    out of the root.
    """
    relative = PurePosixPath(name)
    if not name or "\0" in name or relative.is_absolute() or ".." in relative.parts:
        refused = (
            f"wanted a path below {root}, without '..' and not absolute: name the root of the "
            "images, or move the file"
        )
        return Source(name, root, refused=refused)
    path, refused = root / relative, ""
    try:
        target = path.resolve()
        if not target.is_relative_to(root.resolve()):
            refused = f"is a link to {target}, outside {root}; copy the file there"
    except (OSError, RuntimeError) as error:  # a loop of links
        refused = f"cannot be followed ({error}); copy the file there"
    return Source(name, path, refused=refused)


def _members(shard: Path) -> list[Source]:
    sources: dict[str, Source] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir() or PurePosixPath(member.name).name.startswith("."):
                    continue
                parts, refused = PurePosixPath(member.name), ""
                if parts.is_absolute() or ".." in parts.parts:
                    refused = "the name leaves the shard; wanted a relative one"
                elif not member.isreg() or member.issparse():
                    refused = "is a link or no plain file; store the file itself"
                elif member.name in sources:
                    refused = "the name comes twice in the shard; wanted once"
                sources[member.name] = Source(
                    f"{shard.name}:{member.name}", shard, member.offset_data, member.size, refused
                )
    except OSError as error:
        raise PromptError(f"{shard}: cannot be read ({error.strerror}); wanted a shard") from error
    except tarfile.TarError as error:
        raise PromptError(
            f"{shard}: not a whole uncompressed tar ({error}); unpack .gz, or copy it again"
        ) from error
    return list(sources.values())


def _groups(sources: Sequence[Source], where: str) -> list[Group]:
    """Group by key, in the order in which keys come first.

    Raises PromptError: no rows, an image without text or the other way round, one slot twice.
    """
    groups: dict[str, Group] = {}
    unused: Counter[str] = Counter()
    for source in sources:
        path = PurePosixPath(source.name)
        ending, key = path.suffix.lower(), str(path.with_suffix(""))
        if ending in IMAGE_ENDINGS:
            numbered = _NUMBERED.fullmatch(path.stem)
            number = -1 if numbered is None else int(numbered[2])
            key = key if numbered is None else str(path.with_name(numbered[1]))
            group = groups.setdefault(key, Group(key))
            group.put(group.numbered, number, source)
        elif ending in SIDE_ENDINGS:
            group = groups.setdefault(key, Group(key))
            group.put(group.side, ending, source)
        else:
            unused[ending or path.name] += 1
    if unused:
        log.warning("%s: files that are no part of a row, by ending: %s", where, dict(unused))
    if not groups:
        raise PromptError(f"{where}: no images with prompts; wanted pairs such as 7.jpg and 7.txt")
    return list(_checked(groups.values()))


def _checked(groups: Iterable[Group]) -> Iterable[Group]:
    for group in groups:
        if not group.numbered:
            raise PromptError(
                f"{group.where}: a prompt without an image; wanted {group.where}.jpg, .png or "
                ".webp beside it, or with numbers .0.jpg, .1.jpg"
            )
        if not group.side:
            raise PromptError(
                f"{group.where}: an image without a prompt; wanted {group.where}.txt or .json"
            )
        if -1 in group.numbered and len(group.numbered) > 1:
            raise PromptError(f"{group.where}: an image with and one without number; number all")
        yield group


def side_text(source: Source) -> str:
    """A .txt or .json of a group. PromptError: not readable, not UTF-8, empty."""
    try:
        return source.read().decode("utf-8-sig")
    except ImageError as error:
        raise PromptError(str(error)) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source.name}: byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8"
        ) from error
