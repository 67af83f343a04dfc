"""`kind: pairs`: a vision-language model says which of two pictures is the better one.

It votes in an arena (`python -m qirl_fast.arena judge`), which asks in both orders, as such models
favour a position; it gives no picture a score, and a recipe that trains on it is refused. The model
sees the condition images of an edit, then the two pictures, and answers

    {"better": "first" | "second" | "tie"}

read from the last JSON object it writes, so that it may think before. An answer that cannot be read
is asked for again, sampled, `tries` times in all; then the pair has no answer. The engines are
those of `scorer.py`: a server, or this process.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from qirl_fast.rewards.judge import Row, Scored
from qirl_fast.rewards.sources import condition_images, has_sources, picture
from qirl_fast.rewards.vlm import checklist
from qirl_fast.rewards.vlm.rubric import refuse_control
from qirl_fast.rewards.vlm.scorer import Ask
from qirl_fast.section import Count, Section

ANSWERS = {"first": 1.0, "second": 0.0, "tie": 0.5}
QUESTION = """\
{seen}two pictures, the first and the second, made from one and the same text. Text:
{prompt}

Which of the two is the better picture for this text? Look at whether all that the text asks for is
there and nothing else was changed, then at faults: broken shapes, smears, noise. Say "tie" if you
would not choose. End with one JSON object and nothing after it:
{{"better": "first"}} or {{"better": "second"}} or {{"better": "tie"}}"""
ONLY_PAIRS = "compares two pictures and scores none: name it as the judge of an arena alone"

log = logging.getLogger(__name__)


class Settings(Section):
    """A vision-language model that compares two pictures, for `python -m qirl_fast.arena judge`."""

    kind: Literal["pairs"] = Field(description="compares two pictures, in an arena alone")
    model: checklist.Settings = Field(description="where the model runs: kind openai or vlm")
    tries: Count = Field(default=3, description="answers asked for until one can be read")


class Judge:
    """The judge of these settings."""

    waits = True

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.engine = checklist.build_engine(settings.model, device)
        self.tries = settings.tries

    def check_row(self, row: Row) -> None:
        """ValueError for every row: no picture has a score."""
        raise ValueError(ONLY_PAIRS)

    def __call__(self, images_BHW3: np.ndarray, metadata: list[Row]) -> Scored:
        """ValueError: see `compare`."""
        raise ValueError(ONLY_PAIRS)

    def compare(
        self, first_BHW3: np.ndarray, second_BHW3: np.ndarray, metadata: Sequence[Row]
    ) -> np.ndarray:
        """float64 [B] of uint8 pictures [B, H, W, 3]: 1 the first is better, 0 the second, 1/2 a
        tie, NaN without an answer, whose reason is logged.
        """
        found, asks = np.full(len(metadata), np.nan), {}
        reasons: dict[int, str] = {}
        for i, pair in enumerate(zip(first_BHW3, second_BHW3, metadata, strict=True)):
            try:
                asks[i] = _asked(*pair)
            except ValueError as error:
                reasons[i] = str(error)
        for number in range(self.tries):
            seeds = (number,) if number else ()
            tried = [Ask(*asks[i], (), "", 1, seeds) for i in asks]
            answers = self.engine.ask(tried) if tried else []
            for i, got in zip(list(asks), answers, strict=True):
                if isinstance(got, str):  # the engine has tried by itself
                    reasons[i] = got
                    del asks[i]
                    continue
                tree = checklist.last_object(got[0].text) or {}
                value = ANSWERS.get(str(tree.get("better")).strip().lower())
                if value is None:
                    reasons[i] = f"the answer ends {got[0].text[-80:]!r}; {number + 1} asked for"
                else:
                    found[i] = value
                    del asks[i]
        for reason in dict.fromkeys(reasons[i] for i in sorted(reasons) if np.isnan(found[i])):
            log.warning("a pair was not judged: %s", reason)
        return found


def _asked(first: np.ndarray, second: np.ndarray, row: Row) -> tuple[tuple[np.ndarray, ...], str]:
    """Pictures and text of a question. ValueError for a row that cannot be asked about."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the row's prompt is {prompt!r}; wanted text")
    refuse_control(prompt, "the prompt")
    sources = condition_images(row) if has_sources(row) else []
    seen = "You see "
    if sources:
        many = "a source picture" if len(sources) == 1 else f"{len(sources)} source pictures"
        seen = f"You see {many}, which the text asks to be edited, then "
    pictures = (*sources, picture(first), picture(second))
    return pictures, QUESTION.format(seen=seen, prompt=prompt)
