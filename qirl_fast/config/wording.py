"""Words for a configuration that cannot be run: the key, what came, what is allowed.

What is allowed is read off the JSON schema of the settings, so a message cannot disagree with a
check.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from qirl_fast.config.rules import CrossError

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


class Schema:
    """The JSON schema of a settings model, and what it says in words."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.root = model.model_json_schema()

    def error_lines(self, details: Sequence[ErrorDetails]) -> tuple[list[str], list[str]]:
        """Return one line per pydantic error, and the dotted keys that failed on their own."""
        lines: list[str] = []
        bad: list[str] = []
        for detail in details:
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, CrossError):
                lines += [text for _, text in cause.problems]
                continue
            loc = self.keys_of(detail)
            bad.append(".".join(loc))
            lines.append(self._line(loc, detail))
        return list(dict.fromkeys(lines)), bad

    def keys_of(self, detail: ErrorDetails) -> list[str]:
        """The keys that lead to the error; pydantic names the kind of a section there as well."""
        loc: list[str] = []
        for part in map(str, detail["loc"]):
            if part not in self.node(loc).get("discriminator", {}).get("mapping", {}):
                loc.append(part)
        return loc

    def _line(self, loc: list[str], detail: ErrorDetails) -> str:
        key = ".".join(loc)
        choice = self.node(loc).get("discriminator", {})
        kinds = choice.get("mapping")
        if kinds and detail["type"].startswith("union_tag"):
            came = detail.get("ctx", {}).get("tag")
            came = "nothing came" if came is None else f"got {came!r}"
            named = f"{key}.{choice['propertyName']}"
            return f"{named}: {came}; wanted one of {', '.join(map(repr, kinds))}"
        kind = next((p for p in map(str, detail["loc"]) if p not in loc), None)
        if detail["type"] == "extra_forbidden":
            return f"{key}: unknown key; {self._nearest_key(loc, kind)}"
        node = self.node(loc, kind)
        allowed = self.words(node)
        if detail["type"] == "finite_number":
            allowed = allowed.replace("a number", "a finite number")
        meaning = f" ({node['description']})" if "description" in node else ""
        if detail["type"] == "missing":
            return f"{key}: required, but nothing came; wanted {allowed}{meaning}"
        return f"{key}: got {_came(detail['input'])}; wanted {allowed}{meaning}"

    def _nearest_key(self, loc: Sequence[str], kind: str | None) -> str:
        """Return the nearest valid key: alike in this section, or of that name elsewhere."""
        section, last = ".".join(loc[:-1]), loc[-1]
        names = list(self._section(self.node(loc[:-1]), kind).get("properties", {}))
        elsewhere = {key.rpartition(".")[2]: key for key in reversed(self.dotted_keys())}
        if near := difflib.get_close_matches(last, names, n=1):
            return f"did you mean {f'{section}.' if section else ''}{near[0]}?"
        if near := difflib.get_close_matches(last, elsewhere, n=1, cutoff=0.75):
            return f"did you mean {elsewhere[near[0]]}?"
        return "allowed here: " + ", ".join(names)

    def _resolve(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """Follow `$ref`, also the one inside `X or null`; keys beside it stay."""
        merged = dict(node)
        choices = [c for c in merged.get("anyOf", []) if "$ref" in c]
        ref = merged.get("$ref") or (choices[0]["$ref"] if choices else None)
        if ref:
            return self.root["$defs"][ref.rpartition("/")[2]] | merged
        return merged

    def _section(self, node: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
        """The section itself, of this kind where there are several; else all of them in one."""
        mapping = node.get("discriminator", {}).get("mapping", {})
        if not mapping:
            return self._resolve(node)
        refs = [mapping[kind]] if kind in mapping else list(mapping.values())
        found = [self._resolve({"$ref": ref}) for ref in refs]
        return {"properties": {k: v for f in reversed(found) for k, v in f["properties"].items()}}

    def node(self, loc: Sequence[str], kind: str | None = None) -> dict[str, Any]:
        """Return the JSON schema of the key with these parts, {} if there is no such key.

        kind: of the section on the way whose keys depend on it.
        """
        node = self.root
        for part in loc:
            node = self._section(node, kind)
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

    def dotted_keys(self) -> tuple[str, ...]:
        """Return every dotted key, sections and leaves, in the order of the schema."""

        def walk(node: Mapping[str, Any], prefix: str) -> list[str]:
            found = []
            for name, child in self._resolve(node).get("properties", {}).items():
                found += [prefix + name, *walk(child, f"{prefix}{name}.")]
            return found

        return tuple(walk(self.root, ""))

    def words(self, node: Mapping[str, Any]) -> str:
        """Return what a key accepts, in words: 'a whole number >= 2', "'a' or 'b' or null"."""
        if "anyOf" in node:
            return " or ".join(self.words(choice) for choice in node["anyOf"])
        if "discriminator" in node:
            kinds = ", ".join(map(repr, node["discriminator"]["mapping"]))
            return f"a section whose 'kind' is one of {kinds}"
        if "const" in node:
            return repr(node["const"])
        if "enum" in node:
            return "one of " + ", ".join(repr(value) for value in node["enum"])
        full = self._resolve(node)
        if "properties" in full:
            return "a section with the keys " + ", ".join(full["properties"])
        limits = ", ".join(text.format(full[k]) for k, text in RANGE_WORDS.items() if k in full)
        if full.get("type") == "array":
            items = full.get("items") or (full.get("prefixItems") or [{}])[0]
            text = f"a list of {self.words(items)}"
        elif full.get("type") == "object":
            more = full.get("additionalProperties")
            text = f"a mapping of names to {self.words(more if isinstance(more, dict) else {})}"
        else:
            text = TYPE_WORDS.get(str(full.get("type")), "a value")
        return f"{text} {limits}" if limits else text


@cache
def schema_of(model: type[BaseModel]) -> Schema:
    """The schema of a settings model, made once."""
    return Schema(model)


def _came(value: object) -> str:
    if value is None:
        return "null"
    return f"{value!r} ({CAME_WORDS.get(type(value).__name__, type(value).__name__)})"


def accepted_types(node: Mapping[str, Any]) -> set[str]:
    """Return the JSON types a key accepts; an enumeration counts as its values' type."""
    if "anyOf" in node:
        return set().union(*(accepted_types(choice) for choice in node["anyOf"]))
    return {str(node["type"])} if "type" in node else {"object"}
