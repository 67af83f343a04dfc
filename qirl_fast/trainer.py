"""What a run holds, and the steps the training loop is made of."""

import hashlib
import logging
import os
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.advantages import advantages, diversity, mean_scores, spread_metrics
from qirl_fast.batch import Batch, StepFailed
from qirl_fast.checkpoint import lora_state, rng_state, set_rng_state
from qirl_fast.clock import Speed, peak_flops
from qirl_fast.conditioning import Conditioning
from qirl_fast.config import Config, derived, require_work
from qirl_fast.data.prompts import Prompt, load_prompts
from qirl_fast.data.sampler import PromptSampler
from qirl_fast.distributed import World, process_threads
from qirl_fast.evaluation.heldout import Evaluation
from qirl_fast.heldout_samples import HeldoutSamples
from qirl_fast.learner import Learner
from qirl_fast.models import load_model
from qirl_fast.models.compiled import CompiledForward
from qirl_fast.models.fp8 import Fp8, describe, plan_layers, use_fp8
from qirl_fast.models.fused.attention import use_attention
from qirl_fast.models.graphs import ForwardGraphs
from qirl_fast.models.sharding import own_part
from qirl_fast.preflight import preflight, sharding, sharing_tokens
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.kinds import JudgeSettings
from qirl_fast.rewards.verdict import covered
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling
from qirl_fast.rollout.workers import Workers, cpu_workers
from qirl_fast.rollouts import Rollouts
from qirl_fast.tiny import packaged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DENOISERS: dict[str, type[ForwardGraphs | CompiledForward] | None] = {
    "eager": None,
    "graphs": ForwardGraphs,
    "compile": CompiledForward,
}


logger = logging.getLogger(__name__)


def seed_everything(seed: int) -> None:
    """Seed every global generator; ours need none, but a judge or a library may draw from one."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def require_determinism() -> None:
    """From here on PyTorch raises where it has no algorithm of fixed order. Before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS picks as it likes
    torch.use_deterministic_algorithms(True)
    # What is read was written before.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def prepare_device(cfg: Config) -> str:
    """The device's name, cpu or cuda; generators are seeded, algorithms chosen by the recipe."""
    seed_everything(cfg.seed)
    if cfg.deterministic:
        require_determinism()
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = best if cfg.device == "auto" else cfg.device
    if device == "cuda" and best == "cpu":
        raise ValueError(
            "device: got cuda, and torch.cuda.is_available() is False here; allowed: cpu, auto"
        )
    return device


def judging_device(device: str) -> str:
    """The same by its number: in threads, as judges have, "cuda" is the first GPU."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


class Trainer:
    """Model, prompts, judges, learner; every method is one verb of the loop in train.py.

    world: the processes of the run, each with a Trainer of its own, all of whose verbs they call
    together. served: gives settings for judges in place of the recipe's own.
    """

    def __init__(
        self,
        cfg: Config,
        world: World | None = None,
        served: Callable[[], Mapping[str, JudgeSettings]] = dict,
    ):
        self.cfg, self.world = cfg, world or World()
        require_work(cfg, self.world.size)
        device = prepare_device(cfg)
        if cfg.rollout.denoise == "graphs" and device == "cpu":
            raise ValueError(
                "rollout.denoise: got graphs, and the run is on the CPU; allowed there: eager, "
                "compile"
            )
        folder, shards = packaged(cfg.model.path), sharding(cfg, self.world, device)
        in_step = shards is not None or cfg.processes.sequence > 1  # forwards of several processes
        threads = 1 if in_step else process_threads(cfg.threads)
        self.workers = cpu_workers(threads) if device == "cpu" else Workers(1)
        self.workers.in_step = in_step
        dtype, spread = DTYPES[cfg.model.dtype], shards is not None
        self.model = load_model(folder, cfg.model.family, dtype, device, spread)
        self.model.sequence = sharing_tokens(cfg, self.world, self.model)
        use_attention(self.model.transformer, cfg.model.attention)
        self.fp8 = self._fp8()
        kind = DENOISERS[cfg.rollout.denoise]
        if kind is not None:
            self.model.denoiser = kind(self.model.transformer, self.model.forward)
        if isinstance(self.model.denoiser, ForwardGraphs):
            self.workers.release = self.model.denoiser.forget
        logger.info("denoising: %s", cfg.rollout.denoise)
        self.scheduler = dict(self.model.pipeline.scheduler.config)
        names = [*cfg.rewards, *cfg.watch]
        specs = cfg.judges | dict(served())
        self.judges = Judges(names, specs, judging_device(device), cfg.failures.reask)
        stateful = ", ".join(self.judges.state_dict())
        if stateful and self.world.size > 1:
            raise ValueError(
                f"judges {stateful}: keep a state of all they have seen, and each of "
                f"{self.world.size} processes shows them a part; serve them from one place "
                "(qirl_fast.reward_server), or start one process"
            )
        files = {"train": packaged(cfg.data.train), "heldout": packaged(cfg.data.heldout)}
        roots = {"train": cfg.data.images, "heldout": cfg.data.heldout_images}
        prompts = {name: load_prompts(file, roots[name]) for name, file in files.items()}
        self.conditioning = Conditioning(cfg, self.model, folder, self.world)
        left_out = preflight(
            cfg, self.model, self.judges, self.scheduler, self.conditioning, prompts, files
        )
        self.sampler = self._sampler(prompts["train"], left_out["train"])
        usable = [p for i, p in enumerate(prompts["heldout"]) if i not in left_out["heldout"]]
        self.heldout = usable[: cfg.evaluation.prompts]
        self.rollout_sampling = self._sampling(cfg.rollout.steps, cfg.rollout.guidance)
        self.learner = Learner(
            cfg, self.model, self.workers, self.rollout_sampling, self.world, shards
        )
        self.algorithm = self.learner.algorithm
        self.heldout_samples = HeldoutSamples(
            cfg,
            self.model,
            self.judges,
            self.workers,
            self._sampling(cfg.evaluation.steps, cfg.evaluation.guidance),
            self.scheduler,
            self.conditioning,
            self.world,
        )
        self.rollouts = Rollouts(
            cfg,
            self.model,
            self.algorithm,
            self.judges,
            self.workers,
            self.rollout_sampling,
            self.scheduler,
            self.in_fp8,
            self.conditioning,
            self.world,
        )

    def _sampler(self, prompts: list[Prompt], refused: set[int]) -> PromptSampler:
        """Over all rows, of which those `refused` are never drawn: on resuming others may be."""
        per_step, seed, buckets = self.cfg.data.prompts_per_step, self.cfg.seed, None
        if self.cfg.data.buckets:
            nowhere = (0, 0)  # a refused image has no size
            buckets = [
                nowhere if i in refused else self.conditioning.target(p)
                for i, p in enumerate(prompts)
            ]
        return PromptSampler(prompts, per_step, seed, buckets, refused)

    def _fp8(self) -> Fp8 | None:
        """The transformer's fp8 layers, off; which they are is logged."""
        fp8, transformer = self.cfg.model.fp8, self.model.transformer
        if fp8 is None:
            return None
        layers = fp8.layers or self.model.fp8_layers
        plan = plan_layers(transformer, layers, fp8.skip, fp8.recipe, fp8.backward)
        logger.info("fp8, %s\n%s", fp8.mode, describe(plan, fp8.recipe, fp8.library))
        return use_fp8(transformer, plan, fp8.recipe, fp8.backward, fp8.library)

    def in_fp8(self) -> AbstractContextManager[None]:
        """Inside, the transformer computes in fp8 where the recipe has it."""
        return nullcontext() if self.fp8 is None else self.fp8.on()

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
            keeps=self.cfg.algorithm.keeps,
        )

    def next_prompts(self) -> list[Prompt]:
        """The next update's prompts, their images decoded: see `Conditioning.draw`."""
        return self.conditioning.draw(self.sampler)

    def rollout(self, prompts: list[Prompt], update: int) -> Batch:
        """Every prompt's group, drawn and judged."""
        return self.rollouts.batch(prompts, update)

    def judging_s(self) -> tuple[float, float]:
        """Seconds of the last rollout in which nothing was left but to wait for judges, and in
        which they worked beside it.
        """
        waits = self.rollouts.waits
        beside = covered(self.judges.busy) - covered(self.judges.busy, waits)
        return covered(waits), beside

    def judge_load(self) -> dict[str, float]:
        """Of the last rollout: chunks that waited for judges when one more was handed over, mean
        and most, and the seconds each judge worked.
        """
        queue, seconds = self.judges.queue, self.judges.seconds
        load = {f"{name}_s": value for name, value in sorted(seconds.items())}
        if queue:
            load |= {"queue_mean": sum(queue) / len(queue), "queue_max": max(queue)}
        return load

    def speed(self) -> Speed:
        """Model FLOPs so far, and the most of this process's device."""
        model = self.model
        peak = peak_flops(model.device.type, model.dtype, self.workers)
        return Speed(lambda: model.work.done, peak)

    def advantages(self, batch: Batch) -> ops.GroupAdvantage | None:
        """Of each sample, see `rollouts.advantages`; None where no reward is optimised."""
        return advantages(self.cfg, batch) if self.cfg.rewards else None

    def reward_metrics(
        self, batch: Batch, advantage: ops.GroupAdvantage | None
    ) -> dict[str, float]:
        """Mean score and in-group spread of each judge, where it failed, how much images of a
        prompt differ, and the share of rows that train.
        """
        metrics = mean_scores(self.cfg, batch) | batch.metrics | spread_metrics(self.cfg, batch)
        metrics |= diversity(batch, self.world)
        if advantage is not None:
            metrics["kept_groups"] = advantage.keep.double().mean().item()
        return metrics

    def update(
        self,
        batch: Batch,
        advantage: ops.GroupAdvantage | None,
        begun: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """One optimizer step per minibatch of chunks; returns the metrics of the update.

        begun: called before the first step, after which there is no going back.
        """
        fp8 = self.cfg.model.fp8
        with self.in_fp8() if fp8 is not None and fp8.mode == "unified" else nullcontext():
            value = None if advantage is None else advantage.advantage
            tasks = [p.task for p in batch.prompts for _ in range(batch.group)]
            return self.learner.update(batch.trajectories, value, tasks, begun)

    def evaluate(self, count: int | None = None) -> Evaluation:
        """Score the first `count` held-out prompts, with averaged weights where there are some."""
        with self.learner.averaged():
            return self.evaluate_weights(count)

    def evaluate_weights(self, count: int | None = None) -> Evaluation:
        """Score held-out prompts under the weights as they are, never in fp8: what is exported
        is a LoRA on the model's own weights.
        """
        return self.heldout_samples.evaluate(self.heldout[:count])

    def strip(self, count: int) -> list[np.ndarray]:
        """One image of each of the first `count` held-out prompts, as `evaluate` draws them."""
        with self.learner.averaged():
            return self.heldout_samples.first_images(self.heldout[:count])

    def require_same_weights(self) -> None:
        """StepFailed where another process holds other weights than this one: a fault of memory, or
        processors of several kinds, which round differently.
        """
        if self.world.size == 1:
            return
        digest = hashlib.sha256()
        for p in self.learner.trainable.values():
            digest.update(own_part(p).cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        found = self.world.gather(digest.hexdigest())
        shard = (self.cfg.processes.shard or self.world.size) if self.learner.spread else 1
        other = [rank for rank, own in enumerate(found) if own != found[rank % shard]]
        if other:
            raise StepFailed(
                f"the weights of processes {other} are no longer those of the first; run on "
                "machines of one kind, and check their memory"
            )

    def close(self) -> None:
        """Release what judges and the decoding thread hold."""
        self.judges.close()
        self.conditioning.close()

    def position(self) -> dict[str, Any]:
        """Where prompts, judges and generators stand; with the weights, all an update needs."""
        return {
            "sampler": self.sampler.state_dict(),
            "judges": self.judges.state_dict(),
            "rng": rng_state(),
            "optimizer_steps": self.learner.optimizer_steps,
        }

    def go_back(self, position: dict[str, Any]) -> bool:
        """To the beginning of a failed update. False where that is no state to go on from: some
        of the update was applied, or weights are not finite.
        """
        weights = self.learner.trainable.values()
        sound = all(bool(torch.isfinite(own_part(p)).all()) for p in weights)
        self.judges.abandon()
        if not sound or self.learner.optimizer_steps != position["optimizer_steps"]:
            return False
        self.sampler.load_state_dict(position["sampler"])
        self.judges.load_state_dict(position["judges"])
        set_rng_state(position["rng"])
        return True

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, as a tree for `checkpoint.pack`."""
        position = self.position()
        del position["optimizer_steps"]  # the learner has it
        return {"learner": self.learner.state(), **position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken."""
        self.learner.load_state(state["learner"])
        self.sampler.load_state_dict(state["sampler"])
        self.judges.load_state_dict(state["judges"])
        set_rng_state(state["rng"])

    def lora(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The adapter for export (averaged weights where there are some), None in full training."""
        if self.cfg.model.adapter != "lora":
            return None
        with self.learner.averaged():
            return lora_state(self.model.transformer)
