"""The rules of a recipe that tie several keys together: batch algebra, stochastic steps, weights.

Each broken rule is a line of text and the dotted keys involved. Every single key is known to be
valid by itself when these run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qirl_fast.rewards.edits import check_rule
from qirl_fast.rewards.tiers import check_tiers
from qirl_fast.section import Problem

if TYPE_CHECKING:
    from qirl_fast.config.drawing import RolloutConfig
    from qirl_fast.config.schema import Config


class CrossError(ValueError):
    """Rules that tie several keys together are broken; `problems` lists each."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(text for _, text in problems))
        self.problems = problems


def cross_problems(cfg: Config) -> Iterator[Problem]:
    """Yield each broken rule that involves several keys of `cfg`."""
    yield from _rollout_problems(cfg.rollout)
    yield from cfg.algorithm.problems(cfg)
    yield from _reward_problems(cfg)
    yield from _fp8_problems(cfg)
    if cfg.deterministic and cfg.model.attention in ("cudnn", "xformers"):
        yield (
            ("deterministic", "model.attention"),
            f"deterministic: got true, and the backward pass of model.attention="
            f"{cfg.model.attention} adds up in any order; allowed: auto, sdpa, flash, flash3, flex",
        )
    yield from _shard_problems(cfg)
    if cfg.processes.rewards and not cfg.rewards and not cfg.watch:
        yield (
            ("processes.rewards", "rewards", "watch"),
            f"processes.rewards: got {cfg.processes.rewards}, and there is no judge to serve; set "
            "it to 0, or name judges under watch",
        )
    yield from _batch_problems(cfg)
    yield from _weight_problems(cfg)
    yield from _tier_problems(cfg)
    yield from _edit_problems(cfg)
    yield from _curation_problems(cfg)


def _rollout_problems(rollout: RolloutConfig) -> Iterator[Problem]:
    window, drawn, steps = rollout.window, rollout.sde_steps, rollout.steps
    if window is not None and window.start + window.size > steps - 1:
        yield (
            ("rollout.window.start", "rollout.window.size", "rollout.steps"),
            f"rollout.window: steps {window.start} to {window.start + window.size - 1} do not fit; "
            f"with rollout.steps={steps} a window lies within steps 0 to {steps - 2} "
            f"(the last step, {steps - 1}, is never trained)",
        )
    if drawn is not None:
        high = steps - 1 if drawn.high is None else drawn.high
        keys = ("rollout.sde_steps.count", "rollout.sde_steps.high", "rollout.steps")
        if high > steps - 1:
            yield (
                keys,
                f"rollout.sde_steps.high: got {high}; with rollout.steps={steps} allowed: 1 to "
                f"{steps - 1} (the last step, {steps - 1}, is never trained)",
            )
        if drawn.count > high:
            yield (
                keys,
                f"rollout.sde_steps.count: got {drawn.count} distinct steps out of the first {high}"
                f"; allowed: 1 to {high}",
            )
    if rollout.dynamics == "cps" and rollout.eta > 1:
        yield (
            ("rollout.eta", "rollout.dynamics"),
            f"rollout.eta: got {rollout.eta:g}; for cps allowed: above 0, at most 1",
        )
    interval = rollout.guidance_interval
    if interval is not None and interval[0] > interval[1]:
        yield (
            ("rollout.guidance_interval",),
            f"rollout.guidance_interval: got {list(interval)}, which ends before it begins; wanted "
            "[lowest, highest] noise level, such as [0.3, 0.9]",
        )


def _reward_problems(cfg: Config) -> Iterator[Problem]:
    """Whether the algorithm's needs of rewards and of groups are met, and nothing is idle."""
    name = cfg.algorithm.name
    if cfg.algorithm.rewarded and not cfg.rewards:
        yield (
            ("rewards", "algorithm.name"),
            f"rewards: got none, and {name} trains on advantages; name at least one judge",
        )
    if not cfg.algorithm.rewarded and cfg.rewards:
        yield (
            ("rewards", "algorithm.name"),
            f"rewards: got {', '.join(cfg.rewards)}, and {name} optimises no reward; set rewards "
            "to {} and name under watch what is to be scored and shown",
        )
    if cfg.algorithm.rewarded and cfg.rollout.group_size < 2:
        yield (
            ("rollout.group_size", "algorithm.name"),
            f"rollout.group_size: got {cfg.rollout.group_size}; {name} compares samples of a "
            "prompt: allowed: 2 or more",
        )


def _fp8_problems(cfg: Config) -> Iterator[Problem]:
    fp8, group = cfg.model.fp8, cfg.rollout.group_size
    if fp8 is None:
        return
    if fp8.library == "te" and cfg.rollout.denoise == "compile":
        yield (
            ("model.fp8.library", "rollout.denoise"),
            "rollout.denoise: got compile, which cannot look into the layers of model.fp8.library="
            "te; allowed there: eager, graphs",
        )
    if cfg.model.adapter == "full":
        yield (
            ("model.fp8", "model.adapter"),
            "model.fp8: fp8 weights are frozen and model.adapter is 'full'; set "
            "model.adapter=lora, or model.fp8=null",
        )
    own = ("row", "block", "tensor") if fp8.library == "native" else ("block", "tensor", "delayed")
    if fp8.recipe not in own:
        yield (
            ("model.fp8.recipe", "model.fp8.library"),
            f"model.fp8.recipe: got {fp8.recipe!r}; with library {fp8.library!r} allowed: "
            + ", ".join(own),
        )
    if fp8.mode != "unified" and fp8.backward == "fp8":
        yield (
            ("model.fp8.backward", "model.fp8.mode"),
            f"model.fp8.backward: got 'fp8', and mode {fp8.mode!r} trains without fp8; set "
            "backward=high",
        )
    if fp8.mode == "unified" and fp8.library == "te" and fp8.backward == "high":
        yield (
            ("model.fp8.backward", "model.fp8.mode", "model.fp8.library"),
            "model.fp8.backward: got 'high', and Transformer Engine's backward is always in fp8; "
            "set backward=fp8, or library=native",
        )
    if fp8.stateful_scales and fp8.recipe != "delayed":
        yield (
            ("model.fp8.stateful_scales", "model.fp8.recipe"),
            f"model.fp8.stateful_scales: got true, and the scales of {fp8.recipe!r} have no state; "
            "set it to false",
        )
    if fp8.recipe == "delayed" and fp8.mode == "unified":
        yield (
            ("model.fp8.recipe", "model.fp8.mode"),
            "model.fp8.recipe: 'delayed' scales change from call to call, so a replay is not its "
            "rollout and 'unified' has no ratio of 1; set recipe=tensor, or mode=corrected",
        )
    elif fp8.recipe == "delayed" and cfg.rollout.guidance != 1 and not fp8.stateful_scales:
        yield (
            ("model.fp8.recipe", "rollout.guidance", "model.fp8.stateful_scales"),
            f"model.fp8.recipe: 'delayed' with rollout.guidance={cfg.rollout.guidance:g} lets both "
            "branches move each other's scales; set recipe=tensor, or declare it with "
            "stateful_scales=true",
        )
    if fp8.recipe == "tensor" and fp8.mode == "unified" and cfg.train.replay_steps > 1:
        yield (
            ("model.fp8.recipe", "model.fp8.mode", "train.replay_steps"),
            f"model.fp8.recipe: one scale for all of 'tensor' depends on the batch, and "
            f"train.replay_steps={cfg.train.replay_steps} replays in another than rollout's; set "
            "recipe=row, or train.replay_steps=1",
        )
    if fp8.mode != "unified" and cfg.algorithm.keeps != "transitions":
        yield (
            ("model.fp8.mode", "algorithm.name"),
            f"model.fp8.mode: got {fp8.mode!r}, which is about the ratio of transitions, and "
            f"{cfg.algorithm.name} has none; set mode=unified",
        )
    if (fp8.keep is None) == (fp8.mode == "explore"):
        wanted = f"an even number below rollout.group_size {group}"
        yield (
            ("model.fp8.keep", "model.fp8.mode"),
            f"model.fp8.keep: got {fp8.keep} with mode {fp8.mode!r}; wanted "
            + (wanted if fp8.mode == "explore" else "null"),
        )
    elif fp8.keep is not None and fp8.keep >= group:
        yield (
            ("model.fp8.keep", "rollout.group_size"),
            f"model.fp8.keep: got {fp8.keep} of rollout.group_size {group} samples; allowed: even "
            f"numbers from 2 to {(group - 1) // 2 * 2}",
        )


def _shard_problems(cfg: Config) -> Iterator[Problem]:
    shard, sequence = cfg.processes.shard, cfg.processes.sequence
    if shard == 1 and cfg.processes.offload:
        yield (
            ("processes.offload", "processes.shard"),
            "processes.offload: got true, and processes.shard=1 spreads nothing; set "
            "processes.shard=0, or offload=false",
        )
    name, denoise = cfg.algorithm.name, cfg.rollout.denoise
    does = "records the places of weights" if denoise == "graphs" else "leaves out the hooks"
    cannot = {
        "model.fp8": ("it holds weights of its own", "null", cfg.model.fp8 is not None),
        "rollout.denoise": (f"{denoise} {does}", "eager", denoise != "eager"),
        "algorithm.name": (f"{name} changes the adapters", "another", not cfg.algorithm.shards),
    }
    for key, (why, wanted, found) in cannot.items():
        if found and shard != 1:
            yield (
                (key, "processes.shard"),
                f"{key}: {why} of a transformer, and processes.shard={shard} spreads it over "
                f"processes; set processes.shard=1, or {key} to {wanted}",
            )
        if found and sequence != 1:
            yield (
                (key, "processes.sequence"),
                f"{key}: is not served by processes.sequence={sequence}, where processes exchange "
                f"heads in every block; set processes.sequence=1, or {key} to {wanted}",
            )


def trained_group(cfg: Config) -> int:
    """Samples of a prompt that are trained on."""
    fp8 = cfg.model.fp8
    return fp8.keep if fp8 is not None and fp8.keep is not None else cfg.rollout.group_size


def _batch_problems(cfg: Config) -> Iterator[Problem]:
    prompts, group, updates = (
        cfg.data.prompts_per_step,
        trained_group(cfg),
        cfg.train.updates_per_rollout,
    )
    samples = prompts * group
    if samples % updates:
        yield (
            ("train.updates_per_rollout", "data.prompts_per_step", "rollout.group_size"),
            f"train.updates_per_rollout: got {updates}, which does not divide the {samples} "
            f"samples of a rollout (data.prompts_per_step {prompts} x rollout.group_size {group}); "
            f"allowed: {_divisors(samples)}",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _weight_problems(cfg: Config) -> Iterator[Problem]:
    tables = {"rewards": cfg.rewards} if cfg.rewards else {}
    tables |= {f"category_weights.{name}": table for name, table in cfg.category_weights.items()}
    for key, table in tables.items():
        if table and not any(table.values()):
            yield (key,), f"{key}: all weights are 0; at least one must be above 0"
        if not table:
            yield (key,), f"{key}: is empty; name at least one judge with a weight above 0"
        for name in table:
            if name not in cfg.rewards:
                yield (
                    (f"{key}.{name}",),
                    f"{key}.{name}: judge {name!r} is not among rewards; allowed: "
                    + ", ".join(cfg.rewards),
                )
    for name in cfg.watch:
        if name in cfg.rewards:
            yield ("watch",), f"watch: {name!r} is already optimised in rewards; name it only once"
    if len(set(cfg.watch)) < len(cfg.watch):
        yield ("watch",), f"watch: got {cfg.watch}, which repeats a judge; name each only once"


def _tier_problems(cfg: Config) -> Iterator[Problem]:
    for tier in cfg.tiers:
        if tier.judge not in cfg.rewards:
            yield (
                ("tiers",),
                f"tiers: judge {tier.judge!r} is not among rewards; allowed: "
                + ", ".join(cfg.rewards),
            )
    try:
        check_tiers(cfg.tiers)
    except ValueError as error:
        yield ("tiers",), f"tiers: {error}"


def _edit_problems(cfg: Config) -> Iterator[Problem]:
    if cfg.edit is not None:
        try:
            check_rule(cfg.edit, list(cfg.rewards))
        except ValueError as error:
            yield ("edit",), f"edit: {error}"


def _curation_problems(cfg: Config) -> Iterator[Problem]:
    threshold, quantile = cfg.curation.threshold, cfg.curation.quantile
    if (threshold is None) == (quantile is None):
        came = "neither" if threshold is None else f"{threshold:g} and {quantile:g}"
        yield (
            ("curation.threshold", "curation.quantile"),
            f"curation.threshold, curation.quantile: got {came}; set exactly one and the other to "
            "null, such as curation.threshold=0.5 curation.quantile=null",
        )
    low, high = cfg.curation.drop_failed, cfg.curation.drop_passed
    if low is not None and high is not None and low > high:
        yield (
            ("curation.drop_failed", "curation.drop_passed"),
            f"curation.drop_failed: got {low:g}, above curation.drop_passed {high:g}; a reward "
            "would count as failed and passed",
        )
