"""qirl_fast: fast RL post-training of flow-matching image models.

``from qirl_fast import ops`` gives the fused ops alone, ``qirl_fast.patch(transformer)`` puts them
into a diffusers model; ``python -m qirl_fast.train`` trains.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

__version__ = version("qirl-fast")  # it stands in pyproject.toml alone


def configs_dir() -> Path:
    """Folder of the recipes (YAML): inside the installed package, or the repository's own."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no recipes at {here / 'configs'} or {here.parent / 'configs'}: the installation is "
        "incomplete; reinstall the package."
    )


def patch(transformer: Any) -> Any:
    """Swap fused blocks into a stock diffusers transformer: see `qirl_fast.models.fused.patch`."""
    from qirl_fast.models import fused  # diffusers takes seconds to import

    return fused.patch(transformer)


def unpatch(transformer: Any) -> Any:
    """Undo `patch`: see `qirl_fast.models.fused.unpatch`."""
    from qirl_fast.models import fused

    return fused.unpatch(transformer)
