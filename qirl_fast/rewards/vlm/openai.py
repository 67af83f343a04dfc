"""`kind: openai`: a vision-language model behind an OpenAI-compatible server scores each row.

The same judge as `kind: vlm` (`scorer.py`), asked through `chat.py`; on the same model the same
number, as far as the server computes and lists the same log-probabilities.

The expected score is made of the five score tokens among `top_logprobs`, renormalised. A score
token that is not listed is left out, not taken as impossible: `score.py` bounds what it could
change, and where that is more than max_spread the row fails rather than be wrong.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from qirl_fast.rewards.vlm.chat import ChatEngine, Server
from qirl_fast.rewards.vlm.rubric import DimensionField, Reading, rubric
from qirl_fast.rewards.vlm.scorer import How, Scorer
from qirl_fast.section import Count, Natural, NonNegative, Positive, Section, Text

Url = Annotated[str, Field(pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$")]


class Settings(Section):
    """A vision-language model behind vLLM, SGLang or another OpenAI-compatible server."""

    kind: Literal["openai"] = Field(description="model behind an OpenAI-compatible server")
    url: Url = Field(description="base address, such as http://127.0.0.1:8000/v1")
    model: Text = Field(description="name the server knows the model by")
    dimension: DimensionField
    rubric: Text | None = Field(default=None, description="text of the question; null: built-in")
    reading: Reading = Field(
        default="expected",
        description="expected: mean of 1..5 by the score token's probabilities; yes_no: 1 + 4 "
        "P(yes) / (P(yes) + P(no)); integer: the score it writes (needs no logprobs)",
    )
    reasonings: Natural = Field(
        default=1,
        description="0: the score at once (needs continue_final_message: vLLM, SGLang); 1: one, "
        "greedy; more: sampled and averaged",
    )
    temperature: Positive = Field(default=1.0, description="of sampled reasonings")
    max_new_tokens: Count = Field(
        default=512, description="most tokens of a reasoning; then it is closed and scored"
    )
    top_logprobs: Annotated[int, Field(ge=1, le=100000)] = Field(
        default=20, description="likely tokens asked for; servers commonly allow 20"
    )
    max_spread: NonNegative = Field(
        default=0.25,
        description="a row fails where score tokens missing from the list could move its score by "
        "more than this, in points of the scale 1..5",
    )
    api_key_env: Text | None = Field(
        default=None, description="environment variable that holds the API key; null: none is sent"
    )
    timeout_s: Positive = Field(default=120.0, description="seconds for one request")
    deadline_s: Positive = Field(default=300.0, description="seconds for a request and its retries")
    retries: Natural = Field(default=3, description="further tries after a failed one")
    concurrency: Count = Field(default=32, description="requests under way at once")
    max_body: Count = Field(default=16 * 2**20, description="most bytes of one answer")


class OpenAi(Scorer):
    """The judge of these settings. ValueError for a bad url or an API key that is not set."""

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        try:
            assert urlsplit(settings.url).hostname, "the pattern of url asks for a host"
            urlsplit(settings.url).port  # noqa: B018 - raises for one above 65535
        except ValueError as error:
            raise ValueError(f"url {settings.url!r} is no address: {error}") from error
        key = None
        if settings.api_key_env is not None:
            key = os.environ.get(settings.api_key_env)
            if not key:
                raise ValueError(
                    f"the environment variable {settings.api_key_env} is not set; set it to the "
                    "server's API key, or leave api_key_env out"
                )
        server = Server(
            url=settings.url.rstrip("/"),
            model=settings.model,
            api_key=key,
            timeout_s=settings.timeout_s,
            deadline_s=settings.deadline_s,
            retries=settings.retries,
            concurrency=settings.concurrency,
            top_logprobs=settings.top_logprobs,
            max_body=settings.max_body,
        )
        text = settings.rubric or rubric(settings.dimension, settings.reading)
        how = How(
            settings.dimension, text, settings.reading, settings.reasonings, settings.max_spread
        )
        super().__init__(ChatEngine(server, settings.temperature, settings.max_new_tokens), how)
