"""The kinds of judges a recipe can describe, and how each is built.

Their settings are light to import; what a judge runs on is imported when one is built.
"""

import importlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from qirl_fast.rewards import clip, face, imagereward, ocr, preservation, remote
from qirl_fast.rewards.judge import Judge
from qirl_fast.rewards.vlm import local, openai, pairs
from qirl_fast.section import Section, Text


class PythonSettings(Section):
    """A judge that a Python callable makes: `path(**arguments)`."""

    kind: Literal["python"] = Field(description="what a callable of yours makes")
    path: Text = Field(description="'package.module:callable' that makes the judge")
    arguments: dict[str, Any] = Field(default={}, description="its keyword arguments")


JudgeSettings = Annotated[
    local.Settings
    | openai.Settings
    | pairs.Settings
    | remote.Settings
    | ocr.Settings
    | clip.Settings
    | imagereward.Settings
    | face.Settings
    | preservation.Settings
    | PythonSettings,
    Field(discriminator="kind"),
]

# Settings that say where a judge is and how long to wait for it: they change no score.
OPERATIONAL = (
    {"url", "token_env", "api_key_env", "ca_file", "timeout_s", "deadline_s", "attempt_s"}
    | {"retries", "backoff_s", "backoff_max_s", "concurrency", "rows_per_request"}
    | {"max_response_bytes", "max_body"}
)


def build(settings: Any, device: str) -> Judge:
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
        raise ValueError(
            f"{settings.path!r} made a {type(judge).__name__}, which is not callable and so no "
            "judge"
        )
    return judge


BUILDERS: dict[str, Callable[[Any, str], Judge]] = {
    "vlm": local.Vlm,
    "openai": openai.OpenAi,
    "pairs": pairs.Judge,
    "remote": remote.Remote,
    "ocr": ocr.Judge,
    "clip": clip.Judge,
    "pickscore": clip.Judge,
    "hpsv2": clip.Judge,
    "imagereward": imagereward.Judge,
    "face": face.Judge,
    "preservation": preservation.Judge,
    "python": _python,
}
