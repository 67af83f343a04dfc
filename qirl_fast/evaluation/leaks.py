"""Do evaluated prompts occur among training prompts: the same row, text, image, or nearly so.

Texts are compared as `rewards.vlm.rows.normalised` has them (NFKC, case and space folded), then as
sets of words without punctuation, E and T:

    Jaccard |E & T| / |E | T|,   containment |E & T| / min(|E|, |T|)

(Broder 1997). Nearly the same: one of them is at least `near`; containment counts only where the
smaller set has WORDS words or more, as "a cat" is contained in much. A set knows no order: "a left
of b" and "b left of a" are alike, so in a world of few words this says more than it should, and no
less. Images are compared by SHA-256 of their files: one that was encoded anew is not found.

Shapes: E evaluated prompts, T training prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix

from qirl_fast.data.prompts import Prompt
from qirl_fast.data.sources import ImageError
from qirl_fast.rewards.vlm.rows import normalised

WORDS = 8
BLOCK = 256  # evaluated prompts compared at once: bounds the memory, 8 bytes a pair
WORD = re.compile(r"\w+")

Kind = Literal["row", "text", "image", "near"]
EXACT: tuple[Kind, ...] = ("row", "text", "image")


@dataclass(frozen=True)
class Leak:
    """An evaluated prompt that training has seen. kind: the strongest that holds, text being the
    same before an image. index: of the evaluated prompt. trained: the training prompt it is like,
    source: where that stands. likeness in (0, 1]: 1 but for kind "near".
    """

    kind: Kind
    index: int
    prompt: str
    trained: str
    source: str
    likeness: float = 1.0


def find_leaks(
    evaluated: Sequence[Prompt], trained: Mapping[str, Sequence[Prompt]], near: float
) -> list[Leak]:
    """One leak at most for each evaluated prompt and source of training prompts, in their order.

    trained: training prompts by a name of where they are from. near in (0, 1].
    """
    if not 0 < near <= 1:
        raise ValueError(f"got near {near}; wanted a number above 0, at most 1")
    return [
        leak
        for source, rows in trained.items()
        for leak in _of_source(evaluated, rows, source, near)
    ]


def _of_source(
    evaluated: Sequence[Prompt], rows: Sequence[Prompt], source: str, near: float
) -> list[Leak]:
    ids = {row.id: row.prompt for row in rows}
    written = [row for row in rows if not row.images]  # instructions recur: an edit is its picture
    texts = {normalised(row.prompt): row.prompt for row in written}
    images = {digest: row.prompt for row in rows for digest in _digests(row)}
    found: dict[int, Leak] = {}
    for i, row in enumerate(evaluated):
        same_image = next((images[d] for d in _digests(row) if d in images), None)
        text = texts.get(normalised(row.prompt))
        if row.id in ids:
            found[i] = Leak("row", i, row.prompt, ids[row.id], source)
        elif text is not None and not row.images:
            found[i] = Leak("text", i, row.prompt, text, source)
        elif same_image is not None:
            found[i] = Leak("image", i, row.prompt, same_image, source)
    left = [i for i in range(len(evaluated)) if i not in found and not evaluated[i].images]
    if written:
        for i, j, likeness in _alike([evaluated[i].prompt for i in left], written, near):
            own = evaluated[left[i]]
            found[left[i]] = Leak("near", left[i], own.prompt, written[j].prompt, source, likeness)
    return [found[i] for i in sorted(found)]


def _alike(
    texts: Sequence[str], rows: Sequence[Prompt], near: float
) -> list[tuple[int, int, float]]:
    """(index, row, likeness) of the likest row of each text that has one."""
    words: dict[str, int] = {}
    first, second = (_matrix(list(side), words) for side in (texts, [r.prompt for r in rows]))
    first.resize(first.shape[0], max(1, len(words)))
    second.resize(second.shape[0], max(1, len(words)))
    sizes_T, pairs = second.getnnz(1), []
    for start in range(0, first.shape[0], BLOCK):
        block = first[start : start + BLOCK]
        common_ET = (block @ second.T).toarray().astype(np.float64)
        sizes_E = block.getnnz(1)[:, None]
        smaller_ET = np.minimum(sizes_E, sizes_T)
        union_ET = np.maximum(sizes_E + sizes_T - common_ET, 1)
        contained_ET = np.where(smaller_ET >= WORDS, common_ET / np.maximum(smaller_ET, 1), 0)
        likeness_ET = np.maximum(common_ET / union_ET, contained_ET)
        best = likeness_ET.argmax(1)
        top = likeness_ET[np.arange(len(best)), best]
        pairs += [
            (start + int(e), int(best[e]), float(top[e])) for e in np.flatnonzero(top >= near)
        ]
    return pairs


def _matrix(texts: Sequence[str], words: dict[str, int]) -> csr_matrix:
    """Which words each text has, int32 [texts, words]; new words are added to `words`."""
    columns, starts = [], [0]
    for text in texts:
        columns += [words.setdefault(w, len(words)) for w in set(WORD.findall(normalised(text)))]
        starts.append(len(columns))
    shape = (len(texts), max(1, len(words)))
    return csr_matrix((np.ones(len(columns), np.int32), columns, starts), shape)


def _digests(row: Prompt) -> list[str]:
    """SHA-256 of the row's images; one that cannot be read is for whoever draws it to refuse."""
    found = []
    for image in row.images:
        try:
            found.append(image.sha256())
        except (ImageError, OSError):
            continue
    return found
