"""What a run should be warned of, by rules that are stated here and in docs/report.md.

Each check says "warning", "clear" or "not checked", with a sentence of numbers. A trend compares
the last quarter of the updates with the first, of TREND updates or more: a mean has risen or
fallen where it lies more than Z standard errors of the difference away (updates taken as
independent).

Shapes: n values, one an update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qirl_fast.evaluation.paired import PairedResult, paired_bootstrap
from qirl_fast.reporting.run import Floats, Run

TREND = 20  # updates, below which there is no trend to speak of
Z = 3.0
COLLAPSE = 0.5  # share of the first quarter's diversity
GRID_RISE, GRID_PICTURES = 1.5, 32  # factor; held-out prompts looked at
CLIPPED = 0.9
FAILED, MISSING = 0.05, 0.5  # shares of verdicts
ROUNDING = 0.01  # a ratio's error that several steps scored in one forward may have


@dataclass(frozen=True)
class Check:
    """What one rule found."""

    name: str
    state: Literal["warning", "clear", "not checked"]
    text: str


def checks(run: Run) -> list[Check]:
    """All rules' findings, warnings first."""
    rules: tuple[Callable[[Run], Check], ...] = (
        monitors, diversity, grid_artefacts, exact_ratio, clipping, verdicts,
    )  # fmt: skip
    found = [rule(run) for rule in rules]
    return sorted(found, key=lambda c: ("warning", "not checked", "clear").index(c.state))


def quarters(values: Floats) -> tuple[Floats, Floats] | None:
    """The first and the last quarter of the finite values; None of under TREND."""
    known = values[np.isfinite(values)]
    n = len(known) // 4
    return (known[:n], known[-n:]) if len(known) >= TREND else None


def trend(values: Floats) -> float | None:
    """Last quarter's mean less the first's in standard errors; None without enough values."""
    parts = quarters(values)
    if parts is None:
        return None
    first, last = parts
    error = float(np.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last)))
    change = float(last.mean() - first.mean())
    return change / error if error else float(np.sign(change)) * np.inf if change else 0.0


def paired(run: Run, judge: str) -> PairedResult | None:
    """Held-out scores before and after; None without two pairs that the judge could judge."""
    if run.before is None or run.after is None or run.before.ids != run.after.ids:
        return None
    if judge not in run.before.scores or judge not in run.after.scores:
        return None
    before, after = run.before.scores[judge], run.after.scores[judge]
    both = np.isfinite(before) & np.isfinite(after)
    return paired_bootstrap(before[both], after[both]) if both.sum() >= 2 else None


def changes(run: Run) -> dict[str, dict[str, float]]:
    """By judge {"before", "after", "diff", "low", "high", "n"} as in summary.json."""
    found: dict[str, dict[str, float]] = {}
    for name in run.judges:
        r = paired(run, name)
        if r is not None:
            found[name] = {"before": r.before, "after": r.after, "diff": r.diff}
            found[name] |= {"low": r.low, "high": r.high, "n": r.n}
    return found or dict(run.summary.get("judges") or {})


def monitors(run: Run) -> Check:
    """Reward up, a judge down: held out, where the 95 % interval of an optimised judge's change
    lies above 0 and that of another judge's below; in rollouts, where `reward` has risen and a
    judge has fallen.
    """
    name = "reward rises, a judge falls"
    held = changes(run)
    up = [n for n, r in held.items() if n in run.weights and r["low"] > 0]
    down = [n for n, r in held.items() if r["high"] < 0]
    found = []
    if up and down:
        fall = ", ".join(f"{n} {held[n]['diff']:+.3f}" for n in down)
        rise = ", ".join(f"{n} {held[n]['diff']:+.3f}" for n in up)
        found.append(f"On held-out prompts {rise}, but {fall}.")
    rising = trend(run.column("reward"))
    if rising is not None and rising > Z:
        falls = {n: trend(run.column(f"reward/{n}")) for n in run.judges}
        falling = [n for n, z in falls.items() if z is not None and z < -Z]
        if falling:
            found.append(
                f"In rollouts the reward rose ({rising:+.1f} standard errors), but "
                + ", ".join(f"{n} fell ({falls[n]:+.1f})" for n in falling)
                + "."
            )
    if found:
        mend = "Look whether the pictures got better; the reward may be gamed."
        return Check(name, "warning", " ".join([*found, mend]))
    if len(run.judges) < 2:
        return Check(name, "not checked", "There is no second judge: name one under watch.")
    if not held and rising is None:
        return Check(name, "not checked", f"No held-out results, and under {TREND} updates.")
    return Check(name, "clear", "No judge falls while the reward rises.")


def diversity(run: Run) -> Check:
    """Images of one prompt alike: the mean `diversity` of the last quarter of the updates is below
    COLLAPSE times that of the first.
    """
    name, parts = "diversity collapse", quarters(run.column("diversity"))
    if parts is None:
        return Check(name, "not checked", f"Under {TREND} updates have a diversity.")
    first, last = (float(part.mean()) for part in parts)
    text = (
        f"Images of one prompt lie {first:.1f} apart in the first quarter, {last:.1f} in the last"
    )
    if last < COLLAPSE * first:
        return Check(name, "warning", f"{text} (Delta E): less than {COLLAPSE:.0%} of it is left.")
    return Check(name, "clear", f"{text} (Delta E).")


def grid_artefacts(run: Run) -> Check:
    """A grid in the pictures: `evaluation.gridness` of the first GRID_PICTURES held-out prompts
    has grown by a factor whose geometric mean is at least GRID_RISE, its 95 % interval above 1.
    """
    name = "grid artefacts"
    if run.before is None or run.after is None or run.before.ids != run.after.ids:
        return Check(name, "not checked", "There are no held-out pictures of before and after.")
    logs = np.log([held.gridness(GRID_PICTURES) for held in (run.before, run.after)]).T
    logs = logs[np.isfinite(logs).all(1)]
    if len(logs) < 2:
        return Check(name, "not checked", "The pictures are under 32 pixels, or fewer than two.")
    r = paired_bootstrap(logs[:, 0], logs[:, 1])
    factor, low, high = (float(np.exp(v)) for v in (r.diff, r.low, r.high))
    text = (
        f"Steps at every 16th pixel, against steps elsewhere: x{factor:.2f} from before to after "
        f"(x{low:.2f} to x{high:.2f}, {r.n} prompts)."
    )
    fired = factor >= GRID_RISE and low > 1
    return Check(name, "warning" if fired else "clear", text)


def exact_ratio(run: Run) -> Check:
    """Before the first optimizer step of a rollout the ratio is exactly 1: any
    `pre_update_ratio_error` but 0 is wrong; over ROUNDING where train.replay_steps is above 1, or
    memory did not suffice for whole chunks.
    """
    name, errors = "ratio before an update", run.column("pre_update_ratio_error")
    known = errors[np.isfinite(errors)]
    if not len(known):
        return Check(name, "not checked", "This algorithm has no ratio.")
    several = int((run.settings.get("train") or {}).get("replay_steps") or 1) > 1
    in_parts = np.isfinite(run.column("backoff_rows"))
    wrong = int((errors > np.where(in_parts | several, ROUNDING, 0)).sum())
    several = several or bool(in_parts.any())
    if wrong:
        return Check(
            name,
            "warning",
            f"Off 1 in {wrong} of {len(known)} updates, by up to {known.max():.2g}: rollout and "
            "replay computed different velocities from the same weights.",
        )
    text = f"Off 1 by at most {known.max():.2g}." if several else "Exactly 1 in every update."
    return Check(name, "clear", text)


def clipping(run: Run) -> Check:
    """Nearly all of the loss is clipped: mean `clip_fraction` of the last tenth of the updates (one
    at least) is CLIPPED or more.
    """
    name, values = "clip fraction", run.column("clip_fraction")
    known = values[np.isfinite(values)]
    if not len(known):
        return Check(name, "not checked", "This algorithm clips nothing.")
    last = float(known[-max(1, len(known) // 10) :].mean())
    text = f"{last:.1%} of the ratios were clipped in the last tenth of the updates."
    if last >= CLIPPED:
        text += " Hardly anything is learned from the rest: lower train.lr, or widen the clip."
    return Check(name, "warning" if last >= CLIPPED else "clear", text)


def verdicts(run: Run) -> Check:
    """A judge is silent: over the run it failed on a share of FAILED or more of the images, or had
    nothing to judge in MISSING or more.
    """
    name, found, seen = "missing verdicts", [], False
    for judge in run.judges:
        for what, limit in (("failed", FAILED), ("missing", MISSING)):
            values = run.column(f"{what}/{judge}")
            known = values[np.isfinite(values)]
            seen = seen or bool(len(known))
            if len(known) and known.mean() >= limit:
                said = "failed on" if what == "failed" else "had nothing to judge in"
                found.append(f"{judge} {said} {known.mean():.1%} of the images")
    if found:
        return Check(name, "warning", "; ".join(found) + ".")
    if not seen:
        return Check(name, "not checked", "No update tells of a judge.")
    text = (
        f"No judge failed on {FAILED:.0%} of the images, or had nothing to judge in {MISSING:.0%}."
    )
    return Check(name, "clear", text)
