"""The socket that a server of this project listens on."""

import socket

from qirl_fast.config import ConfigError


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
