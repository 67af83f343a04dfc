"""Words for a configuration that cannot be run: the key, what came, what is allowed.

What is allowed is read off the JSON schema of `Config`, so a message cannot disagree with a check.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic_core import ErrorDetails

from qirl_fast.config.rules import CrossError
from qirl_fast.config.schema import Config

TYPE_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}
CAME_WORDS = {
    "bool": "true/false value",
    "int": "whole number",
    "float": "number",
    "str": "text",
    "list": "list",
    "dict": "mapping",
}
RANGE_WORDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} character long",
    "maxLength": "at most {} characters long",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "minProperties": "at least {} entry",
    "pattern": "matching {}",
}


class ConfigError(ValueError):
    """A recipe that cannot be run; the message has one line per problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def error_lines(details: Sequence[ErrorDetails]) -> tuple[list[str], list[str]]:
    """Return one line per pydantic error, and the dotted keys that failed on their own."""
    lines: list[str] = []
    bad: list[str] = []
    for detail in details:
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, CrossError):
            lines += [text for _, text in cause.problems]
            continue
        loc = [str(part) for part in detail["loc"]]
        bad.append(".".join(loc))
        lines.append(_line(loc, detail))
    return list(dict.fromkeys(lines)), bad


def _line(loc: list[str], detail: ErrorDetails) -> str:
    key = ".".join(loc)
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_nearest_key(loc)}"
    node = schema_node(loc)
    allowed = words(node)
    if detail["type"] == "finite_number":
        allowed = allowed.replace("a number", "a finite number")
    meaning = f" ({node['description']})" if "description" in node else ""
    if detail["type"] == "missing":
        return f"{key}: required, but nothing came; wanted {allowed}{meaning}"
    return f"{key}: got {_came(detail['input'])}; wanted {allowed}{meaning}"


def _came(value: object) -> str:
    if value is None:
        return "null"
    return f"{value!r} ({CAME_WORDS.get(type(value).__name__, type(value).__name__)})"


def _nearest_key(loc: Sequence[str]) -> str:
    """Return the nearest valid key: spelled alike in this section, or of that name elsewhere."""
    section, last = ".".join(loc[:-1]), loc[-1]
    names = list(_resolve(schema_node(loc[:-1])).get("properties", {}))
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(valid_keys())}
    if near := difflib.get_close_matches(last, names, n=1):
        return f"did you mean {f'{section}.' if section else ''}{near[0]}?"
    if near := difflib.get_close_matches(last, elsewhere, n=1, cutoff=0.75):
        return f"did you mean {elsewhere[near[0]]}?"
    return "allowed here: " + ", ".join(names)


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _resolve(node: Mapping[str, Any]) -> dict[str, Any]:
    """Follow `$ref`, also the one inside `X or null`; keys beside it, such as description, stay."""
    merged = dict(node)
    choices = [c for c in merged.get("anyOf", []) if "$ref" in c]
    ref = merged.get("$ref") or (choices[0]["$ref"] if choices else None)
    if ref:
        return _schema()["$defs"][ref.rpartition("/")[2]] | merged
    return merged


def schema_node(loc: Sequence[str]) -> dict[str, Any]:
    """Return the JSON schema of the key with these parts, {} if there is no such key."""
    node = _schema()
    for part in loc:
        node = _resolve(node)
        if part in node.get("properties", {}):
            node = node["properties"][part]
            continue
        more = node.get("additionalProperties") or node.get("items")
        more = more or (node.get("prefixItems") or [{}])[0]
        choices = [c for c in node.get("anyOf", []) if "items" in c]
        node = more or (choices[0]["items"] if choices else {})
        if not isinstance(node, dict):
            return {}
    return dict(node)


@cache
def valid_keys() -> tuple[str, ...]:
    """Return every dotted key, sections and leaves, in the order of the schema."""

    def walk(node: Mapping[str, Any], prefix: str) -> list[str]:
        found = []
        for name, child in _resolve(node).get("properties", {}).items():
            found += [prefix + name, *walk(child, f"{prefix}{name}.")]
        return found

    return tuple(walk(_schema(), ""))


def accepted_types(node: Mapping[str, Any]) -> set[str]:
    """Return the JSON types a key accepts; an enumeration counts as its values' type."""
    if "anyOf" in node:
        return set().union(*(accepted_types(choice) for choice in node["anyOf"]))
    return {str(node["type"])} if "type" in node else {"object"}


def words(node: Mapping[str, Any]) -> str:
    """Return what a key accepts, in words: 'a whole number >= 2', "'a' or 'b' or null"."""
    if "anyOf" in node:
        return " or ".join(words(choice) for choice in node["anyOf"])
    if "const" in node:
        return repr(node["const"])
    if "enum" in node:
        return "one of " + ", ".join(repr(value) for value in node["enum"])
    full = _resolve(node)
    if "properties" in full:
        return "a section with the keys " + ", ".join(full["properties"])
    limits = ", ".join(text.format(full[k]) for k, text in RANGE_WORDS.items() if k in full)
    if full.get("type") == "array":
        items = full.get("items") or (full.get("prefixItems") or [{}])[0]
        text = f"a list of {words(items)}"
    elif full.get("type") == "object":
        text = f"a mapping of names to {words(full.get('additionalProperties', {}))}"
    else:
        text = TYPE_WORDS.get(str(full.get("type")), "a value")
    return f"{text} {limits}" if limits else text
