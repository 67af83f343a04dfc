"""Loss of fine-tuning a judge: the score's error, and the rationale's text.

One sample is a conversation with the answer "{rationale}\\nScore: {N}" and the end token. With
p_s the softmax over the five score tokens at the score token's place and t the label in [1, 5]:
    expected = sum_s s p_s
    L = w_score (expected - t)^2 + w_text CE
CE is the mean, over the tokens of "{rationale}\\nScore: " and of the end, of the next-token
cross-entropy (teacher forced), and, as one term more of that mean, -log of the probability at the
score's place that any of the five comes: which of them is the squared error's business, that it is
one of them is the text's. The N that is fed for the end token is the label rounded to the nearest.
A sample shown without its rationale is given "Score: ", as a judge with reasonings: 0 is; its CE
begins at the score token. Learnt, the lead would be one of some five terms, the first word of a
rationale one of some fifty: even a few such samples would teach the judge never to reason.
A batch's loss is the mean over its samples, each weighing the same whatever it is batched with, so
accumulating micro-batches gives the gradient of one big batch (to rounding).

Logits, softmax and sums are in float32. Rows are padded on the right; attention is causal, so a
sample's numbers do not see the padding.

Shapes: B samples, L tokens, T answer tokens that are predicted, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qirl_fast.rewards.vlm.prompt import build_prompt, encode, positions
from qirl_fast.rewards.vlm.rubric import answer


@dataclass(frozen=True)
class Sample:
    """Tokens of one conversation with its answer. ids, kinds: int64 [L]. pixels, grids: see
    `prompt.Prompt`. start: the first answer token that is learnt; place: the score token.
    target: the label.
    """

    ids: Tensor
    kinds: Tensor
    pixels: Tensor
    grids: Tensor
    start: int
    place: int
    target: float


@dataclass(frozen=True)
class Losses:
    """Of each sample of a batch, float32 [B]; `total` carries the gradient."""

    total: Tensor
    squared: Tensor
    text: Tensor
    expected: Tensor
    outside: Tensor


def build_sample(
    processor: Any, ids5: Sequence[int], images: Sequence[np.ndarray], text: str, label: Any
) -> Sample:
    """label: (rationale, score in [1, 5]); rationale None: shown without, "Score: " is given; "":
    the judge is to say "Score: " at once. ids5: of the digits, see `prompt.score_ids`.
    """
    rationale, score = label
    prompt = build_prompt(processor, images, text)
    digit = ids5[int(np.floor(score + 0.5)) - 1]
    before = encode(processor, answer(rationale or ""))
    tail = torch.tensor([*before, digit, processor.tokenizer.eos_token_id])
    start = prompt.ids.shape[1]
    ids = torch.cat([prompt.ids[0], tail])
    kinds = torch.cat([prompt.kinds[0], torch.zeros_like(tail)])
    place = start + len(before)
    first = place if rationale is None else start
    return Sample(ids, kinds, prompt.pixels, prompt.grids, first, place, float(score))


def batch_losses(
    model: Any, samples: Sequence[Sample], ids5: Sequence[int], w_score: float, w_text: float
) -> Losses:
    """Losses of some samples in one forward of a Qwen-VL model (not wrapped by PEFT)."""
    device, pad = model.device, 0
    rows = torch.nn.utils.rnn.pad_sequence
    ids_BL = rows([s.ids for s in samples], batch_first=True, padding_value=pad).to(device)
    kinds_BL = rows([s.kinds for s in samples], batch_first=True).to(device)
    mask_BL = rows([torch.ones_like(s.ids) for s in samples], batch_first=True).to(device)
    grids = torch.cat([s.grids for s in samples]).to(device)
    hidden_BLD = model.model(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        position_ids=positions(model, ids_BL, kinds_BL, grids, mask_BL),
        pixel_values=torch.cat([s.pixels for s in samples]).to(device),
        image_grid_thw=grids,
        use_cache=False,
    ).last_hidden_state
    found = [
        _sample_losses(model, hidden_BLD[b], sample, list(ids5)) for b, sample in enumerate(samples)
    ]
    squared, text, expected, outside = (torch.stack(part) for part in zip(*found, strict=True))
    return Losses(w_score * squared + w_text * text, squared, text, expected, outside)


def _sample_losses(
    model: Any, hidden_LD: Tensor, sample: Sample, ids5: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(squared error, text loss, expected score, probability outside the five) of one sample."""
    logits_TV = model.lm_head(hidden_LD[sample.start - 1 : len(sample.ids) - 1]).float()
    wanted_T = sample.ids[sample.start :].to(logits_TV.device)
    at = sample.place - sample.start
    five = logits_TV[at, ids5]
    scale = torch.arange(1.0, 6.0, device=five.device)
    expected = (five.softmax(0) * scale).sum()
    any_of_five = logits_TV[at].logsumexp(0) - five.logsumexp(0)
    terms_T = F.cross_entropy(logits_TV, wanted_T, reduction="none")
    text = torch.cat([terms_T[:at], any_of_five[None], terms_T[at + 1 :]]).mean()
    squared = (expected - sample.target) ** 2
    return squared, text, expected, 1.0 - (-any_of_five).exp()
