"""The score of an edit: following the instruction, and a middle one for leaving the rest alone.

With i in [0, 1] how far the instruction was followed, p in [0, 1] how well the rest was kept,

    s(i, p) = p (middle + (1 - middle) i)

- followed and kept: 1. Followed, all else destroyed: 0. Nothing kept: 0, whatever else.
- faithful but failed (i = 0, p = 1, an unchanged picture among them): `middle`, not 0.

The product i p, which is middle = 0, is 0 for nearly every sample of a model that seldom succeeds:
its groups are flat and teach nothing. At middle = 1 only keeping counts, and doing nothing is
perfect. Between them s rises in both: ds/dp = middle + (1 - middle) i > 0 also where every attempt
fails, ds/di = (1 - middle) p. An attempt beats doing nothing where

    i > middle (1 - p) / ((1 - middle) p)

with 0.3: where it costs a tenth of the rest (p = 0.9), from i = 0.05 on. So small a middle does not
pay for doing nothing, and 0.5 asks for 0.11 already.

It is a rule on columns of scores, as tiers are (`tiers.py`): the instruction judge's column becomes
s in that judge's own units, lowest + (highest - lowest) s; the other column stays, so that both
are weighed, logged and seen apart. Any judge in 0..1 may be `preservation`: `preservation`, `face`.

Shapes: B images, K judges.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from qirl_fast.rewards.judge import FAILED, SCORED
from qirl_fast.section import Level, Section, Text

TOLERANCE = 1e-3  # of a judge's range: what rounding may put a score beside it


class EditRule(Section):
    """What an edit scores, of two judges among the optimised ones."""

    instruction: Text = Field(description="name of the judge of the instruction; it gets the score")
    preservation: Text = Field(description="name of the judge, 0..1, of what should stay")
    lowest: float = Field(default=1.0, description="the instruction judge's worst score")
    highest: float = Field(default=5.0, description="the instruction judge's best score")
    middle: Level = Field(
        default=0.3, description="of 0..1, for an edit that failed but left the rest alone"
    )


def edit_score(instruction: np.ndarray, preservation: np.ndarray, middle: float) -> np.ndarray:
    """s of arrays in [0, 1], in [0, 1]; ValueError for a number outside."""
    for name, x in (("instruction", instruction), ("preservation", preservation)):
        bad = ~((np.asarray(x) >= 0) & (np.asarray(x) <= 1))
        if bad.any():
            raise ValueError(f"{name} is {np.asarray(x)[bad].flat[0]}; wanted numbers in 0..1")
    if not 0 <= middle <= 1:
        raise ValueError(f"middle is {middle}; wanted a number in 0..1")
    return preservation * (middle + (1.0 - middle) * instruction)


def check_rule(rule: EditRule, names: Sequence[str]) -> None:
    """ValueError where the rule names no judge among `names`, one twice, or an empty range."""
    for name in (rule.instruction, rule.preservation):
        if name not in names:
            raise ValueError(f"judge {name!r} is not among {', '.join(map(repr, names))}")
    if rule.instruction == rule.preservation:
        raise ValueError(f"{rule.instruction!r} is both judges; name two")
    if not rule.lowest < rule.highest:
        raise ValueError(f"lowest {rule.lowest} is not below highest {rule.highest}")


def edit_columns(
    values_BK: np.ndarray, status_BK: np.ndarray, names: Sequence[str], rule: EditRule | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and states (`judge.py`) with the instruction judge's column as the rule has it.

    Where preservation failed, so has that column. Where it is missing there is nothing to keep, in
    a whole group at once, and the instruction's score stands. ValueError for a rule that
    `check_rule` refuses and for a score outside its judge's range.
    """
    values_BK, status_BK = values_BK.copy(), status_BK.copy()
    if rule is None:
        return values_BK, status_BK
    check_rule(rule, names)
    k, p = list(names).index(rule.instruction), list(names).index(rule.preservation)
    failed = (status_BK[:, k] == SCORED) & (status_BK[:, p] == FAILED)
    both = (status_BK[:, k] == SCORED) & (status_BK[:, p] == SCORED)
    status_BK[failed, k] = FAILED
    span = rule.highest - rule.lowest
    followed = _within(names[k], (values_BK[both, k] - rule.lowest) / span, rule)
    kept = _within(names[p], values_BK[both, p], None)
    values_BK[both, k] = rule.lowest + span * edit_score(followed, kept, rule.middle)
    return values_BK, status_BK


def _within(name: str, shares: np.ndarray, rule: EditRule | None) -> np.ndarray:
    """Shares of a range in [0, 1], rounding mended."""
    bad = ~((shares >= -TOLERANCE) & (shares <= 1 + TOLERANCE))
    if bad.any():
        low, high = (rule.lowest, rule.highest) if rule else (0.0, 1.0)
        raise ValueError(
            f"judge {name!r} scored {low + (high - low) * shares[bad][0]:g}; the edit rule wants "
            f"{low:g}..{high:g}" + (": set lowest and highest to its range" if rule else "")
        )
    return shares.clip(0.0, 1.0)
