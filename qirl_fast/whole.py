"""Files that appear whole or not at all: written beside their place, then renamed."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 to `path`; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
