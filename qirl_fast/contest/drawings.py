"""Images of a prompt file from several models, drawn or taken from the cache, and judged.

Image s of prompt p (numbered among the prompts of its size) starts, for every model, from the noise
that the held-out evaluation of a run of the same seed gives it (`heldout_samples.py`); there is no
stochastic step. They are drawn in chunks of max_rows, each kept whole once it is drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qirl_fast.conditioning import Conditioning, Given
from qirl_fast.config import Config, ConfigError, default_recipe, load_config
from qirl_fast.config.evaluate import EvaluateConfig
from qirl_fast.contest.contenders import Contender, image_key
from qirl_fast.contest.kept_images import KeptImages
from qirl_fast.data.prompts import Prompt
from qirl_fast.data.sources import ImageError
from qirl_fast.distributed import World
from qirl_fast.evaluation.facet_judge import FacetJudge, as_json, from_json, identity
from qirl_fast.evaluation.facets import Answers
from qirl_fast.heldout_samples import EvaluationFailed
from qirl_fast.models import load_model
from qirl_fast.models.adapter import NotFinite
from qirl_fast.models.teachers import add_lora
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.verdict import BadReward, Pending, Verdict
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, decode, sample_then
from qirl_fast.rollout.schedule import make_sigmas
from qirl_fast.rollout.workers import StepFailed, Workers
from qirl_fast.whole import write_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAPTER = "evaluated"
AHEAD = 2  # chunks drawn for each worker, and judged, before something is waited for


@dataclass(frozen=True)
class Judged:
    """One model's images as they were judged. Rows: prompt by prompt, B = P * samples.

    verdict: of the judges. answers: of the facets' judge, [] without one. first: PNG file of the
    first image of each prompt, by its number.
    """

    verdict: Verdict
    answers: list[Answers]
    first: dict[int, Path]


@dataclass
class Artist:
    """Draws and judges with one model after another."""

    cfg: EvaluateConfig
    size: tuple[int, int]
    prompts: Sequence[Prompt]
    judges: Judges
    facets: FacetJudge | None
    workers: Workers
    device: str

    def __post_init__(self) -> None:
        self.model: Any = None
        self._folder: Path | None = None
        self._fresh = self.judges.state_dict()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="facets")

    def judged(self, contender: Contender) -> Judged:
        """Draw what is not there of a model's images, and judge all.

        EvaluationFailed for an image that is not finite or takes too much memory, or a judge that
        is broken.
        """
        self._load(contender.folder)
        cfg = _recipe(self.cfg, contender, self.size)
        try:
            conditioning = Conditioning(cfg, self.model, contender.folder, World())
        except ValueError as error:
            raise ConfigError([str(error)]) from error
        self.judges.load_state_dict(self._fresh)
        try:
            with self._weights(contender):
                sizes = [conditioning.target(p) for p in self.prompts]
                parts = [
                    [i for i, s in enumerate(sizes) if s == size] for size in dict.fromkeys(sizes)
                ]
                self._require_sizes(contender, dict.fromkeys(sizes))
                found = [self._of_one_size(contender, conditioning, part) for part in parts]
        except ImageError as error:
            raise ConfigError([f"prompts: {error}; mend it, or take the row out"]) from error
        except (NotFinite, StepFailed) as error:
            raise EvaluationFailed(f"{contender.name}: {error}") from error
        except BadReward as error:
            raise EvaluationFailed(f"images of {contender.name}: {error}") from error
        finally:
            conditioning.close()
        return _together(found, parts, self.cfg.samples_per_prompt)

    def close(self) -> None:
        """Release what the judges hold."""
        self._background.shutdown(wait=True, cancel_futures=True)
        self.judges.close()

    def _load(self, folder: Path) -> None:
        if folder == self._folder:
            return
        self.model = None  # before the next comes into memory
        try:
            self.model = load_model(folder, "auto", DTYPES[self.cfg.dtype], self.device)
        except (ValueError, OSError) as error:
            raise ConfigError([f"{folder}: {error}"]) from error
        self._folder = folder

    @contextmanager
    def _weights(self, contender: Contender) -> Iterator[None]:
        """Inside, the model is the contender; after it the base, as if nothing had been added."""
        if contender.adapter is None:
            yield
            return
        transformer = self.model.transformer
        add_lora(transformer, contender.adapter, ADAPTER, f"the adapter of {contender.name!r}")
        try:
            yield
        finally:
            transformer.unload_lora()

    def _require_sizes(self, contender: Contender, sizes: Iterable[tuple[int, int]]) -> None:
        """ConfigError for a size or a number of steps that the model has no noise levels for."""
        for height, width in sizes:
            try:
                tokens, _ = self.model.latent_shape(height, width)
                make_sigmas(contender.steps, tokens, dict(self.model.pipeline.scheduler.config))
            except ValueError as error:
                key = "height, width" if self.cfg.buckets is None else "buckets"
                raise ConfigError([f"{key}: models.{contender.name}: {error}"]) from error

    def _of_one_size(
        self, contender: Contender, conditioning: Conditioning, part: Sequence[int]
    ) -> Judged:
        prompts = [self.prompts[i] for i in part]
        given, samples = conditioning.of(prompts), self.cfg.samples_per_prompt
        how = self._sampling(contender, given)
        folder = Path(self.cfg.cache or Path(self.cfg.output) / "images")
        kept = KeptImages(folder / image_key(contender, _plain(self.cfg, how, self.device)))
        rows = [(i, s) for i in range(len(part)) for s in range(samples)]
        chunks = [rows[k : k + how.max_rows] for k in range(0, len(rows), how.max_rows)]
        keys = [_chunk_key(prompts, chunk) for chunk in chunks]
        missing = [k for k, c in enumerate(chunks) if not kept.sound(keys[k], len(c))]
        total = sum(len(chunks[k]) for k in missing)
        for line in kept.damaged:
            print(f"{contender.name}: {line}")
        print(
            f"{contender.name}: {len(rows) - total} of {len(rows)} images are there"
            + (f", drawing {total}" if total else ", nothing is drawn"),
            flush=True,
        )
        new = self._draw(given, how, missing)
        asked: list[tuple[Pending, Future[list[Answers]] | None]] = []
        first: dict[int, Path] = {}
        for k, chunk in enumerate(chunks):
            if k in missing:
                images = next(new)
                kept.put(keys[k], images)
            else:
                images = kept.get(keys[k], len(chunk))
            metadata = [given.rows[i] for i, _ in chunk]
            facets = self._asked(kept, keys[k], images, metadata)
            asked.append((self.judges.submit(images, metadata), facets))
            for row, (i, s) in enumerate(chunk):
                if s == 0:
                    first[part[i]] = kept.file(keys[k], row)
            if k >= AHEAD:  # else images would pile up before a slow judge
                for one in asked[k - AHEAD]:
                    if one is not None:
                        one.result()
        verdict = Verdict.of([own.result() for own, _ in asked])
        answers = [a for _, own in asked if own is not None for a in own.result()]
        return Judged(verdict, answers, first)

    def _draw(self, given: Given, how: Sampling, chunks: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 [rows, H, W, 3] of each of these chunks."""
        some = AHEAD * self.workers.count
        for first in range(0, len(chunks), some):
            yield from sample_then(
                lambda chunk: decode(self.model, chunk.latents, how, self.workers),
                self.workers,
                self.model,
                given.embeddings,
                given.null,
                how,
                dict(self.model.pipeline.scheduler.config),
                group_size=self.cfg.samples_per_prompt,
                seed=self.cfg.seed,
                update=0,
                chunks=chunks[first : first + some],
            )

    def _sampling(self, contender: Contender, given: Given) -> Sampling:
        rescale = self.model.norm_rescaled_guidance
        return Sampling(
            height=given.height,
            width=given.width,
            steps=contender.steps,
            guidance=Guidance(contender.guidance, rescale, "frozen_offset", (0.0, 1.0)),
            max_rows=self.cfg.max_rows,
        )

    def _asked(
        self, kept: KeptImages, key: str, images: np.ndarray, rows: list[dict[str, Any]]
    ) -> Future[list[Answers]] | None:
        """The facets of a chunk: what was answered before, else the judge is asked now."""
        if self.facets is None:
            return None
        assert self.cfg.facets is not None
        judge = self.cfg.facets.judge.model_dump(mode="json", exclude={"url", "api_key_env"})
        what = identity(judge, self.facets.taxonomy, rows)
        pixels = hashlib.sha256(what.encode() + images.tobytes()).hexdigest()
        return self._background.submit(self._answers, kept.note(key, pixels), images, rows)

    def _answers(self, note: Path, images: np.ndarray, rows: list[dict[str, Any]]) -> list[Answers]:
        assert self.facets is not None
        if note.exists():
            try:
                return from_json(note.read_text(encoding="utf-8"))
            except (ValueError, TypeError):
                print(f"{note} is damaged; the judge is asked again")
        answers = self.facets(images, rows)
        if not any(one.failed for one in answers):
            write_text(note, as_json(answers) + "\n")
        return answers


def _recipe(cfg: EvaluateConfig, contender: Contender, size: tuple[int, int]) -> Config:
    """The recipe that `Conditioning` reads: of a run that would evaluate so."""
    words: dict[str, Any] = {
        "model.path": str(contender.folder),
        "model.dtype": cfg.dtype,
        "data.train": "tiny:train",
        "rollout.height": size[0],
        "rollout.width": size[1],
        "data.buckets": json.dumps(cfg.buckets),
        "evaluation.guidance": contender.guidance,
        "rollout.guidance": 1.0,
        "rollout.ratio_mode": "null",
        "output": cfg.output,
    }
    return load_config([str(default_recipe()), *(f"{k}={v}" for k, v in words.items())])


def _plain(cfg: EvaluateConfig, how: Sampling, device: str) -> dict[str, Any]:
    """All of the sampling that is not the contender's own."""
    own: dict[str, Any] = {
        "height": how.height,
        "width": how.width,
        "rescale": how.guidance.rescale,
    }
    own |= {"seed": cfg.seed, "samples": cfg.samples_per_prompt, "dtype": cfg.dtype}
    return own | {"device": device}


def _chunk_key(prompts: Sequence[Prompt], chunk: Sequence[tuple[int, int]]) -> str:
    """Names a chunk's rows: numbers, prompts, samples and condition images."""
    told = [
        [i, s, prompts[i].id, prompts[i].prompt, [image.sha256() for image in prompts[i].images]]
        for i, s in chunk
    ]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return f"{chunk[0][0]:05d}-{digest[:16]}"


def _together(found: Sequence[Judged], parts: Sequence[Sequence[int]], samples: int) -> Judged:
    """The parts of one size each as one, prompts in their order."""
    prompts = np.argsort([i for part in parts for i in part])
    rows = [int(p) * samples + s for p in prompts for s in range(samples)]
    whole = Verdict.of([part.verdict for part in found])
    place = {row: i for i, row in enumerate(rows)}
    reasons = {(place[row], name): reason for (row, name), reason in whole.reasons.items()}
    answers = [a for part in found for a in part.answers]
    return Judged(
        Verdict(whole.scores[rows], whole.status[rows], reasons),
        [answers[row] for row in rows] if answers else [],
        {i: file for part in found for i, file in part.first.items()},
    )
