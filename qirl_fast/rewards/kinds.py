"""The kinds of judges a recipe can describe, and how each is built."""

import importlib
from typing import Any, Literal

from pydantic import Field

from qirl_fast.rewards.judge import Judge
from qirl_fast.section import Section, Text


class PythonSettings(Section):
    """A judge that a Python callable makes: `path(**arguments)`."""

    kind: Literal["python"]
    path: Text = Field(description="'package.module:callable' that makes the judge")
    arguments: dict[str, Any] = Field(default={}, description="its keyword arguments")


JudgeSettings = PythonSettings


def build(settings: JudgeSettings, device: str) -> Judge:
    """Make the judge that the settings describe. Raises ValueError where that is impossible."""
    return BUILDERS[settings.kind](settings, device)


def _python(settings: PythonSettings, device: str) -> Judge:
    module_name, _, attribute = settings.path.partition(":")
    try:
        maker = getattr(importlib.import_module(module_name), attribute)
        judge = maker(**settings.arguments)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"judge made by {settings.path!r}: {error!r}") from error
    if not callable(judge):
        raise ValueError(f"{settings.path!r} made a {type(judge).__name__}, which is no judge")
    return judge


BUILDERS = {"python": _python}
