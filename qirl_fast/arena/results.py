"""What the votes say: a share with its verdict, ratings by category, how far raters agree.

People and judges are never mixed: everything here is of people's votes, but for `judged`.

A prompt is decided by the first votes_per_prompt people who voted on the pair, averaged; it enters
the share when it has them all, in that order, as win_share.py asks. "Both bad" and a tie are half a
win each. A changed vote counts as changed, in its old place. Ratings and agreement use all votes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from qirl_fast.arena.store import CHOICES, Vote
from qirl_fast.arena.study import Study
from qirl_fast.evaluation.bradley_terry import Ratings, rate
from qirl_fast.evaluation.krippendorff import Alpha, alpha
from qirl_fast.evaluation.win_share import Share, win_share

ALL = "all"
OF_A = {"a": 1.0, "b": 0.0, "tie": 0.5, "bad": 0.5}


@dataclass(frozen=True)
class Verdict:
    """Is `model` preferred to `other`? share: of the decided prompts, at the level of the settings.
    strict: the same at a level at which all pairs of models together hold. counts: votes for the
    model, the other, tie, bad. waiting: prompts with some but too few votes. looked: votes of
    raters who had seen results. raters: people.
    """

    model: str
    other: str
    share: Share
    strict: Share
    counts: tuple[int, int, int, int]
    waiting: int
    looked: int
    raters: int


@dataclass(frozen=True)
class Judged:
    """A judge's votes: its own share, and how far it agrees with the majority of people, on both
    (alpha) and where both prefer a model (same of n).
    """

    judge: str
    share: Share
    alpha: Alpha
    same: int
    n: int


def pair_votes(votes: Sequence[Vote], model: str, other: str) -> dict[str, list[tuple[int, Vote]]]:
    """Votes on a pair by prompt, numbered in the order of casting."""
    found: dict[str, list[tuple[int, Vote]]] = {}
    for number, vote in enumerate(votes):
        if {vote.item.a, vote.item.b} == {model, other}:
            found.setdefault(vote.item.prompt, []).append((number, vote))
    return found


def outcome(vote: Vote, model: str) -> float:
    """1 where the vote is for the model, 0 for the other, 1/2 for neither."""
    of_a = OF_A[vote.choice]
    return of_a if vote.item.a == model else 1 - of_a


def outcomes(votes: Sequence[Vote], model: str, other: str, needed: int) -> list[float]:
    """One a decided prompt, in the order in which they were decided."""
    decided = []
    for some in pair_votes(votes, model, other).values():
        if len(some) >= needed:
            first = some[:needed]
            decided.append((first[-1][0], np.mean([outcome(vote, model) for _, vote in first])))
    return [float(y) for _, y in sorted(decided)]


def verdict(
    study: Study, votes: Sequence[Vote], model: str, other: str, needed: int, level: float
) -> Verdict:
    """Of people's votes."""
    ys = outcomes(votes, model, other, needed)
    of_pair = pair_votes(votes, model, other)
    flat = [vote for some in of_pair.values() for _, vote in some]
    counts = Counter(
        vote.choice
        if vote.choice in ("tie", "bad")
        else ("model" if outcome(vote, model) == 1 else "other")
        for vote in flat
    )
    pairs = len(study.models) * (len(study.models) - 1) // 2
    return Verdict(
        model,
        other,
        win_share(ys, level),
        win_share(ys, 1 - (1 - level) / pairs),
        (counts["model"], counts["other"], counts["tie"], counts["bad"]),
        len(of_pair) - len(ys),
        sum(vote.looked for vote in flat),
        len({vote.rater for vote in flat}),
    )


def ratings(
    study: Study, votes: Sequence[Vote], level: float, n_boot: int, seed: int = 0
) -> dict[str, Ratings]:
    """Ratings on all prompts and, where there is more than one category, on each of them."""
    place = {model: m for m, model in enumerate(study.models)}
    wins: dict[str, np.ndarray] = {}
    for a, b in combinations(study.models, 2):
        for prompt, some in pair_votes(votes, a, b).items():
            own = wins.setdefault(prompt, np.zeros((len(place), len(place))))
            share = float(np.mean([outcome(vote, a) for _, vote in some]))
            own[place[a], place[b]], own[place[b], place[a]] = share, 1 - share
    groups: dict[str, list[np.ndarray]] = {ALL: []}
    names = sorted({p.category for p in study.prompts.values()})
    groups |= {name: [] for name in names if len(names) > 1}
    for prompt in sorted(wins):
        known = study.prompts.get(prompt)
        groups[ALL].append(wins[prompt])
        if known is not None and known.category in groups:
            groups[known.category].append(wins[prompt])
    return {
        name: rate(np.array(own), n_boot=n_boot, seed=seed, level=level)
        for name, own in groups.items()
        if own
    }


def agreement(votes: Sequence[Vote], level: float, n_boot: int) -> Alpha:
    """How far people agree, in the four labels a, b, tie, bad."""
    table: dict[tuple[str, str, str], list[float]] = {}
    for vote in votes:
        key = (vote.item.prompt, vote.item.a, vote.item.b)
        table.setdefault(key, [0.0] * len(CHOICES))[CHOICES.index(vote.choice)] += 1
    return _alpha(table, level, n_boot)


def judged(
    people: Sequence[Vote],
    judges: Sequence[Vote],
    model: str,
    other: str,
    level: float,
    n_boot: int,
) -> list[Judged]:
    """Each judge on a pair of models, beside people."""
    of_people = {p: majority(some) for p, some in pair_votes(people, model, other).items()}
    found = []
    for judge in sorted({vote.rater for vote in judges}):
        own = [vote for vote in judges if vote.rater == judge]
        said = {p: some[0][1].choice for p, some in pair_votes(own, model, other).items()}
        both = {p: (of_people[p], said[p]) for p in said if of_people.get(p) is not None}
        table = {
            (p, model, other): [float((c == x) + (c == y)) for c in CHOICES]
            for p, (x, y) in both.items()
        }
        decided = [pair for pair in both.values() if {*pair} <= {"a", "b"}]
        found.append(
            Judged(
                judge,
                win_share(outcomes(own, model, other, 1), level),
                _alpha(table, level, n_boot),
                sum(x == y for x, y in decided),
                len(decided),
            )
        )
    return found


def majority(some: Sequence[tuple[int, Vote]]) -> str | None:
    """The label that most gave; None where two have as many."""
    ranked = Counter(vote.choice for _, vote in some).most_common(2)
    return None if len(ranked) > 1 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def _alpha(table: dict[tuple[str, str, str], list[float]], level: float, n_boot: int) -> Alpha:
    keys = sorted(table)
    counts = np.array([table[key] for key in keys]).reshape(len(keys), len(CHOICES))
    return alpha(counts, [key[0] for key in keys], n_boot=n_boot, level=level)
