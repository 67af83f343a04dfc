"""One exchange with a reward server: timed as a whole, its answer read up to a limit.

Redirects, proxies and packed answers are not followed, used or accepted: a proxy for the internet
is none for a neighbour, and a packed answer of a kilobyte can be a gigabyte.
"""

import json
import os
import re
import ssl
from typing import TYPE_CHECKING

from qirl_fast.rewards.wire import MEDIA_TYPE

if TYPE_CHECKING:
    import httpx

ERROR_BYTES = 2**16
ERROR_CHARACTERS = 1000
AGAIN = {408, 425, 429}  # and 500 and above


class Problem(Exception):
    """Why there is no answer. again: asking again may mend it, but not within wait_s seconds."""

    def __init__(self, text: str, again: bool = True, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.again, self.wait_s = again, wait_s


class Server:
    """Connections to one server, for the event loop that uses it first.

    token_env: the environment variable with the bearer token; ca_file: who signed its certificate.
    ValueError, which does not show the token, where either cannot be used.
    """

    def __init__(self, url: str, token_env: str | None, ca_file: str | None) -> None:
        self.url, self._token_env = url, token_env
        self._headers = _headers(token_env)
        self._tls = _tls(ca_file)
        self._client: httpx.AsyncClient | None = None

    async def exchange(
        self, method: str, path: str, seconds: float, most_bytes: int, body: bytes | None = None
    ) -> bytes:
        """The body of the answer with status 200, at most most_bytes; Problem for anything else."""
        import anyio
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(
                verify=self._tls,
                trust_env=False,
                timeout=None,  # the whole is timed: single reads would let a dripping server go on
                limits=httpx.Limits(max_connections=None),
            )
        headers = self._headers | ({} if body is None else {"Content-Type": MEDIA_TYPE})
        try:
            with anyio.fail_after(seconds):
                async with self._client.stream(
                    method, f"{self.url}{path}", content=body, headers=headers
                ) as response:
                    most = most_bytes if response.status_code == 200 else ERROR_BYTES
                    answer = await _read(response, most)
        except TimeoutError:
            raise Problem(f"no answer within {seconds:g} s") from None
        except (httpx.HTTPError, OSError) as error:
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise Problem(text) from error
        if response.status_code != 200:
            raise self._refusal(response, answer)
        return answer

    async def close(self) -> None:
        """End the connections; a later exchange opens new ones."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _refusal(self, response: "httpx.Response", answer: bytes) -> Problem:
        """What an answer without scores says, and what to do."""
        status = response.status_code
        try:
            text = str(json.loads(answer)["error"])[:ERROR_CHARACTERS]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = repr(answer[:200])
        name = self._token_env
        todo = {
            401: f"put the server's token into the variable {name}" if name else "set token_env",
            404: "set `judge` to one that the server serves, and `url` to a reward server's",
            413: "lower rows_per_request, or raise the server's limits",
        }.get(status, "redirects are not followed: set `url`" if status // 100 == 3 else "")
        again = status in AGAIN or status >= 500
        asked = response.headers.get("Retry-After", "")  # a date is taken as no wish
        wait_s = float(asked) if re.fullmatch(r"\d{1,6}", asked) else 0.0
        return Problem(f"status {status}: {text}" + (f"; {todo}" if todo else ""), again, wait_s)


async def _read(response: "httpx.Response", most: int) -> bytes:
    """The body; Problem as soon as it is over `most` bytes."""
    if packing := response.headers.get("Content-Encoding"):
        raise Problem(f"the answer is packed ({packing}); wanted it as it is")
    parts, size = [], 0
    async for chunk in response.aiter_raw():
        parts.append(chunk)
        size += len(chunk)
        if size > most:
            raise Problem(f"the answer, status {response.status_code}, has over {most} bytes")
    return b"".join(parts)


def _headers(token_env: str | None) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity"}
    if token_env is None:
        return headers
    token = os.environ.get(token_env, "")
    if not re.fullmatch(r"[!-~]+", token):
        what = "holds characters other than visible ASCII" if token else "is not set, or empty"
        raise ValueError(
            f"token_env: the environment variable {token_env} {what}; wanted the reward server's "
            f"token, as by `export {token_env}=...`"
        )
    return headers | {"Authorization": f"Bearer {token}"}


def _tls(ca_file: str | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ValueError(
            f"ca_file: {ca_file} cannot be read ({error}); wanted a PEM file"
        ) from error
