"""The HTTP side of the reward server: who may ask, how much, and what is counted.

POST /score    a question of `rewards.wire`; 200 with its answer, else {"error": text}:
               400 malformed, 401 no or another token, 404 judge not served, 408 too slow in coming,
               413 over a limit, 415 packed, 503 with Retry-After when full
GET /health    200 as long as it serves; the judges' names where the caller may ask them
GET /metrics   Prometheus' text format

A request is refused as early as it can be: its token before its body, its body's size while it
comes, its images' sizes before they are unpacked.
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qirl_fast import __version__
from qirl_fast.reward_metrics import Metrics
from qirl_fast.rewards.served import Answer, Served, read
from qirl_fast.rewards.wire import VERSION, Limits, TooLarge, WireError

if TYPE_CHECKING:
    import uvicorn

RETRY_AFTER_S = 1
CONNECTIONS = 512  # beside those with a request

logger = logging.getLogger(__name__)


class Refused(Exception):
    """A request that gets no scores: status, what came and what is wanted."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class App:
    """judges: by the name they are served under. requests: held at once; body_s: to come in."""

    def __init__(
        self,
        judges: Mapping[str, Served],
        token: str | None,
        limits: Limits,
        requests: int,
        body_s: float,
    ) -> None:
        self.judges, self.limits = judges, limits
        self._token, self._most, self._body_s = token, requests, body_s
        self._held = 0
        self.metrics = Metrics(list(judges))

    def starlette(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/score", self._guarded(self.score), methods=["POST"]),
                Route("/health", self._guarded(self.health)),
                Route("/metrics", self._guarded(self.show_metrics)),
            ],
            exception_handlers={HTTPException: _no_such_route},
        )

    async def health(self, request: Request) -> Response:
        """Whether it serves; a probe without a token does not learn what."""
        found: dict[str, object] = {"status": "ok", "protocol": VERSION, "version": __version__}
        if self._token is None or "Authorization" in request.headers:
            self._authorise(request)
            found["judges"] = list(self.judges)
        return JSONResponse(found)

    async def show_metrics(self, request: Request) -> Response:
        """What was counted since the start."""
        self._authorise(request)
        return Response(self.metrics.text(self._held), media_type="text/plain; version=0.0.4")

    async def score(self, request: Request) -> Response:
        """Scores of a question's rows."""
        self._authorise(request)
        with self._place():
            body = await self._body(request)
            try:
                key, question = await asyncio.to_thread(read, body, self.limits)
            except TooLarge as error:
                raise Refused(413, str(error)) from error
            except WireError as error:
                raise Refused(400, str(error)) from error
            name = question.judge
            if name not in self.judges:
                served = ", ".join(self.judges)
                raise Refused(404, f"judge {name!r} is not served here; served are {served}")
            future, new = self.judges[name].ask(key, question)
            if new:
                answer = await self._wait(asyncio.wrap_future(future))
                self.metrics.judged(name, answer)
        if not new:  # nothing of it is held: it waits for the first one's answer
            self.metrics.repeated(name)
            answer = await self._wait(asyncio.wrap_future(future))
        return Response(answer.body, media_type="application/json")

    async def _wait(self, answer: "asyncio.Future[Answer]") -> Answer:
        try:
            return await asyncio.shield(answer)
        except WireError as error:
            raise Refused(400, str(error)) from error

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places for requests that are held."""
        if self._held >= self._most:
            raise Refused(503, f"{self._held} requests are held already; ask again later")
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def _authorise(self, request: Request) -> None:
        if self._token is None:
            return
        came = request.headers.get("Authorization", "").encode("latin-1")
        if not hmac.compare_digest(came, f"Bearer {self._token}".encode()):
            what = "another bearer token than the server's" if came else "no bearer token"
            raise Refused(401, f"{what} came; wanted the header Authorization: Bearer <token>")

    async def _body(self, request: Request) -> bytes:
        """The body, refused as soon as it is over the limit."""
        most = self.limits.body_bytes
        text = f"at most {most} are taken: send fewer rows at a time"
        if packing := request.headers.get("Content-Encoding"):
            raise Refused(415, f"the body is packed ({packing}); wanted it as it is")
        length = request.headers.get("Content-Length", "0")
        if length.isdecimal() and int(length) > most:
            raise Refused(413, f"the body has {length} bytes; {text}")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_s):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise Refused(413, f"the body has over {most} bytes; {text}")
        except TimeoutError:
            raise Refused(
                408, f"{size} bytes came in {self._body_s:g} s; wanted all of the body"
            ) from None
        return b"".join(parts)

    def _guarded(
        self, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint, its refusals as answers, counted and logged."""

        async def guarded(request: Request) -> Response:
            path = request.url.path
            try:
                response = await endpoint(request)
            except Refused as error:
                client = request.client.host if request.client else "?"
                logger.warning("%s %s: %d %s", client, path, error.status, error)
                response = _error(error.status, str(error))
            except ClientDisconnect:
                logger.warning("%s: the client went away before all of the request came", path)
                response = _error(400, "the request ended early")
            except Exception:  # a fault of this program: Starlette answers 500 and logs it
                self.metrics.answered(path, 500)
                raise
            self.metrics.answered(path, response.status_code)
            return response

        return guarded


def server_of(app: App, requests: int, grace_s: int) -> "uvicorn.Server":
    """What answers for the app, `requests` of which it holds at once; grace_s: to finish in."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app.starlette(),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=requests + CONNECTIONS,
            timeout_graceful_shutdown=grace_s,
        )
    )


def _error(status: int, text: str) -> Response:
    """A refusal; what may follow on the connection is the rest of a body nobody will read."""
    headers = {"Connection": "close"}
    if status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": text}, status, headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = f"{request.method} {request.url.path} is not served; wanted POST /score, GET /health or "
    return _error(status, text + "GET /metrics")
