"""From what a model says at the answer token to a score in [1, 5].

With l_s the log-probability of the token s over the whole vocabulary:
    expected   sum_s s p_s,  p_s = exp(l_s) / sum_{s' in 1..5} exp(l_s')
    yes_no     1 + 4 P(yes) / (P(yes) + P(no)), each summed over its spellings
    integer    the number after the last "Score:", or of a JSON object's "score"
all in float64. `outside` is the probability of every other token: near 1, the model was about to
say something else, and its score means little.

A server lists only its most likely tokens. A candidate that is not listed has a probability
between 0 and that of the least likely one listed (and no more than is left over). It is left out
of the sum, and `spread` says by how much the score could lie elsewhere: the width of the interval
that those bounds allow. Of yes and no only a word without any listed spelling counts as missing.
Nothing listed at all is no score.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from qirl_fast.rewards.vlm.rubric import SCALE

YES = ("Yes", "yes", "YES")
NO = ("No", "no", "NO")
CANDIDATES = {"expected": SCALE, "yes_no": (*YES, *NO), "integer": ()}

_SCORE = re.compile(r"Score\s*:\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class Unreadable(ValueError):
    """An answer without a score; the message is the reason the row failed with."""


@dataclass(frozen=True)
class Reading:
    """One number read: value in [1, 5]; outside, the probability of all other tokens in [0, 1];
    spread >= 0, how far missing candidates could move the value; p: of 1..5, () for other readings.
    """

    value: float
    outside: float = 0.0
    spread: float = 0.0
    p: tuple[float, ...] = ()


def read_tokens(reading: str, logprobs: Mapping[str, float], least: float | None) -> Reading:
    """Read natural log-probabilities of candidate tokens at the answer position.

    logprobs: token -> log-probability, of any tokens; those of CANDIDATES[reading] are read.
    least: log-probability of the least likely listed token where the list is cut short, None where
    all candidates are in it. Raises Unreadable for none of them, or NaN.
    """
    wanted = CANDIDATES[reading]
    mass = {token: _probability(token, logprobs[token]) for token in wanted if token in logprobs}
    inside = math.fsum(mass.values())
    if not inside > 0.0:
        likely = sorted(logprobs, key=lambda token: -logprobs[token])[:3]
        raise Unreadable(
            f"none of {', '.join(wanted)} is among the likely tokens at the answer (there: "
            f"{', '.join(map(repr, likely))}); the model was not trained to answer so, or the list "
            "is too short (top_logprobs)"
        )
    outside = min(1.0, max(0.0, 1.0 - inside))
    worth = _worth(reading)
    value = math.fsum(p * worth[token] for token, p in mass.items()) / inside
    missing = _missing(reading, mass)
    bound = 0.0 if least is None else min(math.exp(least), outside)
    low, high = (_bound(mass, missing, worth, bound, outside, sign) for sign in (1.0, -1.0))
    p = tuple(mass.get(token, 0.0) / inside for token in wanted) if reading == "expected" else ()
    return Reading(min(5.0, max(1.0, value)), outside, max(0.0, high - low), p)


def _missing(reading: str, mass: Mapping[str, float]) -> list[str]:
    """The candidates that are not listed; of a word, one where none of its spellings is."""
    if reading == "expected":
        return [token for token in SCALE if token not in mass]
    return [word[0] for word in (YES, NO) if not mass.keys() & set(word)]


def _probability(token: str, logprob: float) -> float:
    if math.isnan(logprob) or logprob > 1e-3:
        raise Unreadable(f"the log-probability of {token!r} is {logprob}; wanted 0 or less")
    return math.exp(logprob)


def _worth(reading: str) -> dict[str, float]:
    if reading == "expected":
        return {token: float(token) for token in SCALE}
    return {**dict.fromkeys(YES, 5.0), **dict.fromkeys(NO, 1.0)}


def _bound(
    mass: Mapping[str, float],
    missing: list[str],
    worth: Mapping[str, float],
    most: float,
    room: float,
    sign: float,
) -> float:
    """The lowest (sign 1) or highest (-1) value with missing tokens at up to `most`, `room` in all.

    Greedy is exact: the mean is pulled furthest by the tokens furthest from it, taken in full.
    """
    total = math.fsum(mass.values())
    weighted = math.fsum(p * worth[token] for token, p in mass.items())
    for token in sorted(missing, key=lambda token: sign * worth[token]):
        if sign * (worth[token] - weighted / total) >= 0.0:
            break
        share = min(most, room)
        total, weighted, room = total + share, weighted + share * worth[token], room - share
    return weighted / total


def read_text(text: str) -> Reading:
    """The number of an answer: a JSON object with "score" if there is one, else after "Score:".

    Of several the last one counts, as models revise themselves. Raises Unreadable where there is
    none, or it is outside 1..5.
    """
    found = _json_scores(text) or [float(match) for match in _SCORE.findall(text)]
    if not found:
        tail = text[-80:]
        raise Unreadable(f"no 'Score: N' and no JSON score in the answer, which ends {tail!r}")
    if not 1.0 <= found[-1] <= 5.0:
        raise Unreadable(f"the answer's score is {found[-1]:g}; wanted 1 to 5")
    return Reading(found[-1])


def _json_scores(text: str) -> list[float]:
    found = []
    for part in re.findall(r"\{[^{}]*\}", text):
        try:
            value = json.loads(part).get("score")
        except ValueError:
            continue  # braces in prose are no JSON
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append(float(value))
    return found
