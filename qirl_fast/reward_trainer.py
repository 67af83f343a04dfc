"""Fine-tuning a judge, as verbs for `train_reward`: samples, update, held-out loss, export.

What is trained is in float32: a LoRA over weights of model.dtype, or all weights, whose forward
runs in model.dtype by autocast. The order of samples, and which are shown without their rationale,
are functions of the seed and of the sample's number in the run, so a resumed run needs no more
than its step.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qirl_fast.checkpoint import rng_state, set_rng_state
from qirl_fast.config.reward import RewardConfig
from qirl_fast.rewards.vlm.data import load_rows
from qirl_fast.rewards.vlm.folder import JudgeCard, base_of, load_processor, model_class
from qirl_fast.rewards.vlm.images import read_image
from qirl_fast.rewards.vlm.loss import Losses, Sample, batch_losses, build_sample
from qirl_fast.rewards.vlm.prompt import score_ids
from qirl_fast.rewards.vlm.rows import Judgement, Tiers, digest
from qirl_fast.rewards.vlm.rubric import question, rubric

LANGUAGE = r"language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
VISION = r"visual\.blocks\..*\.(qkv|proj|linear_fc1|linear_fc2|gate_proj|up_proj|down_proj)"


class TrainingFailed(RuntimeError):
    """A step that gave NaN or infinity; its update was not applied."""


def read_data(cfg: RewardConfig) -> dict[str, list[Judgement]]:
    """The rows of both splits. Raises DataError; ValueError without rows to train on."""
    tiers = cfg.data.tiers
    rule = Tiers(tuple(tiers.order), tiers.failed_below, tiers.cap, tiers.cap_labels)
    rows = load_rows(Path(cfg.data.file), cfg.data.heldout_share, rule)
    splits = {name: [row for row in rows if row.split == name] for name in ("train", "heldout")}
    if not splits["train"]:
        raise ValueError(
            f"data.file: all {len(rows)} rows of {cfg.data.file} are held out; lower "
            "data.heldout_share, or give rows the split 'train'"
        )
    return splits


def rubrics_of(cfg: RewardConfig, rows: Sequence[Judgement]) -> dict[str, str]:
    """Dimension -> question text, of the dimensions in the data."""
    own: Mapping[Any, str] = cfg.data.rubrics
    return {name: own.get(name, rubric(name)) for name in sorted({row.dimension for row in rows})}


class RewardTrainer:
    """Model, optimizer and data of one run. `digests`: of each split's rows (`rows.digest`).

    Raises ValueError or FileNotFoundError for a model or data that do not fit.
    """

    def __init__(self, cfg: RewardConfig) -> None:
        if cfg.threads is not None:
            torch.set_num_threads(cfg.threads)
        self.cfg = cfg
        self.splits = read_data(cfg)
        self.digests = {name: digest(part) for name, part in self.splits.items()}
        self.rubrics = rubrics_of(cfg, [*self.splits["train"], *self.splits["heldout"]])
        torch.manual_seed(cfg.seed)
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = found if cfg.device == "auto" else cfg.device
        self.processor = load_processor(cfg.model.path)
        self.ids5 = score_ids(self.processor)
        self.wrapped = _build(cfg).to(self.device)
        self.model = self.wrapped.get_base_model() if cfg.model.adapter == "lora" else self.wrapped
        self.trainable = {n: p for n, p in self.wrapped.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=cfg.train.lr,
            betas=cfg.train.betas,
            weight_decay=cfg.train.weight_decay,
        )
        # One thread: fast tokenizers may not be called from two at once.
        self.loader = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self.ahead: tuple[int, Future[list[Sample]]] | None = None

    def update(self, step: int) -> dict[str, float]:
        """Optimizer step `step`, counted from 1: the metrics of its batch.

        Raises TrainingFailed for a loss or gradient that is not finite.
        """
        cfg, size = self.cfg.train, self.cfg.train.micro_batch
        samples = self._batch(step)
        parts = []
        for start in range(0, len(samples), size):
            with self._autocast():
                losses = self._losses(samples[start : start + size])
            (losses.total.sum() / len(samples)).backward()
            parts.append(losses)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), cfg.max_grad_norm)
        metrics = _metrics(parts, samples) | {"grad_norm": norm.item(), "lr": self.rate(step)}
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            self.optimizer.zero_grad()
            raise TrainingFailed(
                f"step {step}: {', '.join(broken)} not finite, so the update was not applied; "
                "lower train.lr or train.max_grad_norm, or look at the samples of this step"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 1."""
        cfg = self.cfg.train
        if step <= cfg.warmup:
            return cfg.lr * step / cfg.warmup
        done = (step - 1 - cfg.warmup) / (cfg.steps - cfg.warmup)
        falls = {
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
            "linear": 1.0 - done,
            "constant": 1.0,
        }
        return cfg.lr * falls[cfg.schedule]

    def heldout(self) -> dict[str, float]:
        """Teacher-forced losses over the held-out rows; {} without any."""
        rows = self.heldout_rows()
        size = self.cfg.train.micro_batch
        parts, seen = [], []
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            samples = self.loader.submit(self._samples, chosen, [False] * len(chosen)).result()
            with torch.no_grad(), self._autocast():
                parts.append(self._losses(samples))
            seen += samples
        return {f"heldout/{k}": v for k, v in _metrics(parts, seen).items()} if rows else {}

    def heldout_rows(self) -> list[Judgement]:
        """The held-out rows that are used."""
        rows = self.splits["heldout"]
        return rows[: self.cfg.validation.rows or len(rows)]

    def _losses(self, samples: list[Sample]) -> Losses:
        loss = self.cfg.loss
        return batch_losses(self.model, samples, self.ids5, loss.score, loss.text)

    def _autocast(self) -> AbstractContextManager[Any]:
        cfg = self.cfg.model
        if cfg.adapter == "full" and cfg.dtype == "bfloat16":
            return torch.autocast(torch.device(self.device).type, torch.bfloat16)
        return nullcontext()

    def _batch(self, step: int) -> list[Sample]:
        """The samples of a step; those of the next are made meanwhile."""
        future = self.ahead[1] if self.ahead and self.ahead[0] == step else self._submit(step)
        samples = future.result()
        self.ahead = (step + 1, self._submit(step + 1)) if step < self.cfg.train.steps else None
        return samples

    def _submit(self, step: int) -> Future[list[Sample]]:
        rows, size = self.splits["train"], self.cfg.train.batch
        numbers = range((step - 1) * size, step * size)
        chosen = [rows[place_of(number, len(rows), self.cfg.seed)] for number in numbers]
        direct = [_drawn(number, self.cfg.seed) < self.cfg.loss.direct for number in numbers]
        return self.loader.submit(self._samples, chosen, direct)

    def _samples(self, rows: Sequence[Judgement], direct: Sequence[bool]) -> list[Sample]:
        built = []
        for row, alone in zip(rows, direct, strict=True):
            text = question(row.dimension, row.text, self.rubrics[row.dimension])
            label = (None if alone else row.rationale, row.score)
            try:
                images = [read_image(path) for path in row.images]
                built.append(build_sample(self.processor, self.ids5, images, text, label))
            except ValueError as error:
                raise ValueError(f"{row.where}: the model cannot take it: {error}") from error
        return built

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, as a tree for `checkpoint.pack`."""
        return {
            "weights": {name: p.detach() for name, p in self.trainable.items()},
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken."""
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])

    def export(self, folder: Path) -> None:
        """Write the judge folder (`rewards/vlm/folder.py`), whole or not at all."""
        beside = folder.with_name(f".{folder.name}.beside")
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir(parents=True)
        if self.cfg.model.adapter == "full" and self.cfg.model.dtype == "bfloat16":
            self.wrapped.to(torch.bfloat16)
        self.wrapped.save_pretrained(beside)
        (beside / "README.md").unlink(missing_ok=True)  # PEFT's model card for the hub
        self.processor.save_pretrained(beside)
        base = str(Path(self.cfg.model.path).resolve())
        card = JudgeCard(base if self.cfg.model.adapter == "lora" else None, self.rubrics)
        card.write(beside)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)

    def close(self) -> None:
        """Stop the loader."""
        self.loader.shutdown(wait=True, cancel_futures=True)


def _build(cfg: RewardConfig) -> Any:
    """The model with what is trained set to require gradients."""
    base = base_of(Path(cfg.model.path), None)
    full = cfg.model.adapter == "full"
    dtype = torch.float32 if full else getattr(torch, cfg.model.dtype)
    model = model_class(base).from_pretrained(base, dtype=dtype)
    if cfg.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode alone; no dropout is set
    if full:
        model.model.visual.requires_grad_(cfg.model.vision)
        return model
    from peft import LoraConfig, get_peft_model

    lora = cfg.model.lora
    default = rf".*({LANGUAGE}|{VISION})" if cfg.model.vision else rf".*{LANGUAGE}"
    targets: str | list[str] = lora.targets or default
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
    return get_peft_model(model, config)


def place_of(number: int, count: int, seed: int) -> int:
    """The row shown as sample `number` of a run: a new shuffle of all rows each epoch."""
    epoch, place = divmod(number, count)
    return int(_shuffle(epoch, count, seed)[place])


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _shuffle(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def _drawn(number: int, seed: int) -> float:
    return float(np.random.default_rng((seed, 1, number)).random())


def _metrics(parts: Sequence[Losses], samples: Sequence[Sample]) -> dict[str, float]:
    def mean(name: str) -> float:
        values: Tensor = torch.cat([getattr(part, name).detach().float() for part in parts])
        return values.double().mean().item()

    names = {"loss": "total", "mse": "squared", "text": "text", "score": "expected"}
    found = {shown: mean(name) for shown, name in names.items()}
    label = float(np.mean([sample.target for sample in samples]))
    return found | {"label": label, "outside": mean("outside")}
