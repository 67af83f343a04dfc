"""What the page asks for, without the page: a rater's question as HTML, a vote, the results.

The browser sends one JSON object: {"rater", "place"?, "item"?, "choice"?}. It names the question it
shows in its vote, so a click that comes late, or twice, is never a vote on the next question.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import json
import threading
from typing import Any

from qirl_fast.arena.pictures import Pictures
from qirl_fast.arena.report import as_html, report
from qirl_fast.arena.schedule import question
from qirl_fast.arena.store import Shown, Store, StoreError
from qirl_fast.arena.study import Item, Study
from qirl_fast.config.arena import ArenaConfig

SIDES = ("left", "right", "tie", "bad")
WORDS = {"left": "left is better", "right": "right is better", "tie": "a tie", "bad": "both bad"}
NOT_LOADED = "waiting"  # the browser's word for a vote before it had the pictures
PIXELATED_BELOW = 256


class Desk:
    """One study's raters."""

    def __init__(self, cfg: ArenaConfig, study: Study, store: Store) -> None:
        self.cfg, self.study, self.store = cfg, study, store
        self.pictures = Pictures(study, store.secret)
        self.items = {self._token(item): item for item in study.items}
        self._lock = threading.Lock()
        self._report: tuple[tuple[object, ...], str] = ((), "")

    def _token(self, item: Item) -> str:
        text = "\0".join(("item", item.prompt, item.a, item.b))
        return hmac.new(self.store.secret, text.encode(), hashlib.sha256).hexdigest()[:32]

    def show(self, wire: str) -> str:
        """The rater's question `place`, or the next that is open."""
        try:
            came = _read(wire)
            rater = self.store.rater(came["rater"]) if came.get("rater") else ""
            return self._question(rater, came.get("place"), "") if rater else _greeting()
        except StoreError as error:
            return _greeting(str(error))

    def vote(self, wire: str) -> str:
        """Keep a vote and show the next question."""
        try:
            came = _read(wire)
            rater = self.store.rater(came.get("rater", ""))
            item, choice = self.items.get(came.get("item", "")), came.get("choice", "")
            shown = next((s for s in self.store.shown(rater) if s.item == item), None)
            if item is None or shown is None:
                return self._question(rater, None, "")
            if choice == NOT_LOADED:
                return self._question(rater, shown.place, "The pictures had not loaded; no vote.")
            if choice not in SIDES:
                raise StoreError(f"got the vote {choice!r}; wanted one of {', '.join(SIDES)}")
            if not self.pictures.usable(item):
                return self._question(rater, None, "A picture is gone; no vote was kept.")
            found = self.store.cast(rater, item, label(choice, shown.left))
        except StoreError as error:
            return _greeting(str(error))
        if found == "too fast":
            return self._question(rater, shown.place, "That was too fast; no vote was kept.")
        said = {"new": "", "same": "", "changed": "Your vote was changed."}
        return self._question(rater, None, said[found])

    def results(self, wire: str, model: str, other: str) -> str:
        """The results, noting who looked; without a rater's JSON nobody is noted."""
        if wire:
            try:
                self.store.look(str(_read(wire).get("rater") or "")[:40])
            except StoreError as error:
                return _message(str(error))
        if model == other or not {model, other} <= set(self.study.models):
            return _message("Choose two different models.")
        key = (self.store.stamp(), model, other)
        with self._lock:
            if self._report[0] != key:
                parts = report(self.cfg, self.study, self.store, model, other)
                self._report = (key, as_html(parts))
            return self._report[1]

    def _question(self, rater: str, place: int | None, said: str) -> str:
        items = list(self.items.values())
        usable = self.pictures.usable
        shown = question(self.store, items, self.cfg.seed, rater, place, usable)
        answered = sum(one.choice is not None for one in self.store.shown(rater))
        if shown is None:
            return (
                f"<div id='arena-pair' data-rater='{html.escape(rater)}' data-place=''>"
                f"<p class='done'>Thank you, {html.escape(rater)}: all {answered} questions are "
                "answered. Go back to change a vote.</p></div>"
            )
        return self._html(shown, rater, answered, said)

    def _html(self, shown: Shown, rater: str, answered: int, said: str) -> str:
        prompt = self.study.prompts[shown.item.prompt]
        sides = (shown.item.a, shown.item.b)
        left, right = sides if shown.left == "a" else sides[::-1]
        name, height, width = self.pictures.name, *prompt.size
        small = " class='small'" if max(height, width) < PIXELATED_BELOW else ""
        two = "".join(
            f"<figure><img src='picture/{name(prompt.id, model)}' alt='{side} picture'{small}>"
            f"<figcaption>{side}</figcaption></figure>"
            for side, model in (("left", left), ("right", right))
        )
        source = (
            f"<figure class='source'><img src='picture/{name(prompt.id, None)}' "
            f"alt='picture to be edited'{small}><figcaption>to be edited</figcaption></figure>"
            if prompt.source is not None
            else ""
        )
        if shown.choice is not None:
            vote = WORDS[side_of(shown.choice, shown.left)]
            said = f"You voted: {vote}. Another vote changes it. {said}"
        ask = "Which edit is better?" if source else "Which picture fits the text better?"
        return (
            f"<div id='arena-pair' data-rater='{html.escape(rater)}' data-place='{shown.place}' "
            f"data-item='{self._token(shown.item)}' data-vote='{shown.choice is not None}'>"
            f"<p class='where'>{html.escape(rater)}, question {shown.place}; "
            f"{answered} of {len(self.items)} answered</p>"
            f"<p class='prompt'>{html.escape(prompt.prompt)}</p>"
            f"<div class='pictures{' edit' if source else ''}'>{source}{two}</div>"
            f"<p class='ask'>{ask}</p><p class='said'>{html.escape(said)}</p></div>"
        )


def label(side: str, left: str) -> str:
    """What a vote for a side means, given which model stands left."""
    if side in ("tie", "bad"):
        return side
    return left if side == "left" else "ba"["ab".index(left)]


def side_of(choice: str, left: str) -> str:
    """Inverse of `label`."""
    if choice in ("tie", "bad"):
        return choice
    return "left" if choice == left else "right"


def _read(wire: str) -> dict[str, Any]:
    """The browser's object; StoreError where it is none."""
    kinds = {"rater": str, "item": str, "choice": str, "place": int}
    try:
        came = json.loads(wire)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError("the page sent something unreadable; reload it") from error
    if not isinstance(came, dict) or any(
        not isinstance(value, kinds.get(key, type(None)))
        for key, value in came.items()
        if value is not None
    ):
        raise StoreError("the page sent something unreadable; reload it")
    if abs(came.get("place") or 0) > 1 << 31:
        raise StoreError("the page asked for a question that cannot be; reload it")
    return came


def _greeting(said: str = "") -> str:
    return (
        "<div id='arena-hello'><p>Type your name above and press Enter. You will see two pictures "
        f"at a time, not whose they are.</p><p class='said'>{html.escape(said)}</p></div>"
    )


def _message(text: str) -> str:
    return f"<p class='said'>{html.escape(text)}</p>"
