"""On-policy distillation: several teachers' velocities, learnt where the student itself goes.

    x_n   states of the student's own trajectory, unguided, detached
    v_T   = v_u + w (v_c - v_u), the teacher of the row's task with its guidance w; rescaled to the
            norm of v_c for families that do so (Qwen-Image 1.x), see ops.guide
    loss  = mean over rows and recorded steps of  weight mean (v_student(x_n) - v_T(x_n))^2
          + anchor weight                               mean (v_student(x_n) - v_anchor(x_n))^2

    target     weight        what is matched
    velocity   1             the velocity
    mean       c^2           the mean of the step, a x + c v
    x0         sigma^2       the estimate x - sigma v of the clean latents
    kl         c^2 / (2 s^2) the transition (stochastic states alone)

The teacher's guidance ends up in the student, which then samples without any. No reward takes part.
A teacher answers for all states of a chunk at once; rows of several tasks may share a chunk.

Source: Qwen-Image-2.0-RL (arXiv 2606.27608): ODE states, all steps, velocities, one teacher a task.
Options of others: one low-noise state a trajectory (DanceOPD, arXiv 2606.27377), stochastic states
and the mean of the step (DiffusionOPD, arXiv 2605.15055), a student that begins as the teachers'
merged adapters and a frozen anchor (Flow-OPD, arXiv 2605.08063).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qirl_fast import ops
from qirl_fast.algorithms.algorithm import Algorithm, Policy, StepLoss
from qirl_fast.algorithms.algorithm import Settings as Base
from qirl_fast.models.teachers import Teacher, is_lora, load_teacher, start_from
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import velocities
from qirl_fast.rollout.sample import Keeps, Trajectory
from qirl_fast.section import Count, Natural, NonNegative, Positive, Problem, Section, Text


class TeacherSettings(Section):
    """A teacher, and which rows it answers for."""

    path: Text = Field(
        description="folder of a PEFT LoRA on the student's base, or of a whole model"
    )
    tasks: Annotated[list[Text], Field(min_length=1)] = Field(
        description="rows it answers for, by their `task`: t2i, edit, or as the prompt file says"
    )
    guidance: NonNegative = Field(
        default=1.0, description="classifier-free guidance scale of its answers; 1: off"
    )


class StepsSettings(Section):
    """A part of the states, drawn anew for each update."""

    count: Count = Field(description="states of a trajectory")
    first: Natural = Field(default=0, description="they are drawn from this step on, 0 being noise")


class AnchorSettings(Section):
    """A policy that the student is held near to, on all rows."""

    teacher: Text = Field(
        default="base", description="'base': the model before training; or a teacher's name"
    )
    weight: Positive = Field(description="weight of the mean squared velocity difference")


class Settings(Base):
    """On-policy distillation."""

    shards: ClassVar[bool] = False
    keeps: ClassVar[Keeps] = "states"
    rewarded: ClassVar[bool] = False

    name: Literal["opd"] = Field(description="on-policy distillation of teachers")
    teachers: dict[str, TeacherSettings] = Field(min_length=1, description="teachers by name")
    init: Text = Field(
        default="base",
        description="the student's LoRA begins as nothing (base), the mean of the teachers' "
        "(merged), or one teacher's, by its name",
    )
    target: Literal["velocity", "mean", "x0", "kl"] = Field(
        default="velocity", description="what is matched"
    )
    steps: StepsSettings | None = Field(default=None, description="null: every step's state")
    anchor: AnchorSettings | None = Field(default=None, description="null: none")

    @property
    def guides(self) -> bool:
        """True where a teacher is guided."""
        return any(t.guidance != 1 for t in self.teachers.values())

    @property
    def tasks(self) -> set[str]:
        """Those that a teacher answers for."""
        return {task for teacher in self.teachers.values() for task in teacher.tasks}

    @property
    def models(self) -> dict[str, Path]:
        """Teachers of whole weights."""
        found = {name: Path(teacher.path) for name, teacher in self.teachers.items()}
        return {f"teacher {n!r}": path for n, path in found.items() if not is_lora(path)}

    def states(self, rollout: Any) -> int:
        """Steps that may be recorded: all, but the last where states are stochastic."""
        return int(rollout.steps - (rollout.dynamics != "ode"))

    def recorded_steps(self, rollout: Any) -> int:
        """All that may be, or as many as are drawn."""
        return self.states(rollout) if self.steps is None else self.steps.count

    def problems(self, cfg: Any) -> Iterator[Problem]:
        """Teachers, their tasks, the start, and a rollout without guidance or chosen steps."""
        yield from self._teacher_problems(cfg)
        rollout = cfg.rollout
        if rollout.guidance != 1 or rollout.ratio_mode is not None:
            yield (
                ("rollout.guidance", "rollout.ratio_mode", "algorithm.name"),
                f"rollout.guidance: got {rollout.guidance:g}, ratio_mode {rollout.ratio_mode}; the "
                "student draws without guidance: set rollout.guidance=1 and "
                "rollout.ratio_mode=null, and guide the teachers",
            )
        if rollout.window is not None or rollout.sde_steps is not None:
            yield (
                ("rollout.window", "rollout.sde_steps", "algorithm.name"),
                "rollout.window, rollout.sde_steps: choose steps of a ratio, and opd has none; set "
                "both to null, and algorithm.steps for a part of the states",
            )
        if self.target == "kl" and rollout.dynamics == "ode":
            yield (
                ("algorithm.target", "rollout.dynamics"),
                "algorithm.target: 'kl' compares densities, and rollout.dynamics 'ode' has none; "
                "take stochastic dynamics, or another target",
            )
        if self.steps is not None and self.steps.first + self.steps.count > self.states(rollout):
            yield (
                ("algorithm.steps", "rollout.steps"),
                f"algorithm.steps: {self.steps.count} from step {self.steps.first} on; there are "
                f"states of steps 0 to {self.states(rollout) - 1}",
            )

    def _teacher_problems(self, cfg: Any) -> Iterator[Problem]:
        by_task: dict[str, str] = {}
        for name, teacher in self.teachers.items():
            for task in teacher.tasks:
                if task in by_task:
                    yield (
                        ("algorithm.teachers",),
                        f"algorithm.teachers: {by_task[task]!r} and {name!r} both answer for "
                        f"{task!r} rows; wanted one teacher a task",
                    )
                by_task[task] = name
        known = ", ".join(self.teachers)
        own = [("init", self.init, ["base", "merged"])]
        if self.anchor is not None:
            own.append(("anchor.teacher", self.anchor.teacher, ["base"]))
        for key, value, others in own:
            if value not in (*others, *self.teachers):
                yield (
                    (f"algorithm.{key}", "algorithm.teachers"),
                    f"algorithm.{key}: got {value!r}; allowed: {', '.join(others)}, {known}",
                )
        loras = any(is_lora(Path(teacher.path)) for teacher in self.teachers.values())
        if cfg.model.adapter == "full" and loras:
            yield (
                ("model.adapter", "algorithm.teachers"),
                "model.adapter: got 'full', which changes the base that LoRA teachers sit on; set "
                "model.adapter=lora, or take teachers of whole weights",
            )


class Opd(Algorithm):
    """Distillation of the teachers of several tasks into one student."""

    settings: Settings

    def __init__(self, settings: Settings, policy: Policy):
        super().__init__(settings, policy)
        self.teachers: dict[str, Teacher] = {
            name: load_teacher(policy.model, name, Path(t.path))
            for name, t in settings.teachers.items()
        }
        if settings.init != "base":
            names = list(self.teachers) if settings.init == "merged" else [settings.init]
            start_from(policy.model, [self.teachers[name] for name in names])

    def record(self, rollout: Any, seed: int, update: int) -> tuple[int, ...]:
        """Every step, or those drawn for this update."""
        steps, last = self.settings.steps, self.settings.states(rollout)
        if steps is None:
            return tuple(range(last))
        rng = np.random.default_rng([seed, update, 2])
        places = rng.choice(last - steps.first, steps.count, replace=False)
        return tuple(sorted(int(p) + steps.first for p in places))

    def prepare(self, chunks: Sequence[Trajectory], tasks: Sequence[str]) -> list[Any]:
        """For each chunk (answers, anchor): velocities [B, N, Z] at every recorded state.

        ValueError for a row whose task no teacher answers for.
        """
        strange = sorted(set(tasks) - self.settings.tasks)
        if strange:
            known = sorted(self.settings.tasks)
            raise ValueError(f"rows of tasks {strange}: teachers answer for {known} alone")
        own = {
            name: [[i for i, r in enumerate(c.rows) if tasks[r] in t.tasks] for c in chunks]
            for name, t in self.settings.teachers.items()
        }
        used = [name for name, rows in own.items() if any(rows)]
        parts: list[list[tuple[list[int], list[Tensor]]]] = [[] for _ in chunks]
        for k, name in enumerate(used):
            self.teachers[name].fetch()
            with self.teachers[name].active() as model:
                if k + 1 < len(used):
                    self.teachers[used[k + 1]].fetch()
                scale = self.settings.teachers[name].guidance
                found = self._answers(model, scale, chunks, own[name])
            for part, rows, answers in zip(parts, own[name], found, strict=True):
                part.append((rows, answers))
        anchors = self._anchors(chunks)
        joined = [_joined(c, part) for c, part in zip(chunks, parts, strict=True)]
        return list(zip(joined, anchors, strict=True))

    def _answers(
        self, model: Any, scale: float, chunks: Sequence[Trajectory], rows: Sequence[list[int]]
    ) -> list[list[Tensor]]:
        """A model's velocities at the recorded states of these rows of each chunk."""
        guidance = Guidance(scale, model.norm_rescaled_guidance)
        if guidance.on and any(null is None for c in chunks for null in c.prompts.nulls):
            raise ValueError(
                f"a teacher's guidance is {scale:g}, and the student's prompts came without an "
                "unconditional embedding; encode the empty prompt as well, or set the teacher's "
                "guidance to 1"
            )

        @torch.no_grad()
        def of(part: Trajectory) -> list[Tensor]:
            return list(velocities(model, part, guidance, self.how.replay_steps))

        work = [
            chunk if len(own) == len(chunk.rows) else chunk.states_of(own)
            for chunk, own in zip(chunks, rows, strict=True)
        ]
        return list(self.policy.workers.tensors(of, work))

    def _anchors(self, chunks: Sequence[Trajectory]) -> list[list[Tensor] | None]:
        anchor = self.settings.anchor
        if anchor is None:
            return [None] * len(chunks)
        rows = [list(range(len(c.rows))) for c in chunks]
        if anchor.teacher == "base":
            own, scale = self.model.reference(), 1.0
        else:
            own = self.teachers[anchor.teacher].active()
            scale = self.settings.teachers[anchor.teacher].guidance
        with own as model:
            return [*self._answers(model or self.model, scale, chunks, rows)]

    def loss(
        self, chunk: Trajectory, advantage: Tensor | None, prepared: Any
    ) -> Iterator[StepLoss]:
        """One StepLoss per recorded state; prepared: the chunk's, from `prepare`."""
        answers, anchors = prepared
        found = velocities(self.model, chunk, Guidance(), self.how.replay_steps)
        for i, v in enumerate(found):
            weight = torch.full((len(v),), self._weight(chunk, i), device=v.device)
            step = ops.velocity_loss(v, answers[i], weight=weight)
            total, metrics = step.loss, {"teacher_mse": step.mse.mean()}
            if anchors is not None and self.settings.anchor is not None:
                held = ops.velocity_loss(v, anchors[i])
                total = total + self.settings.anchor.weight * held.loss
                metrics["anchor_mse"] = held.mse.mean()
            yield StepLoss(total, metrics)

    def _weight(self, chunk: Trajectory, i: int) -> float:
        k, sigma = chunk.coefficients[i], chunk.sigmas[i]
        if self.settings.target == "kl":
            return k.c**2 / (2 * k.s**2)
        return {"velocity": 1.0, "mean": k.c**2, "x0": sigma**2}[self.settings.target]


def _joined(chunk: Trajectory, parts: Sequence[tuple[list[int], list[Tensor]]]) -> list[Tensor]:
    """The answers of several teachers for parts of a chunk's rows, in the order of its rows."""
    parts = [(rows, answers) for rows, answers in parts if rows]
    if len(parts) == 1:
        return parts[0][1]
    order = torch.tensor([r for rows, _ in parts for r in rows], device=chunk.latents.device)
    back = order.argsort()
    return [
        torch.cat([answers[i] for _, answers in parts])[back] for i in range(len(chunk.recorded))
    ]
