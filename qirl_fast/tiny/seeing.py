"""Pre-training of the tiny judge's base: it learns to see and to read, and is never shown a rating.

One picture a sequence: describe it quarter by quarter; in every other batch, answer questions on
how many of a thing there are and whether one stands so to another, and say some words after the
user, which makes it read, copy and know its vocabulary. Loss on the answers alone.
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
WORDS = (*COLORS, *SHAPES, *RELATIONS, *NUMBERS, "extra", "odd shape", "edges", "colors")
TELLS = ("yes", "partly", "no", "none", "one", "two", "many", "good", "fair", "bad")
STEPS = {"left of": 1, "right of": -1, "above": 2, "below": -2}  # to the quarter related to


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


def is_named(thing: Quarter) -> bool:
    """Whether it is of a named colour and a named shape."""
    return thing is not None and thing[0] != "odd" and thing[1] != "shape"


def beside(cell: int, relation: str) -> int | None:
    """The quarter that `cell` is left of, right of, above or below; None at the border."""
    other = cell + STEPS[relation]
    in_line = abs(STEPS[relation]) == 2 or cell // 2 == other // 2
    return other if 0 <= other < 4 and in_line else None


def stands(quarters: list[Quarter], a: Quarter, relation: str, b: Quarter) -> bool:
    """Whether some `a` is `relation` some `b`, side by side or one above the other."""
    return any(
        is_there(quarters, a, cell) and other is not None and is_there(quarters, b, other)
        for cell in range(4)
        for other in [beside(cell, relation)]
    )


def question(quarters: list[Quarter], rng: np.random.Generator) -> tuple[str, str]:
    """A question on the picture and its answer; things asked for are mostly in it."""
    here = [cell for cell in range(4) if is_named(quarters[cell])]

    def thing(cell: int | None) -> tuple[str, str]:
        found = None if cell is None else quarters[cell]
        color, shape = found or (str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)))
        return ("" if rng.random() < 0.35 else color), shape

    def any_cell() -> int | None:
        return here[rng.integers(len(here))] if here and rng.random() < 0.7 else None

    if rng.random() < 0.5:
        a = thing(any_cell())
        count = sum(is_there(quarters, a, cell) for cell in range(4))
        return f"How many {' '.join(a).strip()}s?", NUMBERS[count]
    relation = RELATIONS[rng.integers(4)]
    pairs = [(c, beside(c, relation)) for c in here if beside(c, relation) in here]
    first, second = any_cell(), any_cell()
    if pairs and rng.random() < 0.6:
        first, second = pairs[rng.integers(len(pairs))]
    a, b = thing(first), thing(second)
    asked = f"Is there a {' '.join(a).strip()} {relation} a {' '.join(b).strip()}?"
    return asked, "yes" if stands(quarters, a, relation, b) else "no"


def phrase(rng: np.random.Generator) -> tuple[str, str]:
    """Random words to say after the user, and a random number; nothing about the picture."""
    picked = [(rng.choice(WORDS), rng.choice(TELLS)) for _ in range(rng.integers(1, 4))]
    said = ", ".join(f"{word} {tell}" for word, tell in picked) + "."
    if rng.random() < 0.7:
        said += f"\nScore: {rng.integers(1, 6)}"
    return f"Say: {said}", said


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
        """Description of picture i; with questions on it, words to say after these."""
        described = (DESCRIBE, pictures.words(self.quarters[i]))
        if not questions:
            return [described]
        asked = [question(self.quarters[i], rng) for _ in range(questions)]
        return [described, *asked, phrase(rng)]

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
