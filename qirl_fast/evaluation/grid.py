"""Pictures of what models draw: for each prompt its text, then an image of each of several columns,
such as the source of an edit, the model before and the model after.

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
    """`image_grid` of what was edited, if anything was, before and after.

    scores: N pairs (before, after).
    """
    columns: dict[str, Sequence[Image_]] = {} if sources is None else {"source": sources}
    columns |= {"before": before, "after": after}
    pairs = np.asarray(scores, np.float64).reshape(-1, 2)
    return image_grid(columns, prompts, {"before": pairs[:, 0], "after": pairs[:, 1]}, path)


def image_grid(
    columns: Mapping[str, Sequence[Image_ | None]],
    prompts: Sequence[str],
    scores: Mapping[str, Sequence[float] | NDArray[np.float64]],
    path: str | os.PathLike[str],
    per_column: int = ROWS,
) -> Path:
    """Draw a row for each prompt as PNG, and return its path.

    columns: by heading N images, uint8 [H, W, 3] of any size or None, N >= 1. prompts: N texts.
    scores: of some columns N numbers, shown under the images, green or red where one is above or
    below that of the first of these columns; NaN, shown as a dash: there was nothing to judge.
    per_column: prompts under each other; the next ones stand beside them. The file appears whole or
    not at all. Raises ValueError naming what does not fit.
    """
    _check(columns, prompts, scores)
    row_height = TILE + SCORE_HEIGHT + GAP
    width = TEXT_WIDTH + len(columns) * (TILE + GAP) + 2 * GAP
    across, down = -(-len(prompts) // per_column), min(len(prompts), per_column)
    canvas = Image.new("RGB", (across * width, HEADER_HEIGHT + down * row_height + GAP), WHITE)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    for row, prompt in enumerate(prompts):
        edge, top = width * (row // per_column), HEADER_HEIGHT + row % per_column * row_height
        draw.multiline_text((edge + GAP, top + 4), wrap(prompt, font), INK, font, spacing=5)
        for i, (name, images) in enumerate(columns.items()):
            left = edge + TEXT_WIDTH + 2 * GAP + i * (TILE + GAP)
            if row % per_column == 0:
                draw.text((left + TILE / 2, HEADER_HEIGHT / 2), name, INK, font, anchor="mm")
            pixels = images[row]
            if pixels is not None:
                canvas.paste(enlarge(pixels), (left, top))
                draw.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=PALE)
            if name in scores:
                # as they are shown: what differs in the third digit has no colour
                both = (next(iter(scores.values())), scores[name])
                first, score = (round(float(s[row]), 2) for s in both)
                text = "-" if score != score else f"{score:.2f}"
                color = UP if score > first else DOWN if score < first else INK
                spot = (left + TILE / 2, top + TILE + SCORE_HEIGHT / 2)
                draw.text(spot, text, color, font, anchor="mm")
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    canvas.save(beside, format="PNG", optimize=True)
    beside.replace(path)
    return path


def _check(
    columns: Mapping[str, Sequence[Image_ | None]],
    prompts: Sequence[str],
    scores: Mapping[str, Sequence[float] | NDArray[np.float64]],
) -> None:
    counts = {name: len(images) for name, images in columns.items()}
    counts |= {"prompts": len(prompts)}
    counts |= {f"scores of {name}": len(values) for name, values in scores.items()}
    if len(set(counts.values())) > 1 or not len(prompts):
        came = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"got {came}; wanted one of each per row, and a row at least")
    for name, images in columns.items():
        for i, image in enumerate(images):
            if image is None:
                continue
            shape = image.shape
            if image.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
                raise ValueError(
                    f"{name}[{i}]: got {image.dtype} {list(shape)}; wanted uint8 [H, W, 3]"
                )
    for name, values in scores.items():
        if np.isinf(np.asarray(values, np.float64)).any():
            raise ValueError(f"scores of {name} hold infinity: {list(values)}")


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
