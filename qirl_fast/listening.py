"""What a server of this project listens with."""

import socket
from typing import Any

from qirl_fast.config import ConfigError


def reward_library() -> Any:
    """qirl_fast.reward_app; ConfigError where packages of the extra `server` are missing."""
    try:
        import uvicorn  # noqa: F401

        from qirl_fast import reward_app
    except ImportError as error:
        text = f"{error.name} is not installed; `pip install 'qirl-fast[server]'` brings it"
        raise ConfigError([text]) from error
    return reward_app


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket; ConfigError where it cannot be had. Taken before anything slow is done: a
    port in use should not cost minutes.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # asyncio turns off Nagle's delay of 40 ms an answer, where the protocol is named
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        raise ConfigError(
            [f"host, port: cannot listen on {host}:{port} ({error}); choose another"]
        ) from error
    return found
