"""People's ratings of curated samples: JSONL, one rating a line.

`{"id": "12-3", "score": 4, "judge"?: name, "prompt"?: text}`: sample 3 of the prompt at row 12,
both counted from 0, as the files of images/ are named; "image": "images/12-3.png" in place of "id"
will do. "judge" (or "dimension") is the judge whose question was answered; without it, or as
"overall", the rating is of the whole and is compared with every judge that has none of its own. Any
finite scale: ranks alone are used. Several ratings of one sample are averaged.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OVERALL = "overall"
KEYS = ("id", "image", "score", "judge", "dimension", "prompt")


class RatingError(ValueError):
    """A ratings file that cannot be used; the message is 'file:line: what came; what is wanted'."""


def load_ratings(
    path: str | os.PathLike[str], prompts: Mapping[int, str], samples: int, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Judge's name or OVERALL -> float64 [P, n], NaN where nobody rated.

    prompts: row -> text, P of them in the order of the arrays; samples: n. Raises RatingError.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RatingError(f"{path}: cannot be read ({error}); wanted JSON lines") from error
    place = {row: p for p, row in enumerate(prompts)}
    found: dict[tuple[str, int, int], list[float]] = {}
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break
        where = f"{path}:{number}"
        rating = _object(line, where)
        row, sample = _sample(rating, where)
        if row not in prompts or sample >= samples:
            raise RatingError(
                f"{where}: there is no sample {row}-{sample}; wanted row-sample, rows "
                f"{min(prompts)} to {max(prompts)}, samples 0 to {samples - 1}"
            )
        if rating.get("prompt", prompts[row]) != prompts[row]:
            raise RatingError(
                f"{where}: the prompt of {row}-{sample} is {prompts[row]!r}, not "
                f"{rating['prompt']!r}; the ratings are of another curation"
            )
        key = (_judge(rating, names, where), place[row], sample)
        found.setdefault(key, []).append(_score(rating, where))
    if not found:
        raise RatingError(f"{path}: holds no rating; wanted one JSON object a line")
    ratings: dict[str, np.ndarray] = {}
    for (name, p, sample), values in found.items():
        table = ratings.setdefault(name, np.full((len(prompts), samples), np.nan))
        table[p, sample] = math.fsum(values) / len(values)
    return ratings


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        rating = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RatingError(f"{where}: malformed JSON ({error}); wanted one object a line") from error
    if not isinstance(rating, dict):
        raise RatingError(f"{where}: got {line[:60]!r}; wanted an object with id and score")
    strange = [key for key in rating if key not in KEYS]
    if strange:
        raise RatingError(f"{where}: unknown key {strange[0]!r}; known are {', '.join(KEYS)}")
    return rating


def _sample(rating: Mapping[str, Any], where: str) -> tuple[int, int]:
    came = rating.get("id", rating.get("image"))
    text = Path(came).stem if isinstance(came, str) else ""
    match = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", text)
    if match is None:
        raise RatingError(
            f"{where}: got id or image {came!r}; wanted row-sample, such as 12-3 or images/12-3.png"
        )
    return int(match[1]), int(match[2])


def _judge(rating: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    name = rating.get("judge", rating.get("dimension", OVERALL))
    if name not in (*names, OVERALL):
        raise RatingError(
            f"{where}: got judge {name!r}; the curation's are {', '.join(names)}, and {OVERALL!r}"
        )
    return str(name)


def _score(rating: Mapping[str, Any], where: str) -> float:
    score = rating.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise RatingError(f"{where}: got score {score!r}; wanted a finite number")
    return float(score)
