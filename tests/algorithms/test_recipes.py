"""Every recipe of configs/ loads, and those of algorithms do what their comment says."""

from __future__ import annotations

from pathlib import Path

import pytest
from yaml import safe_load

from qirl_fast.algorithms import ALGORITHMS
from qirl_fast.config import load_config, load_reward_config, load_server_config

CONFIGS = Path("configs")
TRAINING = sorted([*CONFIGS.glob("tiny_*.yaml"), *(CONFIGS / "algorithms").glob("*.yaml")])


@pytest.mark.parametrize("recipe", TRAINING, ids=str)
def test_a_training_recipe_loads(recipe: Path) -> None:
    assert load_config([str(recipe)]).train.steps > 0
