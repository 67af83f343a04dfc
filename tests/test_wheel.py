"""`make wheel`: the built package, installed and used outside the checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_works_in_a_new_environment() -> None:
    done = subprocess.run([ROOT / ".ci" / "wheel"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ops.swiglu is that of its reference" in done.stdout
    assert "python -m qirl_fast.train --dry-run" in done.stdout
