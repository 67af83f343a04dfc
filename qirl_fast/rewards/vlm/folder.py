"""Folders: a base model in transformers' format, and a judge made from one.

<judge>/judge.json            format, base (path, null where the weights are here), dimensions
                              with their rubrics
        adapter_config.json, adapter_model.safetensors     a LoRA (PEFT), or
        config.json, model.safetensors                     a full model
        tokenizer.json, preprocessor_config.json, ...      the processor
        validation.json       how far it agrees with people, if it was measured
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
CLASSES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


@dataclass(frozen=True)
class JudgeCard:
    """judge.json. base: the folder of the base model, absolute or relative to the judge's; None
    where the weights lie beside. dimensions: dimension -> rubric it was trained with.
    """

    base: str | None
    dimensions: dict[str, str]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / "judge.json").write_text(text + "\n", encoding="utf-8")


def read_card(folder: Path) -> JudgeCard | None:
    """judge.json of a folder, None without one. ValueError for one that is damaged or newer."""
    path = folder / "judge.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        number = data["format"]
        base, dimensions = data["base"], dict(data["dimensions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); train the judge again") from error
    if number != FORMAT:
        raise ValueError(f"{path} is of format {number!r}; this version reads {FORMAT}")
    return JudgeCard(base, dimensions)


def base_of(folder: Path, card: JudgeCard | None) -> Path:
    """The folder with the base weights. FileNotFoundError, naming the way out, without one."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no such folder: {folder}; wanted a judge folder or a Qwen-VL model folder"
        )
    base = folder if card is None or card.base is None else folder / card.base
    if not (base / "config.json").is_file():
        mend = f"; mend `base` in {folder / 'judge.json'}" if base != folder else ""
        raise FileNotFoundError(f"{base} holds no config.json, so it is no model folder{mend}")
    return base


def model_class(base: Path) -> Any:
    """The transformers class of a base folder. ValueError for another model than Qwen-VL."""
    import transformers

    kind = json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"{base}: model_type is {kind!r}; wanted one of {', '.join(CLASSES)}")
    return getattr(transformers, CLASSES[kind])


def load_model(folder: str | Path, adapter: str | None, dtype: str, device: str) -> Any:
    """A judge's or base model's network for inference, adapter merged into the weights.

    dtype: "float32" or "bfloat16". Merging happens in that dtype, so in bfloat16 the merged
    weights are rounded once.
    """
    import torch

    folder = Path(folder)
    card = read_card(folder)
    base = base_of(folder, card)
    model = model_class(base).from_pretrained(base, dtype=getattr(torch, dtype))
    own = str(folder) if (folder / "adapter_config.json").is_file() else None
    for path in filter(None, (own, adapter)):
        from peft import PeftModel

        if not (Path(path) / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"{path} holds no adapter_config.json, so it is no PEFT adapter"
            )
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return model.to(device).eval().requires_grad_(False)


def load_processor(folder: str | Path) -> Any:
    """The processor of a judge or base folder, without torchvision."""
    from qirl_fast.processor import QwenVLProcessor

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        folder = base_of(folder, read_card(folder))
    processor = QwenVLProcessor.from_pretrained(folder)
    template = folder / "chat_template.json"
    if processor.chat_template is None and template.is_file():
        processor.tokenizer.chat_template = processor.chat_template = json.loads(
            template.read_text(encoding="utf-8")
        )["chat_template"]
    if processor.chat_template is None:
        raise ValueError(f"{folder} holds no chat template; take the complete folder of the model")
    return processor


def rubric_for(folder: str | Path, dimension: str) -> str | None:
    """The rubric a judge folder was trained with, None for a base model.

    ValueError for a dimension that it was not trained on.
    """
    card = read_card(Path(folder))
    if card is None:
        return None
    if dimension not in card.dimensions:
        raise ValueError(
            f"{folder} was trained on {', '.join(card.dimensions)}, not on {dimension!r}; set "
            "dimension to one of those"
        )
    return card.dimensions[dimension]


def agreement_warnings(folder: str | Path, dimension: str, least: float) -> list[str]:
    """What to tell a person before RL: held-out agreement below `least`, or not measured."""
    path = Path(folder) / "validation.json"
    if not path.is_file():
        return [
            f"{folder}: no validation.json, so nobody knows how far this judge agrees with people; "
            "train it with held-out rows, or watch it closely"
        ]
    found = _spearman(path, dimension)
    if found is None:
        return [f"{path}: no Spearman correlation for {dimension!r}; validate on that dimension"]
    if found < least:
        return [
            f"{path}: held-out Spearman correlation for {dimension!r} is {found:.3f}, below the "
            f"{least:g} that min_agreement asks for; optimising this judge may not please people"
        ]
    return []


def _spearman(path: Path, dimension: str) -> float | None:
    """The number in validation.json (qirl_fast.evaluation.agreement); None where it is undefined
    or the dimension was not validated.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))["dimensions"]
        value = tree[dimension]["spearman"]["value"] if dimension in tree else None
        return None if value is None else float(value)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); validate the judge again") from error
