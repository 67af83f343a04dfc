"""A picture of the change: for each prompt its text, the image before and the image after.

Edits also show the source picture, before the two.

Eight prompts make a column; the next ones stand beside it.

Small images are enlarged by a whole factor without smoothing, so that a pixel stays a pixel; large
ones are shrunk. Scores stand under the images.

Shapes: N rows, H, W pixels.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

TILE = 192  # side of a drawn image, pixels
GAP = 16
TEXT_WIDTH = 300
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
FONT_SIZE = 16
SCORE_HEIGHT = 30
HEADER_HEIGHT = 38
MAX_LINES = 7
ROWS = 8  # prompts in a column
WHITE, INK, PALE, UP, DOWN = (255,) * 3, (30, 30, 30), (225,) * 3, (0, 110, 40), (170, 30, 20)

Image_ = NDArray[np.uint8]


def before_after_grid(
    before: Sequence[Image_],
    after: Sequence[Image_],
    prompts: Sequence[str],
    scores: Sequence[tuple[float, float]],
    path: str | os.PathLike[str],
    sources: Sequence[Image_] | None = None,
) -> Path:
    """Draw the grid as PNG and return its path.

    before, after: N images, uint8 [H, W, 3] of any size, N >= 1. prompts: N texts. scores: N pairs
    (before, after); NaN, shown as a dash: there was nothing to judge. sources: what was edited, N
    images, in a column before the others. The file appears whole or not at all. Raises ValueError
    naming what does not fit.
    """
    columns_of = {} if sources is None else {"source": sources}
    columns_of |= {"before": before, "after": after}
    _check(columns_of, prompts, scores)
    names = tuple(columns_of)
    row_height = TILE + SCORE_HEIGHT + GAP
    width = TEXT_WIDTH + len(names) * (TILE + GAP) + 2 * GAP
    columns, rows = -(-len(prompts) // ROWS), min(len(prompts), ROWS)
    size = (columns * width, HEADER_HEIGHT + rows * row_height + GAP)
    canvas = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    for row, prompt in enumerate(prompts):
        edge, top = width * (row // ROWS), HEADER_HEIGHT + row % ROWS * row_height
        lefts = [edge + TEXT_WIDTH + 2 * GAP + i * (TILE + GAP) for i in range(len(names))]
        if row % ROWS == 0:
            for left, text in zip(lefts, names, strict=True):
                draw.text((left + TILE / 2, HEADER_HEIGHT / 2), text, INK, font, anchor="mm")
        draw.multiline_text((edge + GAP, top + 4), wrap(prompt, font), INK, font, spacing=5)
        old, new = scores[row]
        colors = (INK, UP if new > old else DOWN if new < old else INK)
        shown = [images[row] for images in columns_of.values()]
        for left, pixels in zip(lefts, shown, strict=True):
            canvas.paste(enlarge(pixels), (left, top))
            draw.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=PALE)
        for left, score, color in zip(lefts[-2:], (old, new), colors, strict=True):
            spot = (left + TILE / 2, top + TILE + SCORE_HEIGHT / 2)
            draw.text(spot, "-" if score != score else f"{score:.2f}", color, font, anchor="mm")
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    canvas.save(beside, format="PNG", optimize=True)
    beside.replace(path)
    return path


def _check(
    columns: Mapping[str, Sequence[Image_]],
    prompts: Sequence[str],
    scores: Sequence[tuple[float, float]],
) -> None:
    counts = {name: len(images) for name, images in columns.items()}
    counts |= {"prompts": len(prompts), "scores": len(scores)}
    if len(set(counts.values())) > 1 or not len(prompts):
        came = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"got {came}; wanted one of each per row, and a row at least")
    for name, images in columns.items():
        for i, image in enumerate(images):
            shape = image.shape
            if image.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
                raise ValueError(
                    f"{name}[{i}]: got {image.dtype} {list(shape)}; wanted uint8 [H, W, 3]"
                )
    if np.isinf(np.asarray(scores, np.float64)).any():
        raise ValueError(f"scores hold infinity: {list(scores)}")


def enlarge(pixels: NDArray[np.uint8], side: int = TILE) -> Image.Image:
    """Return a square picture with the image centred: whole factor up, or smoothly down."""
    image = Image.fromarray(pixels)
    factor = side // max(image.size)
    if factor:
        scaled = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    else:
        scaled = image.copy()
        scaled.thumbnail((side, side), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (side, side), PALE)
    tile.paste(scaled, ((side - scaled.width) // 2, (side - scaled.height) // 2))
    return tile


def wrap(prompt: str, font: ImageFont.FreeTypeFont) -> str:
    """Break a prompt into lines that fit beside the images; a long one ends in dots."""
    characters = int(TEXT_WIDTH / font.getlength("abcdefghijklmnopqrstuvwxyz ") * 27)
    lines = textwrap.wrap(prompt, characters) or [""]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][: characters - 4] + " ..."]
    return "\n".join(lines)
