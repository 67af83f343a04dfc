"""What several runs have in common, and in which respects they are not comparable.

Held-out prompts are matched by id, the k-th of equal ids with the k-th; judges by name, and those
whose settings differ are different judges. Everything outside the common part is named in
`remarks` and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qirl_fast.evaluation.paired import PairedResult, paired_bootstrap
from qirl_fast.reporting.run import Floats, Held, Run

NAMES_ONLY = ("run", "output", "resume")  # settings in which runs always differ
SHOWN = 8  # differing things named before "and N more"


@dataclass(frozen=True)
class Common:
    """Of runs with these labels: judges all have, and the rows of the prompts that all drew.

    prompts: for each run the numbers of its held-out prompts, as many for every run and in the same
    order; empty where there are none in common.
    """

    runs: list[Run]
    labels: list[str]
    judges: list[str]
    prompts: list[list[int]]
    remarks: list[str]


def common(runs: Sequence[Run]) -> Common:
    """The common part of two runs or more."""
    labels = labelled(runs)
    remarks = [
        f"{label}: {note}" for label, run in zip(labels, runs, strict=True) for note in run.notes
    ]
    judges, told = _judges(runs, labels)
    remarks += told
    prompts, told = _prompts(runs, labels)
    remarks += told + _circumstances(runs, labels)
    return Common(list(runs), labels, judges, prompts, remarks)


def labelled(runs: Sequence[Run]) -> list[str]:
    """The runs' names, with their folder or number where two are equal."""
    names = [run.name for run in runs]
    folders = [str(run.folder) for run in runs]
    return [
        name if names.count(name) == 1
        else f"{name} ({folder})" if folders.count(folder) == 1
        else f"{name} ({folder}, {i + 1})"
        for i, (name, folder) in enumerate(zip(names, folders, strict=True))
    ]  # fmt: skip


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, but for names of the run; empty sections stay."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, child in value.items():
                walk(child, f"{key}.{name}" if key else str(name))
        else:
            found[key] = value

    walk({k: v for k, v in settings.items() if k not in NAMES_ONLY}, "")
    return found


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings in which the runs differ: a value for each, "absent" where one has no such key."""
    every = [flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for one in every for key in one)
    rows = {key: [one.get(key, "absent") for one in every] for key in keys}
    return {k: v for k, v in rows.items() if any(repr(x) != repr(v[0]) for x in v)}


def scores(run: Run, held: Held, numbers: Sequence[int], judge: str) -> Floats:
    """A judge's scores of some prompts [n]; NaN without any."""
    found = held.scores.get(judge)
    return np.full(len(numbers), np.nan) if found is None else found[list(numbers)]


def against_first(both: Common, judge: str, which: int) -> PairedResult | None:
    """After training: run number `which` (as after) against the first (as before), on the common
    prompts that this judge could judge in both; None with fewer than two.
    """
    first, other = both.runs[0], both.runs[which]
    if first.after is None or other.after is None or not both.prompts[0]:
        return None
    old = scores(first, first.after, both.prompts[0], judge)
    new = scores(other, other.after, both.prompts[which], judge)
    known = np.isfinite(old) & np.isfinite(new)
    return paired_bootstrap(old[known], new[known]) if known.sum() >= 2 else None


def _judges(runs: Sequence[Run], labels: Sequence[str]) -> tuple[list[str], list[str]]:
    told, every = [], list(dict.fromkeys(name for run in runs for name in run.judges))
    shared = []
    lonely: dict[str, list[str]] = {}
    for name in every:
        having = [label for label, run in zip(labels, runs, strict=True) if name in run.judges]
        if len(having) < len(runs):
            lonely.setdefault(_listed(having), []).append(name)
            continue
        kinds = {repr((run.settings.get("judges") or {}).get(name)) for run in runs}
        if len(kinds) > 1:
            told.append(
                f"Judge {name} has other settings in some runs, so its scores are left out."
            )
        else:
            shared.append(name)
    for where, names in lonely.items():
        told.append(f"Judges only in {where}: {_listed(names)}; left out.")
    if every and not shared:
        told.append("The runs have no judge in common: no scores are compared.")
    return shared, told


def _prompts(runs: Sequence[Run], labels: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """Numbers of the common prompts in each run, in the order of the first."""
    none: list[list[int]] = [[] for _ in runs]
    without = [label for label, run in zip(labels, runs, strict=True) if run.after is None]
    if without:
        return none, [
            f"{_listed(without)}: no held-out pictures of after training, so held-out scores and "
            "pictures are not compared."
        ]
    keyed = [_numbered(run.after.ids) for run in runs if run.after is not None]
    shared = [key for key in keyed[0] if all(key in other for other in keyed[1:])]
    sizes = [len(one) for one in keyed]
    if all(size == len(shared) for size in sizes):
        return [[one[key] for key in shared] for one in keyed], []
    counts = ", ".join(f"{label} {size}" for label, size in zip(labels, sizes, strict=True))
    if not shared:
        return none, [
            f"The runs have no held-out prompt in common ({counts}): held-out scores and pictures "
            "are not compared."
        ]
    told = f"Held-out prompts differ ({counts}): compared on the {len(shared)} in common."
    return [[one[key] for key in shared] for one in keyed], [told]


def _numbered(ids: Sequence[str]) -> dict[tuple[str, int], int]:
    """(id, how often it came before) -> its number."""
    seen: dict[str, int] = {}
    found = {}
    for number, each in enumerate(ids):
        found[each, seen.get(each, 0)] = number
        seen[each] = seen.get(each, 0) + 1
    return found


def _circumstances(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """Ways in which runs were made that make their numbers differ for other reasons."""
    told = []
    for what, keys, means in (
        ("Resolutions", ("rollout.height", "rollout.width", "data.buckets"),
         "scores are of pictures of different sizes"),
        ("Settings of held-out sampling", ("evaluation.steps", "evaluation.guidance",
         "evaluation.seed", "evaluation.samples_per_prompt"),
         "pairs do not share their noise or their steps"),
        ("Base models", ("model.path",), "the runs did not start from the same weights"),
        ("Training prompts", ("data.train",), "means over rollouts are of different prompts"),
        ("Judges' weights", ("rewards", "category_weights", "tiers", "edit"),
         "the reward is not the same quantity, and is left out of the curves"),
    ):  # fmt: skip
        found = [_part(flat(run.settings), keys) for run in runs]
        if any(value != found[0] for value in found):
            each = [f"{label} {value}" for label, value in zip(labels, found, strict=True)]
            told.append(f"{what} differ ({_listed(each, '; ')}): {means}.")
    return told


def same_reward(runs: Sequence[Run]) -> bool:
    """Whether `reward` is the same mean of the same judges in all runs."""
    keys = ("rewards", "category_weights", "tiers", "edit", "judges")
    return len({_part(flat(run.settings), keys) for run in runs}) == 1


def _part(settings: dict[str, Any], keys: Sequence[str]) -> str:
    """The settings under these keys, in short."""
    found = {
        k: v
        for k, v in settings.items()
        if any(k == key or k.startswith(f"{key}.") for key in keys)
    }
    return ", ".join(
        f"{k.split('.', 1)[-1]}={v}" for k, v in found.items() if v not in (None, {}, [])
    )


def _listed(names: Sequence[str], between: str = ", ") -> str:
    shown = between.join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
