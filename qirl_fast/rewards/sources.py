"""The condition images of an editing row, which judges of edits find under SOURCES.

The last one is the edited picture, at the result's size; the others are what it was edited with.
"""

from typing import Any

import numpy as np

from qirl_fast.rewards.judge import SOURCES, Row


def condition_images(row: Row) -> list[np.ndarray]:
    """The row's condition images, uint8 [h, w, 3] each, one or more; ValueError without any."""
    sources = row.get(SOURCES)
    sources = () if sources is None else sources
    if not isinstance(sources, list | tuple):
        raise ValueError(
            f"the row's {SOURCES} are a {type(sources).__name__}; wanted a list of images, "
            "uint8 [h, w, 3] each"
        )
    if not sources:
        raise ValueError(
            f"no condition image in the row ({SOURCES}), and an edit is judged against its "
            "source; use this judge for rows that carry one, or another dimension"
        )
    return [picture(source) for source in sources]


def picture(image: Any) -> np.ndarray:
    """An image as a contiguous array; ValueError unless it is uint8 [h, w, 3] and not empty."""
    array = np.ascontiguousarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"got an image {array.dtype} {list(array.shape)}; wanted uint8 [h, w, 3]")
    return array


def has_sources(row: Row) -> bool:
    """Whether the row is one of an edit at all: it has condition images, of whatever form."""
    sources = row.get(SOURCES)
    return sources is not None and (not isinstance(sources, list | tuple) or len(sources) > 0)
