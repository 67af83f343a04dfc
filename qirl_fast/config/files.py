"""Find what a recipe points to and what is not there: model folder, prompt files, checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qirl_fast.config.wording import ConfigError

SPLITS = ("train", "validation", "heldout")
PACKAGED = tuple(f"tiny:{kind}{name}" for kind in ("", "edit-") for name in SPLITS)
WEIGHTLESS = ("scheduler", "processor", "tokenizer", "feature_extractor", "image_processor")


def missing_files(plain: Mapping[str, Any]) -> list[str]:
    """Return one line per file or folder that the recipe (nested dicts) names and that is missing.

    Keys that do not hold text are passed over: their type is reported elsewhere.
    """
    lines = []
    for name in ("train", "heldout"):
        path = _text(plain, "data", name)
        if path is None or path in PACKAGED or path.startswith("tiny:"):
            if path is not None and path not in PACKAGED:
                lines.append(f"data.{name}: got {path!r}; packaged prompts: {', '.join(PACKAGED)}")
        elif not (Path(path).exists() or path.endswith(".tar")):  # shards may be a {000..010}
            lines.append(
                f"data.{name}: no such file: {path!r}; wanted a .jsonl or .txt file, a folder, or "
                "tar shards"
            )
    for name in ("images", "heldout_images"):
        images = _text(plain, "data", name)
        if images is not None and not Path(images).is_dir():
            lines.append(f"data.{name}: no such folder: {images!r}")
    model = _text(plain, "model", "path")
    if model is not None and model != "tiny":
        lines += [f"model.path: {line}" for line in model_folder_problems(Path(model))]
    algorithm = plain.get("algorithm")
    teachers = algorithm.get("teachers") if isinstance(algorithm, Mapping) else None
    for name, teacher in teachers.items() if isinstance(teachers, Mapping) else ():
        path = teacher.get("path") if isinstance(teacher, Mapping) else None
        if isinstance(path, str):
            key = f"algorithm.teachers.{name}.path"
            lines += [f"{key}: {line}" for line in _teacher_problems(Path(path))]
    resume = plain.get("resume")
    if isinstance(resume, str) and resume not in ("never", "auto") and not Path(resume).is_dir():
        lines.append(
            f"resume: no such checkpoint folder: {resume!r}; wanted 'never', 'auto' or a folder"
        )
    return lines


def make_folder(folder: Path) -> None:
    """Make the folder that `output` leads to, and see that it can be written to; ConfigError."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            [f"output: cannot write to {folder} ({error.strerror}); choose another by output=PATH"]
        ) from error


def _teacher_problems(folder: Path) -> list[str]:
    """What is missing from a teacher: a PEFT adapter, or a model folder."""
    if (folder / "adapter_config.json").is_file():
        lacks = not (folder / "adapter_model.safetensors").is_file()
        return [f"half an adapter: {folder} lacks adapter_model.safetensors"] if lacks else []
    if (folder / "model_index.json").is_file():
        return model_folder_problems(folder)
    return [
        f"{str(folder)!r} is no teacher; wanted a PEFT adapter (adapter_config.json), such as "
        "<run>/checkpoints/latest/lora, or a model in diffusers' format"
    ]


def _text(plain: Mapping[str, Any], section: str, name: str) -> str | None:
    inner = plain.get(section)
    value = inner.get(name) if isinstance(inner, Mapping) else None
    return value if isinstance(value, str) and value else None


def model_folder_problems(folder: Path) -> list[str]:
    """Return what is missing from a diffusers model folder, judged by its own model_index.json."""
    index = folder / "model_index.json"
    if not folder.is_dir():
        return [f"no such folder: {str(folder)!r}; wanted 'tiny' or a model in diffusers' format"]
    if not index.is_file():
        return [f"{folder} holds no model_index.json, so it is no model in diffusers' format"]
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        names = [k for k, v in parts.items() if isinstance(v, list) and v and v[0] is not None]
    except (ValueError, AttributeError) as error:
        return [f"{index} cannot be read as JSON: {error}"]
    lines = []
    for name in names:
        part = folder / name
        if not part.is_dir() or not any(part.iterdir()):
            lines.append(f"half a model: {part} is missing or empty (named in model_index.json)")
        elif name.rstrip("_0123456789") not in WEIGHTLESS:  # tokenizer_2 is one too
            lines += _weight_problems(part)
    return lines


def _weight_problems(part: Path) -> list[str]:
    config = part / "config.json"
    if not config.is_file():
        return [f"half a model: {config} is missing"]
    try:
        keys = set(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        return [f"half a model: {config} cannot be read as JSON: {error}"]
    if not keys & {"_class_name", "architectures", "model_type"}:
        # A library would build its default, which for a text encoder is billions of weights.
        return [f"half a model: {config} names no model (_class_name, architectures, model_type)"]
    lines = []
    for index in part.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            return [f"{index} is no weight index: {error!r}"]
        lines += [
            f"half a model: {part / shard} is missing (named in {index.name})"
            for shard in sorted(shards)
            if not (part / shard).is_file()
        ]
    if not lines and not any(part.glob("*.safetensors")):
        lines.append(f"half a model: {part} holds no .safetensors weights")
    return lines
