"""Scores of an image in the form of Qwen-Image-Bench: pillars, groups, facets.

A facet is answered 0 (fails), 1 (passes), 2 (excels) or None: N/A, it does not apply. As points
0, 60, 100; N/A enters nothing. Bottom-up, in one image (arXiv 2605.28091, algorithm 1):

    group    mean of the points of its facets that apply
    pillar   mean of its groups that have some
    overall  mean of its pillars that have some

and of a model each of these is the mean over the images that have it. So the overall of a model is
not the mean of its pillars where prompts ask about different ones.

A pillar on which the judge failed is no number and its image has no overall: failed is never 0.

The names are those of Qwen-Image-Bench; the questions are worded here, not its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

POINTS: dict[int, float] = {0: 0.0, 1: 60.0, 2: 100.0}
OVERALL = "overall"

Path3 = tuple[str, str, str]  # pillar, group, facet
Taxonomy = Mapping[str, Mapping[str, Mapping[str, str]]]  # pillar -> group -> facet -> question


@dataclass(frozen=True)
class Answers:
    """Of one image. given: answer of each facet asked, None for N/A. failed: why, by pillar."""

    given: Mapping[Path3, int | None] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


def points(answers: Answers) -> dict[tuple[str, ...], float]:
    """Points in [0, 100] of one image: by (pillar, group, facet), (pillar, group), (pillar,), ().

    What does not apply, or failed, is not there.
    """
    found: dict[tuple[str, ...], float] = {
        path: POINTS[answer]
        for path, answer in answers.given.items()
        if answer is not None and path[0] not in answers.failed
    }
    for depth in (2, 1):
        below: dict[tuple[str, ...], list[float]] = {}
        for path, value in found.items():
            if len(path) == depth + 1:
                below.setdefault(path[:-1], []).append(value)
        found |= {path: math.fsum(values) / len(values) for path, values in below.items()}
    pillars = [value for path, value in found.items() if len(path) == 1]
    if pillars and not answers.failed:
        found[()] = math.fsum(pillars) / len(pillars)
    return found


@dataclass(frozen=True)
class Entry:
    """A line of a model's table. path: () overall; points: mean over `images` images, None: none.
    failed: images of which the judge's answer could not be had.
    """

    path: tuple[str, ...]
    points: float | None
    images: int
    failed: int


def table(answers: Sequence[Answers]) -> list[Entry]:
    """A model's table, each part before what it is made of; in the order in which they came."""
    values: dict[tuple[str, ...], list[float]] = {(): []}
    failed: dict[tuple[str, ...], int] = {}
    for one in answers:
        paths = [*one.given, *((pillar,) for pillar in one.failed)]
        for path in paths:
            for depth in range(1, len(path) + 1):
                values.setdefault(path[:depth], [])
        for path, value in points(one).items():
            values[path].append(value)
        for pillar in one.failed:
            failed[(pillar,)] = failed.get((pillar,), 0) + 1
        failed[()] = failed.get((), 0) + bool(one.failed)
    return [
        Entry(path, math.fsum(own) / len(own) if own else None, len(own), failed.get(path, 0))
        for path, own in _in_order(values)
    ]


def _in_order(
    values: Mapping[tuple[str, ...], list[float]],
) -> list[tuple[tuple[str, ...], list[float]]]:
    """Depth first; siblings as they first came."""
    place = {path: i for i, path in enumerate(values)}
    return sorted(
        values.items(), key=lambda item: [place[item[0][:d]] for d in range(1, len(item[0]) + 1)]
    )


def paths_of(taxonomy: Taxonomy) -> list[Path3]:
    """All facets, in order."""
    return [
        (pillar, group, facet)
        for pillar, groups in taxonomy.items()
        for group, facets in groups.items()
        for facet in facets
    ]


def asked(row: Mapping[str, object], taxonomy: Taxonomy) -> list[Path3]:
    """The facets that a prompt row is judged in: those its `dims_en` or `facets` names, else all.

    `dims_en`: "Quality / Realism / Noise; Alignment / Layout / 2D Space", as in the benchmark's
    data; `facets`: a list of such paths. ValueError for a path the taxonomy does not have.
    """
    known = {_plain(" / ".join(path)): path for path in paths_of(taxonomy)}
    named = row.get("facets", row.get("dims_en"))
    if named is None:
        return list(known.values())
    texts = named.split(";") if isinstance(named, str) else named
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the row's facets are {named!r}; wanted 'pillar / group / facet; ...'")
    strange = [text for text in texts if text.strip() and _plain(text) not in known]
    if strange or not any(text.strip() for text in texts):
        raise ValueError(
            f"the row's facets name {strange or 'nothing'}; wanted some of the rubric's, such as "
            f"{' / '.join(next(iter(known.values())))!r}"
        )
    return list(dict.fromkeys(known[_plain(text)] for text in texts if text.strip()))


def _plain(path: str) -> str:
    return re.sub(r"\s*/\s*", "/", " ".join(path.split())).casefold()
