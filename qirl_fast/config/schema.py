"""Every setting of a run: names, types, ranges and meaning.

The models are frozen, refuse unknown keys and convert nothing except a whole number where a number
is wanted. `Config` is the whole recipe. The rules that tie several keys together are in `rules`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from qirl_fast.algorithms import AlgorithmSettings, grpo
from qirl_fast.config.drawing import ModelConfig, RolloutConfig
from qirl_fast.config.rules import CrossError, cross_problems
from qirl_fast.rewards.edits import EditRule
from qirl_fast.rewards.kinds import JudgeSettings
from qirl_fast.rewards.tiers import Tier
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
    Size,
    Text,
)


class DataConfig(Section):
    """Prompts, and the condition images of editing rows."""

    train: Text = Field(
        description="training prompts: 'tiny:train', or a .jsonl or .txt file, a folder, tar shards"
    )
    heldout: Text = Field(description="evaluation prompts, in the same forms")
    prompts_per_step: Count = Field(description="different prompts per rollout")
    images: Text | None = Field(
        default=None,
        description="folder that image paths of a .jsonl `train` start from; null: its own folder",
    )
    heldout_images: Text | None = Field(
        default=None, description="the same of `heldout`; null: its own folder"
    )
    decoder: Literal["pil", "dali"] = Field(
        default="pil", description="library that decodes condition images"
    )
    bad_images: Literal["stop", "skip"] = Field(
        default="stop",
        description="a condition image that cannot be used stops the run, or its row is left out "
        "and named in the log",
    )
    buckets: Annotated[list[Size], Field(min_length=1)] | None = Field(
        default=None,
        description="[height, width] pairs: an editing row is drawn at the one whose aspect ratio "
        "is nearest to its last image's; null: rollout.height x rollout.width",
    )
    condition_pixels: Count | None = Field(
        default=None,
        description="pixels of a condition image as the autoencoder sees it, at its own aspect "
        "ratio; null: as many as are drawn",
    )


class AdvantageConfig(Section):
    """Rewards to advantages, see `ops.group_advantage`."""

    std: Literal["group", "global"] = Field(
        default="group", description="scope of the standard deviation"
    )
    ddof: int = Field(
        default=0, ge=0, le=1, description="0: population, 1: sample standard deviation"
    )
    eps: Positive = Field(default=1e-4, description="added to the standard deviation")
    std_floor: NonNegative = Field(
        default=0.0, description="a reward with less in-group std counts zero"
    )
    clamp: Positive = Field(default=5.0, description="advantages are clamped to +- this")
    min_range: NonNegative = Field(
        default=0.0, description="groups with no wider reward range are dropped"
    )
    mode: Literal["zscore_sum", "sum_first", "gdpo"] = Field(
        default="zscore_sum", description="z-score each reward then sum; sum then z-score; or GDPO"
    )


class FailureConfig(Section):
    """What happens where a judge fails. A failed reward is never 0: its group is left out."""

    reask: Natural = Field(
        default=1, description="times a row that a judge failed on is asked again, by itself"
    )
    budget: Level = Field(
        default=0.1,
        description="share of an update's images a judge may fail on, all tries counted; above it "
        "the run stops, its state saved",
    )


class EmaConfig(Section):
    """Moving average of the trained weights."""

    decay: Decay = Field(default=0.9, description="share of the old average that is kept")
    every: Count = Field(
        default=8, description="optimizer steps between two updates of the average"
    )


class TrainConfig(Section):
    """The policy update."""

    steps: Count = Field(description="rollout + update rounds; may grow on resume")
    lr: Positive = Field(description="AdamW learning rate")
    warmup: Natural = Field(
        default=0, description="optimizer steps over which the learning rate rises linearly to lr"
    )
    decay: Natural = Field(
        default=0,
        description="last optimizer steps of the run, over which the learning rate falls linearly "
        "towards 0",
    )
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = Field(
        default=(0.9, 0.999), description="AdamW betas"
    )
    weight_decay: NonNegative = Field(default=1e-4, description="AdamW weight decay")
    max_grad_norm: Positive = Field(default=1.0, description="gradient norm clip")
    updates_per_rollout: Count = Field(
        default=1, description="minibatches, one optimizer step each"
    )
    ema: EmaConfig | None = Field(default=None, description="null: off")
    recompute_blocks: Natural = Field(
        default=0,
        description="transformer blocks, from the first, whose activations are computed again in "
        "the backward pass and not kept: less memory, the same numbers",
    )
    skip_flat: bool = Field(
        default=True,
        description="leave out the replay of chunks whose advantages are all 0, where no KL needs "
        "it: less time, the same numbers",
    )
    replay_steps: Count = Field(
        default=1,
        description="recorded steps scored in one forward; above 1 the shape is not that of "
        "rollout, and the ratio before an update is 1 to rounding only",
    )


class EvaluationConfig(Section):
    """Paired before and after evaluation: ODE sampling with fixed seeds."""

    prompts: Count = Field(
        default=96, description="held-out prompts used, from the top of the file"
    )
    samples_per_prompt: Count = Field(default=1, description="images per prompt")
    steps: int = Field(default=10, ge=1, description="denoising steps")
    guidance: NonNegative = Field(default=1.0, description="classifier-free guidance scale; 1: off")
    seed: Seed = Field(default=1234, description="seed of the initial noise")
    every: Natural = Field(
        default=0, description="updates between evaluations; 0: before and after only"
    )


class CurationConfig(Section):
    """Which prompts are worth training on, see `evaluation.curation`; used by qirl_fast.curate."""

    samples: int = Field(default=8, ge=2, description="samples drawn of each prompt")
    threshold: NonNegative | None = Field(
        default=None,
        description="prompts are kept whose reward range exceeds this, in standard deviations; "
        "null: by quantile",
    )
    quantile: Decay | None = Field(
        default=0.25, description="the threshold is this quantile of all ranges; null: by threshold"
    )
    drop_failed: float | None = Field(
        default=None,
        description="drop prompts whose best sample has less weighted reward than this; null: none",
    )
    drop_passed: float | None = Field(
        default=None,
        description="drop prompts whose worst sample has more weighted reward; null: none",
    )
    images: Natural = Field(
        default=0,
        description="prompts, spread over the file, whose samples are kept as PNG to be rated",
    )


class ProcessesConfig(Section):
    """The processes that torchrun starts; changes no number but, where trained weights or tokens
    are shared out, the order of sums.
    """

    shard: Natural = Field(
        default=1,
        description="neighbouring processes that hold one copy of the transformer between them "
        "(FSDP2), whole while they draw: 1: each has its own; 0: all processes",
    )
    sequence: Count = Field(
        default=1,
        description="neighbouring processes that draw and replay the same samples, each its share "
        "of the tokens (Ulysses); 1: each process draws samples of its own",
    )
    offload: bool = Field(
        default=False,
        description="sharded weights, their gradients and moments in CPU memory, on the GPU only "
        "while used",
    )
    rewards: Natural = Field(
        default=0,
        description="processes, the last, that train nothing and serve the judges to the others; "
        "0: every process has judges of its own",
    )
    timeout_s: Positive = Field(
        default=1800.0,
        description="seconds after which a process that hears nothing of the others ends the run",
    )


class TrackingConfig(Section):
    """What is written while training; changes no number."""

    tensorboard: bool = Field(default=True, description="write TensorBoard events to tb/")
    wandb: bool = Field(default=False, description="log to Weights & Biases")
    checkpoint_every: Natural = Field(
        default=10, description="updates between checkpoints; 0: the last only"
    )
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints kept")
    samples_every: Natural = Field(default=0, description="updates between sample images; 0: none")
    strips: Natural = Field(
        default=6,
        description="times in the run at which eight held-out prompts are drawn for report.html, "
        "one image each, unjudged; 0: none",
    )
    profile: list[Count] = Field(
        default=[],
        description="updates of which a trace of PyTorch's profiler is written to profile/",
    )


class Config(Section):
    """A whole recipe."""

    run: FolderName | None = Field(
        default=None, description="output folder name; null: recipe name + '-seed' + seed"
    )
    output: Text = Field(default="outputs", description="folder that holds the runs")
    seed: Seed = Field(default=0, description="seed of everything random")
    resume: Text = Field(
        default="never",
        description="'never'; 'auto': the newest whole checkpoint, if any; or a checkpoint folder",
    )
    device: Literal["cpu", "cuda", "auto"] = Field(default="auto", description="where to compute")
    threads: Count | None = Field(
        default=None, description="CPU threads of all processes of a machine; null: one a core"
    )
    deterministic: bool = Field(
        default=False,
        description="refuse algorithms that may give other bits the next time; on a CPU there are "
        "none, on a GPU some are slower",
    )
    algorithm: AlgorithmSettings = Field(
        default=grpo.Settings(name="grpo"),
        description="the training algorithm, by its name, and its settings",
    )
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    rewards: dict[str, NonNegative] = Field(
        description="optimised judges and their weights, scaled to sum to 1; {} where the "
        "algorithm needs none"
    )
    category_weights: dict[str, dict[str, NonNegative]] = Field(
        default={}, description="weights for prompts of one category in place of `rewards`"
    )
    watch: list[Text] = Field(
        default=[], description="judges that are scored and shown, not optimised"
    )
    judges: dict[str, JudgeSettings] = Field(
        default={}, description="judges with settings, by the name under which rewards use them"
    )
    tiers: list[Tier] = Field(
        default=[],
        description="optimised judges from the highest tier to the lowest; one that fails caps "
        "what those below it may score",
    )
    edit: EditRule | None = Field(
        default=None,
        description="of two judges of an edit: what one scores that left the rest alone and yet "
        "failed; null: each by itself",
    )
    failures: FailureConfig = FailureConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    curation: CurationConfig = CurationConfig()
    processes: ProcessesConfig = ProcessesConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _cross(self) -> Config:
        found = list(cross_problems(self))
        if found:
            raise CrossError(found)
        return self
