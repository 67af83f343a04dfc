"""The judge of facets: one checklist a pillar and image, asked of a vision-language model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from qirl_fast.evaluation.facets import Answers, Path3, Taxonomy, asked
from qirl_fast.evaluation.image_bench import IMAGE_BENCH
from qirl_fast.rewards.judge import Row
from qirl_fast.rewards.vlm.checklist import Checklist, Items, ask_checklists
from qirl_fast.rewards.vlm.scorer import Engine


class FacetJudge:
    """Answers facets about images. tries: of an answer that cannot be read."""

    def __init__(self, engine: Engine, taxonomy: Taxonomy, tries: int) -> None:
        self.engine, self.taxonomy, self.tries = engine, taxonomy, tries

    def check_row(self, row: Row) -> None:
        """ValueError for a row whose facets are not the rubric's."""
        asked(row, self.taxonomy)

    def __call__(self, images_BHW3: np.ndarray, metadata: Sequence[Row]) -> list[Answers]:
        """Answers about uint8 images [B, H, W, 3]; never raises for the model or the server."""
        lists, owners = [], []
        for i, (image, row) in enumerate(zip(images_BHW3, metadata, strict=True)):
            for pillar, items in self._items(asked(row, self.taxonomy)).items():
                lists.append(Checklist(image, str(row["prompt"]), pillar, items))
                owners.append(i)
        given: list[dict[Path3, int | None]] = [{} for _ in metadata]
        failed: list[dict[str, str]] = [{} for _ in metadata]
        found = ask_checklists(self.engine, lists, self.tries)
        for i, one, got in zip(owners, lists, found, strict=True):
            if isinstance(got, str):
                failed[i][one.title] = got
            else:
                given[i] |= {(one.title, *path): answer for path, answer in got.items()}
        return [Answers(g, f) for g, f in zip(given, failed, strict=True)]

    def _items(self, paths: Sequence[Path3]) -> dict[str, Items]:
        """What is asked of each pillar."""
        found: dict[str, dict[str, dict[str, str]]] = {}
        for pillar, group, facet in paths:
            question = self.taxonomy[pillar][group][facet]
            found.setdefault(pillar, {}).setdefault(group, {})[facet] = question
        return dict(found)


def taxonomy_of(rubric: str | None) -> Taxonomy:
    """The rubric of a YAML file, pillar -> group -> facet -> question; None: Qwen-Image-Bench's.

    ValueError for a file that cannot be read or has another form.
    """
    if rubric is None:
        return IMAGE_BENCH
    try:
        tree: Any = yaml.safe_load(Path(rubric).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{rubric}: cannot be read as YAML: {error}") from error
    if not _whole(tree, 3):
        raise ValueError(
            f"{rubric}: wanted pillars, in each groups, in each facets with a question, all of "
            "them named by text and none empty"
        )
    taxonomy: Taxonomy = tree
    return taxonomy


def _whole(tree: Any, depth: int) -> bool:
    if not depth:
        return isinstance(tree, str) and bool(tree.strip())
    return (
        isinstance(tree, dict)
        and bool(tree)
        and all(isinstance(k, str) and k.strip() and _whole(v, depth - 1) for k, v in tree.items())
    )


def as_json(answers: Sequence[Answers]) -> str:
    """What `from_json` makes the same answers of; images without failures only."""
    return json.dumps([[[*path, value] for path, value in one.given.items()] for one in answers])


def from_json(text: str) -> list[Answers]:
    """Answers that were kept."""
    return [Answers({(p, g, f): value for p, g, f, value in one}) for one in json.loads(text)]


def identity(settings: Mapping[str, Any], taxonomy: Taxonomy, rows: Sequence[Row]) -> str:
    """SHA-256 of what decides the answers beside the images: judge, rubric, prompts and facets."""
    asked_of = [[str(row["prompt"]), asked(row, taxonomy)] for row in rows]
    return hashlib.sha256(json.dumps([settings, taxonomy, asked_of]).encode()).hexdigest()
