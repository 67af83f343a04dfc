"""Settings of `python -m qirl_fast.reward_server`."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qirl_fast.config.rules import CrossError
from qirl_fast.config.wording import ConfigError
from qirl_fast.rewards.judges import JUDGES, resolve
from qirl_fast.rewards.kinds import JudgeSettings
from qirl_fast.rewards.wire import Limits
from qirl_fast.section import Count, Natural, Positive, Problem, Section, Text


class ServerConfig(Section):
    """A reward server."""

    serve: Annotated[list[Text], Field(min_length=1)] = Field(
        description="judges to serve: packaged ones, 'package.module:function', names in `judges`"
    )
    judges: dict[str, JudgeSettings] = Field(
        default={}, description="judges with settings, by the name under which they are served"
    )
    host: Text = Field(
        default="127.0.0.1", description="address to listen on; 0.0.0.0: every one of this machine"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8765, description="port to listen on; 0: a free one, printed"
    )
    token_env: Text | None = Field(
        default=None, description="environment variable with the token clients must send; null: any"
    )
    allow_unauthenticated: bool = Field(
        default=False, description="accept to serve whoever reaches `host` without a token"
    )
    device: Literal["cpu", "cuda", "auto"] = Field(default="auto", description="where judges run")
    threads: Count | None = Field(default=None, description="CPU threads; null: one a core")
    reask: Natural = Field(default=1, description="times a failed row is asked again, alone")
    requests: Count = Field(
        default=16, description="requests held at once, read or judged; others are sent away (503)"
    )
    body_s: Positive = Field(default=60, description="seconds in which a request must have come")
    grace_s: Count = Field(
        default=30, description="seconds to finish what is under way after SIGTERM"
    )
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _cross(self) -> ServerConfig:
        found = self._judge_problems()
        found += host_problems(self.host, bool(self.token_env), self.allow_unauthenticated)
        if found:
            raise CrossError(found)
        return self

    def _judge_problems(self) -> list[Problem]:
        problems: list[Problem] = [
            (("judges",), f"judges.{name}: is the name of a packaged judge; choose another")
            for name in self.judges
            if name in JUDGES
        ]
        for name in self.serve:
            if self.serve.count(name) > 1:
                problems.append((("serve",), f"serve: {name!r} is there twice; wanted once"))
            try:
                resolve(name, self.judges)
            except ValueError as error:
                problems.append((("serve",), f"serve: {error}"))
        return list(dict.fromkeys(problems))


def host_problems(host: str, has_token: bool, allow_unauthenticated: bool) -> list[Problem]:
    """What is wrong with listening on an address without a token."""
    if has_token or allow_unauthenticated or is_loopback(host):
        return []
    text = (
        f"host: {host} can be reached from other machines, and no token is asked for; set "
        "token_env, or allow_unauthenticated=true where the network itself keeps strangers out"
    )
    return [(("host", "token_env", "allow_unauthenticated"), text)]


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone; a name other than localhost is taken as not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_of(token_env: str | None) -> str | None:
    """The token in the environment variable of that name; None where none is asked for."""
    if token_env is None:
        return None
    token = os.environ.get(token_env, "")
    if not re.fullmatch(r"[!-~]{16,}", token):
        raise ConfigError(
            [
                f"token_env: the environment variable {token_env} is not set or no token; wanted "
                "16 or more visible ASCII characters, as `openssl rand -hex 32` makes"
            ]
        )
    return token
