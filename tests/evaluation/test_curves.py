"""The picture of every judge's score through a run."""

import numpy as np
import pytest
from PIL import Image

from qirl_fast.evaluation.curves import reward_curves, running_mean


@pytest.mark.parametrize("width", [1, 3, 50])
def test_running_mean_is_the_plain_loop(width):
    values = np.random.default_rng(0).normal(size=40)
    values[[0, 5, 6, 7, 8]] = np.nan
    loop = []
    for i in range(40):
        some = [v for v in values[max(0, i - width + 1) : i + 1] if np.isfinite(v)]
        loop.append(np.mean(some) if some else np.nan)
    np.testing.assert_allclose(running_mean(values, width), loop, rtol=1e-12)


def test_the_picture_has_a_panel_a_judge_and_outlives_gaps(tmp_path):
    rows = [
        {"step": i, "reward/a": i / 50, "std/a": 0.1, "reward/b": 0.4 - i / 200, "std/b": 0.05}
        for i in range(1, 51)
    ]
    del rows[7]["reward/b"], rows[7]["std/b"]
    rows[9] |= {"heldout/a": 0.3, "heldout/b": 0.4}
    one = reward_curves(rows, {"a": 1.0}, [], tmp_path / "one.png")
    two = reward_curves(rows, {"a": 1.0}, ["b"], tmp_path / "two.png")
    with Image.open(one) as small, Image.open(two) as wide:
        assert wide.width == 2 * small.width and wide.height == small.height
        colors = np.asarray(wide.convert("RGB"), int)
    orange = np.abs(colors - [255, 127, 14]).sum(-1) < 60
    assert orange.any() and not orange[:, : small.width].any(), "the watched one, in its panel"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "two.png"]
