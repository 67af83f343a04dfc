"""Settings of `python -m qirl_fast.train_reward`: fine-tuning a vision-language judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from qirl_fast.config.rules import CrossError
from qirl_fast.rewards.vlm.rubric import Dimension
from qirl_fast.section import (
    Count,
    Decay,
    FolderName,
    Level,
    Natural,
    NonNegative,
    Positive,
    Section,
    Seed,
    Text,
)

Score = Annotated[float, Field(ge=1, le=5)]


class JudgeLora(Section):
    """Low-rank adapter (PEFT)."""

    rank: Count = Field(default=32, description="rank of the two adapter matrices")
    alpha: Positive = Field(default=64, description="the update is alpha / rank * B A x")
    targets: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="name endings of the linear layers to adapt; null: attention and MLP of the "
        "language model, and of the vision tower where model.vision is set",
    )


class JudgeModel(Section):
    """The base model."""

    path: Text = Field(
        description="a Qwen3-VL or Qwen2.5-VL folder in transformers' format: config.json, "
        "weights, tokenizer and image processor side by side"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the forward; what is trained, adapter or all weights, is in float32 always",
    )
    adapter: Literal["lora", "full"] = Field(default="lora", description="what is trained")
    lora: JudgeLora = Field(default=JudgeLora(), description="used when adapter is lora")
    vision: bool = Field(default=False, description="train the vision tower too")
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass: less memory"
    )


class JudgeTiers(Section):
    """Tier rule of the labels: a failed higher tier caps the lower ones."""

    order: list[Dimension] = Field(
        default=[],
        description="dimensions, highest first, such as [alignment, aesthetics]; []: off",
    )
    failed_below: Score = Field(default=2.5, description="a lower score has failed its tier")
    cap: Score = Field(default=2.5, description="most that later tiers may be given then")
    cap_labels: bool = Field(
        default=False, description="true: labels above it are capped; false: they are an error"
    )


class JudgeData(Section):
    """The judgements to learn from."""

    file: Text = Field(description=".jsonl, one judgement a line; see docs/rewards.md")
    heldout_share: Level = Field(
        default=0.1, description="share of prompts held out, where rows name no split"
    )
    rubrics: dict[Dimension, Text] = Field(
        default={}, description="question texts in place of the built-in ones, by dimension"
    )
    tiers: JudgeTiers = JudgeTiers()


class JudgeLoss(Section):
    """loss = score * (expected - label)^2 + text * cross-entropy; see rewards/vlm/loss.py."""

    score: Positive = Field(default=1.0, description="weight of the score's squared error")
    text: NonNegative = Field(default=0.2, description="weight of the text's cross-entropy")
    direct: Level = Field(
        default=0.0,
        description="share of samples trained without their rationale, for judging with "
        "reasonings: 0",
    )


class JudgeTraining(Section):
    """The optimizer."""

    steps: Count = Field(description="optimizer steps")
    batch: Count = Field(default=32, description="samples per optimizer step")
    micro_batch: Count = Field(
        default=1, description="samples per forward; gradients are accumulated over the batch"
    )
    lr: Positive = Field(default=1e-4, description="AdamW learning rate")
    warmup: Natural = Field(default=0, description="steps over which it rises linearly to lr")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how it falls to 0 after that, or not"
    )
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = Field(
        default=(0.9, 0.999), description="AdamW betas"
    )
    weight_decay: NonNegative = Field(default=0.0, description="AdamW weight decay")
    max_grad_norm: Positive = Field(default=1.0, description="gradient norm clip")


class JudgeValidation(Section):
    """Held-out judgements, written to validation.json beside the judge."""

    every: Natural = Field(
        default=0, description="steps between held-out losses in the metrics; 0: none"
    )
    rows: Natural = Field(default=0, description="most held-out rows used, from the top; 0: all")
    reasonings: Natural = Field(default=1, description="as the judge's setting `reasonings`")
    max_new_tokens: Count = Field(default=512, description="as the judge's")
    temperature: Positive = Field(default=1.0, description="as the judge's")
    bootstrap: Annotated[int, Field(ge=100)] = Field(
        default=2000, description="resamples of the 95 % intervals"
    )


class JudgeTracking(Section):
    """What is written while training; changes no number."""

    tensorboard: bool = Field(default=True, description="write TensorBoard events to tb/")
    wandb: bool = Field(default=False, description="log to Weights & Biases")
    checkpoint_every: Natural = Field(
        default=50, description="steps between checkpoints; 0: the last only"
    )
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints kept")


class RewardConfig(Section):
    """Fine-tuning of a judge, whole."""

    run: FolderName = Field(description="output folder name")
    output: Text = Field(default="outputs", description="folder that holds the runs")
    seed: Seed = Field(default=0, description="seed of everything random")
    resume: Text = Field(
        default="never",
        description="'never'; 'auto': the newest whole checkpoint, if any; or a checkpoint folder",
    )
    device: Literal["cpu", "cuda", "auto"] = Field(default="auto", description="where to compute")
    threads: Count | None = Field(default=None, description="CPU threads; null: one a core")
    model: JudgeModel
    data: JudgeData
    loss: JudgeLoss = JudgeLoss()
    train: JudgeTraining
    validation: JudgeValidation = JudgeValidation()
    tracking: JudgeTracking = JudgeTracking()

    @model_validator(mode="after")
    def _cross(self) -> RewardConfig:
        found = list(_problems(self))
        if found:
            raise CrossError(found)
        return self


def _problems(cfg: RewardConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    train, tiers = cfg.train, cfg.data.tiers
    if train.batch % train.micro_batch:
        keys = ("train.batch", "train.micro_batch")
        yield (
            keys,
            f"train.batch {train.batch} is no multiple of train.micro_batch {train.micro_batch}; "
            "set one to fit",
        )
    if train.warmup >= train.steps:
        keys = ("train.warmup", "train.steps")
        yield (
            keys,
            f"train.warmup {train.warmup} is not below train.steps {train.steps}: the learning "
            "rate would never be reached; lower it",
        )
    if len(set(tiers.order)) != len(tiers.order):
        yield ("data.tiers.order",), f"data.tiers.order names a dimension twice: {tiers.order}"
    if not Path(cfg.data.file).is_file():
        yield ("data.file",), f"data.file: no such file: {cfg.data.file!r}; wanted a .jsonl file"
    if not Path(cfg.model.path, "config.json").is_file():
        yield (
            ("model.path",),
            f"model.path: {cfg.model.path!r} holds no config.json; wanted a Qwen3-VL or Qwen2.5-VL "
            "folder in transformers' format",
        )
