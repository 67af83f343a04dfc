"""A small study and its database."""

from pathlib import Path

import pytest
from small_studies import write_model

from qirl_fast.arena.store import Store
from qirl_fast.arena.study import load_study


@pytest.fixture
def folders(tmp_path):
    """base and rl, six prompts each, two of them edits."""
    models = {"base": str(tmp_path / "base"), "rl": str(tmp_path / "rl")}
    for name, shade in (("base", 10), ("rl", 100)):
        write_model(Path(models[name]), shade, edits=2)
    return models


@pytest.fixture
def study(folders):
    return load_study(folders)


@pytest.fixture
def store(tmp_path):
    found = Store(tmp_path / "votes.db")
    yield found
    found.close()
