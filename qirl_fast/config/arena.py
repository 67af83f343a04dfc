"""Settings of `python -m qirl_fast.arena`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qirl_fast.config.rules import CrossError
from qirl_fast.config.server import host_problems
from qirl_fast.rewards.judges import JUDGES, resolve
from qirl_fast.rewards.kinds import JudgeSettings
from qirl_fast.section import Count, FolderName, NonNegative, Problem, Section, Seed, Text


class ArenaConfig(Section):
    """A study: which models are compared, where votes are kept, who may reach the page."""

    models: dict[FolderName, Text] = Field(
        description="two models or more by name, each the folder of its images (prompts.jsonl); "
        "the first is the one that the others are measured from, such as the base"
    )
    database: Text = Field(
        default="outputs/arena/votes.db", description="SQLite file of the votes; made if need be"
    )
    seed: Seed = Field(default=0, description="seed of the order and of the sides")
    votes_per_prompt: Count = Field(
        default=1,
        description="people whose votes decide a prompt; set before the first vote, and kept",
    )
    level: Annotated[float, Field(ge=0.5, le=0.999)] = Field(
        default=0.95, description="coverage of all intervals"
    )
    resamples: Annotated[int, Field(ge=100, le=100_000)] = Field(
        default=2000, description="bootstrap resamples of the ratings and of the agreement"
    )
    sizes: Literal["refuse", "scale"] = Field(
        default="refuse",
        description="pictures of one prompt in different sizes: an error, or shown at the smallest",
    )
    host: Text = Field(
        default="127.0.0.1", description="address to listen on; 0.0.0.0: every one of this machine"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=7860, description="port to listen on; 0: a free one, printed"
    )
    token_env: Text | None = Field(
        default=None, description="environment variable with the token of the page; null: none"
    )
    allow_unauthenticated: bool = Field(
        default=False, description="accept to serve whoever reaches `host` without a token"
    )
    judge: Text | None = Field(
        default=None,
        description="judge that votes beside people with `python -m qirl_fast.arena judge`",
    )
    judges: dict[str, JudgeSettings] = Field(
        default={}, description="judges with settings, by name"
    )
    judge_margin: NonNegative = Field(
        default=0.0, description="scores that differ by no more are the judge's tie"
    )
    device: Literal["cpu", "cuda", "auto"] = Field(
        default="auto", description="where the judge runs"
    )

    @model_validator(mode="after")
    def _cross(self) -> ArenaConfig:
        found: list[Problem] = []
        if len(self.models) < 2:
            names = ", ".join(self.models) or "none"
            found.append(
                (
                    ("models",),
                    f"models: got {len(self.models)} ({names}); wanted two or more, as models: "
                    "{base: FOLDER, rl: FOLDER}",
                )
            )
        folders = list(self.models.values())
        if len(set(folders)) < len(folders):
            found.append((("models",), "models: two of them have the same folder"))
        found += host_problems(self.host, bool(self.token_env), self.allow_unauthenticated)
        found += [
            (("judges",), f"judges.{name}: is the name of a packaged judge; choose another")
            for name in self.judges
            if name in JUDGES
        ]
        if self.judge is not None:
            try:
                resolve(self.judge, self.judges)
            except ValueError as error:
                found.append((("judge",), f"judge: {error}"))
        if found:
            raise CrossError(found)
        return self
