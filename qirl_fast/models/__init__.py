"""Adapters: one file per model family, the same five methods in each."""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from qirl_fast.models.adapter import Adapter

if TYPE_CHECKING:
    from qirl_fast.models.flux import Flux
    from qirl_fast.models.flux2 import Flux2
    from qirl_fast.models.qwenimage import QwenImage
    from qirl_fast.models.qwenimage21 import QwenImage21
    from qirl_fast.models.sd3 import StableDiffusion3
    from qirl_fast.models.zimage import ZImage

    Model: TypeAlias = QwenImage | QwenImage21 | StableDiffusion3 | Flux | Flux2 | ZImage
else:
    Model = Adapter

# family -> (module and class of the adapter, pipeline class of its folders). A family's module is
# imported when a folder asks for it: some of diffusers' pipelines warn of packages they miss.
FAMILIES: dict[str, tuple[str, str, str]] = {
    "qwenimage": ("qwenimage", "QwenImage", "QwenImagePipeline"),
    "qwenimage_edit": ("qwenimage_edit", "QwenImageEdit", "QwenImageEditPipeline"),
    "qwenimage_edit_plus": ("qwenimage_edit", "QwenImageEditPlus", "QwenImageEditPlusPipeline"),
    "qwenimage21": ("qwenimage21", "QwenImage21", "QwenImage21Pipeline"),
    "sd3": ("sd3", "StableDiffusion3", "StableDiffusion3Pipeline"),
    "flux": ("flux", "Flux", "FluxPipeline"),
    "flux2": ("flux2", "Flux2", "Flux2Pipeline"),
    "flux2_klein": ("flux2", "Flux2Klein", "Flux2KleinPipeline"),
    "zimage": ("zimage", "ZImage", "ZImagePipeline"),
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
        matches = [f for f, (_, _, pipeline) in FAMILIES.items() if pipeline == name]
        if not matches:
            served = ", ".join(pipeline for _, _, pipeline in FAMILIES.values())
            raise ValueError(f"{index}: no adapter for pipeline {name!r}; there are: {served}")
        family = matches[0]
    module, adapter, _ = FAMILIES[family]
    found: type[Model] = getattr(import_module(f"qirl_fast.models.{module}"), adapter)
    return found


def load_model(
    folder: str | Path, family: str, dtype: torch.dtype, device: str, spread: bool = False
) -> Model:
    """Load a local model folder; spread: its transformer on the CPU, see `Adapter.load`.

    Raises as `adapter_of`, and FileNotFoundError for a missing component.
    """
    return adapter_of(folder, family).load(folder, dtype, device, spread)
