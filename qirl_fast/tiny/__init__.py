"""The tiny world and the tiny model: real components, small enough for two CPU cores."""

from pathlib import Path

HERE = Path(__file__).parent


def packaged(name: str) -> Path:
    """The file or folder behind 'tiny', 'tiny:train' and the like; other paths stay."""
    if name == "tiny":
        return HERE / "weights"
    if name.startswith("tiny:"):
        return HERE / "prompts" / f"{name.removeprefix('tiny:')}.jsonl"
    return Path(name)
