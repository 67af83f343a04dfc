"""Load one component of a model folder, and refuse half of one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

SHOWN = 3  # names in a message


def load_component(component: Any, folder: Path, dtype: torch.dtype) -> Any:
    """`component.from_pretrained(folder)` from local safetensors, every weight of it and no other.

    component: a model class of diffusers or transformers; both fill weights that the files lack
    with random numbers, pass over weights that the config does not name, and go on.
    Raises ValueError naming the folder if files are unreadable, config and files are of different
    models, or weights are missing or left over.
    """
    load_part(lambda path: _check_config(component, path), folder)
    loaded, info = load_part(
        component.from_pretrained,
        folder,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **{"torch_dtype" if hasattr(component, "load_config") else "dtype": dtype},
    )
    for kind, says in (("missing_keys", "lack"), ("unexpected_keys", "hold, beyond the config,")):
        keys = sorted(info[kind])
        if keys:
            names = ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
            raise ValueError(
                f"half a model: the files in {folder} {says} {len(keys)} weights ({names}); "
                "fetch the folder again"
            )
    return loaded


def load_part(load: Callable[..., Any], folder: Path, **settings: Any) -> Any:
    """`load(folder)`; whatever a library raises for broken files becomes a ValueError naming it."""
    try:
        return load(folder, **settings)
    except Exception as error:  # tokenizers raises bare Exception, configs KeyError and TypeError
        reason = str(error) or repr(error)
        raise ValueError(f"half a model: {folder} cannot be loaded: {reason}") from error


def check_class(folder: Path, file: str, key: str, wanted: str) -> None:
    """ValueError unless `key` in the JSON `file` of the folder says `wanted`."""
    named = json.loads((folder / file).read_text(encoding="utf-8")).get(key)
    if named != wanted:
        raise ValueError(f"{file} names {key} {named!r}; wanted {wanted!r}")


def described_model(component: Any, folder: Path) -> Any:
    """The component that the config in the folder describes, on the meta device: no memory."""
    with torch.device("meta"):
        if hasattr(component, "load_config"):  # diffusers
            check_class(folder, "config.json", "_class_name", component.__name__)
            return component.from_config(component.load_config(folder, local_files_only=True))
        check_class(folder, "config.json", "model_type", component.config_class.model_type)
        return component(component.config_class.from_pretrained(folder))


def _check_config(component: Any, folder: Path) -> None:
    """The config is this component's and describes about as many weights as the files hold.

    A config without sizes describes the library's default, often billions of weights: found out
    here, on the meta device, before memory is asked for them.
    """
    model = described_model(component, folder)
    described, held = sum(p.numel() for p in model.parameters()), 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            held += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    if described > 1.5 * held:
        raise ValueError(f"the config describes {described:,} weights, the files hold {held:,}")
