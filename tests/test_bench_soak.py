"""python -m bench soak: what counts as flat, and a short run looked at from outside."""

from __future__ import annotations

import json
import os

import pytest

from bench import soak


def test_a_leak_rises_and_noise_does_not() -> None:
    leak = [100.0 + 0.1 * step for step in range(1000)]
    assert soak.rise(leak) == pytest.approx(0.1 * 499 / 174.95)  # of the second half's median
    assert abs(soak.rise([6.0, 7.0] * 500)) < 0.01
    assert abs(soak.rise([900.0] * 500 + [100.0] * 500)) < 1e-9  # the first half does not count


def test_a_process_is_looked_at() -> None:
    before = soak.looked_at(os.getpid())
    with open(os.devnull) as _:
        resident, files, threads = soak.looked_at(os.getpid())
    assert files == before[1] + 1 and resident > 10 and threads >= 1


@pytest.mark.slow
def test_a_short_run_is_written_and_drawn(tmp_path) -> None:
    out = tmp_path / "soak.json"
    result = soak.run(12, tmp_path / "runs", out, say=lambda text: None)
    assert result["steps"] == len(result["seconds"]) == 12
    assert all(1 <= step < 12 for step in result["seen"]["step"]) and result["seen"]["step"]
    assert json.loads(out.read_text())["rises"].keys() == {"rss_mib", "files", "threads", "step_s"}
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "| threads | " in out.with_suffix(".md").read_text()
