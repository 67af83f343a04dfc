"""Settings of `python -m qirl_fast.evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qirl_fast.config.files import PACKAGED
from qirl_fast.config.rules import CrossError
from qirl_fast.config.schema import FailureConfig
from qirl_fast.rewards.judges import JUDGES, resolve
from qirl_fast.rewards.kinds import JudgeSettings
from qirl_fast.rewards.vlm import checklist
from qirl_fast.section import (
    Count,
    Level,
    NonNegative,
    Pixels,
    Positive,
    Problem,
    Section,
    Size,
    Text,
)
from qirl_fast.section import Seed as SeedNumber

FACETS = "facets"
Share = Annotated[float, Field(gt=0, lt=1)]
LONGEST = 100  # characters of a model's name


class ContenderConfig(Section):
    """A model that is evaluated: a base, or a base with an adapter."""

    path: Text = Field(
        default="base", description="model folder in diffusers' format, 'tiny', or 'base': `base`"
    )
    adapter: Text | None = Field(
        default=None,
        description="LoRA on it: a PEFT folder, a run of qirl_fast.train, a checkpoint, or 'last': "
        "the newest run under `runs` that held out these prompts",
    )
    guidance: NonNegative | None = Field(default=None, description="null: `guidance`")
    steps: Annotated[int, Field(ge=1)] | None = Field(default=None, description="null: `steps`")


class GenEvalConfig(Section):
    """Accuracy in GenEval's form: an image is right or it is not."""

    judge: Text = Field(default="geneval", description="judge that says whether all is there")
    correct_at: float = Field(default=1.0, description="least score of an image that is right")


class OcrConfig(Section):
    """Accuracy of written text."""

    judge: Text = Field(description="name, under judges, of one of kind ocr")


class FacetsConfig(Section):
    """Scores in the form of Qwen-Image-Bench."""

    judge: checklist.Settings = Field(description="vision-language model that answers")
    rubric: Text | None = Field(
        default=None,
        description="YAML file, pillar -> group -> facet -> question; null: Qwen-Image-Bench's "
        "facets, asked in this project's words",
    )
    tries: Count = Field(default=3, description="answers asked for until one can be read")


class EvaluateConfig(Section):
    """An evaluation of several models on one prompt file."""

    output: Text = Field(
        description="folder of tables, images, embeddings; tables there are written anew"
    )
    models: Annotated[dict[str, ContenderConfig], Field(min_length=1)] = Field(
        description="what is compared, by name"
    )
    base: Text = Field(default="tiny", description="model folder that `path: base` stands for")
    runs: Text = Field(default="outputs", description="folder of runs, for `adapter: last`")
    baseline: Text | None = Field(default=None, description="model compared with; null: the first")
    compare: Literal["baseline", "all"] = Field(
        default="baseline", description="every model with the baseline, or every pair"
    )
    prompts: Text = Field(description="prompt file, in the forms of data.heldout")
    images: Text | None = Field(
        default=None, description="folder that image paths of a .jsonl start from; null: its own"
    )
    count: Count | None = Field(default=None, description="prompts used, from the top; null: all")
    split: Text = Field(default="heldout", description="name of the split, recorded")
    training: list[Text] = Field(
        default=[],
        description="prompt files that models were trained on; those of a run are known",
    )
    near: Level = Field(
        default=0.9, description="share of common words from which a prompt is nearly another"
    )
    leaks: Literal["say", "stop"] = Field(
        default="say", description="a prompt or image seen in training is reported, or ends it"
    )
    seed: SeedNumber = Field(default=1234, description="seed of the initial noise")
    samples_per_prompt: Count = Field(default=1, description="images per prompt")
    steps: Annotated[int, Field(ge=1)] = Field(default=10, description="denoising steps")
    guidance: NonNegative = Field(default=1.0, description="classifier-free guidance scale; 1: off")
    height: Pixels | None = Field(default=None, description="null: that of the adapters' runs")
    width: Pixels | None = Field(default=None, description="null: that of the adapters' runs")
    buckets: Annotated[list[Size], Field(min_length=1)] | None = Field(
        default=None,
        description="[height, width] pairs: an edit is drawn at the nearest in aspect ratio; null: "
        "all at height x width",
    )
    score: list[Text] = Field(default=[], description="judges asked about every image")
    judges: dict[str, JudgeSettings] = Field(default={}, description="judges with settings")
    geneval: GenEvalConfig | None = Field(default=None, description="null: no such table")
    ocr: OcrConfig | None = Field(default=None, description="null: no such table")
    facets: FacetsConfig | None = Field(default=None, description="null: no such table")
    failures: FailureConfig = FailureConfig()
    alpha: Share = Field(default=0.05, description="level of the tests, after Holm's correction")
    power: Share = Field(default=0.8, description="of the planned evaluation")
    effect: Positive = Field(default=0.02, description="difference in score to be planned for")
    cache: Text | None = Field(default=None, description="folder of images; null: <output>/images")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the forward")
    device: Literal["cpu", "cuda", "auto"] = Field(default="auto", description="where to compute")
    threads: Count | None = Field(default=None, description="CPU threads; null: one a core")
    max_rows: Count = Field(default=64, description="most samples in one transformer forward")

    @property
    def reference(self) -> str:
        """The model that the others are compared with."""
        return self.baseline or next(iter(self.models))

    @property
    def asked(self) -> list[str]:
        """Judges asked about every image, each once."""
        more = [table.judge for table in (self.geneval, self.ocr) if table is not None]
        return list(dict.fromkeys([*self.score, *more]))

    @model_validator(mode="after")
    def _cross(self) -> EvaluateConfig:
        found = [*_judge_problems(self), *_other_problems(self)]
        if found:
            raise CrossError(found)
        return self


def _judge_problems(cfg: EvaluateConfig) -> Iterator[Problem]:
    for name in cfg.judges:
        if name in JUDGES or name.partition("/")[0] == FACETS:
            yield ("judges",), f"judges.{name}: is the name of a packaged judge; choose another"
        elif name not in cfg.asked:
            text = f"judges.{name}: is used nowhere; name it in score, or take it out"
            yield ("judges", "score"), text
    used = [("score", name) for name in cfg.score]
    used += [("geneval.judge", cfg.geneval.judge)] if cfg.geneval else []
    used += [("ocr.judge", cfg.ocr.judge)] if cfg.ocr else []
    for key, name in used:
        try:
            resolve(name, cfg.judges)
        except ValueError as error:
            yield (key, "judges"), f"{key}: {error}"
    if len(set(cfg.score)) < len(cfg.score):
        yield ("score",), f"score: {cfg.score} names a judge twice; wanted each once"
    if cfg.ocr and (own := cfg.judges.get(cfg.ocr.judge)) is not None and own.kind != "ocr":
        text = f"ocr.judge: {cfg.ocr.judge!r} is of kind {own.kind}; wanted one of kind ocr"
        yield ("ocr.judge", "judges"), text
    if not cfg.asked and cfg.facets is None:
        text = "score: no judge is named; wanted one or more, or geneval, ocr or facets"
        yield ("score", "geneval", "ocr", "facets"), text


def _other_problems(cfg: EvaluateConfig) -> Iterator[Problem]:
    for name in cfg.models:
        if not name.isprintable() or name != name.strip() or not 0 < len(name) <= LONGEST:
            text = f"models: got the name {name!r}; wanted 1 to {LONGEST} printable characters, "
            yield ("models",), text + "no space around them"
    if cfg.baseline is not None and cfg.baseline not in cfg.models:
        text = f"baseline: got {cfg.baseline!r}; the models are {', '.join(cfg.models)}"
        yield ("baseline", "models"), text
    if (cfg.height is None) != (cfg.width is None):
        text = f"height, width: got {cfg.height} and {cfg.width}; wanted both, or neither"
        yield ("height", "width"), text
    if cfg.near == 0:
        yield ("near",), "near: got 0, from which every prompt is every other; wanted above 0"
    if cfg.alpha >= cfg.power:
        text = f"alpha {cfg.alpha:g} is not below power {cfg.power:g}; wanted alpha < power"
        yield ("alpha", "power"), text
    for key, path in [("prompts", cfg.prompts), *(("training", path) for path in cfg.training)]:
        if path.startswith("tiny:") and path not in PACKAGED:
            text = f"{key}: got {path!r}; packaged prompts: {', '.join(PACKAGED)}"
            yield (key,), text
