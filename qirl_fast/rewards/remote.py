"""A judge on another machine, over HTTP (`python -m qirl_fast.reward_server`; protocol in `wire`).

One call:

    cut the rows into requests of rows_per_request, each with an id of its own
    each request, at most `concurrency` in flight over all calls of this judge:
        until deadline_s has passed since the call began:
            POST it, for at most attempt_s
            200 and a sound answer: these rows are done
            401, 404, ... : these rows have failed; asking again would not mend it
            else: wait backoff_s 2^i, at most backoff_max_s, times a random number in [1/2, 1), or
                  as long as the server asks; again, with the same id
        these rows have failed, and the reason says what went wrong last

So a server may be restarted in the middle: scores are as if nothing had happened. No fault of the
server or the network raises; other rows keep their scores.
"""

import itertools
import json
import logging
import random
import threading
import uuid
from concurrent.futures import Future
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, field_validator

from qirl_fast.rewards import wire, wire_answer
from qirl_fast.rewards.judge import FAILED, Row, Scored
from qirl_fast.rewards.remote_http import Problem, Server
from qirl_fast.section import Count, Natural, Positive, Section, Text

if TYPE_CHECKING:
    import anyio
    from anyio.from_thread import BlockingPortal

HEALTH_S, HEALTH_BYTES = 5.0, 2**16

logger = logging.getLogger(__name__)


class Settings(Section):
    """A judge served by `python -m qirl_fast.reward_server`."""

    kind: Literal["remote"] = Field(description="a judge on another machine, over HTTP")
    url: Annotated[str, Field(pattern=r"^https?://[^/]")] = Field(
        description="address of the server, such as http://127.0.0.1:8765"
    )
    judge: Text = Field(description="name of the judge on the server")
    token_env: Text | None = Field(
        default=None, description="environment variable with the bearer token; null: none is sent"
    )
    ca_file: Text | None = Field(
        default=None, description="PEM file of who signed an https server; null: the public ones"
    )
    deadline_s: Positive = Field(default=600, description="seconds of one call, retries included")
    attempt_s: Positive = Field(
        default=120, description="seconds of one request; a judge that takes longer is asked again"
    )
    retries: Natural | None = Field(
        default=None, description="of one request; null: as many as the deadline allows"
    )
    backoff_s: Positive = Field(default=0.5, description="first wait before asking again, doubled")
    backoff_max_s: Positive = Field(default=10, description="longest wait before asking again")
    concurrency: Count = Field(default=4, description="requests in flight, over all calls")
    rows_per_request: Count = Field(default=16, description="images of one request")
    max_response_bytes: Count = Field(default=2**22, description="largest answer that is read")

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        parts = urlsplit(url)
        port = parts.port  # ValueError by itself where it is none
        if parts.username or parts.query or parts.fragment or not parts.hostname or port == 0:
            raise ValueError("wanted scheme, host, port and path alone; a token goes to token_env")
        return url.rstrip("/")


class Remote:
    """The judge of that name on that server; failed rows carry the reason. Threads may share it.

    ValueError where the token's variable is not set or ca_file cannot be read. The server need not
    be up yet.
    """

    waits = True  # not a computation of this machine: `Judges` gives it a thread of its own

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings = settings
        self._server = Server(settings.url, settings.token_env, settings.ca_file)
        self._random = random.Random()  # jitter must not draw from the run's own generators
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._portal: BlockingPortal | None = None
        self._running: set[Future[Any]] = set()
        self._turns: anyio.Semaphore
        self._down = False

    def __call__(self, images_BHW3: np.ndarray, metadata: list[Row]) -> Scored:
        """Scores of uint8 images [B, H, W, 3]; ValueError where these are no such images."""
        _check_images(images_BHW3, metadata)
        b = len(metadata)
        reasons: dict[int, str] = {}
        scored = Scored(np.zeros(b, np.float32), np.full(b, FAILED, np.int8), reasons)
        rows = []
        for i, row in enumerate(metadata):
            try:
                wire.check_row(row)
                rows.append(i)
            except wire.WireError as error:
                reasons[i] = str(error)

        async def part(which: list[int], end: float) -> None:
            ids = [str(i) for i in which]
            try:
                got = await self._part(ids, images_BHW3[which], [metadata[i] for i in which], end)
            except Problem as problem:
                text = f"reward server {self.settings.url}: {problem}"
                reasons.update(dict.fromkeys(which, text))
                return
            scored.values[which], scored.status[which] = got.values, got.status
            reasons.update({which[i]: reason for i, reason in got.reasons.items()})

        async def all_parts() -> None:
            import anyio

            end = anyio.current_time() + self.settings.deadline_s
            size = self.settings.rows_per_request
            async with anyio.create_task_group() as group:
                for start in range(0, len(rows), size):
                    group.start_soon(part, rows[start : start + size], end)

        if rows:
            self._run(all_parts)
        return scored

    def check_row(self, row: Row) -> None:
        """ValueError for metadata that cannot travel."""
        wire.check_row(row)

    @cached_property
    def warnings(self) -> list[str]:
        """What is wrong with the server, asked once: it may be mended before it is needed."""
        where = f"the reward server {self.settings.url}"
        try:
            text = self._run(self._server.exchange, "GET", "/health", HEALTH_S, HEALTH_BYTES)
            judges = json.loads(text)["judges"]
        except Problem as problem:
            return [
                f"{where} is not ready: {problem} (start it with `python -m "
                "qirl_fast.reward_server`; rows are asked again until deadline_s)"
            ]
        except (ValueError, KeyError, TypeError, RecursionError):
            return [f"{where} answers /health with {text[:200]!r}: it is no reward server"]
        if self.settings.judge in judges:
            return []
        return [f"{where} serves {judges}, not {self.settings.judge!r}"]

    def close(self) -> None:
        """End what is in flight and the connections; a later call opens new ones."""
        with self._lock:
            for future in tuple(self._running):  # calls that end leave it meanwhile
                future.cancel()
            self._open.close()
            self._portal = None

    def _run(self, function: Any, *arguments: Any) -> Any:
        """The result of a coroutine function in the event loop, on a thread of its own."""
        import anyio
        from anyio.from_thread import start_blocking_portal

        with self._lock:
            if self._portal is None:
                self._turns = anyio.Semaphore(self.settings.concurrency)
                self._portal = self._open.enter_context(start_blocking_portal(name="remote judge"))
                self._open.callback(self._portal.call, self._server.close)
            future = self._portal.start_task_soon(function, *arguments)
            self._running.add(future)
        try:
            return future.result()
        except BaseException:  # a person's Ctrl-C included: nothing is left running
            future.cancel()
            raise
        finally:
            self._running.discard(future)

    async def _part(
        self, ids: list[str], images: np.ndarray, rows: list[Row], end: float
    ) -> Scored:
        """One request, asked until `end`; Problem says why there are no scores."""
        import anyio

        request, deadline = uuid.uuid4().hex, f"not scored within {self.settings.deadline_s:g} s"
        last = f"it waited for its turn, {self.settings.concurrency} requests being in flight"
        try:
            with anyio.fail_after(end - anyio.current_time()):
                async with self._turns:
                    last = "it was being packed"
                    body = await anyio.to_thread.run_sync(
                        wire.encode, request, self.settings.judge, ids, list(images), rows
                    )
                    last = "the first attempt was under way"
                    for attempt in itertools.count():
                        try:
                            scored = await self._attempt(body, request, ids)
                        except Problem as problem:
                            last = f"{problem} (attempt {attempt + 1})"
                            wait = self._wait(problem, attempt)
                        else:
                            self._log(up=True)
                            return scored
                        if anyio.current_time() + wait >= end:
                            break
                        await anyio.sleep(wait)
        except wire.TooLarge as error:
            raise Problem(str(error), again=False) from error
        except TimeoutError:
            pass
        raise Problem(f"{deadline}: {last}", again=False)

    async def _attempt(self, body: bytes, request: str, ids: list[str]) -> Scored:
        cfg = self.settings
        answer = await self._server.exchange(
            "POST", "/score", cfg.attempt_s, cfg.max_response_bytes, body
        )
        try:
            return wire_answer.decode(answer, request, ids)
        except wire.WireError as error:
            raise Problem(str(error)) from error

    def _wait(self, problem: Problem, attempt: int) -> float:
        """Seconds until the next attempt; Problem where there is none."""
        cfg = self.settings
        if not problem.again:
            raise problem
        if cfg.retries is not None and attempt >= cfg.retries:
            raise Problem(f"{problem} (after {cfg.retries} retries, as allowed)", again=False)
        self._log(up=False, problem=problem)
        backoff_s = min(cfg.backoff_s * 2.0 ** min(attempt, 60), cfg.backoff_max_s)
        return max(backoff_s * (0.5 + 0.5 * self._random.random()), problem.wait_s)

    def _log(self, up: bool, problem: Problem | None = None) -> None:
        """Once when the server goes, once when it is back."""
        if self._down != up:
            return
        self._down = not up
        text = "answers again" if up else f"{problem}; asking again"
        logger.warning("reward server %s: %s", self.settings.url, text)


def _check_images(images: Any, metadata: list[Row]) -> None:
    shape: tuple[int, ...] = getattr(images, "shape", ())
    kind = getattr(images, "dtype", type(images).__name__)
    if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] != len(metadata):
        raise ValueError(
            f"got images {kind} {shape} and {len(metadata)} metadata rows; wanted uint8 "
            "[B, H, W, 3] and B rows"
        )
    if 0 in shape[1:]:
        raise ValueError(f"got images of {shape[1]} x {shape[2]} pixels; wanted at least 1 x 1")
