"""Serves the page: who may reach it, the pictures, one server a database.

GET /                the page (Gradio)
GET /picture/<name>  a picture under its hidden name, pixels only

Bound to 127.0.0.1 unless told otherwise. With a token every request needs it: the first as
/?token=..., which leaves a cookie, or as a bearer token; compared in constant time. Without one a
request must name this machine in its Host header, so that no other site's name leads here. It
speaks plain HTTP: over a network that others can read, put a proxy that speaks TLS before it.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from qirl_fast.arena.desk import Desk
from qirl_fast.arena.store import Store
from qirl_fast.arena.study import Study
from qirl_fast.config.arena import ArenaConfig
from qirl_fast.config.server import is_loopback, token_of
from qirl_fast.config.wording import ConfigError
from qirl_fast.data.sources import ImageError
from qirl_fast.listening import listen

GRACE_S = 5
COOKIE = "arena"
INSTALL = "pip install 'qirl-fast[arena]'"
HEADERS = (
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)


def serve(cfg: ArenaConfig, study: Study) -> int:
    """Serve until a signal comes."""
    uvicorn, build, mount, fastapi = libraries()
    token = token_of(cfg.token_env)
    path = Path(cfg.database)
    with only_one(path):
        store = opened(cfg, study)
        listening = listen(cfg.host, cfg.port)
        app = application(Desk(cfg, study, store), build, mount, fastapi)
        gate = Gate(app, token, local=is_loopback(cfg.host) and token is None)
        server = uvicorn.Server(
            uvicorn.Config(
                gate,
                http="h11",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        listening.listen()
        host, port = listening.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        asked = f"/?token=${cfg.token_env}" if token else "/"
        print(f"arena of {', '.join(study.models)}: http://{where}{asked}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises what it got again
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
        store.close()
    return 0


def libraries() -> tuple[Any, Any, Any, Any]:
    """uvicorn, page.build, Gradio's mount, fastapi; all come with the extra `arena`."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import fastapi
        import gradio
        import uvicorn

        from qirl_fast.arena.page import build
    except ImportError as error:
        raise ConfigError([f"{error.name} is not installed; `{INSTALL}` brings it"]) from error
    return uvicorn, build, gradio.mount_gradio_app, fastapi


def opened(cfg: ArenaConfig, study: Study) -> Store:
    """The database of a study, which must be of this study."""
    store = Store(Path(cfg.database))
    store.agree("votes_per_prompt", str(cfg.votes_per_prompt))
    store.know(study.digests())
    return store


@contextmanager
def only_one(database: Path) -> Iterator[None]:
    """Hold the database; ConfigError naming the process that does.

    The lock is the kernel's and ends with the process, however it ends.
    """
    lock = database.with_name(f"{database.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+", encoding="ascii")
    except OSError as error:
        raise ConfigError([f"database: {lock} cannot be written ({error.strerror})"]) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError(
                [
                    f"database: {database} is served by process {holder} already; use its page, "
                    "end it, or name another file: database=FILE"
                ]
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def application(desk: Desk, build: Any, mount: Any, fastapi: Any) -> Any:
    """The page and its pictures."""
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def picture(name: str) -> Any:
        try:
            data = desk.pictures.png(name)
        except (ImageError, OSError) as error:
            log.warning("%s", error)
            data = None
        if data is None:
            return fastapi.Response("no such picture", 404, media_type="text/plain")
        headers = {"Cache-Control": "private, max-age=3600"}
        return fastapi.Response(data, media_type="image/png", headers=headers)

    app.add_api_route("/picture/{name}", picture)
    page, how = build(desk)
    return mount(app, page, path="/", **how)


class Gate:
    """Lets those in who have the token or, without one, who call this machine by its name."""

    def __init__(self, app: Application, token: str | None, *, local: bool) -> None:
        self._app, self._local = app, local
        self._token = None if token is None else token.encode()
        self._cookie = (
            b""
            if self._token is None
            else hmac.new(self._token, b"arena cookie", hashlib.sha256).hexdigest().encode()
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        if self._local and not is_loopback(_host(headers.get(b"host", b""))):
            await _answer(send, 421, b"wanted this machine's own name as the host")
            return
        if self._token is not None:
            query = parse_qs(scope["query_string"]).get(b"token", [b""])[0]
            if query and scope["path"] == "/" and hmac.compare_digest(query, self._token):
                cookie = f"{COOKIE}=".encode() + self._cookie
                cookie += b"; HttpOnly; SameSite=Strict; Path=/"
                await _answer(send, 303, b"", (b"location", b"/"), (b"set-cookie", cookie))
                return
            if not self._known(headers):
                await _answer(send, 401, b"wanted the token: open /?token=...")
                return

        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await self._app(scope, receive, sent)

    def _known(self, headers: dict[bytes, bytes]) -> bool:
        assert self._token is not None
        bearer = headers.get(b"authorization", b"")
        cookies: SimpleCookie = SimpleCookie()
        with suppress(CookieError):
            cookies.load(headers.get(b"cookie", b"").decode("latin-1"))
        came = cookies[COOKIE].value.encode("latin-1") if COOKIE in cookies else b""
        by_header = hmac.compare_digest(bearer, b"Bearer " + self._token)
        return hmac.compare_digest(came, self._cookie) or by_header


def _host(header: bytes) -> str:
    text = header.decode("latin-1")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


async def _answer(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    start = [(b"content-type", b"text/plain"), (b"cache-control", b"no-store"), *HEADERS, *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
