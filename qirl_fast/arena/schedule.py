"""What a rater is asked next, and on which side each model stands.

Next: of the questions that this rater has not had, one of those with the fewest people's votes;
equal ones by a generator seeded with the study's seed, the rater and the place, so in an order that
depends on no vote's content. Sides: a coin for each rater and question, from the same seed; the
store records how it fell.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence

from qirl_fast.arena.store import Shown, Store
from qirl_fast.arena.study import Item


def next_item(
    items: Sequence[Item],
    counts: Counter[Item],
    had: Sequence[Shown],
    seed: int,
    rater: str,
    usable: Callable[[Item], bool] = lambda item: True,
) -> Item | None:
    """The rater's next question; None where they had all. counts: people's votes by question."""
    known = {shown.item for shown in had}
    left = [item for item in items if item not in known]
    generator = random.Random(f"{seed}|{len(had)}|{rater}")
    generator.shuffle(left)
    left.sort(key=counts.__getitem__)
    return next((item for item in left if usable(item)), None)


def side(seed: int, rater: str, item: Item) -> str:
    """Which model stands left: 'a' or 'b'."""
    text = "\0".join((str(seed), rater, item.prompt, item.a, item.b))
    return "ab"[hashlib.sha256(text.encode()).digest()[0] & 1]


def question(
    store: Store,
    items: Sequence[Item],
    seed: int,
    rater: str,
    place: int | None,
    usable: Callable[[Item], bool],
) -> Shown | None:
    """The rater's question number `place`; without one, or where it cannot be had, their first
    that has no vote, or a new one. None: they have answered all.
    """
    had, compared = store.shown(rater), set(items)
    asked = [shown for shown in had if shown.place == place]
    asked += [shown for shown in had if shown.choice is None and shown.item in compared]
    for shown in asked:
        if usable(shown.item):
            return shown
    counts = Counter(vote.item for vote in store.votes())
    item = next_item(items, counts, had, seed, rater, usable)
    return None if item is None else store.show(rater, item, side(seed, rater, item))
