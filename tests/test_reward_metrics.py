"""What a batch's scores amount to: means, in-group spread, flat groups, failures, advantages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qirl_fast.advantages import advantages, mean_scores, optimised, spread_metrics
from qirl_fast.batch import Batch, StepFailed
from qirl_fast.config import Config, ConfigError, load_config
from qirl_fast.data.prompts import Prompt
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED

RECIPE = Path(__file__).with_name("recipe.yaml")


@pytest.fixture
def cfg() -> Config:
    rewards = "rewards={alignment: 0.75, aesthetics: 0.25}"
    return load_config([str(RECIPE), rewards, "advantage.std_floor=0.05", "watch=[]"])


def batch(scores: list[list[float]], status: list[list[int]] | None = None) -> Batch:
    """Two prompts, three samples each, two judges."""
    prompts = [Prompt(str(i), str(i), None, {"prompt": str(i)}) for i in range(2)]
    states = torch.zeros(6, 2, dtype=torch.int8) if status is None else torch.tensor(status)
    images = np.zeros((6, 1, 1, 3), np.uint8)
    return Batch(prompts, [], images, torch.tensor(scores), states.to(torch.int8))


SCORES = [[0.0, 0.5], [0.3, 0.5], [0.6, 0.5], [0.2, 0.1], [0.21, 0.4], [0.2, 0.7]]


def test_spread_is_that_inside_groups(cfg: Config) -> None:
    found = spread_metrics(cfg, batch(SCORES))
    inside = np.array(SCORES).reshape(2, 3, 2).std(1)
    assert found["std/alignment"] == pytest.approx(inside[:, 0].mean(), rel=1e-6)
    assert found["std/aesthetics"] == pytest.approx(inside[:, 1].mean(), rel=1e-6)
    assert found["flat/alignment"] == 0.5, "the second group is under the floor"
    assert found["flat/aesthetics"] == 0.5, "the first group is all equal"
    assert mean_scores(cfg, batch(SCORES))["reward/alignment"] == pytest.approx(0.251667, rel=1e-4)


def test_groups_with_an_unscored_member_have_no_spread(cfg: Config) -> None:
    status = [[SCORED, SCORED]] * 5 + [[FAILED, MISSING]]
    found = spread_metrics(cfg, batch(SCORES, status))
    assert found["std/alignment"] == pytest.approx(np.std([0, 0.3, 0.6]), rel=1e-6)
    assert found["failed/alignment"] == found["missing/aesthetics"] == pytest.approx(1 / 6)
    nothing = spread_metrics(cfg, batch(SCORES, [[FAILED, SCORED]] * 6))
    assert "std/alignment" not in nothing and nothing["failed/alignment"] == 1.0


def test_a_group_without_anything_to_judge_goes_by_its_other_rewards(cfg: Config) -> None:
    status = [[SCORED, SCORED]] * 3 + [[MISSING, SCORED]] * 3
    found = advantages(cfg, batch(SCORES, status))
    assert found.keep.all()
    z = np.array([-1.0, 0.0, 1.0]) * 0.3 / (np.std([0.1, 0.4, 0.7]) + cfg.advantage.eps)
    np.testing.assert_allclose(found.advantage[3:], z, rtol=1e-5, atol=1e-6)


def test_a_group_with_a_failed_member_is_left_out(cfg: Config) -> None:
    status = [[SCORED, SCORED]] * 5 + [[FAILED, SCORED]]
    found = advantages(cfg, batch(SCORES, status))
    assert found.keep.tolist() == [True] * 3 + [False] * 3
    assert (found.advantage[3:] == 0).all()


def test_the_edit_rule_shapes_what_is_optimised(cfg: Config) -> None:
    rule = "edit={instruction: alignment, preservation: aesthetics, lowest: 0, highest: 1}"
    plain = [str(RECIPE), "rewards={alignment: 0.75, aesthetics: 0.25}", "watch=[]"]
    cfg = load_config([*plain, rule])
    status = [[SCORED, SCORED]] * 4 + [[SCORED, MISSING], [SCORED, FAILED]]
    scores, states = optimised(cfg, batch(SCORES, status))
    expected = np.array(SCORES, np.float32)
    expected[:4, 0] = expected[:4, 1] * (0.3 + 0.7 * expected[:4, 0])
    np.testing.assert_allclose(scores[:5], expected[:5], rtol=1e-6)
    assert states[:, 0].tolist() == [SCORED] * 5 + [FAILED]
    found = advantages(cfg, batch(SCORES)).advantage
    assert not torch.equal(found, advantages(load_config(plain), batch(SCORES)).advantage)
    # Scores of 1..5 under a range of 0..1 stop the step, and say what to set.
    with pytest.raises(StepFailed, match=r"'alignment' scored 5.*set lowest and highest"):
        advantages(cfg, batch([[5.0, 0.5]] * 6))
    with pytest.raises(ConfigError, match=r"edit: judge 'face' is not among"):
        load_config([*plain, rule.replace("alignment", "face")])


def test_a_failed_higher_tier_caps_what_lower_ones_may_score(cfg: Config) -> None:
    tier = "[{judge: alignment, fails_below: 0.25, cap: {aesthetics: 0.4}}, {judge: aesthetics, "
    tiers = f"tiers={tier}fails_below: 0}}]"
    rewards = "rewards={alignment: 0.75, aesthetics: 0.25}"
    capped = load_config([str(RECIPE), rewards, tiers, "watch=[]"])
    found = optimised(capped, batch(SCORES))[0]
    low = torch.tensor(SCORES)[:, 0] < 0.25
    assert low.any() and not low.all()
    wanted = torch.tensor(SCORES)
    wanted[low, 1] = wanted[low, 1].clamp(max=0.4)
    assert torch.equal(found, wanted)
    assert torch.equal(optimised(cfg, batch(SCORES))[0], torch.tensor(SCORES))
    a, b = advantages(capped, batch(SCORES)), advantages(cfg, batch(SCORES))
    assert not torch.equal(a.advantage, b.advantage)
