"""Engine of `scorer.Scorer` on a server that speaks OpenAI's chat completions (vLLM, SGLang).

Every reasoning is one POST of /chat/completions with the images as PNG data URLs and, where
candidates are wanted, `logprobs` with `top_logprobs`. Two forms of request:
- reasonings >= 1: the model writes freely; the answer is read at the first token after "Score: ";
  sampled ones carry `temperature` and the row's `seed` (which tokens a seed gives is the server's
  business: the same server and seed give the same reasoning, the engine in this process another);
- no reasoning, or one that did not come to "Score: " within max_new_tokens (it is closed, and
  counted) or wrote something else than one space after the colon: the assistant's turn is begun
  for the model, up to "Score: ", and continued by one token (`continue_final_message`, which vLLM
  and SGLang have and OpenAI's own server does not).
Log-probabilities are taken as the model's own, before temperature: vLLM's default.

A request that fails (no connection, time-out, status 408, 429 or 5xx, an answer that is no JSON of
the right shape or longer than `max_body`) is made again, up to `retries` times within
`deadline_s` of the first, after a random wait of up to 0.5, 1, 2, ... seconds. Then its row has
failed with the last reason. Other statuses fail at once: asking again would not help.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qirl_fast.rewards.vlm.rubric import CLOSE, CONTROL, LEAD, MARK
from qirl_fast.rewards.vlm.scorer import Answer, Ask

AGAIN = (408, 429)
BAD_SHAPE = (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError)
FIRST_WAIT_S = 0.5
ENDING = 8  # tokens after "Score:" for the space, the digit and the end


class Refused(RuntimeError):
    """The server's answer will not change by asking again."""


class Unusable(RuntimeError):
    """The server's answer cannot be used; another try may be better."""


@dataclass(frozen=True)
class Server:
    """url: up to and with /v1. timeout_s: of one request; deadline_s: of one row's request with
    all its tries. max_body: bytes of one answer.
    """

    url: str
    model: str
    api_key: str | None
    timeout_s: float
    deadline_s: float
    retries: int
    concurrency: int
    top_logprobs: int
    max_body: int


class ChatEngine:
    """See the module. temperature, max_new_tokens: of one reasoning."""

    def __init__(self, server: Server, temperature: float, max_new_tokens: int) -> None:
        self.server, self.temperature, self.max_new_tokens = server, temperature, max_new_tokens
        self.requests = 0

    def ask(self, asks: Sequence[Ask]) -> list[list[Answer] | str]:
        """One entry an ask: its answers, or why there are none. Never raises for the server."""
        return asyncio.run(self._all(asks))

    async def _all(self, asks: Sequence[Ask]) -> list[list[Answer] | str]:
        import httpx

        server = self.server
        headers = {"Accept-Encoding": "identity"}
        if server.api_key:
            headers["Authorization"] = f"Bearer {server.api_key}"
        limits = httpx.Limits(max_connections=server.concurrency)
        timeout = httpx.Timeout(server.timeout_s, pool=None)
        # trust_env off: a judge's images go to the address in the settings, through no proxy.
        async with httpx.AsyncClient(
            headers=headers, limits=limits, timeout=timeout, trust_env=False
        ) as client:
            turns = asyncio.Semaphore(server.concurrency)
            return await asyncio.gather(*(self._row(client, turns, ask) for ask in asks))

    async def _row(self, client: Any, turns: asyncio.Semaphore, ask: Ask) -> list[Answer] | str:
        urls = await asyncio.gather(*(asyncio.to_thread(_data_url, im) for im in ask.images))
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in urls
        ]
        content.append({"type": "text", "text": ask.text})
        user = {"role": "user", "content": content}
        post = _Poster(self, client, turns)
        tasks = [self._reasoning(post, user, ask, j) for j in range(max(1, ask.reasonings))]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for result in found:
            if isinstance(result, Refused | Unusable):
                return str(result)
            if isinstance(result, BaseException):
                raise result
        return [answer for answer in found if isinstance(answer, Answer)]

    async def _reasoning(self, post: _Poster, user: Any, ask: Ask, number: int) -> Answer:
        if not ask.reasonings:
            return await self._continued(post, user, ask, "", False)
        ending = ENDING if ask.candidates else 0
        more = {"temperature": 0.0, "max_tokens": self.max_new_tokens + ending}
        if ask.seeds:
            more |= {"temperature": self.temperature, "seed": ask.seeds[number]}
        written = await post([user], more, bool(ask.candidates))
        if not ask.candidates:
            return Answer(written.text)
        start, end = written.marked(self.max_new_tokens)
        if start is None:
            kept = written.reasoning(self.max_new_tokens)
            return await self._continued(post, user, ask, kept + CLOSE, True)
        reasoning = "".join(token for token, _ in written.tokens[:start])
        if end is None:
            lead = reasoning[: reasoning.rindex(MARK)] + LEAD
            return await self._continued(post, user, ask, lead, False)
        return self._answer(ask, reasoning, written.tokens[end][1], False)

    async def _continued(
        self, post: _Poster, user: Any, ask: Ask, begun: str, closed: bool
    ) -> Answer:
        begun = begun or ask.lead
        talk = [user, {"role": "assistant", "content": begun}] if begun else [user]
        more: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1}
        if begun:
            more |= {"continue_final_message": True, "add_generation_prompt": False}
        written = await post(talk, more, True)
        return self._answer(ask, begun, written.tokens[0][1], closed)

    def _answer(self, ask: Ask, text: str, likely: dict[str, float], closed: bool) -> Answer:
        """A list that holds all candidates is complete as far as the reading goes."""
        complete = all(token in likely for token in ask.candidates)
        # A sampled token is listed beside the likely ones even if it is far less likely.
        ranked = sorted(likely.values(), reverse=True)[: self.server.top_logprobs]
        return Answer(text, likely, None if complete or not ranked else ranked[-1], closed)


@dataclass(frozen=True)
class Written:
    """A completion. tokens: (text, its likely tokens: text -> log-probability), one a token."""

    text: str
    tokens: list[tuple[str, dict[str, float]]]

    def reasoning(self, most: int) -> str:
        """The text of the first `most` tokens, without the control token that ended it."""
        texts = [token for token, _ in self.tokens[:most]]
        ends = [i for i, token in enumerate(texts) if CONTROL.fullmatch(token)]
        return "".join(texts[: ends[0]] if ends else texts)

    def marked(self, most: int) -> tuple[int | None, int | None]:
        """(tokens up to and with "Score:", index of the token right after "Score: ").

        The first is None where "Score:" does not come within `most` tokens, the second where
        anything else than one space and then a token follows.
        """
        text = ""
        for index, (token, _) in enumerate(self.tokens[:most]):
            text += token
            if MARK not in text:
                continue
            after = index + 1
            if text.endswith(MARK) and after < len(self.tokens) and self.tokens[after][0] == " ":
                after += 1
                text += " "
            usable = text.endswith(LEAD) and after < len(self.tokens)
            return index + 1, after if usable else None
        return None, None


class _Poster:
    """Posts one request with its tries, in turn with all others."""

    def __init__(self, engine: ChatEngine, client: Any, turns: asyncio.Semaphore) -> None:
        self.engine, self.client, self.turns = engine, client, turns

    async def __call__(self, talk: list[Any], more: dict[str, Any], logprobs: bool) -> Written:
        server = self.engine.server
        body = {"model": server.model, "messages": talk, **more}
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": server.top_logprobs}
        async with self.turns:
            until = time.monotonic() + server.deadline_s
            for number in range(server.retries + 1):
                try:
                    self.engine.requests += 1
                    limit = min(server.timeout_s, until - time.monotonic())
                    async with asyncio.timeout(limit):
                        return _parsed(await self._fetch(body), logprobs)
                except TimeoutError:
                    reason = f"no answer within {limit:.3g} s"
                except Unusable as error:
                    reason = str(error)
                wait = random.uniform(0.0, FIRST_WAIT_S * 2**number)
                if number == server.retries or time.monotonic() + wait >= until:
                    break
                await asyncio.sleep(wait)
        tries = f"{number + 1} {'try' if number == 0 else 'tries'}"
        raise Unusable(f"{server.url}: {reason}; {tries} within {server.deadline_s:g} s")

    async def _fetch(self, body: dict[str, Any]) -> bytes:
        import httpx

        server = self.engine.server
        try:
            address = f"{server.url}/chat/completions"
            async with self.client.stream("POST", address, json=body) as response:
                data = await _bounded(response, server.max_body)
        except httpx.TimeoutException as error:
            raise TimeoutError from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise Unusable(f"no usable answer ({type(error).__name__}: {error})") from error
        status = response.status_code
        if status == 200:
            return data
        said = f"status {status}: {data[:200].decode('utf-8', 'replace')!r}"
        if status in AGAIN or status >= 500:
            raise Unusable(said)
        raise Refused(f"{server.url}: {said}")


async def _bounded(response: Any, most: int) -> bytes:
    """The body, read no further than `most` bytes and never decompressed."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Unusable(f"the answer is encoded as {encoding!r}; plain was asked for")
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > most:
            raise Unusable(f"the answer is longer than max_body {most} bytes")
    return bytes(data)


def _parsed(data: bytes, logprobs: bool) -> Written:
    """The completion in a response. Unusable for any other shape."""
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"]
        listed = choice["logprobs"]["content"] if logprobs else []
        tokens = [
            (_checked(entry["token"]), {_checked(t["token"]): float(t["logprob"]) for t in top})
            for entry in listed
            for top in [entry["top_logprobs"]]
        ]
    except BAD_SHAPE as error:
        head = data[:80].decode("utf-8", "replace")
        hint = ""
        if logprobs and b'"logprobs"' not in data:
            hint = "; a server without log-probabilities serves reading: integer alone"
        raise Unusable(f"not a completion ({error!r}): {head!r}{hint}") from error
    if not logprobs and not isinstance(text, str):
        raise Unusable(f"the completion's content is {text!r}; wanted text")
    if logprobs and not tokens:
        raise Unusable("the completion has no tokens with log-probabilities")
    return Written(text if isinstance(text, str) else "", tokens)


def _checked(token: Any) -> str:
    if not isinstance(token, str):
        raise TypeError(f"token {token!r} is no text")
    return token


def _data_url(image: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
