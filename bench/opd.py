"""`python -m bench opd`: one step of on-policy distillation, plain and by this package.

`plain`: stock diffusers modules and PEFT. The student draws step by step without guidance; then at
each recorded state the adapter is switched to the teacher for its two guidance branches, and back
to the student for a forward, F.mse_loss and a backward pass. `one state at a time` and `all states
at once` are `algorithms.opd`. Model, weights, group and steps are those of `bench step`.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

import qirl_fast
from bench.baselines import stock
from bench.machine import about
from bench.step import Bench, Clock, Options
from qirl_fast.algorithms import Policy, opd
from qirl_fast.models.teachers import STUDENT, LoraTeacher
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, Trajectory, sample
from qirl_fast.rollout.workers import Workers

PHASES = ("rollout", "teacher", "student", "optimizer")
TEACHER = "teacher_t"


class PlainLoop(stock.Loop):
    """Rollout without guidance, then teacher and student at one state after the other."""

    def conditional(self, x: Tensor, sigma: float, text: Tensor) -> Tensor:
        """[B, N, Z] of one branch."""
        if not isinstance(self.transformer, QwenImageTransformer2DModel):
            return self.branch(x, sigma, text)
        out: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=text.expand(len(x), -1, -1),
            timestep=torch.full((len(x),), sigma, device=x.device, dtype=x.dtype),
            img_shapes=[[(1, *self.grid)]] * len(x),
            return_dict=False,
        )[0]
        return out

    @torch.no_grad()
    def states(self, x: Tensor) -> list[Tensor]:
        """The state [B, N, Z] at which each step begins."""
        found = []
        for sigma, below in zip(self.sigmas, self.sigmas[1:], strict=False):
            found.append(x)
            x = x + (below - sigma) * self.conditional(x, sigma, self.text)
        return found

    def teach(self, x: Tensor, sigma: float) -> Tensor:
        """The teacher's guided velocity, with the conditional one's norm for Qwen-Image."""
        self.transformer.set_adapter(TEACHER)
        with torch.no_grad():
            v_cond = self.conditional(x, sigma, self.text)
            v_null = self.conditional(x, sigma, self.null)
        self.transformer.set_adapter(STUDENT)
        v = v_null + self.scale * (v_cond - v_null)
        if isinstance(self.transformer, QwenImageTransformer2DModel):
            v = v * (v_cond.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))
        return v

    def train(self, states: list[Tensor], clock: Clock) -> float:
        """The loss, its gradient added to the student's."""
        total = 0.0
        for x, sigma in zip(states, self.sigmas, strict=False):
            with clock.phase("teacher"):
                target = self.teach(x, sigma)
            with clock.phase("student"):
                v = self.conditional(x, sigma, self.text)
                loss = F.mse_loss(v.float(), target.float()) / len(states)
                loss.backward()
            total += loss.item()
        return total


class Distilled(Bench):
    """The model of `bench step` with a teacher: a second adapter of random weights."""

    def __init__(self, options: Options):
        super().__init__(options)
        transformer, targets = self.model.transformer, list(self.model.lora_targets)
        config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets)
        transformer.add_adapter(config, adapter_name=TEACHER)
        with torch.no_grad():
            for name, p in transformer.named_parameters():
                if TEACHER in name:
                    p.normal_(std=0.02)
        transformer.set_adapter(STUDENT)
        self.scale = Guidance(options.guidance, self.model.norm_rescaled_guidance)
        self.x = self.states()[0]

    def algorithm(self, together: int) -> opd.Opd:
        """This package's distillation, `together` states in one forward."""
        found = opd.Opd.__new__(opd.Opd)  # its teacher is made here, not read from a folder
        teacher = {"path": "-", "tasks": ["t2i"], "guidance": self.options.guidance}
        found.settings = opd.Settings(name="opd", teachers={"t": teacher})
        found.policy = Policy(self.model, {}, self.how(together), Workers(1))
        found.model, found.how = self.model, found.policy.sampling
        own = LoraTeacher.__new__(LoraTeacher)
        own.model, own.name = self.model, TEACHER
        found.teachers = {"t": own}
        return found

    def how(self, together: int) -> Sampling:
        """Unguided, all states kept."""
        o = self.options
        return Sampling(
            o.px, o.px, o.steps, Guidance(), "ode", max_rows=o.group, replay_steps=together,
            keeps="states", storage_dtype="float32" if o.device == "cpu" else "bfloat16",
        )  # fmt: skip

    def trajectory(self, together: int) -> Trajectory:
        o = self.options
        (chunk,) = sample(
            self.model,
            [self.conditioned(self.text)],
            self.conditioned(self.null),
            self.how(together),
            self.scheduler,
            group_size=o.group,
            seed=0,
            update=1,
            recorded=tuple(range(o.steps)),
        )
        return chunk

    def states(self) -> list[Tensor]:
        """Those of this package's rollout."""
        return list(self.trajectory(1).x)

    def plain(self, clock: Clock) -> float:
        """A plain step from the same noise; its loss."""
        o = self.options
        loop = PlainLoop(
            transformer=self.model.transformer,
            text=self.text,
            null=self.null,
            grid=self.grid,
            group=o.group,
            sigmas=self.sigmas,
            window=range(0),
            scale=o.guidance,
            eta=o.eta,
            condition=self.condition,
        )
        with clock.phase("rollout"):
            states = loop.states(self.x)
        return self.applied(loop.train(states, clock), clock)

    def ours(self, together: int, clock: Clock) -> float:
        """A step of `algorithms.opd`; its loss."""
        algorithm = self.algorithm(together)
        with clock.phase("rollout"):
            chunk = self.trajectory(together)
        with clock.phase("teacher"):
            (answers,) = algorithm.prepare([chunk], ["t2i"] * self.options.group)
        with clock.phase("student"):
            loss = torch.stack([s.loss for s in algorithm.loss(chunk, None, answers)]).mean()
            loss.backward()
        return self.applied(loss.item(), clock)

    def applied(self, loss: float, clock: Clock) -> float:
        with clock.phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss


def run(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The result; options.out is written at the end. Rounds of all rows in turn, medians."""
    bench = Distilled(options)
    transformer = bench.model.transformer
    rows: dict[str, tuple[bool, Callable[[Clock], float]]] = {
        "plain": (False, bench.plain),
        "one state at a time": (True, lambda clock: bench.ours(1, clock)),
        "all states at once": (True, lambda clock: bench.ours(options.steps, clock)),
    }
    clocks: dict[str, list[Clock]] = {name: [] for name in rows}
    losses = {}
    for round_ in range(options.repeats + 1):
        for name, (fused, step) in rows.items():
            (qirl_fast.patch if fused else qirl_fast.unpatch)(transformer)
            clock = Clock(options.device)
            losses[name] = step(clock)
            if round_:  # the first one meets untouched memory
                clocks[name].append(clock)
    plain = statistics.median(sum(c.seconds.values()) for c in clocks["plain"])
    found = []
    for name, of_row in clocks.items():
        seconds = statistics.median(sum(c.seconds.values()) for c in of_row)
        phases = {p: statistics.median(c.seconds[p] for c in of_row) for p in PHASES}
        found.append(
            {"name": name, "seconds": seconds, "speedup": plain / seconds, "loss": losses[name]}
            | {"phases_s": phases}
        )
        shown = ", ".join(f"{phase} {s:.2f}" for phase, s in phases.items())
        say(
            f"{name:20} {seconds:7.2f} s  {plain / seconds:5.2f}x  loss {losses[name]:.6f}  {shown}"
        )
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    result = about(options.device) | {"settings": settings, "rows": found}
    if options.out is not None:
        write(result, options.out)
    return result


def write(result: dict[str, Any], path: Path) -> None:
    """The result as JSON and as a table in Markdown beside it."""
    path.write_text(json.dumps(result, indent=1) + "\n")
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    lines = [
        f"Commit {result['commit'][:12]}, {result['date']}; {machine}. "
        + ", ".join(f"{k} {v}" for k, v in result["settings"].items())
        + ".",
        "",
        "| row | seconds | against plain | " + " | ".join(PHASES) + " | loss |",
        "|---" * (4 + len(PHASES)) + "|",
    ]
    for row in result["rows"]:
        cells = [row["name"], f"{row['seconds']:.2f}", f"{row['speedup']:.2f}x"]
        cells += [f"{s:.2f}" for s in row["phases_s"].values()]
        lines.append("| " + " | ".join([*cells, f"{row['loss']:.6f}"]) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
