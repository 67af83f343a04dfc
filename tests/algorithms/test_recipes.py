"""Every recipe of configs/ loads, but for files that its user is to bring."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from yaml import safe_load

from qirl_fast.algorithms import ALGORITHMS
from qirl_fast.config import ConfigError, load_config, load_settings
from qirl_fast.config.evaluate import EvaluateConfig
from qirl_fast.config.pipeline import PipelineConfig
from qirl_fast.config.reward import RewardConfig
from qirl_fast.config.server import ServerConfig

CONFIGS = Path("configs")
ALGORITHM_RECIPES = sorted((CONFIGS / "algorithms").glob("*.yaml"))
OTHERS: dict[str, Any] = {
    "reward_server.yaml": ServerConfig,
    "tiny_pipeline.yaml": PipelineConfig,
    "tiny_evaluate.yaml": EvaluateConfig,
}
TRAINING = sorted(
    [path for path in CONFIGS.glob("tiny_*.yaml") if path.name not in OTHERS] + ALGORITHM_RECIPES
)
LACKING = ("no such file", "holds no config.json", "is no teacher")


def loader(recipe: Path) -> Callable[[], Any]:
    if recipe in TRAINING:
        return lambda: load_config([str(recipe)])
    return lambda: load_settings([str(recipe)], OTHERS.get(recipe.name, RewardConfig))


@pytest.mark.parametrize("recipe", sorted(CONFIGS.rglob("*.yaml")), ids=str)
def test_a_recipe_loads(recipe: Path) -> None:
    try:
        loader(recipe)()
    except ConfigError as error:
        assert recipe not in ALGORITHM_RECIPES, error
        lines = str(error).splitlines()
        assert all(any(part in line for part in LACKING) for line in lines), error


def test_each_algorithm_has_a_recipe() -> None:
    named = {safe_load(path.read_text())["algorithm"]["name"] for path in TRAINING}
    assert named == set(ALGORITHMS)


def test_each_recipe_is_in_the_docs() -> None:
    text = Path("docs/algorithms.md").read_text()
    assert all(f"| `{recipe.stem}` |" in text for recipe in ALGORITHM_RECIPES)


def test_the_algorithm_written_out_in_the_docs_works(make_bench, monkeypatch, advantage) -> None:
    text = Path("docs/algorithms.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"__name__": "mine"}
    exec(compile(code, "docs", "exec", dont_inherit=True), names)
    monkeypatch.setitem(ALGORITHMS, "reinforce", names["Reinforce"])
    bench = make_bench(names["Settings"](name="reinforce", kl_weight=0.1), (0, 1))
    steps = bench.losses(advantage, bench.prepare())
    torch.stack([step.loss for step in steps]).mean().backward()
    assert len(steps) == 2 and all(p.grad.any() for p in bench.model.parameters())
