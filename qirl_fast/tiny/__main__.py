"""`python -m qirl_fast.tiny build`: make the packaged tiny model and its prompt files anew."""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import QwenImage21Pipeline
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.tiny import HERE, pretrain, scenes
from qirl_fast.tiny import model as tiny


def write_prompts(folder: Path) -> None:
    """train, validation and heldout prompt files, GenEval JSONL, disjoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in scenes.split_rows().items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_model(model: QwenImage21, folder: Path) -> int:
    """Save a stock pipeline folder; returns its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "text_encoder", "transformer", "scheduler", "processor"):
        getattr(model.pipeline, name).save_pretrained(folder / name)
    tiny.write_model_index(folder)
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def build(output: Path, recipe: pretrain.Recipe) -> None:
    """Train everything from `recipe.seed` and write weights/ and prompts/ under `output`."""
    start = time.monotonic()
    write_prompts(output / "prompts")
    with Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    ) as progress:
        tasks: dict[str, tuple[object, list[float]]] = {}

        def report(phase: str, step: int, total: int, values: dict[str, float]) -> None:
            if phase not in tasks:
                tasks[phase] = (progress.add_task(phase, total=total, note=""), [])
            task, losses = tasks[phase]
            losses += values.values()
            note = f"loss {sum(losses[-100:]) / len(losses[-100:]):.4f}" if losses else ""
            progress.update(task, completed=step, note=note)  # type: ignore[arg-type]

        torch.manual_seed(recipe.seed)
        processor = tiny.build_processor()
        vae = tiny.build_vae()
        psnr = pretrain.train_vae(vae, recipe, report)
        torch.manual_seed(recipe.seed)
        pipeline = QwenImage21Pipeline(
            tiny.build_scheduler(),
            vae,
            tiny.build_text_encoder(processor),
            processor,
            tiny.build_transformer(),
        )
        model = QwenImage21(pipeline)
        pretrain.train_dit(model, recipe, report)
    size = write_model(model, output / "weights")
    minutes = (time.monotonic() - start) / 60
    print(
        f"built {output / 'weights'}: {size / 1e6:.1f} MB, autoencoder {psnr:.1f} dB, "
        f"{minutes:.1f} minutes on {torch.get_num_threads()} threads"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qirl_fast.tiny", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="pre-train the tiny model and write its files")
    command.add_argument(
        "--output",
        type=Path,
        default=HERE,
        help="gets weights/ and prompts/ (default: here)",
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--quick", action="store_true", help="a few steps only: checks the path, draws nothing"
    )
    args = parser.parse_args()
    recipe = pretrain.Recipe(seed=args.seed)
    if args.quick:
        recipe = pretrain.Recipe(
            seed=args.seed, vae_steps=5, vae_scenes=320, dit_steps=5, wrong_steps=2, dit_scenes=512
        )
    build(args.output, recipe)


if __name__ == "__main__":
    main()
