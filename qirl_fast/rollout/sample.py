"""Rollout: prompts in, trajectories out.

Rows are laid out prompt by prompt, `group_size` rows each, in chunks of at most `max_rows`; a
chunk is also the unit of replay, so that both run the same kernels on the same shapes. All
randomness is a function of (seed, offset): row seeds come from the run's seed, the update and the
sample's number, never from generator state.

Shapes: B rows of a chunk, S recorded steps, T denoising steps, N latent tokens, Z channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.models.adapter import require_finite
from qirl_fast.rollout.dynamics import StepCoefficients, step_coefficients
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.schedule import make_sigmas
from qirl_fast.rollout.workers import Workers

R = TypeVar("R")

# Of a recorded step: the transition, to be scored again; the state it starts from; the noise level.
Keeps = Literal["transitions", "states", "levels"]
KEPT: dict[Keeps, tuple[str, ...]] = {
    "transitions": ("x", "x_next", "delta", "logp"),
    "states": ("x",),
    "levels": (),
}
RECORDED = KEPT["transitions"]

INITIAL_NOISE = 1 << 40  # Philox offset of the initial noise; steps use their own index
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model(Protocol):
    """What rollout needs of a model adapter (models/<family>.py)."""

    device: torch.device
    dtype: torch.dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, int]: ...
    def prefix(
        self, prompts: Sequence[Any], owner: Sequence[int], height: int, width: int
    ) -> Any: ...
    def join(self, first: Any, second: Any) -> Any: ...
    def velocity(
        self, x: Tensor, sigma: Sequence[float], prefix: Any, exact: bool = True
    ) -> Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """How trajectories are made; one for training, one for evaluation."""

    height: int
    width: int
    steps: int
    guidance: Guidance
    dynamics: str = "ode"
    eta: float = 0.7
    storage_dtype: str = "float32"
    max_rows: int = 64  # samples of a chunk; where both branches run as one, twice as many rows
    replay_steps: int = 1  # recorded steps of a chunk scored in one forward
    keeps: Keeps = "transitions"


@dataclass(frozen=True)
class Prompts:
    """A chunk's conditioning: an embedding [L, C] a prompt, or what else the model's prefix takes;
    `owner[r]` is the prompt of row r. nulls: the unconditional one for all prompts, or for each.
    height, width: of what is drawn, pixels.
    """

    embeddings: tuple[Any, ...]
    nulls: tuple[Any, ...]
    owner: tuple[int, ...]
    height: int
    width: int

    def prefix(self, model: Model) -> Any:
        return model.prefix(self.embeddings, self.owner, self.height, self.width)

    def null_prefix(self, model: Model) -> Any:
        owner = self.owner if len(self.nulls) > 1 else [0] * len(self.owner)
        return model.prefix(self.nulls, owner, self.height, self.width)

    def of(self, rows: Sequence[int]) -> "Prompts":
        """Of these rows alone."""
        return replace(self, owner=tuple(self.owner[r] for r in rows))


@dataclass(frozen=True)
class Trajectory:
    """One chunk's rollout. Recorded tensors are in storage dtype, log-probs in float32."""

    prompts: Prompts
    latents: Tensor  # [B, N, Z], the final state
    rows: range  # positions of the chunk's rows in the whole batch
    seeds: Tensor  # int64 [B], what all that is drawn for a row is a function of
    recorded: tuple[int, ...]  # S step indices
    sigmas: tuple[float, ...]  # noise level of each recorded step
    coefficients: tuple[StepCoefficients, ...]
    x: tuple[Tensor, ...] = ()  # S of [B, N, Z]
    x_next: tuple[Tensor, ...] = ()
    delta: tuple[Tensor | None, ...] = ()  # guidance offset added to the mean
    logp: tuple[Tensor, ...] = ()  # S of [B]

    def part(self, rows: slice) -> Self:
        """These rows of the chunk, with all that was recorded of them."""
        if rows == slice(0, len(self.rows)):
            return self

        def cut(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(None if t is None else t[rows] for t in tensors)

        return replace(
            self,
            prompts=self.prompts.of(range(rows.start, rows.stop)),
            latents=self.latents[rows],
            rows=self.rows[rows],
            seeds=self.seeds[rows],
            **{name: cut(getattr(self, name)) for name in RECORDED},
        )

    @classmethod
    def joined(cls, parts: Sequence["Trajectory"], prompts: Prompts) -> "Trajectory":
        """A chunk of its parts, in order; prompts: the chunk's."""
        if len(parts) == 1:
            return parts[0]

        def of(name: str) -> tuple[Any, ...]:
            same = zip(*(getattr(part, name) for part in parts), strict=True)
            return tuple(None if step[0] is None else torch.cat(step) for step in same)

        return replace(
            parts[0],
            prompts=prompts,
            latents=torch.cat([part.latents for part in parts]),
            rows=range(parts[0].rows.start, parts[-1].rows.stop),
            seeds=torch.cat([part.seeds for part in parts]),
            **{name: of(name) for name in RECORDED},
        )

    def states_of(self, rows: Sequence[int]) -> Self:
        """Prompts and recorded states of these rows of the chunk, and no more of them."""
        at = torch.tensor(rows, dtype=torch.int64, device=self.latents.device)
        return replace(
            self,
            prompts=self.prompts.of(rows),
            latents=self.latents[at],
            rows=range(len(rows)),
            seeds=self.seeds[at],
            x=tuple(x[at] for x in self.x),
            x_next=(),
            delta=(),
            logp=(),
        )


def coefficient_tensors(step: StepCoefficients, rows: int, device: torch.device) -> list[Tensor]:
    """(a, c, s, w, b) as float32 [rows] each; float64 host values are cast once."""
    return [
        torch.full((rows,), value, dtype=torch.float32, device=device)
        for value in (step.a, step.c, step.s, step.w, step.b)
    ]


def row_seeds(seed: int, update: int, numbers: Sequence[int], stream: int) -> Tensor:
    """int64 [len(numbers)]: seeds of these rows; a sequence for each (seed, update, stream)."""
    words = np.random.SeedSequence([seed, update, stream]).generate_state(
        max(numbers) + 1, np.uint64
    )
    return torch.from_numpy(words.view(np.int64)[list(numbers)])


def initial_noise(
    seeds: Tensor, shape: tuple[int, int], device: torch.device, offset: int = INITIAL_NOISE
) -> Tensor:
    """Standard normal latents float32 [B, N, Z], row r a function of (seeds[r], offset) alone."""
    zeros = torch.zeros((len(seeds), *shape), device=device)
    step = StepCoefficients(a=0.0, c=0.0, s=1.0, w=0.0, b=0.0)
    a, c, s, w, b = coefficient_tensors(step, len(seeds), device)
    seeds = seeds.to(device)
    return ops.flow_step(zeros, zeros, a, c, s, w, b, seed=seeds, offset=offset)[0]


def sample(
    model: Model,
    embeddings: Sequence[Any],
    null: Any,
    how: Sampling,
    scheduler_config: Mapping[str, Any],
    *,
    group_size: int,
    seed: int,
    update: int,
    recorded: Sequence[int] = (),
    shared_noise: bool = False,
    samples: Sequence[int] | None = None,
) -> Iterator[Trajectory]:
    """Trajectories of `group_size` samples for each prompt by chunks: see `sample_then`."""
    return sample_then(
        lambda chunk: chunk,
        Workers(1),
        model,
        embeddings,
        null,
        how,
        scheduler_config,
        group_size=group_size,
        seed=seed,
        update=update,
        recorded=recorded,
        shared_noise=shared_noise,
        samples=samples,
    )


def sample_then(
    then: Callable[[Trajectory], R],
    workers: Workers,
    model: Model,
    embeddings: Sequence[Any],
    null: Any,
    how: Sampling,
    scheduler_config: Mapping[str, Any],
    *,
    group_size: int,
    seed: int,
    update: int,
    recorded: Sequence[int] = (),
    shared_noise: bool = False,
    samples: Sequence[int] | None = None,
    chunks: Sequence[int] | None = None,
) -> Iterator[R]:
    """`then` of each chunk of `group_size` samples for each prompt, made by `workers`, in order.

    Args:
        embeddings: P text embeddings [L_p, C], or what else the model's prefix takes; null: the
            unconditional one, or a list of one for each prompt.
        recorded: steps sampled with `how.dynamics` and kept for replay; the others follow the ODE.
        shared_noise: all samples of a prompt start from one initial noise.
        samples: numbers in range(P * group_size), ascending, of those to make; None: all. A sample
            is the same whichever are made beside it, up to the bits that a matrix product of
            another shape may change.
        chunks: numbers of the chunks to make, ascending; None: all. Of prompts that have no row in
            them embeddings (and nulls) may be anything.
    All chunks' `rows` cover range(len(samples)) in order.
    """
    tokens, channels = model.latent_shape(how.height, how.width)
    sigmas = make_sigmas(how.steps, tokens, scheduler_config)
    numbers = range(len(embeddings) * group_size) if samples is None else samples
    total = len(numbers)

    def chunk(first: int) -> R:
        rows = range(first, min(first + how.max_rows, total))
        own = [numbers[r] for r in rows]
        prompt = [number // group_size for number in own]
        used = sorted(set(prompt))
        prompts = Prompts(
            tuple(embeddings[p] for p in used),
            tuple(null[p] for p in used) if isinstance(null, list) else (null,),
            tuple(used.index(p) for p in prompt),
            how.height,
            how.width,
        )
        noise_seeds = row_seeds(seed, update, prompt if shared_noise else own, stream=0)
        x = initial_noise(noise_seeds, (tokens, channels), model.device)
        seeds = row_seeds(seed, update, own, stream=1).to(model.device)

        def draw(part: slice) -> Trajectory:
            whole = part == slice(0, len(rows))
            mine = prompts if whole else prompts.of(range(part.start, part.stop))
            of_rows = (mine, rows[part], x[part], seeds[part])
            return _sample_chunk(model, *of_rows, how, sigmas, tuple(recorded))

        return then(Trajectory.joined(workers.parts(draw, len(rows)), prompts))

    firsts = range(0, total, how.max_rows)
    return workers.map(chunk, firsts if chunks is None else [firsts[k] for k in chunks])


def decode(model: Any, latents: Tensor, how: Sampling, workers: Workers) -> np.ndarray:
    """uint8 images [B, H, W, 3] of a chunk's latents, by the model adapter; NotFinite as there."""
    require_finite(latents)  # a part's own error would count its rows
    found = workers.parts(
        lambda part: model.decode(latents[part], how.height, how.width), len(latents), "decode"
    )
    return found[0] if len(found) == 1 else np.concatenate(found)


@torch.no_grad()
def _sample_chunk(
    model: Model,
    prompts: Prompts,
    rows: range,
    x: Tensor,
    seeds: Tensor,
    how: Sampling,
    sigmas: np.ndarray,
    recorded: tuple[int, ...],
) -> Trajectory:
    guidance = how.guidance
    prefix = prompts.prefix(model)
    null_prefix = prompts.null_prefix(model) if guidance.on else None
    joined = None if null_prefix is None else model.join(prefix, null_prefix)
    x = x.to(_DTYPES[how.storage_dtype])
    kept: dict[str, list[Any]] = {name: [] for name in KEPT[how.keeps]}
    steps = [
        step_coefficients(
            how.dynamics if i in recorded else "ode",
            float(sigmas[i]),
            float(sigmas[i + 1]),
            eta=how.eta,
            sigma_max=float(sigmas[1]),
        )
        for i in range(how.steps)
    ]
    for i, step in enumerate(steps):
        sigma, delta = (float(sigmas[i]),), None
        scored = i in recorded and how.keeps == "transitions"
        a, c, s, w, b = coefficient_tensors(step, len(rows), x.device)
        if null_prefix is None or not guidance.at(sigma[0]):
            v_cond = model.velocity(x, sigma, prefix, scored)
            x_next, logp = ops.flow_step(x, v_cond, a, c, s, w, b, seed=seeds, offset=i)
        else:
            if scored and not guidance.in_objective:  # at the shape of replay
                v_cond, v_null = (model.velocity(x, sigma, p) for p in (prefix, null_prefix))
            else:
                both = model.velocity(torch.cat([x, x]), sigma, joined, scored)
                v_cond, v_null = both.chunk(2)
            x_next, logp, delta = ops.guide_step(
                *(x, v_cond, v_null, guidance.scale, a, c, s, w, b),
                seed=seeds,
                offset=i,
                rescale=guidance.rescale,
                frozen=scored and guidance.ratio_mode == "frozen_offset",
            )
        if scored and guidance.at(sigma[0]) and guidance.ratio_mode == "conditional":
            logp = ops.flow_logp(x, x_next, v_cond, a, c, w, b)
        if i in recorded:
            found = {"x": x, "x_next": x_next, "delta": delta, "logp": logp}
            for name, values in kept.items():
                values.append(found[name])
        x = x_next
    return Trajectory(
        prompts=prompts,
        latents=x,
        rows=rows,
        seeds=seeds,
        recorded=recorded,
        sigmas=tuple(float(sigmas[i]) for i in recorded),
        coefficients=tuple(steps[i] for i in recorded),
        **{name: tuple(values) for name, values in kept.items()},
    )
