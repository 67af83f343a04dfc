"""The before/after picture: pixels are where they should be and unsmoothed; text is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qirl_fast.evaluation import before_after_grid
from qirl_fast.evaluation.grid import GAP, HEADER_HEIGHT, SCORE_HEIGHT, TEXT_WIDTH, TILE

LEFTS = (TEXT_WIDTH + 2 * GAP, TEXT_WIDTH + TILE + 3 * GAP)


def random_images(n: int, h: int, w: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def draw(path: Path, **changes: object) -> np.ndarray:
    values = {
        "before": random_images(3, 32, 32, 0),
        "after": random_images(3, 32, 32, 1),
        "prompts": ["a red circle", "two squares " * 60, "gr\u00fcn \U0001f600"],
        "scores": [(0.25, 0.75), (0.5, 0.5), (1, 0)],
    } | changes
    assert before_after_grid(**values, path=path) == path  # type: ignore[arg-type]
    return np.asarray(Image.open(path))


def tile(canvas: np.ndarray, row: int, column: int) -> np.ndarray:
    top = HEADER_HEIGHT + row * (TILE + SCORE_HEIGHT + GAP)
    return canvas[top : top + TILE, LEFTS[column] : LEFTS[column] + TILE]


@pytest.mark.parametrize("size", [32, 64, 192])
def test_small_images_are_enlarged_by_whole_pixels(tmp_path: Path, size: int) -> None:
    before, after = random_images(3, size, size, 0), random_images(3, size, size, 1)
    canvas = draw(tmp_path / "g.png", before=before, after=after)
    factor = TILE // size
    for row in range(3):
        for column, images in enumerate((before, after)):
            wanted = images[row].repeat(factor, axis=0).repeat(factor, axis=1)
            assert np.array_equal(tile(canvas, row, column), wanted)


def test_large_and_oblong_images_are_shrunk_whole(tmp_path: Path) -> None:
    images = np.full((1, 200, 400, 3), 40, np.uint8)
    canvas = draw(
        tmp_path / "g.png", before=images, after=images, prompts=["wide"], scores=[(0, 1)]
    )
    dark = (tile(canvas, 0, 0) == 40).all(axis=-1)
    assert dark.any(axis=1).sum() == TILE // 2 and dark.any(axis=0).sum() == TILE


def test_prompts_and_scores_are_drawn_and_stay_in_their_place(tmp_path: Path) -> None:
    canvas = draw(tmp_path / "g.png")
    plain = draw(tmp_path / "h.png", prompts=[" ", " ", " "])
    scored = draw(tmp_path / "i.png", scores=[(0.25, 0.76), (0.5, 0.5), (1, 0)])
    text = (canvas != plain).any(axis=-1)
    assert text[:, :TEXT_WIDTH].any() and not text[:, TEXT_WIDTH + GAP :].any()
    for row in range(3):
        top = HEADER_HEIGHT + row * (TILE + SCORE_HEIGHT + GAP)
        assert text[top : top + TILE].any(), "each row has its text"
        assert not text[top + TILE + SCORE_HEIGHT : top + TILE + SCORE_HEIGHT + GAP].any()
    changed_rows, changed_columns = np.nonzero((canvas != scored).any(axis=-1))
    assert len(changed_rows) and changed_columns.min() > LEFTS[1]
    assert changed_rows.min() >= HEADER_HEIGHT + TILE
    assert changed_rows.max() < HEADER_HEIGHT + TILE + SCORE_HEIGHT


def test_the_source_of_an_edit_stands_before(tmp_path: Path) -> None:
    """Of any size; the other columns are as without it, one tile further right."""
    sources = [*random_images(2, 64, 64, 2), np.full((20, 40, 3), 9, np.uint8)]
    plain, canvas = draw(tmp_path / "g.png"), draw(tmp_path / "s.png", sources=sources)
    assert canvas.shape[1] == plain.shape[1] + TILE + GAP
    assert np.array_equal(tile(canvas, 0, 0), sources[0].repeat(3, 0).repeat(3, 1))
    assert (tile(canvas, 2, 0) == 9).all(axis=-1).sum() == 80 * 160, "whole, four times as large"
    below = canvas[HEADER_HEIGHT:], plain[HEADER_HEIGHT:]
    edge = LEFTS[0] + TILE + GAP
    assert np.array_equal(below[0][:, edge:], below[1][:, LEFTS[0] :]), "scores stay below theirs"
    assert (canvas[HEADER_HEIGHT + TILE + 1 :][:SCORE_HEIGHT, LEFTS[0] : edge] == 255).all()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([np.zeros((4, 4, 3), np.uint8)], "1 source, 3 before"),
        ([np.zeros((4, 4, 4), np.uint8)] * 3, r"source\[0\]: got uint8 \[4, 4, 4\]; wanted"),
        ([np.zeros((4, 4, 3))] * 3, r"source\[0\]: got float64"),
    ],
)
def test_sources_that_do_not_fit_are_refused(
    tmp_path: Path, sources: list[np.ndarray], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "g.png", sources=sources)
    assert not any(tmp_path.iterdir())


def test_the_file_is_a_png_and_nothing_else_is_left(tmp_path: Path) -> None:
    draw(tmp_path / "g.png")
    draw(tmp_path / "g.png")
    assert [path.name for path in tmp_path.iterdir()] == ["g.png"]
    assert Image.open(tmp_path / "g.png").format == "PNG"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"before": random_images(3, 8, 8, 0).astype(np.float32)}, r"before\[0\]: got float32"),
        ({"after": random_images(3, 8, 8, 0)[..., :1]}, r"after\[0\]: got uint8 \[8, 8, 1\]"),
        ({"before": random_images(2, 32, 32, 0)}, "got 2 before, 3 after"),
        ({"prompts": ["a"]}, "1 prompts"),
        ({"scores": [(0, 1)] * 4}, "4 scores"),
        ({"scores": [(0, float("inf"))] * 3}, "infinity"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, object], part: str
) -> None:
    with pytest.raises(ValueError, match=part):
        draw(tmp_path / "g.png", **changes)
    assert not list(tmp_path.iterdir())
