"""The last stage of the tiny model's pre-training: from drawing to drawing and editing.

It continues from a model that draws (`pretrain.py`) on batches of two kinds: text-to-image with
misread captions as at that model's end, so that it draws as before, and edits. An edit is laid out
as the stock pipeline does it: the source picture goes through the vision tower into the text
encoder together with the instruction, and its latents take the places of its slots in the prefix.
First the targets are right, then, as the learning rate falls, a share is misread (`edits.misread`):
the model then knows every word, draws clean scenes, keeps what it is not told to change, and does
what it is told only part of the time.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage21
from torch import Tensor

from qirl_fast.models.prefix import Conditioned, Prefix
from qirl_fast.models.qwenimage21 import PIXELS_PER_TOKEN, QwenImage21
from qirl_fast.tiny import edits, pretrain, scenes
from qirl_fast.tiny.edits import OPERATIONS, Edit
from qirl_fast.tiny.pretrain import Fit, Report

GRID = (scenes.SIZE // PIXELS_PER_TOKEN,) * 2


@dataclass(frozen=True)
class Recipe:
    """Sizes of the stage; the last `wrong_steps` misread a share `misread` of what edits ask for.

    edits: the share of batches that are edits. drawing: how the other batches are made.
    """

    seed: int = 0
    steps: int = 3300
    wrong_steps: int = 800
    edits: float = 0.75
    pool: int = 8192
    misread: float = 0.35
    edits_per_step: int = 32
    rows_per_edit: int = 3
    lr: float = 1.5e-3
    drawing: pretrain.Recipe = field(
        default_factory=lambda: pretrain.Recipe(dit_scenes=8192, wrong_words=0.4)
    )


def encode(
    model: QwenImage21, instructions: list[str], pictures: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Differentiable embeddings [P, L, C] and slots [P, L] of edits with a picture each.

    pictures: uint8 [P, H, W, 3]; instructions: of one token count. What the stock pipeline's
    `encode_prompt` gives for one of them, whose batches share their pictures.
    """
    pipeline = model.pipeline
    inputs = pipeline.processor(
        text=[pipeline.prompt_template_ti2i.format(text) for text in instructions],
        images=list(pictures),
        return_tensors="pt",
    )
    # The stock pipeline reads the last layer's output before the final norm.
    unnormed = pipeline.text_encoder.model.language_model.norm.register_forward_hook(
        lambda module, args, output: args[0]
    )
    try:
        hidden = pipeline.text_encoder.model(**inputs).last_hidden_state
    finally:
        unnormed.remove()
    slots = inputs["input_ids"] == pipeline._img_token_id
    return hidden[:, pipeline._drop_idx :], slots[:, pipeline._drop_idx :]


class Pool:
    """Edits with their source pictures, latents of sources and targets, by token count."""

    def __init__(self, model: QwenImage21, recipe: Recipe, misread: float, report: Report):
        rng = np.random.default_rng([recipe.seed, int(1000 * misread), 1])
        kept_away = edits.asked_keys()
        self.pictures: list[np.ndarray] = []
        self.instructions: list[str] = []
        targets: list[np.ndarray] = []
        while len(targets) < recipe.pool:
            edit = edits.random_edit(OPERATIONS[len(targets) % len(OPERATIONS)], rng)
            if edit.key in kept_away:
                continue
            self.pictures.append(edits.picture(edit.source))
            self.instructions.append(str(rng.choice(edit.wordings())))
            targets.append(edits.picture(_after(edit, misread, rng)))
        self.sources = _encode_in_parts(model.vae, self.pictures, report, f"edits {misread:.0%}")
        self.targets = _encode_in_parts(model.vae, targets, report, f"targets {misread:.0%}")
        tokenize = model.pipeline.processor.tokenizer.tokenize
        by_count: dict[int, list[int]] = {}
        for i, text in enumerate(self.instructions):
            by_count.setdefault(len(tokenize(text)), []).append(i)
        self.same_count = {i: ids for ids in by_count.values() for i in ids}

    def batch(
        self, model: QwenImage21, recipe: Recipe, rng: np.random.Generator
    ) -> tuple[Prefix, Tensor]:
        """Differentiable prefix and latents of one step; all instructions go at a chance."""
        same = self.same_count[int(rng.integers(len(self.instructions)))]
        picks = rng.choice(same, recipe.edits_per_step)
        dropped = rng.random() < recipe.drawing.drop_text
        instructions = [" " if dropped else self.instructions[i] for i in picks]
        text, slots = encode(model, instructions, np.stack([self.pictures[i] for i in picks]))
        prompts = [
            Conditioned(*parts, (GRID,))
            for parts in zip(text, slots, self.sources[picks], strict=True)
        ]
        owner = np.repeat(np.arange(len(picks)), recipe.rows_per_edit)
        prefix = model.prefix(prompts, owner.tolist(), scenes.SIZE, scenes.SIZE)
        return prefix, self.targets[picks[owner]]


def _after(edit: Edit, misread: float, rng: np.random.Generator) -> edits.Scene:
    return edits.misread(edit, misread, rng) if misread else edit.target


def _encode_in_parts(
    vae: AutoencoderKLQwenImage21, pictures: list[np.ndarray], report: Report, name: str
) -> Tensor:
    parts = []
    for start in range(0, len(pictures), 256):
        parts.append(pretrain.latents_of(vae, np.stack(pictures[start : start + 256])))
        report(name, start + len(parts[-1]), len(pictures), {})
    return torch.cat(parts)


def train(model: QwenImage21, recipe: Recipe, report: Report) -> None:
    """Continue in place, the vision tower included; ends on averaged weights."""
    drawing = recipe.drawing
    right_steps = recipe.steps - recipe.wrong_steps
    scenes_ = pretrain.Pool(model, drawing, drawing.wrong_words, report)
    right = Pool(model, recipe, 0.0, report)
    wrong = Pool(model, recipe, recipe.misread, report)

    def draw(step: int, rng: np.random.Generator) -> tuple[Prefix, Tensor]:
        if rng.random() >= recipe.edits:
            return scenes_.batch(model, drawing, rng)
        return (right if step < right_steps else wrong).batch(model, recipe, rng)

    fit = Fit("editing", recipe.steps, recipe.wrong_steps, recipe.lr)
    modules = [model.transformer, model.pipeline.text_encoder.model]
    rng = np.random.default_rng(recipe.seed + 3)
    pretrain.match_flow(model, modules, draw, fit, rng, report)
