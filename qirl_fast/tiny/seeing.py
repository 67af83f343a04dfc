"""Pre-training of the tiny judge's base: it learns to see and to read, and is never shown a rating.

One picture a sequence: describe it quarter by quarter, then, in every other batch, answer questions
on how many of a thing there are and whether one stands so to another. Loss on the answers alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from qirl_fast.processor import QwenVLProcessor
from qirl_fast.tiny import pictures
from qirl_fast.tiny.pictures import Quarter
from qirl_fast.tiny.scenes import COLORS, RELATIONS, SHAPES

Report = Callable[[str, int, int, dict[str, float]], None]

DESCRIBE = "Describe the image."
NUMBERS = ("none", "one", "two", "three", "four")
IMAGE = f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>"  # 64 x 64 pixels: four tokens
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Sizes of one pre-training run."""

    seed: int = 0
    pictures: int = 10000
    steps: int = 500
    batch: int = 64
    lr: float = 3e-3
    questions: int = 2


def is_there(quarters: list[Quarter], thing: Quarter, cell: int) -> bool:
    """Whether quarter `cell` holds the thing, whose colour may be free ("")."""
    here = quarters[cell]
    return bool(here and thing and here[1] == thing[1] and thing[0] in ("", here[0]))


def stands(quarters: list[Quarter], a: Quarter, relation: str, b: Quarter) -> bool:
    """Whether some `a` is `relation` some `b`, side by side or one above the other."""
    step = {"left of": 1, "right of": -1, "above": 2, "below": -2}[relation]
    return any(
        is_there(quarters, a, cell) and is_there(quarters, b, cell + step)
        for cell in range(4)
        if 0 <= cell + step < 4 and (abs(step) == 2 or cell // 2 == (cell + step) // 2)
    )


def question(quarters: list[Quarter], rng: np.random.Generator) -> tuple[str, str]:
    """A question on the picture and its answer; things asked for are mostly in it."""
    here = [q for q in quarters if q and q[0] != "odd" and q[1] != "shape"]

    def thing() -> tuple[str, str]:
        if here and rng.random() < 0.7:
            color, shape = here[rng.integers(len(here))]
        else:
            color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
        return ("" if rng.random() < 0.35 else color), shape

    a, b = thing(), thing()
    noun, other = (f"{t[0]} {t[1]}".strip() for t in (a, b))
    if rng.random() < 0.5:
        count = sum(is_there(quarters, a, cell) for cell in range(4))
        return f"How many {noun}s?", NUMBERS[count]
    relation = RELATIONS[rng.integers(4)]
    met = stands(quarters, a, relation, b)
    return f"Is there a {noun} {relation} a {other}?", "yes" if met else "no"


class Sequences:
    """Tokenized conversations: pictures, with questions that are drawn anew every time."""

    def __init__(self, processor: QwenVLProcessor, recipe: Recipe, report: Report):
        self.processor, self.questions = processor, recipe.questions
        rng = np.random.default_rng([recipe.seed, 1])
        self.images, self.quarters = [], []
        for i in range(recipe.pictures):
            strength = 0.0 if rng.random() < 0.3 else rng.uniform(0.2, 1.0)
            image = pictures.spoil(pictures.random_scene(rng), strength, rng)
            self.images.append(image)
            self.quarters.append(pictures.look(image))
            if (i + 1) % 100 == 0 or i + 1 == recipe.pictures:
                report("pictures", i + 1, recipe.pictures, {})

    def turns(self, i: int, questions: int, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Description of picture i, then questions on it."""
        described = (DESCRIBE, pictures.words(self.quarters[i]))
        return [described, *(question(self.quarters[i], rng) for _ in range(questions))]

    def encode(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids and labels; labels hold the answers and their end tokens, else IGNORED."""
        ids: list[int] = []
        labels: list[int] = []
        for n, (asked, answer) in enumerate(turns):
            head = (
                f"<|im_start|>user\n{'' if n else IMAGE}{asked}<|im_end|>\n<|im_start|>assistant\n"
            )
            for text, learnt in ((head, False), (f"{answer}<|im_end|>", True), ("\n", False)):
                own = self.processor.tokenizer(text)["input_ids"]
                ids += own
                labels += own if learnt else [IGNORED] * len(own)
        return ids, labels

    def batch(
        self, chosen: np.ndarray, questions: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Model inputs and labels, right-padded, of the chosen pictures."""
        encoded = [self.encode(self.turns(i, questions, rng)) for i in chosen]
        length = max(len(ids) for ids, _ in encoded)
        pad = self.processor.tokenizer.pad_token_id
        ids_BL = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in encoded])
        labels_BL = torch.tensor([own + [IGNORED] * (length - len(own)) for _, own in encoded])
        mask_BL = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i, _ in encoded])
        return {
            "input_ids": ids_BL,
            "attention_mask": mask_BL,
            "labels": labels_BL,
            "mm_token_type_ids": (ids_BL == self.processor.image_token_id).long(),
            **inputs_of(self.processor, [self.images[i] for i in chosen]),
        }


def inputs_of(processor: QwenVLProcessor, images: list[np.ndarray]) -> dict[str, Tensor]:
    """pixel_values and image_grid_thw of pictures of one size."""
    return dict(processor.image_processor(images=images, return_tensors="pt"))


def pretrain(
    model: Qwen3VLForConditionalGeneration,
    processor: QwenVLProcessor,
    recipe: Recipe,
    report: Report,
) -> None:
    """Train every weight in place; AdamW, warm-up, then linear decay to nothing."""
    data = Sequences(processor, recipe, report)
    rng = np.random.default_rng([recipe.seed, 2])
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.lr, betas=(0.9, 0.98), weight_decay=0.02
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, (recipe.steps - step) / recipe.steps)
    )
    model.train()
    order: list[int] = []
    for step in range(recipe.steps):
        if len(order) < recipe.batch:
            order = rng.permutation(len(data.images)).tolist()
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        loss = model(**data.batch(np.array(chosen), recipe.questions * (step % 2), rng)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report("seeing", step + 1, recipe.steps, {"loss": loss.item()})
    model.eval()
