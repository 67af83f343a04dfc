"""A judge votes on every question, as a rater of kind 'model', apart from people.

A judge of `rewards` scores each picture by itself: the higher score is its vote, scores within
judge_margin are its tie. A judge with `compare(first, second, rows) -> [B]` (how far it prefers the
first, 0..1, NaN: not said) is asked in both orders and their mean taken, as such judges favour a
position; where the orders contradict each other the mean is near 1/2, and within judge_margin of it
a tie.

What a judge cannot score is not voted on, and said. Votes that are there are not asked for again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from qirl_fast.arena.pictures import Pictures
from qirl_fast.arena.store import Store
from qirl_fast.arena.study import Item, Prompt, Study
from qirl_fast.config.arena import ArenaConfig
from qirl_fast.config.wording import ConfigError
from qirl_fast.rewards.judge import SOURCES, Sources
from qirl_fast.rewards.judges import Judges

BATCH = 16

log = logging.getLogger(__name__)


def judge_all(cfg: ArenaConfig, study: Study, store: Store) -> tuple[int, int]:
    """Let cfg.judge vote on what it has not: (votes cast, questions it could not judge)."""
    if cfg.judge is None:
        raise ConfigError(["judge: none is named; wanted judge=NAME"])
    rater = store.rater(f"judge {cfg.judge}"[:40], "model")
    had = {vote.item for vote in store.votes("model") if vote.rater == rater}
    pictures = Pictures(study, store.secret)
    items = [item for item in study.items if item not in had and pictures.usable(item)]
    try:
        judges = Judges([cfg.judge], cfg.judges, _device(cfg.device), 1)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError([f"judge {cfg.judge!r}: {error}"]) from error
    cast = 0
    try:
        # pictures of one size are judged together
        items.sort(key=lambda item: (study.prompts[item.prompt].size, item.prompt))
        for batch in _batches(items, study):
            differences = _asked(judges, cfg.judge, batch, study, pictures)
            for item, difference in zip(batch, differences, strict=True):
                if not np.isnan(difference):
                    store.cast(rater, item, _vote(float(difference), cfg.judge_margin))
                    cast += 1
            print(f"{cast} of {len(items)} voted", flush=True)
    finally:
        judges.close()
    return cast, len(items) - cast


def _vote(difference: float, margin: float) -> str:
    if abs(difference) <= margin:
        return "tie"
    return "a" if difference > 0 else "b"


def _batches(items: Sequence[Item], study: Study) -> list[list[Item]]:
    found: list[list[Item]] = []
    for item in items:
        size = study.prompts[item.prompt].size
        last = found[-1] if found else []
        if not last or len(last) >= BATCH or study.prompts[last[0].prompt].size != size:
            found.append([])
        found[-1].append(item)
    return found


def _asked(
    judges: Judges, name: str, batch: Sequence[Item], study: Study, pictures: Pictures
) -> np.ndarray:
    """How far each question's a is above its b, NaN where that cannot be said."""
    prompts = [study.prompts[item.prompt] for item in batch]
    rows = [_row(prompt, pictures) for prompt in prompts]
    of_a, of_b = (
        np.stack([pictures.array(pictures.name(item.prompt, model)) for item, model in some])
        for some in ([(i, i.a) for i in batch], [(i, i.b) for i in batch])
    )
    compare = getattr(judges.judges[name], "compare", None)
    if compare is not None:
        there = np.asarray(compare(of_a, of_b, rows), np.float64)
        back = np.asarray(compare(of_b, of_a, rows), np.float64)
        for found in (there, back):
            if found.shape != (len(batch),) or ((found < 0) | (found > 1)).any():
                raise ConfigError([f"judge {name!r}: compare gave {found!r}; wanted [B] in 0..1"])
        return (there - back) / 2
    said = judges.score(np.concatenate([of_a, of_b]), rows + rows)
    for (row, _), reason in list(said.reasons.items())[:1]:
        log.warning("judge %r cannot score %s: %s", name, batch[row % len(batch)].prompt, reason)
    scores = np.where(said.valid[:, 0], said.scores[:, 0].astype(np.float64), np.nan)
    difference: np.ndarray = scores[: len(batch)] - scores[len(batch) :]
    return difference


def _row(prompt: Prompt, pictures: Pictures) -> dict[str, object]:
    """What a judge is given of a prompt; the edited picture at the size of what was drawn."""
    row = dict(prompt.metadata)
    if prompt.source is not None:
        row[SOURCES] = Sources([pictures.source_for_judges(prompt)])
    return row


def _device(device: str) -> str:
    if device != "auto":
        return device
    import torch  # takes seconds, and only judges need it

    return "cuda" if torch.cuda.is_available() else "cpu"
