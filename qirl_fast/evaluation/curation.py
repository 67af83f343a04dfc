"""Which prompts are worth training on: curation by the range of rewards inside a group.

n samples of the base model a prompt, K rewards. With std_k the standard deviation of reward k over
all samples of all prompts, in float64,

    r_i = sum_k w_k R_k,i                reward of sample i, w of the prompt's category, sum w = 1
    S_i = sum_k w_k R_k,i / std_k        in standard deviations; a constant reward (std 0) adds 0
    range = max_i S_i - min_i S_i

A group advantage is made of differences inside the group, so a prompt of no range teaches nothing.
Each prompt gets one verdict, the first that holds:

    failed     a reward of non-zero weight lacks a sample's score: neither kept nor dropped
    all fail   max_i r_i < drop_failed
    all pass   min_i r_i > drop_passed
    narrow     range <= threshold
    kept       the rest

threshold is a number, or the quantile of the ranges of all prompts that did not fail. As it is 0 or
more, a group of equal rewards is never kept. (Qwen-Image-2.0-RL, arXiv 2606.27608, curates by this
range; scaling by std_k and the verdicts about whole groups are this project's.)

Shapes: P prompts, n samples, K rewards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KEPT, NARROW, ALL_FAIL, ALL_PASS, FAILED = "kept", "narrow", "all fail", "all pass", "failed"
VERDICTS = (KEPT, NARROW, ALL_FAIL, ALL_PASS, FAILED)
KEY = "curation"  # what is added to a row


@dataclass(frozen=True)
class Rules:
    """threshold or quantile, exactly one; the bounds of whole groups, None: off."""

    threshold: float | None
    quantile: float | None
    drop_failed: float | None = None
    drop_passed: float | None = None


@dataclass(frozen=True)
class Decision:
    """Of each prompt: verdict, range [P] and reward r [P, n], NaN where it failed.

    std: of each reward over all its scores [K]. threshold: the number that was applied.
    """

    verdicts: list[str]
    range: np.ndarray
    reward: np.ndarray
    std: np.ndarray
    threshold: float


def decide(scores_PnK: np.ndarray, weights_PK: np.ndarray, rules: Rules) -> Decision:
    """The verdict on each prompt.

    scores_PnK: float64, NaN where there is none. weights_PK: each row sums to 1; 0 for a judge that
    has nothing to judge in a prompt (`rewards.composite.without_missing`).
    ValueError where no prompt has all its scores, as there is nothing to decide by.
    """
    std_K = global_std(scores_PnK)
    needed_P1K = (weights_PK != 0)[:, None]
    complete_P = ~(np.isnan(scores_PnK) & needed_P1K).any(axis=(1, 2))
    if not complete_P.any():
        raise ValueError("not one prompt has all its scores, so there is nothing to choose by")
    used_PnK = np.where(needed_P1K, scores_PnK, 0.0)
    reward_Pn = (used_PnK * weights_PK[:, None]).sum(-1)
    scale_K = np.divide(1.0, std_K, out=np.zeros_like(std_K), where=std_K > 0)
    composite_Pn = (used_PnK * (weights_PK[:, None] * scale_K)).sum(-1)
    range_P = composite_Pn.max(1) - composite_Pn.min(1)
    if rules.threshold is None:
        assert rules.quantile is not None
        threshold = float(np.quantile(range_P[complete_P], rules.quantile))
    else:
        threshold = rules.threshold
    verdicts = np.where(range_P > threshold, KEPT, NARROW)
    if rules.drop_passed is not None:
        verdicts = np.where(reward_Pn.min(1) > rules.drop_passed, ALL_PASS, verdicts)
    if rules.drop_failed is not None:
        verdicts = np.where(reward_Pn.max(1) < rules.drop_failed, ALL_FAIL, verdicts)
    verdicts = np.where(complete_P, verdicts, FAILED)
    return Decision(verdicts.tolist(), range_P, reward_Pn, std_K, threshold)


def global_std(scores_PnK: np.ndarray) -> np.ndarray:
    """Standard deviation [K] of each reward over all its scores; 0 where it has none."""
    flat_NK = scores_PnK.reshape(-1, scores_PnK.shape[-1])
    return np.array([spread(column[~np.isnan(column)]) for column in flat_NK.T])


def spread(values: np.ndarray) -> float:
    """Standard deviation; exactly 0 of equal numbers and of none."""
    return float((values - values[0]).std()) if len(values) else 0.0


def statistics(
    decision: Decision, scores_PnK: np.ndarray, names: Sequence[str], prompt: int
) -> dict[str, Any]:
    """What a row of a curated file says about its prompt, plain JSON, None where there is nothing.

    max, min and mean are those of the reward r, range that of S; mean and std by judge (ddof 0).
    """
    r_n, own_nK = decision.reward[prompt], scores_PnK[prompt]
    whole = decision.verdicts[prompt] != FAILED
    judges = {}
    for k, name in enumerate(names):
        scored = own_nK[~np.isnan(own_nK[:, k]), k]
        judges[name] = {
            "mean": float(scored.mean()) if len(scored) else None,
            "std": spread(scored) if len(scored) else None,
            "scored": len(scored),
        }
    return {
        "reason": decision.verdicts[prompt],
        "range": float(decision.range[prompt]) if whole else None,
        "max": float(r_n.max()) if whole else None,
        "min": float(r_n.min()) if whole else None,
        "mean": float(r_n.mean()) if whole else None,
        "n": len(r_n),
        "judges": judges,
    }


def source_rows(path: Path) -> list[str]:
    """The rows of a prompt file that `load_prompts` has read, as they are written, as JSON."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = [line.removesuffix(b"\r").decode("utf-8") for line in lines]
    rows = rows if rows[-1] else rows[:-1]
    if path.suffix == ".jsonl":
        return rows
    return [json.dumps({"prompt": row.strip()}, ensure_ascii=False) for row in rows]


def annotated(row: str, curation: dict[str, Any]) -> str:
    """The JSON object `row` with the key "curation" added at its end, the rest byte for byte.

    A row that has that key already, from an earlier curation, is written anew without it first.
    """
    kept = json.loads(row)
    if KEY in kept:
        del kept[KEY]
        row = json.dumps(kept, ensure_ascii=False)
    added = json.dumps({KEY: curation}, ensure_ascii=False, allow_nan=False)
    return f"{row.rstrip()[:-1].rstrip()}, {added[1:]}"
