"""`kind: vlm`: a vision-language model in this process scores each row in [1, 5].

See `scorer.py` for what a row's score is, `engine.py` for how it is computed, and `score.py` for
the readings. The source of the method is METHOD.md 5.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qirl_fast.rewards.vlm.engine import LocalEngine
from qirl_fast.rewards.vlm.folder import (
    agreement_warnings,
    load_model,
    load_processor,
    rubric_for,
)
from qirl_fast.rewards.vlm.prompt import word_ids
from qirl_fast.rewards.vlm.rubric import DimensionField, Reading, rubric
from qirl_fast.rewards.vlm.scorer import How, Scorer
from qirl_fast.section import Count, Natural, Positive, Section, Text


class Settings(Section):
    """A fine-tuned judge, or a base Qwen3-VL / Qwen2.5-VL, in this process."""

    kind: Literal["vlm"] = Field(description="vision-language model in this process")
    path: Text = Field(
        description="a judge folder (train_reward) or a model folder in transformers' format"
    )
    adapter: Text | None = Field(default=None, description="a PEFT adapter folder to add")
    dimension: DimensionField
    rubric: Text | None = Field(
        default=None, description="text of the question; null: the judge's own, else built-in"
    )
    reading: Reading = Field(
        default="expected",
        description="expected: mean of 1..5 by the score token's probabilities; yes_no: 1 + 4 "
        "P(yes) / (P(yes) + P(no)); integer: the score it writes",
    )
    reasonings: Natural = Field(
        default=1,
        description="0: the score at once; 1: one, greedy; more: sampled and averaged",
    )
    temperature: Positive = Field(default=1.0, description="of sampled reasonings")
    max_new_tokens: Count = Field(
        default=512, description="most tokens of a reasoning; then it is closed and scored"
    )
    rows: Count = Field(
        default=1,
        description="rows in one batch; 1: a row's score does not depend on others to the last bit",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the model")
    min_agreement: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        default=None,
        description="warn where the judge's held-out Spearman correlation is lower; null: never",
    )


class Vlm(Scorer):
    """The judge of these settings; loads the model at once.

    Raises FileNotFoundError or ValueError for a folder, tokenizer, dimension or reading that does
    not fit, saying what would. `warnings`: see min_agreement.
    """

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        own = rubric_for(settings.path, settings.dimension)
        processor = load_processor(settings.path)
        if settings.reading == "yes_no":
            word_ids(processor)
            own = None
        text = settings.rubric or own or rubric(settings.dimension, settings.reading)
        how = How(settings.dimension, text, settings.reading, settings.reasonings)
        model = load_model(settings.path, settings.adapter, settings.dtype, device)
        engine = LocalEngine(
            model, processor, settings.temperature, settings.max_new_tokens, settings.rows
        )
        super().__init__(engine, how)
        least = settings.min_agreement
        self.warnings = (
            [] if least is None else agreement_warnings(settings.path, settings.dimension, least)
        )
