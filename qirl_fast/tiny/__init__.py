"""The tiny world and the tiny model: real components, small enough for two CPU cores."""

from pathlib import Path

HERE = Path(__file__).parent


def packaged(name: str) -> Path:
    """The file or folder behind 'tiny', 'tiny:train', 'tiny-judge' and the like; others stay.

    tiny-judge: the base of a judge, a Qwen3-VL that sees but was never shown a rating;
    tiny-judge:alignment: the judge that was fine-tuned from it.
    """
    if name == "tiny":
        return HERE / "weights"
    if name == "tiny-judge":
        return HERE / "judge" / "base"
    if name.startswith("tiny-judge:"):
        return HERE / "judge" / name.removeprefix("tiny-judge:")
    if name.startswith("tiny:"):
        return HERE / "prompts" / f"{name.removeprefix('tiny:')}.jsonl"
    return Path(name)
