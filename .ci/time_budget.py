"""pytest plugin of .ci/run: no test starts after QIRL_TESTS_UNTIL (seconds since the epoch).

The tests left out are skipped with that reason, so they are counted and shown by `-rs`.
"""

import os
import time

import pytest

UNTIL_S = float(os.environ.get("QIRL_TESTS_UNTIL", "inf"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `item` when the time is up."""
    if time.time() > UNTIL_S:
        pytest.skip("left out: the time budget of .ci/run is spent")
