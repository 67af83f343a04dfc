"""`python -m qirl_fast.tiny build | edits | judge | ratings | faces`: what is packaged, made anew.

build: the tiny model and its prompt files. edits: the last stage of build alone, from a model that
draws. judge: the base of the tiny judge, pre-trained to see.
ratings: a simulated rating set to fine-tune it on, with `python -m qirl_fast.train_reward`.
faces: the detector and the embedder of drawn faces, ONNX files; wants qirl-fast[faces-build].
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import QwenImage21Pipeline
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qirl_fast.models import load_model
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.tiny import (
    HERE,
    edits,
    face_training,
    faces,
    pretrain,
    pretrain_edits,
    ratings,
    scenes,
    seeing,
    vlm,
)
from qirl_fast.tiny import model as tiny


def write_prompts(folder: Path) -> None:
    """train, validation and heldout prompt files, GenEval JSONL, disjoint; the same for edits."""
    (folder / "edits").mkdir(parents=True, exist_ok=True)
    files = scenes.split_rows()
    for name, pairs in edits.split_edits().items():
        files[f"edit-{name}"] = [row for row, _ in pairs]
        for row, picture in pairs:
            Image.fromarray(picture).save(folder / row["image"], optimize=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_model(model: QwenImage21, folder: Path) -> int:
    """Save a stock pipeline folder; returns its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "text_encoder", "transformer", "scheduler", "processor"):
        getattr(model.pipeline, name).save_pretrained(folder / name)
    tiny.write_model_index(folder)
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def write_weights(model: QwenImage21, base: Path, folder: Path) -> int:
    """Copy the folder `base` with this model's text encoder and transformer in place of its own.

    Returns the size in bytes. Configurations stay those of `base`: a loaded model's would name the
    folder it came from.
    """
    shutil.copytree(base, folder, dirs_exist_ok=True)
    for name in ("text_encoder", "transformer"):
        with tempfile.TemporaryDirectory() as saved:
            getattr(model.pipeline, name).save_pretrained(saved)
            for file in Path(saved).glob("*.safetensors"):
                shutil.copy(file, folder / name)
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@contextmanager
def shown() -> Iterator[pretrain.Report]:
    """A reporter that draws a progress bar for each phase."""
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
            progress.update(task, completed=step, total=total, note=note)  # type: ignore[arg-type]

        yield report


def build(output: Path, recipe: pretrain.Recipe, editing: pretrain_edits.Recipe) -> None:
    """Train everything from `recipe.seed` and write weights/ and prompts/ under `output`."""
    start = time.monotonic()
    write_prompts(output / "prompts")
    with shown() as report:
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
        torch.manual_seed(editing.seed)
        pretrain_edits.train(model, editing, report)
    size = write_model(model, output / "weights")
    minutes = (time.monotonic() - start) / 60
    print(
        f"built {output / 'weights'}: {size / 1e6:.1f} MB, autoencoder {psnr:.1f} dB, "
        f"{minutes:.1f} minutes on {torch.get_num_threads()} threads"
    )


def build_edits(base: Path, output: Path, recipe: pretrain_edits.Recipe) -> None:
    """Teach the QwenImage21 model in `base` to edit; write weights/ and prompts/ under `output`."""
    start = time.monotonic()
    write_prompts(output / "prompts")
    torch.manual_seed(recipe.seed)
    model = load_model(base, "qwenimage21", torch.float32, "cpu")
    assert isinstance(model, QwenImage21)
    with shown() as report:
        pretrain_edits.train(model, recipe, report)
    size = write_weights(model, base, output / "weights")
    minutes = (time.monotonic() - start) / 60
    print(
        f"built {output / 'weights'} from {base}: {size / 1e6:.1f} MB, {minutes:.1f} minutes "
        f"on {torch.get_num_threads()} threads"
    )


def build_judge(output: Path, recipe: seeing.Recipe) -> None:
    """Pre-train the judge's base from `recipe.seed` and write a transformers folder."""
    start, used = time.monotonic(), time.process_time()
    torch.manual_seed(recipe.seed)
    processor = vlm.build_processor()
    model = vlm.build_model(processor)
    with shown() as report:
        seeing.pretrain(model, processor, recipe, report)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    print(
        f"built {output}: {size / 1e6:.1f} MB, {(time.monotonic() - start) / 60:.1f} minutes, "
        f"{(time.process_time() - used) / 60:.1f} of the CPU, {torch.get_num_threads()} threads"
    )


def build_ratings(output: Path, recipe: ratings.Recipe) -> None:
    """Draw and rate the set, and write it."""
    with shown() as report:
        known = ratings.write(ratings.rated(recipe, report), output)
    for split in ("train", "heldout"):
        if split in known:
            print(
                f"{split}: {known[split]['rows']} ratings, Spearman of truth and score "
                f"{known[split]['spearman_truth_score']:.3f}"
            )
    print(f"written: {output / 'ratings.jsonl'}")


def build_faces(output: Path, recipe: face_training.Recipe) -> None:
    """Train the models of drawn faces and write them."""
    start, used = time.monotonic(), time.process_time()
    with shown() as report:
        face_training.build(output, recipe, report)
    size = sum(f.stat().st_size for f in output.glob("*.onnx"))
    print(
        f"built {output}: {size / 1e3:.0f} kB, {(time.monotonic() - start) / 60:.1f} minutes, "
        f"{(time.process_time() - used) / 60:.1f} of the CPU, {torch.get_num_threads()} threads"
    )


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m qirl_fast.tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True)
    quick = "a few steps only: checks the path, learns nothing"
    build_ = commands.add_parser("build", help="pre-train the tiny model and write its files")
    build_.add_argument(
        "--output", type=Path, default=HERE, help="gets weights/ and prompts/ (default: here)"
    )
    edits_ = commands.add_parser("edits", help="teach a tiny model that draws to edit as well")
    edits_.add_argument("--base", type=Path, required=True, help="its folder")
    edits_.add_argument("--output", type=Path, required=True, help="gets weights/ and prompts/")
    judge_ = commands.add_parser("judge", help="pre-train the tiny judge's base")
    judge_.add_argument("--output", type=Path, required=True, help="gets the model folder")
    faces_ = commands.add_parser("faces", help="train the models of drawn faces")
    faces_.add_argument("--output", type=Path, default=faces.MODELS, help="gets *.onnx")
    for command in (build_, edits_, judge_, faces_):
        command.add_argument("--quick", action="store_true", help=quick)
    ratings_ = commands.add_parser("ratings", help="draw and rate a set for train_reward")
    ratings_.add_argument("--output", type=Path, required=True, help="gets ratings.jsonl, images/")
    default = ratings.Recipe()
    ratings_.add_argument("--train", type=int, default=default.train, help="training rows")
    ratings_.add_argument("--heldout", type=int, default=default.heldout, help="held-out rows")
    for command in (build_, edits_, judge_, ratings_, faces_):
        command.add_argument("--seed", type=int, default=0)
    return whole


def main() -> None:
    args = parser().parse_args()
    if args.command == "ratings":
        build_ratings(
            args.output, ratings.Recipe(seed=args.seed, train=args.train, heldout=args.heldout)
        )
    elif args.command == "faces":
        faces_recipe = face_training.Recipe(seed=args.seed)
        if args.quick:
            faces_recipe = face_training.Recipe(args.seed, 8, 2, 4, 8, 2, 2, 4)
        build_faces(args.output, faces_recipe)
    elif args.command == "judge":
        recipe = seeing.Recipe(seed=args.seed)
        if args.quick:
            recipe = replace(recipe, pictures=64, steps=3, batch=8)
        build_judge(args.output, recipe)
    else:
        drawing = pretrain.Recipe(seed=args.seed)
        editing = pretrain_edits.Recipe(seed=args.seed)
        if args.quick:
            drawing = replace(
                drawing, vae_steps=5, vae_scenes=320, dit_steps=5, wrong_steps=2, dit_scenes=512
            )
            few = replace(editing.drawing, dit_scenes=256)
            editing = replace(editing, steps=4, wrong_steps=2, pool=64, drawing=few)
        if args.command == "build":
            build(args.output, drawing, editing)
        else:
            build_edits(args.base, args.output, editing)


if __name__ == "__main__":
    main()
