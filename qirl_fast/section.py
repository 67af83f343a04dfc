"""The base of every settings section, and the types their fields share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

Problem = tuple[tuple[str, ...], str]  # (dotted keys involved, one line of text)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=16, multiple_of=16)]
Size = Annotated[tuple[Pixels, Pixels], Strict(False)]  # height, width
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, Field(min_length=1)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+=-]*$", max_length=200)]


class Section(BaseModel):
    """Base of every section: unknown keys, conversions, NaN and infinity are refused; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
