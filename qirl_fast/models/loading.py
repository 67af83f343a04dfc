"""Load one component of a model folder, and refuse half of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

SHOWN = 3  # names in a message


def load_component(component: Any, folder: Path, **settings: Any) -> Any:
    """`component.from_pretrained(folder)` from local safetensors, every weight of it.

    component: a model class of diffusers or transformers; both fill weights that the files lack
    with random numbers and go on. settings: further arguments, such as the dtype.
    Raises ValueError naming the folder if files are unreadable or do not fit the config, or weights
    are missing.
    """
    loaded, info = load_part(
        component.from_pretrained,
        folder,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **settings,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        names = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(
            f"half a model: the files in {folder} lack {len(missing)} weights ({names}); "
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
