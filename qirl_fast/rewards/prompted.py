"""What judges that run a local model on (image, prompt) rows share: checks, chunks, cut prompts."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from qirl_fast.rewards.judge import Row

logger = logging.getLogger(__name__)


def check_prompt(kind: str, row: Row) -> None:
    """ValueError for a row whose "prompt" is not some text."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the {kind} judge wants a 'prompt' that is text, got {prompt!r}: {row!r}")


def filled_chunks(items: Sequence[Any], size: int) -> Iterator[tuple[list[Any], int]]:
    """Chunks of exactly `size`, the last filled up with its last item; and how many are real."""
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        yield chunk + [chunk[-1]] * (size - len(chunk)), len(chunk)


class CutLog:
    """Logs each prompt of more than `length` tokens, of which a model reads the first, once."""

    def __init__(self, kind: str, tokenizer: Any, length: int) -> None:
        self._kind, self._tokenizer, self._length = kind, tokenizer, length
        self._seen: set[str] = set()

    def __call__(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if prompt in self._seen:
                continue
            tokens = len(self._tokenizer(prompt, verbose=False)["input_ids"])
            if tokens > self._length:
                self._seen.add(prompt)
                logger.warning(
                    "%s reads the first %d of %d tokens of: %s",
                    self._kind,
                    self._length,
                    tokens,
                    prompt,
                )
