"""Every recipe of configs/ loads, but for files that its user is to bring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_load

from qirl_fast.algorithms import ALGORITHMS
from qirl_fast.config import ConfigError, load_config, load_settings
from qirl_fast.config.reward import RewardConfig
from qirl_fast.config.server import ServerConfig

CONFIGS = Path("configs")
ALGORITHM_RECIPES = sorted((CONFIGS / "algorithms").glob("*.yaml"))
TRAINING = sorted([*CONFIGS.glob("tiny_*.yaml"), *ALGORITHM_RECIPES])


def loader(recipe: Path) -> Callable[[], Any]:
    if recipe in TRAINING:
        return lambda: load_config([str(recipe)])
    kind = ServerConfig if recipe.name == "reward_server.yaml" else RewardConfig
    return lambda: load_settings([str(recipe)], kind)


@pytest.mark.parametrize("recipe", sorted(CONFIGS.rglob("*.yaml")), ids=str)
def test_a_recipe_loads(recipe: Path) -> None:
    try:
        loader(recipe)()
    except ConfigError as error:
        assert recipe not in ALGORITHM_RECIPES, error
        assert all("no such file" in line for line in str(error).splitlines()), error


def test_each_algorithm_has_a_recipe() -> None:
    named = {safe_load(path.read_text())["algorithm"]["name"] for path in TRAINING}
    assert named == set(ALGORITHMS)
