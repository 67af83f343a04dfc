"""Settings of other programs than train: the same file, overrides and messages, for any model."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from qirl_fast.config import ConfigError, load_settings
from qirl_fast.section import Count, Section, Text


class Red(Section):
    kind: Literal["red"]
    depth: Count = Field(default=2, description="how red")
    name: Text | None = Field(default=None, description="what to call it")


class Blue(Section):
    kind: Literal["blue"]
    width: Count = Field(description="how wide")


class Both(Section):
    things: dict[str, Annotated[Red | Blue, Field(discriminator="kind")]] = Field(
        default={}, description="things by name"
    )
    size: Count = Field(default=1, description="how many")


@pytest.fixture
def load(tmp_path):
    file = tmp_path / "settings.yaml"

    def load(text, *overrides):
        file.write_text(text)
        return load_settings([str(file), *overrides], Both)

    return load


def test_a_file_and_overrides_make_the_settings(load):
    both = load("things: {a: {kind: red}}", "size=3", "things.b={kind: blue, width: 4}")
    assert both == Both(things={"a": Red(kind="red"), "b": Blue(kind="blue", width=4)}, size=3)


def test_text_is_taken_as_written_under_a_section_of_several_kinds(load):
    assert load("things: {a: {kind: red}}", "things.a.name=007").things["a"].name == "007"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("things: {a: {kind: green}}", "things.a.kind: got 'green'; wanted one of 'blue', 'red'"),
        ("things: {a: {depth: 1}}", "things.a.kind: nothing came; wanted one of 'blue', 'red'"),
        (
            "things: {a: {kind: red, dept: 1}}",
            "things.a.dept: unknown key; did you mean things.a",
        ),
        ("things: {a: {kind: red, zzz: 1}}", "allowed here: kind, depth, name"),
        ("things: {a: {kind: blue}}", "things.a.width: required, but nothing came; wanted a whole"),
        (
            "things: {a: {kind: red, depth: 0}}",
            "things.a.depth: got 0 (whole number); wanted",
        ),
        ("things: {a: 3}", "things.a: got 3 (whole number); wanted a section whose 'kind' is one"),
        ("sizes: 2", "sizes: unknown key; did you mean size?"),
    ],
)
def test_what_is_wrong_is_named_with_its_key_and_what_is_allowed(load, text, message):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in str(caught.value)


def test_every_problem_is_reported_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load("{things: {a: {kind: blue, width: 0}, b: {kind: red, x: 1}}, size: text}")
    assert len(caught.value.problems) == 3


def test_without_a_file_it_says_what_is_wanted():
    with pytest.raises(ConfigError, match=r"wanted a \.yaml file first"):
        load_settings(["size=2"], Both)
