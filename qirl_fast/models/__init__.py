"""Adapters: one file per model family, the same five methods in each."""

import json
from pathlib import Path

import torch

from qirl_fast.models.flux import Flux
from qirl_fast.models.flux2 import Flux2, Flux2Klein
from qirl_fast.models.qwenimage import QwenImage
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.models.qwenimage_edit import QwenImageEdit, QwenImageEditPlus
from qirl_fast.models.sd3 import StableDiffusion3
from qirl_fast.models.zimage import ZImage

Model = QwenImage | QwenImage21 | StableDiffusion3 | Flux | Flux2 | ZImage
FAMILIES: dict[str, type[Model]] = {
    adapter.family: adapter
    for adapter in (
        QwenImage,
        QwenImageEdit,
        QwenImageEditPlus,
        QwenImage21,
        StableDiffusion3,
        Flux,
        Flux2,
        Flux2Klein,
        ZImage,
    )
}


def adapter_of(folder: str | Path, family: str) -> type[Model]:
    """The adapter of a local model folder; family "auto" reads the class in model_index.json.

    Raises FileNotFoundError for a missing folder or index, ValueError for a pipeline class no
    adapter serves.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json: not a diffusers model folder")
    if family == "auto":
        name = json.loads(index.read_text()).get("_class_name")
        matches = [f for f, adapter in FAMILIES.items() if adapter.pipeline_class.__name__ == name]
        if not matches:
            served = ", ".join(a.pipeline_class.__name__ for a in FAMILIES.values())
            raise ValueError(f"{index}: no adapter for pipeline {name!r}; there are: {served}")
        family = matches[0]
    return FAMILIES[family]


def load_model(folder: str | Path, family: str, dtype: torch.dtype, device: str) -> Model:
    """Load a local model folder.

    Raises as `adapter_of`, and FileNotFoundError for a missing component.
    """
    return adapter_of(folder, family).load(folder, dtype, device)
