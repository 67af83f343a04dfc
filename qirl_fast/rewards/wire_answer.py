"""The answer of the protocol in `wire`, status 200:

    {"version": 1, "request": text, "results": [
        {"id": text, "status": "scored", "score": number}
        {"id": text, "status": "failed", "reason": text}
        {"id": text, "status": "missing"}]}

in any order, scores as float32. Any other status carries {"error": text}.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, Scored
from qirl_fast.rewards.wire import VERSION, Name, WireError, checked
from qirl_fast.section import Section

REASON_CHARACTERS = 1000
STATUS = {"scored": SCORED, "failed": FAILED, "missing": MISSING}
WORDS = {state: word for word, state in STATUS.items()}
FLOAT32_MAX = float(np.finfo(np.float32).max)

Float32 = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]


class _Result(Section):
    id: Name
    status: Literal["scored", "failed", "missing"]
    score: Float32 | None = None
    reason: Annotated[str, Field(min_length=1)] | None = None


class _Answer(Section):
    version: int
    request: str
    results: list[_Result]


def encode(request: str, ids: Sequence[str], scored: Scored) -> bytes:
    """The body of an answer; values of scored rows must be finite."""
    results: list[dict[str, Any]] = []
    for i, name in enumerate(ids):
        result: dict[str, Any] = {"id": name, "status": WORDS[int(scored.status[i])]}
        if scored.status[i] == SCORED:
            result["score"] = float(scored.values[i])
        if scored.status[i] == FAILED:
            result["reason"] = str(scored.reasons.get(i) or "no reason given")[:REASON_CHARACTERS]
        results.append(result)
    answer = {"version": VERSION, "request": request, "results": results}
    return json.dumps(answer, allow_nan=False).encode()


def decode(body: bytes, request: str, ids: Sequence[str]) -> Scored:
    """The scores of the rows `ids`, in their order: of an answer to `request`.

    A row without a result, or with several, has failed. WireError for an answer that is malformed,
    to another request, or about a row that was not asked for: none of it can be trusted.
    """
    answer = checked(_Answer, body, "answer")
    if answer.request != request:
        raise WireError(f"the answer is to request {answer.request!r}; wanted {request!r}")
    found: dict[str, list[_Result]] = {name: [] for name in ids}
    for result in answer.results:
        if result.id not in found:
            raise WireError(f"the answer has a result for row {result.id!r}, which was not sent")
        found[result.id].append(result)
    values, status = np.zeros(len(ids), np.float32), np.full(len(ids), FAILED, np.int8)
    reasons: dict[int, str] = {}
    for i, name in enumerate(ids):
        state, value, reason = _state(found[name])
        status[i] = state
        values[i] = value
        if reason:
            reasons[i] = reason
    return Scored(values, status, reasons)


def _state(results: Sequence[_Result]) -> tuple[int, float, str]:
    """(state, score, reason) of the results that came for one row."""
    if len(results) != 1:
        came = f"{len(results)} results" if results else "no result"
        return FAILED, 0.0, f"the server's answer has {came} for this row; wanted one"
    result = results[0]
    if (result.status == "scored") != (result.score is not None):
        return FAILED, 0.0, f"the server's answer says {result.status!r} and score {result.score}"
    reason = (result.reason or "no reason given") if result.status == "failed" else ""
    value = 0.0 if result.score is None else result.score
    return STATUS[result.status], value, reason[:REASON_CHARACTERS]
