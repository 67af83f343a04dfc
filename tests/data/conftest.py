"""Both decoders; DALI where it is installed."""

from __future__ import annotations

import importlib.util

import pytest

from qirl_fast.data.images import Decoder

BACKENDS = [
    "pil",
    pytest.param(
        "dali",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("nvidia") is None
            or importlib.util.find_spec("nvidia.dali") is None,
            reason="DALI is not installed (extra 'dali')",
        ),
    ),
]


@pytest.fixture(params=BACKENDS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return Decoder(request.param, threads=2)
