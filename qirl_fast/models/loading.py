"""Load one component of a model folder, and refuse half of one."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

SHOWN = 3  # names in a message


def load_component(component: Any, folder: Path, **settings: Any) -> Any:
    """`component.from_pretrained(folder)` from local safetensors, every weight of it.

    component: a model class of diffusers or transformers; both fill weights that the files lack
    with random numbers and go on. settings: further arguments, such as the dtype.
    Raises ValueError naming the folder if files are unreadable or do not fit the config, or weights
    are missing.
    """
    try:
        loaded, info = component.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"half a model: {folder} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        names = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(
            f"half a model: the files in {folder} lack {len(missing)} weights ({names}); "
            "fetch the folder again"
        )
    return loaded
