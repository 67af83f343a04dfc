"""A Qwen-VL model in this process: prefill once, then as many reasonings as wanted.

What is computed once: the images and the text of a row for all its reasonings, which go through
the model as one batch on that cache; and, for edits, everything up to and including the condition
images, for all rows that share them (a GRPO group does), kept for the latest KEPT of them. The
cut is made at that place whether or not it was met before, so a hit changes no bit. For images
without a source there is no such part: they come first in the conversation, before the rubric.

rows: rows in one batch; they must agree in length, image sizes and condition images, and others
wait for their like: nothing is padded. With rows = 1 a row's score is the same bit for bit
whatever it is scored with. With more, matrix products may round by the batch's size: float32
scores agree to about 1e-6 (tested to 1e-5); in bfloat16 a logit of 8 is rounded to 1/32, so scores
may differ by hundredths, and sampled reasonings can take another turn at a near tie.

A reasoning ends at "Score:"; whatever follows, the answer is read right after "Score: ". One that
ends, or has max_new_tokens tokens, before that is closed by appending "\\nScore: " and counted.

Shapes: R sequences decoded together, V the vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qirl_fast.rewards.vlm.prompt import (
    Prompt,
    build_prompt,
    encode,
    positions,
    score_ids,
    word_ids,
)
from qirl_fast.rewards.vlm.rubric import CLOSE, LEAD, MARK, SCALE
from qirl_fast.rewards.vlm.scorer import Answer, Ask

KEPT = 4
TAIL = 16  # tokens looked at for MARK, which has at most six


@dataclass
class Reasoner:
    """One reasoning on its way: what it has written, what it is made to write, what it ended as."""

    ask: Ask
    number: int
    ids: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    reading: bool = False
    closed: bool = False
    done: Answer | str | None = None  # str: why it failed
    random: np.random.Generator | None = None


class LocalEngine:
    """Engine of `scorer.Scorer` on a model and a processor (`folder.load_model`, `load_processor`).

    temperature: of sampled reasonings. max_new_tokens: of one reasoning. Raises ValueError for a
    tokenizer without one token a digit.
    """

    def __init__(
        self, model: Any, processor: Any, temperature: float, max_new_tokens: int, rows: int
    ) -> None:
        self.model, self.processor = model, processor
        self.temperature, self.max_new_tokens, self.rows = temperature, max_new_tokens, rows
        self.ids = dict(zip(SCALE, score_ids(processor), strict=True))
        self.space = encode(processor, LEAD)[len(encode(processor, MARK)) :]
        self.close = encode(processor, CLOSE)
        self.end = processor.tokenizer.eos_token_id
        self.ends = {self.end, processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")}
        self.prefixes: OrderedDict[str, Any] = OrderedDict()
        self.prefills = 0  # forward passes with images, for tests and curiosity

    def ask(self, asks: Sequence[Ask]) -> list[list[Answer] | str]:
        """See `scorer.Engine`; what the processor refuses and NaN are failures of their row."""
        results: list[list[Answer] | str] = [""] * len(asks)
        like: dict[Any, list[tuple[int, Prompt]]] = {}
        for i, ask in enumerate(asks):
            try:
                prompt = build_prompt(self.processor, ask.images, ask.text)
            except ValueError as error:
                results[i] = f"the model cannot take this row: {error}"
                continue
            key = (prompt.ids.shape[1], tuple(map(tuple, prompt.grids.tolist())), _shared(ask))
            like.setdefault(key, []).append((i, prompt))
        for group in like.values():
            for start in range(0, len(group), self.rows):
                batch = group[start : start + self.rows]
                found = self._judge([asks[i] for i, _ in batch], [p for _, p in batch])
                for (i, _), answers in zip(batch, found, strict=True):
                    results[i] = answers
        return results

    @torch.inference_mode()
    def _judge(self, asks: list[Ask], prompts: list[Prompt]) -> list[list[Answer] | str]:
        n = max(1, asks[0].reasonings)
        logits_BV, cache, place = self._prefill(asks[0], prompts)
        states = [Reasoner(ask, j) for ask in asks for j in range(n)]
        for state in states:
            self._begin(state)
        if n > 1:
            cache.batch_repeat_interleave(n)
        logits_RV = logits_BV.repeat_interleave(n, 0)
        while True:
            tokens = self._step(states, logits_RV)
            if all(state.done for state in states):
                break
            feed = torch.tensor(tokens, device=self.model.device)[:, None]
            where = torch.full((3, len(states), 1), place, device=self.model.device)
            logits_RV = self._forward(feed, where, cache)
            place += 1
        rows = [states[k * n : (k + 1) * n] for k in range(len(asks))]
        return [_collected(row) for row in rows]

    def _prefill(self, ask: Ask, prompts: list[Prompt]) -> tuple[Tensor, Any, int]:
        """(logits [B, V] after the prompts, their cache, the next rotary position)."""
        model, first, count = self.model, prompts[0], len(prompts)
        device = model.device
        ids = torch.cat([p.ids for p in prompts]).to(device)
        kinds = torch.cat([p.kinds for p in prompts]).to(device)
        grids = torch.cat([p.grids for p in prompts]).to(device)
        where = positions(model, ids, kinds, grids)
        place = int(where[:, 0].max()) + 1
        cut = first.sources_end
        cache, skipped = None, 0
        if cut:
            cache = self._prefix(ask, first, where[:, :1, :cut])
            if count > 1:
                cache.batch_repeat_interleave(count)
            skipped = int(first.grids[:-1].prod(1).sum())
        images = {
            "pixel_values": torch.cat([p.pixels[skipped:] for p in prompts]).to(device),
            "image_grid_thw": torch.cat([p.grids[-1:] for p in prompts]).to(device),
        }
        self.prefills += 1
        logits = self._forward(ids[:, cut:], where[:, :, cut:], cache, **images)
        return logits, self._cache, place

    def _prefix(self, ask: Ask, prompt: Prompt, where: Tensor) -> Any:
        """The cache of everything up to the result image, a copy of the kept one."""
        key, cut, device = _shared(ask), prompt.sources_end, self.model.device
        if key not in self.prefixes:
            self.prefills += 1
            self._forward(
                prompt.ids[:, :cut].to(device),
                where,
                None,
                pixel_values=prompt.pixels[: int(prompt.grids[:-1].prod(1).sum())].to(device),
                image_grid_thw=prompt.grids[:-1].to(device),
            )
            self.prefixes[key] = self._cache
            while len(self.prefixes) > KEPT:
                self.prefixes.popitem(last=False)
        self.prefixes.move_to_end(key)
        return copy.deepcopy(self.prefixes[key])

    def _forward(self, ids: Tensor, where: Tensor, cache: Any, **images: Tensor) -> Tensor:
        """Logits float32 [R, V] after the last token; the cache grown by these tokens is _cache."""
        out = self.model(
            input_ids=ids,
            position_ids=where,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        self._cache = out.past_key_values
        return out.logits[:, -1].float()

    def _begin(self, state: Reasoner) -> None:
        ask = state.ask
        if ask.reasonings:
            if ask.seeds:
                state.random = np.random.Generator(np.random.PCG64(ask.seeds[state.number]))
            return
        state.reading = True
        state.forced = encode(self.processor, ask.lead) if ask.lead else []

    def _step(self, states: list[Reasoner], logits_RV: Tensor) -> list[int]:
        """Move every reasoning on by one token and return the tokens to feed."""
        greedy = logits_RV.argmax(1).tolist()
        finite = logits_RV.isfinite().all(1).tolist()
        tokens = []
        for r, state in enumerate(states):
            token = self.end
            if state.done is None and not finite[r]:
                state.done = "the model gave NaN or infinite logits"
            elif state.done is None and state.forced:
                token = state.forced.pop(0)
            elif state.done is None and state.reading:
                state.done = self._read(state, logits_RV[r])
            elif state.done is None:
                token = self._chosen(state, logits_RV[r], greedy[r])
            tokens.append(token)
        return tokens

    def _chosen(self, state: Reasoner, logits_V: Tensor, greedy: int) -> int:
        """The next token of a reasoning, its own or the first of what closes it."""
        token = greedy if state.random is None else self._sampled(state.random, logits_V)
        if token in self.ends or len(state.ids) == self.max_new_tokens:
            if not state.ask.candidates:  # a written answer that ends here
                state.done = Answer(self._text(state), closed=token not in self.ends)
                return self.end
            state.closed = state.reading = True
            state.forced = list(self.close)
            return state.forced.pop(0)
        state.ids.append(token)
        tail = self.processor.tokenizer.decode(state.ids[-TAIL:])
        if state.ask.candidates and MARK in tail:
            state.reading = True
            state.forced = [] if tail.endswith(LEAD) else list(self.space)
        return token

    def _sampled(self, random: np.random.Generator, logits_V: Tensor) -> int:
        scaled = logits_V.double().cpu().numpy() / self.temperature
        weights = np.exp(scaled - scaled.max())
        total = np.cumsum(weights)
        drawn = np.searchsorted(total, random.random() * total[-1], side="right")
        return int(min(drawn, len(total) - 1))

    def _read(self, state: Reasoner, logits_V: Tensor) -> Answer:
        words = self.words if state.ask.candidates[0] not in self.ids else self.ids
        logp_V = logits_V.double().log_softmax(0)
        found = {
            word: float(logp_V[i]) for word, i in words.items() if word in state.ask.candidates
        }
        return Answer(self._text(state), found, None, state.closed)

    @cached_property
    def words(self) -> dict[str, int]:
        return word_ids(self.processor)

    def _text(self, state: Reasoner) -> str:
        return str(self.processor.tokenizer.decode(state.ids))


def _shared(ask: Ask) -> str:
    """Names the condition images, and with them everything before the result image."""
    digest = hashlib.sha256()
    for image in ask.images[:-1]:
        digest.update(repr(image.shape).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def _collected(row: list[Reasoner]) -> list[Answer] | str:
    """The answers of a row, or why it failed."""
    done = [state.done for state in row]
    broken = [found for found in done if isinstance(found, str)]
    return broken[0] if broken else [found for found in done if isinstance(found, Answer)]
