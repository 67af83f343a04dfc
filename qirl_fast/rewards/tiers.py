"""Tiers: a failure in a higher tier caps what the lower ones may score.

Qwen-Image-2.0-RL orders its T2I judges alignment > aesthetics > portrait fidelity: a beautiful
picture of the wrong thing is still wrong. With tiers 1..T from the highest to the lowest, x_bt the
scores and failed_bs = valid_bs and x_bs < fails_below_s,

    y_bt = min(x_bt, min over s < t with failed_bs of cap_s[judge_t])

Failing is decided on the scores that came, never on capped ones, so the order of capping does not
matter. A tier whose score is invalid (failed to be judged, or missing) caps nothing; an invalid
score is given back as it came. A lower judge that a cap does not name keeps its score.

Shapes: B images, T tiers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from qirl_fast.section import Section, Text


class Tier(Section):
    """One judge's place in the order. Thresholds and caps are in the units of the judges named."""

    judge: Text = Field(description="name of the judge whose failure counts")
    fails_below: float = Field(description="a score below this is a failure")
    cap: Mapping[str, float] = Field(
        default_factory=dict, description="the most each lower judge may score after a failure"
    )


def check_tiers(tiers: Sequence[Tier]) -> None:
    """ValueError, naming the tier, where a judge comes twice or a cap names no lower judge."""
    names = [tier.judge for tier in tiers]
    for t, tier in enumerate(tiers):
        if tier.judge in names[:t]:
            raise ValueError(f"tier {t + 1}: {tier.judge!r} is a tier already; name a judge once")
        for name in tier.cap:
            if name not in names[t + 1 :]:
                below = ", ".join(map(repr, names[t + 1 :])) or "none"
                raise ValueError(
                    f"tier {tier.judge!r} caps {name!r}, which is no lower tier (below it: "
                    f"{below}); list the tiers from the highest to the lowest"
                )


def cap(values_BT: np.ndarray, valid_BT: np.ndarray, tiers: Sequence[Tier]) -> np.ndarray:
    """Capped scores [B, T] in the dtype of `values_BT`, column t being the judge of `tiers[t]`.

    `valid_BT` is bool [B, T]. ValueError for other shapes or dtypes, a valid score that is not
    finite, and tiers that `check_tiers` refuses.
    """
    check_tiers(tiers)
    wanted = (len(values_BT), len(tiers))
    if values_BT.shape != wanted or valid_BT.shape != wanted or valid_BT.dtype != np.bool_:
        raise ValueError(
            f"values {values_BT.shape}, valid {valid_BT.dtype} {valid_BT.shape}; wanted numbers "
            f"and booleans of {wanted}, a column for each tier"
        )
    if not np.isfinite(values_BT[valid_BT]).all():
        b, t = np.argwhere(valid_BT & ~np.isfinite(values_BT))[0].tolist()
        raise ValueError(f"row {b}: {tiers[t].judge!r} scored {values_BT[b, t]}; wanted a number")
    column = {tier.judge: t for t, tier in enumerate(tiers)}
    capped_BT = values_BT.copy()
    for s, tier in enumerate(tiers):
        failed_B = valid_BT[:, s] & (values_BT[:, s] < tier.fails_below)
        for name, most in tier.cap.items():
            t = column[name]
            held_B = failed_B & valid_BT[:, t]
            capped_BT[held_B, t] = np.minimum(capped_BT[held_B, t], most)
    return capped_BT


def cap_columns(
    values_BK: np.ndarray, valid_BK: np.ndarray, names: Sequence[str], tiers: Sequence[Tier]
) -> np.ndarray:
    """`cap` on those columns [B, K] of judges `names` that are tiers; the others as they came."""
    capped_BK = values_BK.copy()
    if tiers:
        columns = [list(names).index(tier.judge) for tier in tiers]
        capped_BK[:, columns] = cap(values_BK[:, columns], valid_BK[:, columns], tiers)
    return capped_BK
