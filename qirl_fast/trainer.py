"""What a run holds, and the steps the training loop is made of."""

import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from qirl_fast.rollout.sample import Sampling, Trajectory, sample_then
from qirl_fast.rollout.workers import Workers, cpu_workers
from qirl_fast.tiny import packaged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EvaluationFailed(RuntimeError):
    """A judge could not score the held-out images, so there is nothing to compare."""


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
        """Sample every prompt's group; judges score one chunk while the next is sampled."""
        r = self.cfg.rollout
        rows = [prompt for prompt in prompts for _ in range(r.group_size)]
        recorded = self.algorithm.record(
            r.steps,
            (r.window.start, r.window.size) if r.window else None,
            (r.sde_steps.count, r.sde_steps.high or r.steps - 1) if r.sde_steps else None,
            self.cfg.seed,
            update,
        )

        def draw(chunk: Trajectory) -> tuple[Trajectory, np.ndarray]:
            return chunk, self.model.decode(chunk.latents, r.height, r.width)

        chunks: list[tuple[Trajectory, np.ndarray, Future[tuple[Tensor, Tensor]]]] = []
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
            ):
                # Judges see the chunks in order, whichever was drawn first: one may draw numbers.
                part = rows[chunk.rows.start : chunk.rows.stop]
                chunks.append((chunk, images, self._judging.submit(self.judge, images, part)))
        trajectories = [chunk for chunk, _, _ in chunks]
        drawn = np.concatenate([images for _, images, _ in chunks])
        results: list[tuple[Tensor, Tensor]] = []
        for chunk, _, future in chunks:
            try:
                results.append(future.result())
            except BadReward as error:
                row = chunk.rows.start + error.row
                scores = torch.full((len(rows), len(self.judges)), torch.nan)
                for done, (known, _) in zip(trajectories, results, strict=False):
                    scores[done.rows.start : done.rows.stop] = known
                if error.scores is not None:
                    column = self.judges.index(error.judge)
                    scores[chunk.rows.start : chunk.rows.stop, column] = torch.as_tensor(
                        error.scores
                    )
                raise StepFailed(
                    f"judge {error.judge!r}, row {row} ({rows[row].prompt!r}): {error.reason}",
                    Batch(prompts, trajectories, drawn, scores, scores.isfinite()),
                ) from error
        scores, valid = (torch.cat(parts) for parts in zip(*results, strict=True))
        return Batch(prompts, trajectories, drawn, scores, valid)

    def advantages(self, batch: Batch) -> ops.GroupAdvantage:
        """Group advantages of the optimised judges, by each prompt's category weights."""
        cfg, names = self.cfg, list(self.cfg.rewards)
        categories = [p.category for p in batch.prompts for _ in range(cfg.rollout.group_size)]
        weights = weights_for(categories, cfg.rewards, cfg.category_weights, names)
        a = cfg.advantage
        return ops.group_advantage(
            batch.scores[:, : len(names)],
            torch.arange(len(batch.prompts)).repeat_interleave(cfg.rollout.group_size),
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
        """Mean score of each judge over its valid rows, and the share of rows that train.

        `reward` is the weighted mean of the optimised ones, absent where one failed on all rows.
        """
        metrics = {}
        for i, name in enumerate(self.judges):
            valid = batch.valid[:, i]
            if bool(valid.any()):
                metrics[f"reward/{name}"] = batch.scores[valid, i].double().mean().item()
            metrics[f"failed/{name}"] = (~valid).double().mean().item()
        if all(f"reward/{name}" in metrics for name in self.cfg.rewards):
            metrics["reward"] = sum(w * metrics[f"reward/{n}"] for n, w in self.cfg.rewards.items())
        metrics["kept_groups"] = advantage.keep.double().mean().item()
        return metrics

    def update(self, batch: Batch, advantage: ops.GroupAdvantage) -> dict[str, float]:
        """One optimizer step per minibatch of chunks; returns the metrics of the update."""
        return self.learner.update(batch.trajectories, advantage.advantage)

    def evaluate(self, count: int | None = None) -> Evaluation:
        """Score the first `count` held-out prompts, with averaged weights where there are some."""
        with self.learner.averaged():
            return self.evaluate_weights(count)

    def evaluate_weights(self, count: int | None = None) -> Evaluation:
        """Score held-out prompts under the weights as they are.

        Generators and judges are left as they were: a resumed run may not evaluate again.
        """
        prompts = self.heldout[:count]
        generators, judges = rng_state(), judge_states(self.judges)
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
