"""A vision-language model answers a checklist about an image, 0 | 1 | 2 | N/A an item, as JSON.

One question a checklist: the image, the prompt it was made from, the items; wanted is

    {"<group>": {"<item>": {"score": 0 | 1 | 2 | "N/A"}, ...}, ...}

the form of Qwen-Image-Bench's judge (arXiv 2605.28091). The answer is greedy, and read from the
last JSON object in what the model writes, so that it may think before. An answer that lacks an
item, or gives it another value, is asked for again, sampled with the number of the try as its
seed; after `tries` such answers the checklist has failed, with the reason. Items that were not
asked for are passed over. The engines are those of `scorer.py`: a server, or this process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from qirl_fast.rewards.vlm import local, openai
from qirl_fast.rewards.vlm.rubric import refuse_control
from qirl_fast.rewards.vlm.scorer import Ask, Engine
from qirl_fast.section import Count, Natural, Positive, Section, Text

READ = 1 << 16  # characters of an answer's end that are searched for JSON
SHOWN = 80

Items = Mapping[str, Mapping[str, str]]  # group -> item -> question
Given = dict[tuple[str, str], int | None]  # (group, item) -> answer, None: N/A

QUESTION = """\
You judge a picture that was made from a text. Text:
{prompt}

Look at the picture and answer each item of the list "{title}":
{items}

Answer with a number: 0, the picture fails there, a defect is plain to see; 1, it is sound; 2, it is
outstanding, and you can say by what; or "N/A", the item does not apply to this picture and text.
End with one JSON object and nothing after it, all items in it:
{form}"""


class ServerSettings(Section):
    """A model behind an OpenAI-compatible server; see kind `openai` of the judges."""

    kind: Literal["openai"] = Field(description="model behind an OpenAI-compatible server")
    url: openai.Url = Field(description="base address, such as http://127.0.0.1:8000/v1")
    model: Text = Field(description="name the server knows the model by")
    max_new_tokens: Count = Field(default=4096, description="most tokens of an answer, thought too")
    temperature: Positive = Field(default=1.0, description="of an answer asked for again")
    api_key_env: Text | None = Field(
        default=None, description="environment variable that holds the API key; null: none is sent"
    )
    timeout_s: Positive = Field(default=300.0, description="seconds for one request")
    deadline_s: Positive = Field(
        default=3600.0, description="seconds for one batch of images, all its requests"
    )
    retries: Natural = Field(default=3, description="further tries after a failed request")
    concurrency: Count = Field(default=32, description="requests under way at once")
    max_body: Count = Field(default=16 * 2**20, description="most bytes of one answer")


class LocalSettings(Section):
    """A model in this process; see kind `vlm` of the judges."""

    kind: Literal["vlm"] = Field(description="vision-language model in this process")
    path: Text = Field(description="model folder in transformers' format, Qwen3-VL or Qwen2.5-VL")
    adapter: Text | None = Field(default=None, description="a PEFT adapter folder to add")
    max_new_tokens: Count = Field(default=4096, description="most tokens of an answer, thought too")
    temperature: Positive = Field(default=1.0, description="of an answer asked for again")
    rows: Count = Field(default=1, description="rows in one batch")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the model")


Settings = Annotated[ServerSettings | LocalSettings, Field(discriminator="kind")]


def build_engine(settings: ServerSettings | LocalSettings, device: str) -> Engine:
    """Where the model runs. ValueError, FileNotFoundError: see `openai.OpenAi`, `local.Vlm`."""
    plain = settings.model_dump() | {"reading": "integer", "dimension": "alignment"}
    if isinstance(settings, ServerSettings):
        return openai.OpenAi(openai.Settings.model_validate(plain), device).engine
    plain |= {"rubric": "-"}  # a judge's own dimensions are not what is asked about
    return local.Vlm(local.Settings.model_validate(plain), device).engine


@dataclass(frozen=True)
class Checklist:
    """One question. image: uint8 [h, w, 3]; prompt: what it was made from; title: of the list."""

    image: np.ndarray
    prompt: str
    title: str
    items: Items

    @property
    def text(self) -> str:
        """What is asked. ValueError for a prompt with control tokens."""
        refuse_control(self.prompt, "the prompt")
        listed = [
            line
            for group, items in self.items.items()
            for line in (f"## {group}", *(f"- {item}: {q}" for item, q in items.items()))
        ]
        form = {
            g: {item: {"score": '0 | 1 | 2 | "N/A"'} for item in i} for g, i in self.items.items()
        }
        shape = json.dumps(form, ensure_ascii=False).replace(
            '"0 | 1 | 2 | \\"N/A\\""', '0|1|2|"N/A"'
        )
        return QUESTION.format(
            prompt=self.prompt, title=self.title, items="\n".join(listed), form=shape
        )


class Malformed(ValueError):
    """An answer that cannot be read; the message says what is wrong with it."""


def ask_checklists(engine: Engine, lists: Sequence[Checklist], tries: int) -> list[Given | str]:
    """For each checklist its answers, or the reason why there are none. tries >= 1."""
    results: list[Given | str] = [""] * len(lists)
    asks: dict[int, Ask] = {}
    for i, one in enumerate(lists):
        try:
            asks[i] = Ask((one.image,), one.text, (), "", 1, ())
        except ValueError as error:
            results[i] = str(error)
    for number in range(tries):
        again: dict[int, Ask] = {}
        answers = engine.ask(list(asks.values())) if asks else []
        for i, got in zip(asks, answers, strict=True):
            if isinstance(got, str):  # the engine has tried by itself
                results[i] = got
                continue
            try:
                results[i] = read_answer(got[0].text, lists[i].items)
            except Malformed as error:
                results[i] = f"{error}; {number + 1} {'try' if not number else 'tries'}"
                again[i] = Ask((lists[i].image,), asks[i].text, (), "", 1, (number + 1,))
        asks = again
    return results


def read_answer(text: str, items: Items) -> Given:
    """The answers in what a model wrote. Raises Malformed."""
    tree = last_object(text)
    if tree is None:
        raise Malformed(f"no JSON object in the answer, which ends {text[-SHOWN:]!r}")
    found: Given = {}
    for group, own in items.items():
        below = tree.get(group)
        for item in own:
            value = below.get(item) if isinstance(below, dict) else None
            if isinstance(value, dict):
                value = value.get("score")
            found[group, item] = _score(value, f"{group} / {item}")
    return found


def _score(value: Any, where: str) -> int | None:
    if isinstance(value, str):
        value = value.strip().upper()
        if value == "N/A":
            return None
    for score in (0, 1, 2):
        if not isinstance(value, bool) and value in (score, str(score)):
            return score
    came = "nothing came" if value is None else f"got {value!r}"
    raise Malformed(f'{where}: {came}; wanted 0, 1, 2 or "N/A"')


def last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object that lies in no other, in the last READ characters; None without one."""
    text, decoder, at, found = text[-READ:], json.JSONDecoder(), 0, None
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):  # braces in prose
            at += 1
            continue
        found = value
    return found
