"""Settings of what draws: the model, its precision and adapter, and the rollout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from qirl_fast.section import Count, Level, Natural, NonNegative, Pixels, Positive, Section, Text


class LoraConfig(Section):
    """Low-rank adapter (PEFT)."""

    rank: Count = Field(default=64, description="rank of the two adapter matrices")
    alpha: Positive = Field(
        default=128, description="scale numerator: the update is alpha / rank * B A x"
    )
    targets: list[Text] | None = Field(
        default=None,
        description="name endings of the linear layers to adapt; null: the family's default",
    )


class Fp8Config(Section):
    """8-bit floats in the transformer's linear layers. How they meet the ratio must be declared."""

    mode: Literal["unified", "explore", "corrected"] = Field(
        description="unified: rollout and training both in fp8; explore: fp8 draws group_size "
        "samples, the best and worst are drawn again and trained on without it; corrected: fp8 "
        "rollout, whose log-probs training computes again without it"
    )
    recipe: Literal["row", "block", "tensor", "delayed"] = Field(
        default="row",
        description="what shares a scale: a token, 128 channels of one, everything; delayed: "
        "everything, by the scales of earlier calls (te alone)",
    )
    backward: Literal["high", "fp8"] = Field(
        default="high", description="gradients to activations: in model.dtype, or in fp8"
    )
    library: Literal["native", "te"] = Field(
        default="native", description="own kernels and torch's GEMM, or Transformer Engine"
    )
    layers: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="name endings of the linear layers in fp8; null: the family's default",
    )
    skip: list[Text] = Field(default=[], description="name endings among them that stay out of it")
    keep: Annotated[int, Field(ge=2, multiple_of=2)] | None = Field(
        default=None, description="explore: samples of a prompt trained on, half best, half worst"
    )
    stateful_scales: bool = Field(
        default=False,
        description="accept that delayed scales depend on the calls before, guidance's among them",
    )


class ModelConfig(Section):
    """The model to train."""

    path: Text = Field(description="'tiny': the packaged model; else a folder in diffusers' format")
    family: Literal[
        "auto",
        "qwenimage",
        "qwenimage_edit",
        "qwenimage_edit_plus",
        "qwenimage21",
        "sd3",
        "flux",
        "flux2",
        "flux2_klein",
        "zimage",
    ] = Field(default="auto", description="model family; auto: read from model_index.json")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the forward"
    )
    attention: Literal["auto", "sdpa", "cudnn", "flash", "flash3", "xformers", "flex"] = Field(
        default="auto",
        description="library of the transformer's attention; auto: diffusers' default; another is "
        "an error where it is not installed or does not fit",
    )
    fp8: Fp8Config | None = Field(default=None, description="null: off")
    adapter: Literal["lora", "full"] = Field(default="lora", description="what is trained")
    lora: LoraConfig = Field(default=LoraConfig(), description="used when adapter is lora")


class WindowConfig(Section):
    """A run of neighbouring stochastic steps, which may move through the run."""

    start: Natural = Field(description="index of the first stochastic step; 0 is pure noise")
    size: Count = Field(description="number of stochastic steps")
    every: Natural = Field(
        default=0, description="updates after which the window moves; 0: it stays"
    )
    stride: Count = Field(default=1, description="steps by which it moves, then from start again")


class SdeStepsConfig(Section):
    """Stochastic steps drawn anew for each update."""

    count: Count = Field(description="distinct stochastic steps per update")
    high: Count | None = Field(
        default=None,
        description="draw from the first `high` steps, biased to high noise; null: steps - 1",
    )


class RolloutConfig(Section):
    """How trajectories are made."""

    group_size: Count = Field(description="samples per prompt; at least 2 where rewards count")
    height: Pixels = Field(description="image height in pixels")
    width: Pixels = Field(description="image width in pixels")
    steps: int = Field(ge=2, description="denoising steps")
    dynamics: Literal["ode", "flow_sde", "dance_sde", "cps", "langevin"] = Field(
        description="one-step dynamics at the stochastic steps; ODE elsewhere"
    )
    eta: Positive = Field(default=0.7, description="noise level of the dynamics; cps: at most 1")
    window: WindowConfig | None = Field(
        default=None, description="fixed stochastic steps, or sde_steps"
    )
    sde_steps: SdeStepsConfig | None = Field(
        default=None, description="drawn stochastic steps, or window"
    )
    guidance: NonNegative = Field(default=1.0, description="classifier-free guidance scale; 1: off")
    ratio_mode: Literal["frozen_offset", "conditional", "full"] | None = Field(
        default=None,
        description="how a guided rollout enters the ratio; must be declared when guided",
    )
    guidance_interval: Annotated[tuple[Level, Level], Strict(False)] | None = Field(
        default=None,
        description="lowest and highest noise level at which guidance is on, in rollout and "
        "evaluation; null: all",
    )
    rescale_guidance: bool | None = Field(
        default=None,
        description="rescale the guided velocity to the conditional norm; null: as the family",
    )
    shared_noise: bool = Field(
        default=False, description="one initial noise for all samples of a group"
    )
    storage_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of stored states; a state is rounded before it is scored",
    )
    denoise: Literal["eager", "graphs", "compile"] = Field(
        default="eager",
        description="how forwards without gradient run. graphs: the launches of one are recorded "
        "once and replayed, on a GPU: the same bits, memory for its inputs and for the work of one "
        "forward. compile: blocks by torch.compile, but at the steps that are trained on: to "
        "rounding the same",
    )
    max_rows: Count = Field(
        default=64,
        description="most samples in one transformer forward; both guidance branches of them",
    )
