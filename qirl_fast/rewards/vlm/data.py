"""The training file of a judge: JSONL, one judgement a line, checked whole before any work.

    {"image": path | "images": [path, ...],     relative to the file's folder; an edit's source
                                                images first, its result last
     "prompt": text | "instruction": text,      the second with dimension "instruction"
     "dimension": "alignment" | "aesthetics" | "portrait" | "instruction",
     "score": number in [1, 5],                 mean of the raters
     "rationale"?: text,                        what the judge is to think; without, straight away
     "category"?: text, "split"?: "train" | "heldout",
     "tier_scores"?: {dimension: number}}       this image's scores in higher tiers

A row without "split" goes by the SHA-256 of its normalised prompt (Unicode NFKC, case folded,
white space collapsed): the first 64 bits, as a share of 2^64, below `heldout_share` is heldout. So
all rows of a prompt are on one side, in every run and whatever else the file holds.

Leak check: no prompt and no image (by the SHA-256 of its decoded pixels) may be in both splits.

Tier rule (METHOD.md 5): where an image of a prompt failed a tier (score below `failed_below`), its
labels in later tiers may not exceed `cap`: an error, or capped where `cap_labels` is set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qirl_fast.rewards.vlm.rows import (
    DataError,
    Judgement,
    Tiers,
    capped,
    hashed,
    leaks,
    split_of,
)
from qirl_fast.rewards.vlm.rubric import DIMENSIONS, MARK, refuse_control

SPLITS = ("train", "heldout")
KEYS = (
    "image",
    "images",
    "prompt",
    "instruction",
    "dimension",
    "rationale",
    "score",
    "category",
    "tier_scores",
    "split",
)


def load_rows(path: Path, heldout_share: float, tiers: Tiers | None = None) -> list[Judgement]:
    """Read and check a training file. Raises DataError naming every problem found at a stage:
    fields, then images, then leaks, then tiers; FileNotFoundError without the file.
    """
    rows, problems = [], []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError([f"{path}: not UTF-8 text ({error}); convert it"]) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            rows.append(_row(line, where, path.parent, heldout_share))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError([f"{path} holds no rows; wanted one JSON object a line"])
    rows = hashed(rows)
    if found := list(leaks(rows)):
        raise DataError(found)
    return capped(rows, tiers or Tiers())


def _row(line: str, where: str, folder: Path, heldout_share: float) -> Judgement:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error}); wanted one object a line") from error
    if not isinstance(data, dict):
        raise ValueError(f"got a {type(data).__name__}; wanted an object {{...}}")
    if unknown := sorted(set(data) - set(KEYS)):
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    dimension = _text(data, "dimension")
    if dimension not in DIMENSIONS:
        raise ValueError(f"dimension is {dimension!r}; wanted one of {', '.join(DIMENSIONS)}")
    key, other = ("instruction", "prompt")
    if dimension != "instruction":
        key, other = other, key
    if other in data:
        raise ValueError(f"{other} with dimension {dimension!r}; wanted {key} in its place")
    text = _text(data, key)
    refuse_control(text, key)
    rationale = _text(data, "rationale", "")
    if MARK in rationale:
        raise ValueError(f"rationale holds {MARK!r}, which ends the reasoning; leave the score out")
    refuse_control(rationale, "rationale")
    split = _text(data, "split", split_of(text, heldout_share))
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; wanted one of {', '.join(SPLITS)}")
    return Judgement(
        images=tuple(folder / name for name in _images(data, dimension)),
        text=text,
        dimension=dimension,
        rationale=rationale.rstrip(),
        score=_score(data.get("score"), "score"),
        category=_text(data, "category") if "category" in data else None,
        split=split,
        where=where,
        tier_scores=_tier_scores(data),
    )


def _text(data: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = data.get(key, default)
    if value is None:
        raise ValueError(f"{key} is missing; wanted text")
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}; wanted text")
    if not value.strip() and default is None:
        raise ValueError(f"{key} is empty; wanted text")
    return value


def _score(value: Any, key: str) -> float:
    if value is None:
        raise ValueError(f"{key} is missing; wanted a number from 1 to 5")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 5:
        raise ValueError(f"{key} is {value!r}; wanted a number from 1 to 5")
    return float(value)


def _tier_scores(data: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    given = data.get("tier_scores", {})
    if not isinstance(given, dict):
        raise ValueError(f"tier_scores is {given!r}; wanted {{dimension: number}}")
    for name in given:
        if name not in DIMENSIONS:
            raise ValueError(f"tier_scores names {name!r}; wanted {', '.join(DIMENSIONS)}")
    return tuple((name, _score(value, f"tier_scores.{name}")) for name, value in given.items())


def _images(data: Mapping[str, Any], dimension: str) -> list[str]:
    if ("image" in data) == ("images" in data):
        raise ValueError("wanted image, a path, or images, a list of paths, and not both")
    given = [data["image"]] if "image" in data else data["images"]
    if not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        key = "image" if "image" in data else "images"
        raise ValueError(
            f"{key} is {data[key]!r}; wanted {'a path' if key == 'image' else 'paths'}"
        )
    if dimension == "instruction" and len(given) < 2:
        raise ValueError(f"{len(given)} images of an edit; wanted [source, ..., result], 2 or more")
    if dimension != "instruction" and len(given) != 1:
        raise ValueError(f"{len(given)} images; wanted one for dimension {dimension!r}")
    return given
