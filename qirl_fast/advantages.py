"""From an update's scores to advantages and metrics."""

import numpy as np
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.batch import Batch, StepFailed
from qirl_fast.config import Config
from qirl_fast.distributed import World
from qirl_fast.evaluation.diversity import coarse_lab, mean_distance
from qirl_fast.rewards.composite import shaped, weights_for, without_missing
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED


def advantages(cfg: Config, batch: Batch, clamp: float | None = None) -> ops.GroupAdvantage:
    """Group advantages of the optimised judges, by each prompt's category weights.

    A judge that had nothing to judge in a whole group weighs nothing there (`without_missing`).
    StepFailed for a score that the edit rule cannot take. clamp: in place of the recipe's.
    """
    names, group = list(cfg.rewards), batch.group
    try:
        scores, status = optimised(cfg, batch)
    except ValueError as error:
        raise StepFailed(str(error), batch) from error
    categories = [p.category for p in batch.prompts for _ in range(group)]
    weights = weights_for(categories, cfg.rewards, cfg.category_weights, names)
    weights = without_missing(weights, status.numpy(), group)
    a = cfg.advantage
    return ops.group_advantage(
        scores,
        torch.arange(len(batch.prompts)).repeat_interleave(group),
        torch.as_tensor(weights),
        std=a.std,
        ddof=a.ddof,
        eps=a.eps,
        std_floor=a.std_floor,
        clamp=a.clamp if clamp is None else clamp,
        min_range=a.min_range,
        mode=a.mode,
        valid=status == SCORED,
    )


def optimised(cfg: Config, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores and states [B, K] of the optimised judges by the rules between them, see
    `rewards.composite.shaped`.
    """
    k = len(cfg.rewards)
    scores, status = batch.scores[:, :k].numpy(), batch.status[:, :k].numpy()
    scores, status = shaped(scores, status, list(cfg.rewards), cfg.tiers, cfg.edit)
    return torch.as_tensor(scores), torch.as_tensor(status)


def mean_scores(cfg: Config, batch: Batch) -> dict[str, float]:
    """Mean score of each judge over its valid rows.

    `reward` is the weighted mean of the optimised ones, absent without any and where one failed on
    all rows.
    """
    metrics = {}
    for i, name in enumerate([*cfg.rewards, *cfg.watch]):
        valid = batch.valid[:, i]
        if bool(valid.any()):
            metrics[f"reward/{name}"] = batch.scores[valid, i].double().mean().item()
    if cfg.rewards and all(f"reward/{name}" in metrics for name in cfg.rewards):
        metrics["reward"] = sum(w * metrics[f"reward/{n}"] for n, w in cfg.rewards.items())
    return metrics


def spread_metrics(cfg: Config, batch: Batch) -> dict[str, float]:
    """For each judge: `std/` mean in-group standard deviation, `flat/` the share of groups whose
    own is 0 or under advantage.std_floor, both over groups all of whose members are scored, and of
    scores as they are optimised; `failed/` and `missing/` shares of rows.
    """
    metrics = {}
    scores = batch.scores.clone()
    scores[:, : len(cfg.rewards)] = optimised(cfg, batch)[0]
    for i, name in enumerate([*cfg.rewards, *cfg.watch]):
        scored_M = batch.valid[:, i].view(-1, batch.group).all(1)
        scores_MG = scores[:, i].double().view(-1, batch.group)[scored_M]
        if len(scores_MG):
            std_M = scores_MG.std(1, correction=cfg.advantage.ddof)
            spread_M = scores_MG.amax(1) > scores_MG.amin(1)
            flat_M = (std_M < cfg.advantage.std_floor) | ~spread_M
            metrics[f"std/{name}"] = std_M.mean().item()
            metrics[f"flat/{name}"] = flat_M.double().mean().item()
        for what, state in (("failed", FAILED), ("missing", MISSING)):
            metrics[f"{what}/{name}"] = (batch.status[:, i] == state).double().mean().item()
    return metrics


def diversity(batch: Batch, world: World) -> dict[str, float]:
    """All: how far the images of one prompt lie apart, see `evaluation.diversity`.

    Nothing where images were not decoded, or there is one of each prompt.
    """
    if batch.group < 2 or not batch.images.shape[1]:
        return {}
    rows = [r for chunk in world.shown(batch.trajectories) for r in chunk.rows]
    features = world.concatenated(coarse_lab(batch.images))
    order = np.argsort(world.concatenated(np.array(rows, np.int64)))
    return {"diversity": mean_distance(features[order], batch.group)}
