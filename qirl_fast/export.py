"""`python -m qirl_fast.export CHECKPOINT FOLDER [--model BASE]`: the trained model as a folder.

CHECKPOINT: a run's folder (its newest whole checkpoint) or a checkpoint. FOLDER: to be made; it
holds then what the base folder holds, its transformer with the trained weights, the averaged ones
where the run kept an average: a LoRA is merged in float32 and rounded once. diffusers loads it like
the base, and so does `model.path`. BASE: where the base model lies now, if it has moved.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qirl_fast.checkpoint import Checkpoint, CheckpointError, find_latest, load_checkpoint, unpack
from qirl_fast.entry import run
from qirl_fast.models import adapter_of
from qirl_fast.models.loading import load_component
from qirl_fast.models.teachers import add_lora
from qirl_fast.tiny import packaged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(checkpoint: Path, target: Path, base: str | None = None) -> Path:
    """Write the model folder `target`, whole or not at all, and return it.

    Raises FileExistsError where there is one, FileNotFoundError without a checkpoint or a base,
    ValueError where the weights are not of the base, CheckpointError for a damaged checkpoint.
    """
    if target.exists():
        raise FileExistsError(f"{target} is there already; name another folder, or remove it")
    found = find_latest(checkpoint) if (checkpoint / "checkpoints").is_dir() else None
    found = found or load_checkpoint(checkpoint)
    settings = found.state["config"]
    folder = packaged(base or settings["model.path"])
    kind = adapter_of(folder, settings["model.family"]).parts["transformer"]
    transformer = load_component(kind, folder / "transformer", torch.float32)
    if settings["model.adapter"] == "lora":
        add_lora(transformer, found.path / "lora", "trained", "checkpoint")
        transformer.fuse_lora()
        transformer.unload_lora()
    else:
        fill(transformer, found)
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(folder, beside, ignore=shutil.ignore_patterns("transformer"))
    transformer.to(DTYPES[settings["model.dtype"]]).save_pretrained(beside / "transformer")
    beside.rename(target)
    return target


def fill(transformer: Any, found: Checkpoint) -> None:
    """Put a full run's weights, or their average, in place."""
    learner = unpack(found.tensors, found.state["tree"])["learner"]
    weights: dict[str, Tensor] = learner["weights"]
    if learner["ema"]:
        weights = dict(zip(weights, learner["ema"], strict=True))
    own = dict(transformer.named_parameters())
    strange = sorted(set(weights) ^ set(own)) or [
        n for n in own if own[n].shape != weights[n].shape
    ]
    if strange:
        raise ValueError(f"{found.path} does not fit the base model: {', '.join(strange[:3])}")
    transformer.load_state_dict(weights, strict=False)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 it could not be."""

    def work(args: list[str]) -> int:
        base = None
        if "--model" in args[:-1]:
            i = args.index("--model")
            base = args[i + 1]
            del args[i : i + 2]
        if len(args) != 2 or any(arg.startswith("-") for arg in args):
            print(__doc__)
            return 2
        print(export(Path(args[0]), Path(args[1]), base))
        return 0

    return run(argv, __doc__, work, wrong=(CheckpointError, ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
