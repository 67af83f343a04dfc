"""What several rewards amount to: the rules that tie them, weights by category, and rewards that a
group lacks.

Shapes: B rows in groups of G, K judges.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qirl_fast.rewards.edits import EditRule, edit_columns
from qirl_fast.rewards.judge import MISSING, SCORED
from qirl_fast.rewards.tiers import Tier, cap_columns


def shaped(
    values_BK: np.ndarray,
    status_BK: np.ndarray,
    names: Sequence[str],
    tiers: Sequence[Tier] = (),
    edit: EditRule | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and states of judges `names` as they are optimised: the edit rule's, then capped.

    ValueError where a score is not what a rule wants.
    """
    values_BK, status_BK = edit_columns(values_BK, status_BK, names, edit)
    return cap_columns(values_BK, status_BK == SCORED, names, tiers), status_BK


def weights_for(
    categories: Sequence[str | None],
    weights: Mapping[str, float],
    category_weights: Mapping[str, Mapping[str, float]] | None,
    names: Sequence[str],
) -> np.ndarray:
    """Weights float32 [B, K] of the judges `names`, one row a category, each row summing to 1.

    A row takes `category_weights[category]` where there is one, `weights` otherwise; a judge left
    out of the mapping used weighs 0. ValueError for a weight of no judge in `names`, a negative
    or non-finite one, or a mapping without a positive weight.
    """
    default_K = _normalised(weights, names, "weights")
    rows: dict[str | None, np.ndarray] = {
        category: _normalised(mapping, names, f"category_weights[{category!r}]")
        for category, mapping in (category_weights or {}).items()
    }
    if not categories:
        return np.zeros((0, len(names)), np.float32)
    return np.stack([rows.get(category, default_K) for category in categories])


def _normalised(mapping: Mapping[str, float], names: Sequence[str], where: str) -> np.ndarray:
    for name, weight in mapping.items():
        if name not in names:
            raise ValueError(f"{where} weighs {name!r}, which is no judge here: {', '.join(names)}")
        if not math.isfinite(weight) or weight < 0.0:
            raise ValueError(f"{where}[{name!r}] is {weight}; wanted a finite number, 0 or more")
    row_K = np.array([float(mapping.get(name, 0.0)) for name in names])
    if not row_K.sum() > 0.0:
        raise ValueError(f"{where} has no positive weight: {dict(mapping)!r}")
    return (row_K / row_K.sum()).astype(np.float32)


def without_missing(weights_BK: np.ndarray, status_BK: np.ndarray, group: int) -> np.ndarray:
    """The weights with those of rewards that a whole group lacks shared out among its others.

    There is nothing to judge in such a group (no face, no text): its remaining rewards weigh as
    they do among themselves. A group that lacks them all keeps its weights, and is dropped.
    """
    lacks_MK = (status_BK == MISSING).reshape(-1, group, status_BK.shape[1]).all(1)
    kept_BK = np.where(np.repeat(lacks_MK, group, 0), np.float32(0.0), weights_BK)
    total_B1 = kept_BK.sum(1, keepdims=True)
    shared_BK = kept_BK * (weights_BK.sum(1, keepdims=True) / np.where(total_B1 > 0, total_B1, 1))
    changed = lacks_MK.any(1).repeat(group)[:, None] & (total_B1 > 0)
    return np.where(changed, shared_BK, weights_BK).astype(np.float32)
