"""docs/config.md of the site: every key of every program, read off the settings' own classes.

Made when the site is built and not committed: so it cannot be stale, and two branches that add keys
do not meet in it. `python -m qirl_fast.train --dry-run` prints the keys of a run without a site.
"""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from qirl_fast.config.wording import schema_of
from qirl_fast.section import Section

ROOT = Path(__file__).resolve().parents[1]
_CLASS = re.compile(r"^class \w+\([\w.]*(Section|Settings|Config)\):", re.M)

# Module of the outermost section -> the command that reads it. Others go by their docstring.
COMMANDS = {
    "qirl_fast.config.schema": "python -m qirl_fast.train RECIPE.yaml key=value",
    "qirl_fast.config.pipeline": "python -m qirl_fast.pipeline SETTINGS.yaml key=value",
    "qirl_fast.config.evaluate": "python -m qirl_fast.evaluate SETTINGS.yaml key=value",
    "qirl_fast.config.arena": "python -m qirl_fast.arena SETTINGS.yaml key=value",
    "qirl_fast.config.reward": "python -m qirl_fast.train_reward RECIPE.yaml key=value",
    "qirl_fast.config.server": "python -m qirl_fast.reward_server SETTINGS.yaml key=value",
    "qirl_fast.calibrate": "python -m qirl_fast.calibrate FOLDER key=value",
}
HEAD = """# Settings

Every key of every program, made from the classes that check them. A recipe is YAML; any key can be
given as `key=value` after it, with dots (`train.lr=1e-4`). Unknown keys, wrong types and values out
of range are refused by name before anything is computed. `--dry-run` prints every key with the
value it has. `required`: there is no default.
"""


def all_sections() -> list[type[Section]]:
    """Every settings class of the package."""
    for path in sorted((ROOT / "qirl_fast").rglob("*.py")):
        if _CLASS.search(path.read_text(encoding="utf-8")):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found: list[type[Section]] = []
    queue = list(Section.__subclasses__())
    while queue:
        one = queue.pop(0)
        found.append(one)
        queue += one.__subclasses__()
    own = [s for s in dict.fromkeys(found) if s.__module__.startswith("qirl_fast.")]
    return [s for s in own if not s.__name__.startswith("_")]  # those of the wire are no settings


def inside(annotation: Any) -> list[type[Section]]:
    """The settings classes that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in inside(part)]


def below(section: type[Section]) -> list[type[Section]]:
    """The settings classes of a class's fields."""
    return [s for field in section.model_fields.values() for s in inside(field.annotation)]


def roots() -> list[type[Section]]:
    """Settings that no other settings hold and none derives from: one for each program."""
    whole = all_sections()
    held = {s for section in whole for s in below(section)}
    found = [s for s in whole if s not in held and not s.__subclasses__()]
    order = list(COMMANDS)
    return sorted(found, key=lambda s: order.index(s.__module__) if s.__module__ in order else 99)


def parts(section: type[Section], key: str = "") -> Iterator[tuple[str, type[Section]]]:
    """The section and all below it, each with its dotted key ("" for the outermost)."""
    yield key, section
    for name, field in section.model_fields.items():
        for child in inside(field.annotation):
            yield from parts(child, place(section, key, name))


def place(section: type[Section], key: str, name: str) -> str:
    """The dotted key of what stands under a key: `judges.NAME`, `tiers.N`, `train.ema`."""
    kind = shape(section, name)
    middle = ".N" if kind.startswith("list") else ".NAME" if kind.startswith("names") else ""
    return (f"{key}." if key else "") + name + middle


def shape(section: type[Section], name: str) -> str:
    """In words, how many sections stand under a key that holds some."""
    node = schema_of(section).node([name])
    choices = [node, *node.get("anyOf", [])]
    null = " or null" if any(c.get("type") == "null" for c in choices) else ""
    if any(c.get("type") == "array" for c in choices):
        return "list of sections" + null
    if any("additionalProperties" in c and "$ref" not in c for c in choices):
        return "names, a section each" + null
    return "section" + null


def anchor(root: type[Section], key: str, section: type[Section]) -> str:
    """The id of a section's heading: program, key, and which of the kinds that may stand there."""
    names = (root.__module__, key, section.__module__ if key.startswith(("judges", "algo")) else "")
    return "-".join(re.sub(r"\W+", "-", n.removeprefix("qirl_fast.")) for n in names if n).lower()


def cell(text: str) -> str:
    """Text that stands in a cell of a table as it is."""
    text = re.sub(r"matching (\S+)", r"matching `\1`", text)
    return text.replace("|", "\\|").replace("<", "&lt;")


def row(root: type[Section], section: type[Section], key: str, name: str) -> str:
    """One key: what it allows, its default, what it means."""
    field, schema = section.model_fields[name], schema_of(section)
    node = schema.node([name])
    children = inside(field.annotation)
    allowed, default = cell(schema.words(node)), "required"
    if children:
        where = place(section, key, name)
        links = [f"[{title(child)}](#{anchor(root, where, child)})" for child in children]
        allowed = f"{shape(section, name)}: " + ", ".join(links)
    if not field.is_required():
        value = field.get_default(call_default_factory=True)
        default = "its own defaults"
        if not (isinstance(value, Section) and {type(value)} == set(children)):
            plain = value.model_dump(exclude_defaults=True) if children and value else value
            default = f"`{json.dumps(plain)}`"
    meaning = cell(field.description or (children and first_line(children[0])) or "")
    return f"| `{name}` | {allowed} | {default} | {meaning} |"


def first_line(section: type[Section]) -> str:
    """The first line of its docstring."""
    return (section.__doc__ or "").strip().splitlines()[0]


def title(section: type[Section]) -> str:
    """What a section is called among others under the same key: its kind, else "keys"."""
    for name in ("kind", "name"):
        found = section.model_fields.get(name)
        if found is not None and not inside(found.annotation):
            kinds = [str(k) for k in get_args(found.annotation)]
            if kinds:
                return f"`{name}: {' | '.join(kinds)}`".replace("|", "\\|")
    return "keys"


def settings_page() -> str:
    """The whole page."""
    lines = [HEAD]
    seen: set[str] = set()
    for root in roots():
        command = COMMANDS.get(root.__module__)
        for key, section in parts(root):
            if anchor(root, key, section) in seen:  # a section that two kinds share
                continue
            seen.add(anchor(root, key, section))
            kind = "" if title(section) == "keys" else f", {title(section)}".replace("\\|", "or")
            name = f"### `{key}`{kind}" if key else f"## {command or first_line(root)}"
            lines += [f"{name} {{#{anchor(root, key, section)}}}", "", first_line(section), ""]
            lines += ["| key | allowed | default | meaning |", "|---|---|---|---|"]
            lines += [row(root, section, key, one) for one in section.model_fields]
            lines.append("")
    return "\n".join(lines)
