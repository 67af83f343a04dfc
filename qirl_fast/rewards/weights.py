"""Weights of a judge from a local folder: safetensors alone, and every key accounted for.

A pickle can run code when it is opened, so .pt, .pth and .bin files are refused with the command
that turns one into safetensors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
CONVERT = """\
python - <<'END'
import torch
from safetensors.torch import save_file
state = torch.load({source!r}, map_location="cpu", weights_only=True)
state = state.get("state_dict", state)
save_file({{k: v.clone().contiguous() for k, v in state.items()}}, {target!r})
END"""


def folder_of(path: str, files: Sequence[str], what: str) -> Path:
    """The folder; FileNotFoundError unless it is there and holds `files`."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is no folder; wanted the local folder of {what}")
    if missing := [name for name in files if not (folder / name).is_file()]:
        there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{path} lacks {', '.join(missing)}, which {what} wants; it holds: {there}"
        )
    return folder


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, on the CPU, of model.safetensors, of its shards, or of the one .safetensors.

    FileNotFoundError if there is none or the choice is not clear; it tells how to convert a pickle.
    """
    from safetensors.torch import load_file

    every = sorted(folder.glob("*.safetensors"))
    whole = [p for p in every if p.name == "model.safetensors"]
    files = whole or [p for p in every if p.name.startswith("model-")] or every
    if len(files) > 1 and not files[0].name.startswith("model-"):
        names = ", ".join(p.name for p in files)
        raise FileNotFoundError(
            f"{folder} holds {names}; call the one to use model.safetensors, or keep it alone"
        )
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file{_how_to_convert(folder)}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_keys(have: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    """ValueError, naming some, unless both have the same keys with tensors of the same shapes."""
    faults = [f"{k} is missing" for k in want if k not in have]
    faults += [f"{k} is not known" for k in have if k not in want]
    faults += [
        f"{k} is {tuple(have[k].shape)}, wanted {tuple(t.shape)}"
        for k, t in want.items()
        if k in have and have[k].shape != t.shape
    ]
    if faults:
        more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(
            f"the weights do not fit the model: {'; '.join(faults[:4])}{more}; check that the "
            "config file and the weights in the folder belong together"
        )


def _how_to_convert(folder: Path) -> str:
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if not pickles:
        return ""
    command = CONVERT.format(source=str(pickles[0]), target=str(folder / "model.safetensors"))
    return (
        f", and {pickles[0].name} is a pickle, which is not opened here; convert it once:\n"
        f"{command}"
    )
