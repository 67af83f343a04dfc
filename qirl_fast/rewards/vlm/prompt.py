"""Conversation -> tokens, the same for training and for judging.

One user turn: the images in order, then the text; the assistant's turn is open. The five score
tokens are those after "Score: ": each digit has to be one token there.

Shapes: L tokens of a conversation, P image patches, I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qirl_fast.rewards.vlm.rubric import LEAD, SCALE
from qirl_fast.rewards.vlm.score import NO, YES


@dataclass(frozen=True)
class Prompt:
    """Tokens of an opened conversation. ids, kinds (1 at image tokens): int64 [1, L].
    pixels: [P, channels * temporal * patch * patch]. grids: int64 [I, 3].
    sources_end: tokens before the result image's turn in the text, 0 where it comes first.
    """

    ids: Tensor
    kinds: Tensor
    pixels: Tensor
    grids: Tensor
    sources_end: int


def build_prompt(processor: Any, images: Sequence[np.ndarray], text: str) -> Prompt:
    """images: uint8 [h, w, 3], condition images first, at least one. ValueError from the processor
    for an image it cannot take (an aspect ratio above 200, say).
    """
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    talk = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    out = processor(text=talk, images=list(images), return_tensors="pt")
    ids, kinds = out["input_ids"], out["mm_token_type_ids"]
    starts = (kinds[0] > torch.cat([kinds.new_zeros(1), kinds[0, :-1]])).nonzero()[:, 0]
    if len(starts) != len(images):
        raise ValueError(
            f"the chat template shows {len(starts)} images of {len(images)}; wanted one slot each"
        )
    # The token before an image's own opens its slot.
    end = int(starts[-1]) - 1 if len(images) > 1 else 0
    return Prompt(ids, kinds, out["pixel_values"], out["image_grid_thw"], end)


def positions(
    model: Any, ids: Tensor, kinds: Tensor, grids: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Rotary positions int64 [3, B, L] of conversations [B, L], all their images in `grids`."""
    where, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask
    )
    return torch.as_tensor(where)


def encode(processor: Any, text: str) -> list[int]:
    """Token ids of plain text, nothing added."""
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def score_ids(processor: Any) -> list[int]:
    """The ids of "1".."5" after "Score: ". ValueError for a tokenizer that merges them."""
    lead = encode(processor, LEAD)
    found = []
    for digit in SCALE:
        ids = encode(processor, LEAD + digit)
        if ids[:-1] != lead or len(ids) != len(lead) + 1:
            raise ValueError(
                f"the tokenizer writes {LEAD + digit!r} as {ids}, not as {lead} and one token: no "
                "score token to read; wanted a tokenizer that splits digits, as Qwen's do"
            )
        found.append(ids[-1])
    return found


def word_ids(processor: Any) -> dict[str, int]:
    """Ids of those spellings of yes and no that are one token.

    ValueError where one of the two words has none.
    """
    found = {}
    for word in (*YES, *NO):
        ids = encode(processor, word)
        if len(ids) == 1:
            found[word] = ids[0]
    if not (found.keys() & set(YES) and found.keys() & set(NO)):
        raise ValueError(
            "the tokenizer has no single token for Yes or for No: reading yes_no fails"
        )
    return found
