"""What a run holds, and the steps the training loop is made of."""

import logging
import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.algorithms import ALGORITHMS
from qirl_fast.batch import Batch, StepFailed
from qirl_fast.checkpoint import lora_state, rng_state, set_rng_state
from qirl_fast.config import Config, derived
from qirl_fast.data.embeddings import EmbeddingCache, fingerprint
from qirl_fast.data.prompts import Prompt, load_prompts
from qirl_fast.data.sampler import PromptSampler
from qirl_fast.evaluation.heldout import Evaluation, evaluate
from qirl_fast.learner import Learner
from qirl_fast.models import load_model
from qirl_fast.models.adapter import NotFinite
from qirl_fast.models.fp8 import Fp8, describe, plan_layers, use_fp8
from qirl_fast.models.fused.attention import use_attention
from qirl_fast.models.graphs import ForwardGraphs
from qirl_fast.preflight import preflight
from qirl_fast.rewards.composite import (
    BadReward,
    judge_states,
    load_judge_states,
    score_all,
    weights_for,
)
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, Trajectory, sample_then
from qirl_fast.rollout.workers import Workers, cpu_workers
from qirl_fast.tiny import packaged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


logger = logging.getLogger(__name__)


class EvaluationFailed(RuntimeError):
    """A judge could not score the held-out images, so there is nothing to compare."""


def best_and_worst(value: Tensor, groups: int, keep: int) -> list[int]:
    """Indices, ascending, of the keep / 2 largest and smallest of each of `groups` equal parts.

    value: [N], N a multiple of groups. Of equal ones the first.
    """
    order = value.view(groups, -1).argsort(dim=1, stable=True)
    picked = torch.cat([order[:, : keep // 2], order[:, -(keep // 2) :]], dim=1)
    first = torch.arange(groups)[:, None] * order.shape[1]
    return (picked + first).flatten().sort().values.tolist()


def seed_everything(seed: int) -> None:
    """Seed every global generator; ours need none, but a judge or a library may draw from one."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


class Trainer:
    """Model, prompts, judges, learner; every method is one verb of the loop in train.py."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        seed_everything(cfg.seed)
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = best if cfg.device == "auto" else cfg.device
        if device == "cuda" and best == "cpu":
            raise ValueError(
                "device: got cuda, and torch.cuda.is_available() is False here; allowed: cpu, auto"
            )
        if cfg.rollout.cuda_graphs and device == "cpu":
            raise ValueError(
                "rollout.cuda_graphs: got true, and the run is on the CPU; allowed there: false"
            )
        self.workers = cpu_workers(cfg.threads) if device == "cpu" else Workers(1)
        folder = packaged(cfg.model.path)
        self.model = load_model(folder, cfg.model.family, DTYPES[cfg.model.dtype], device)
        use_attention(self.model.transformer, cfg.model.attention)
        self.mode = cfg.model.fp8.mode if cfg.model.fp8 else None
        self.fp8 = self._fp8()
        if cfg.rollout.cuda_graphs:
            self.model.graphs = ForwardGraphs(self.model.transformer, self.model.forward)
        self.scheduler = dict(self.model.pipeline.scheduler.config)
        self.algorithm: ModuleType = ALGORITHMS[cfg.algorithm.name]
        self.judges = [*cfg.rewards, *cfg.watch]
        files = {"train": packaged(cfg.data.train), "heldout": packaged(cfg.data.heldout)}
        prompts = {name: load_prompts(file) for name, file in files.items()}
        preflight(cfg, self.model, self.scheduler, prompts, files)
        self.sampler = PromptSampler(prompts["train"], cfg.data.prompts_per_step, cfg.seed)
        self.heldout = prompts["heldout"][: cfg.evaluation.prompts]
        key = f"{fingerprint(folder)}-{cfg.model.dtype}"
        self.cache = EmbeddingCache(Path(cfg.output) / "embeddings", key)
        self.null = self.embed([""])[0]
        self.rollout_sampling = self._sampling(cfg.rollout.steps, cfg.rollout.guidance)
        self.evaluation_sampling = self._sampling(cfg.evaluation.steps, cfg.evaluation.guidance)
        self.learner = Learner(cfg, self.model, self.algorithm, self.workers, self.rollout_sampling)
        self._judging = ThreadPoolExecutor(1, thread_name_prefix="judges")

    def _fp8(self) -> Fp8 | None:
        """The transformer's fp8 layers, off; which they are is logged."""
        fp8, transformer = self.cfg.model.fp8, self.model.transformer
        if fp8 is None:
            return None
        layers = fp8.layers or self.model.fp8_layers
        plan = plan_layers(transformer, layers, fp8.skip, fp8.recipe, fp8.backward)
        logger.info("fp8, %s, library %s\n%s", fp8.mode, fp8.library, describe(plan, fp8.recipe))
        return use_fp8(transformer, plan, fp8.recipe, fp8.backward, fp8.library)

    def _sampling(self, steps: int, scale: float) -> Sampling:
        r = self.cfg.rollout
        own = self.model.norm_rescaled_guidance
        rescale = own if r.rescale_guidance is None else r.rescale_guidance
        return Sampling(
            height=r.height,
            width=r.width,
            steps=steps,
            guidance=Guidance(scale, rescale, r.ratio_mode, r.guidance_interval or (0.0, 1.0)),
            dynamics=r.dynamics,
            eta=r.eta,
            storage_dtype=r.storage_dtype,
            max_rows=derived(self.cfg).chunk_rows,
            replay_steps=self.cfg.train.replay_steps,
        )

    def embed(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text embeddings [L, C], each prompt encoded once and kept on disk."""
        with torch.no_grad():
            return self.cache.get(list(prompts), self.model.encode)

    def judge(self, images: np.ndarray, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Scores float32 [B, K] and valid bool [B, K] of all judges, optimised ones first."""
        scores, valid = score_all(self.judges, images, [p.metadata for p in prompts])
        return torch.as_tensor(scores), torch.as_tensor(valid)

    def rollout(self, prompts: list[Prompt], update: int) -> Batch:
        """Every prompt's group, drawn and judged; under fp8 as its mode says."""
        if self.mode == "explore":
            return self._explored(prompts, update)
        with self.in_fp8(self.mode is not None):
            batch = self._draw(prompts, update)
        return self._rescored(batch) if self.mode == "corrected" else batch

    def in_fp8(self, wanted: bool) -> AbstractContextManager[None]:
        """Inside, the transformer computes in fp8 where the recipe has it and it is wanted."""
        return self.fp8.on() if self.fp8 is not None and wanted else nullcontext()

    def _explored(self, prompts: list[Prompt], update: int) -> Batch:
        """The best and the worst of what fp8 draws, drawn again without it (arXiv 2604.06916)."""
        fp8 = self.cfg.model.fp8
        assert fp8 is not None and fp8.keep is not None
        with self.in_fp8(True):
            found = self._draw(prompts, update, record=False)
        kept = best_and_worst(self.advantages(found).advantage, len(prompts), fp8.keep)
        batch = self._draw(prompts, update, kept)
        gap = (batch.scores - found.scores[kept])[batch.valid & found.valid[kept]]
        means = self._means(found).items()
        metrics = {f"explored/{n.removeprefix('reward/')}": value for n, value in means}
        if len(gap):
            metrics["explored/score_gap"] = gap.double().abs().mean().item()
        return replace(batch, metrics=metrics)

    def _rescored(self, batch: Batch) -> Batch:
        """The batch with log-probs of the forward that trains in place of fp8's."""

        def again(chunk: Trajectory) -> Trajectory:
            with torch.no_grad():
                steps = replay(self.model, chunk, self.rollout_sampling)
                return replace(chunk, logp=tuple(step.logp for step in steps))

        chunks = list(self.workers.map(again, batch.trajectories))
        pairs = zip(chunks, batch.trajectories, strict=True)
        gaps = [(torch.stack(new.logp) - torch.stack(old.logp)).abs() for new, old in pairs]
        gap = torch.cat([g.flatten() for g in gaps]).double().mean().item()
        return replace(batch, trajectories=chunks, metrics={"fp8/logp_gap": gap})

    def _draw(
        self,
        prompts: list[Prompt],
        update: int,
        samples: list[int] | None = None,
        record: bool = True,
    ) -> Batch:
        """Sample every prompt's group; judges score one chunk while the next is sampled.

        samples: numbers of those to draw, as many of each prompt; None: all. record: keep what
        replay needs.
        """
        r = self.cfg.rollout
        total = len(prompts) * r.group_size
        rows = [prompts[k // r.group_size] for k in (range(total) if samples is None else samples)]
        recorded = self.algorithm.record(
            r.steps,
            (r.window.start, r.window.size) if r.window else None,
            (r.sde_steps.count, r.sde_steps.high or r.steps - 1) if r.sde_steps else None,
            self.cfg.seed,
            update,
        )

        def draw(chunk: Trajectory) -> tuple[Trajectory, np.ndarray | NotFinite]:
            if not record:
                chunk = replace(chunk, recorded=(), x=(), x_next=(), delta=(), logp=())
            try:
                return chunk, self.model.decode(chunk.latents, r.height, r.width)
            except NotFinite as error:
                return chunk, error

        chunks: list[tuple[Trajectory, np.ndarray, Future[tuple[Tensor, Tensor]]]] = []

        def failed(message: str, results: Sequence[Tensor] = ()) -> StepFailed:
            """The error, with what there is of the batch; results: scores of the first chunks."""
            scores = torch.full((len(rows), len(self.judges)), torch.nan)
            for (chunk, _, _), known in zip(chunks, results, strict=False):
                scores[chunk.rows.start : chunk.rows.stop] = known
            size = (0, r.height, r.width, 3)
            drawn = np.concatenate([np.empty(size, np.uint8), *(images for _, images, _ in chunks)])
            trajectories = [chunk for chunk, _, _ in chunks]
            return StepFailed(
                message, Batch(prompts, trajectories, drawn, scores, scores.isfinite())
            )

        with self.algorithm.sampling(self.model):
            for chunk, images in sample_then(
                draw,
                self.workers,
                self.model,
                self.embed([p.prompt for p in prompts]),
                self.null,
                self.rollout_sampling,
                self.scheduler,
                group_size=r.group_size,
                seed=self.cfg.seed,
                update=update,
                recorded=recorded,
                shared_noise=r.shared_noise,
                samples=samples,
            ):
                if isinstance(images, NotFinite):
                    raise failed(f"rollout of rows {chunk.rows}: {images}")
                # Judges see the chunks in order, whichever was drawn first: one may draw numbers.
                part = rows[chunk.rows.start : chunk.rows.stop]
                chunks.append((chunk, images, self._judging.submit(self.judge, images, part)))
        results: list[tuple[Tensor, Tensor]] = []
        for chunk, _, future in chunks:
            try:
                results.append(future.result())
            except BadReward as error:
                row = chunk.rows.start + error.row
                known = [scores for scores, _ in results]
                if error.scores is not None:
                    scores = torch.full((len(chunk.rows), len(self.judges)), torch.nan)
                    scores[:, self.judges.index(error.judge)] = torch.as_tensor(error.scores)
                    known.append(scores)
                raise failed(
                    f"judge {error.judge!r}, row {row} ({rows[row].prompt!r}): {error.reason}",
                    known,
                ) from error
        scores, valid = (torch.cat(parts) for parts in zip(*results, strict=True))
        drawn = np.concatenate([images for _, images, _ in chunks])
        return Batch(prompts, [chunk for chunk, _, _ in chunks], drawn, scores, valid)

    def advantages(self, batch: Batch) -> ops.GroupAdvantage:
        """Group advantages of the optimised judges, by each prompt's category weights."""
        cfg, names = self.cfg, list(self.cfg.rewards)
        group = len(batch.scores) // len(batch.prompts)
        categories = [p.category for p in batch.prompts for _ in range(group)]
        weights = weights_for(categories, cfg.rewards, cfg.category_weights, names)
        a = cfg.advantage
        return ops.group_advantage(
            batch.scores[:, : len(names)],
            torch.arange(len(batch.prompts)).repeat_interleave(group),
            torch.as_tensor(weights),
            std=a.std,
            ddof=a.ddof,
            eps=a.eps,
            std_floor=a.std_floor,
            clamp=a.clamp,
            min_range=a.min_range,
            mode=a.mode,
            valid=batch.valid[:, : len(names)],
        )

    def reward_metrics(self, batch: Batch, advantage: ops.GroupAdvantage) -> dict[str, float]:
        """Mean score of each judge, the share of rows it failed on and of rows that train."""
        metrics = self._means(batch) | batch.metrics
        for i, name in enumerate(self.judges):
            metrics[f"failed/{name}"] = (~batch.valid[:, i]).double().mean().item()
        metrics["kept_groups"] = advantage.keep.double().mean().item()
        return metrics

    def _means(self, batch: Batch) -> dict[str, float]:
        """Mean score of each judge over its valid rows.

        `reward` is the weighted mean of the optimised ones, absent where one failed on all rows.
        """
        metrics = {}
        for i, name in enumerate(self.judges):
            valid = batch.valid[:, i]
            if bool(valid.any()):
                metrics[f"reward/{name}"] = batch.scores[valid, i].double().mean().item()
        if all(f"reward/{name}" in metrics for name in self.cfg.rewards):
            metrics["reward"] = sum(w * metrics[f"reward/{n}"] for n, w in self.cfg.rewards.items())
        return metrics

    def update(self, batch: Batch, advantage: ops.GroupAdvantage) -> dict[str, float]:
        """One optimizer step per minibatch of chunks; returns the metrics of the update."""
        with self.in_fp8(self.mode == "unified"):
            return self.learner.update(batch.trajectories, advantage.advantage)

    def evaluate(self, count: int | None = None) -> Evaluation:
        """Score the first `count` held-out prompts, with averaged weights where there are some."""
        with self.learner.averaged():
            return self.evaluate_weights(count)

    def evaluate_weights(self, count: int | None = None) -> Evaluation:
        """Score held-out prompts under the weights as they are, never in fp8: what is exported
        is a LoRA on the model's own weights.

        Generators and judges are left as they were: a resumed run may not evaluate again.
        """
        prompts = self.heldout[:count]
        generators, judges = rng_state(), judge_states(self.judges)
        try:
            found = evaluate(
                self.model,
                self.embed([p.prompt for p in prompts]),
                self.null,
                [p.metadata for p in prompts],
                self.evaluation_sampling,
                self.scheduler,
                self._scores_by_name,
                self.workers,
                samples_per_prompt=self.cfg.evaluation.samples_per_prompt,
                seed=self.cfg.evaluation.seed,
            )
        except NotFinite as error:
            raise EvaluationFailed(f"held-out images: {error}") from error
        set_rng_state(generators)
        load_judge_states(judges)
        return found

    def _scores_by_name(
        self, images: np.ndarray, metadata: list[dict[str, Any]]
    ) -> dict[str, np.ndarray]:
        try:
            scores, valid = score_all(self.judges, images, metadata)
        except BadReward as error:
            raise EvaluationFailed(f"held-out images: {error}") from error
        failed = [n for i, n in enumerate(self.judges) if not bool(valid[:, i].all())]
        if failed:
            raise EvaluationFailed(f"judges {failed} failed on held-out images; see the log")
        return {name: np.asarray(scores)[:, i] for i, name in enumerate(self.judges)}

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, as a tree for `checkpoint.pack`."""
        return {
            "learner": self.learner.state(),
            "sampler": self.sampler.state_dict(),
            "judges": judge_states(self.judges),
            "rng": rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken."""
        self.learner.load_state(state["learner"])
        self.sampler.load_state_dict(state["sampler"])
        load_judge_states(state["judges"])
        set_rng_state(state["rng"])

    def lora(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The adapter for export (averaged weights where there are some), None in full training."""
        if self.cfg.model.adapter != "lora":
            return None
        with self.learner.averaged():
            return lora_state(self.model.transformer)
