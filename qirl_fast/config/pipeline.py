"""Settings of `python -m qirl_fast.pipeline`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from qirl_fast.config.rules import CrossError
from qirl_fast.section import Count, NonNegative, Problem, Section, Seed, Text

OWN = ("run=", "output=", "seed=", "resume=", "data.train=", "data.heldout=", "data.images=")


class StageConfig(Section):
    """One training run of the pipeline."""

    recipe: Text = Field(description="recipe of qirl_fast.train")
    set: list[Text] = Field(default=[], description="key=value overrides of it")


class TaskConfig(StageConfig):
    """A task: the run of its teacher, and the judge that decides it."""

    judge: Text = Field(description="judge of the final comparison")


class PipelineConfig(Section):
    """Teachers, student and baseline, and how they are compared."""

    output: Text = Field(description="folder of all stages")
    seed: Seed = Field(default=0, description="seed of every stage")
    side_by_side: Count = Field(
        default=1,
        description="so many stages run at a time where they can, and share the CPU's threads; "
        "the numbers are the same",
    )
    tasks: Annotated[dict[str, TaskConfig], Field(min_length=2)] = Field(
        description="tasks by name: each has a teacher, trained on the prompts that its curation "
        "keeps; the name is the `task` of its rows"
    )
    student: StageConfig = Field(description="the distillation of all teachers, algorithm opd")
    baseline: StageConfig = Field(
        description="one run on all tasks and rewards at once, to compare with"
    )
    guidance: NonNegative = Field(
        description="guidance scale of the base, the teachers and the baseline in the comparison; "
        "the student has none"
    )
    prompts: Count = Field(default=96, description="held-out prompts of each task")
    samples_per_prompt: Count = Field(default=4, description="images per held-out prompt")

    @model_validator(mode="after")
    def _cross(self) -> PipelineConfig:
        found: list[Problem] = []
        stages: dict[str, StageConfig] = {f"tasks.{name}": t for name, t in self.tasks.items()}
        stages |= {"student": self.student, "baseline": self.baseline}
        for key, stage in stages.items():
            wrong = [word for word in stage.set if "=" not in word or word.startswith(OWN)]
            wanted = f"wanted key=value of the recipe, but for {', '.join(OWN)}: those are set here"
            found += [((f"{key}.set",), f"{key}.set: got {word!r}; {wanted}") for word in wrong]
        if found:
            raise CrossError(found)
        return self
