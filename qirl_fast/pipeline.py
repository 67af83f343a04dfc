"""`python -m qirl_fast.pipeline [pipeline.yaml] [key=value ...]`: the whole story, stage by stage.

    for each task: curate its prompts, train a teacher on those kept (GRPO)
    distil the teachers into one student that draws without guidance (OPD)
    train a baseline on all tasks and rewards at once
    draw the held-out prompts with base, teachers, baseline and student; compare (the baseline with
    guidance, as it was trained, and without, at the student's price)

Every stage is a command of its own, printed before it runs, in a process of its own; with
`side_by_side` so many run at a time: the teachers and the baseline need nothing of each other, and
the student only the teachers. The same command goes on where it was killed, between stages and
inside one. <output> then holds a folder a stage, mixed-train.jsonl and mixed-heldout.jsonl (all
tasks' rows), evaluation/<model>.npz, comparison.json, comparison.md and comparison.png.
"""

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from qirl_fast import configs_dir
from qirl_fast.config import Config, ConfigError, load_config, load_settings
from qirl_fast.config.files import make_folder
from qirl_fast.config.pipeline import PipelineConfig, StageConfig
from qirl_fast.data.prompts import Prompt
from qirl_fast.entry import run
from qirl_fast.evaluation.comparison import Estimate, gain, lead, share
from qirl_fast.evaluation.grid import image_grid
from qirl_fast.evaluation.heldout import Evaluation
from qirl_fast.models.teachers import LoraTeacher
from qirl_fast.tiny import packaged
from qirl_fast.trainer import Trainer
from qirl_fast.whole import write_text

DEFAULT = "tiny_pipeline.yaml"
LORA = Path("checkpoints", "latest", "lora")
UNGUIDED = ("baseline unguided", "student")
SHOWN = 5  # prompts of each task in the picture
Chain = Callable[[], None]


class StageFailed(RuntimeError):
    """A stage's command ended with an error."""


def pipeline(cfg: PipelineConfig) -> Path:
    """Run what is left of the pipeline and return its folder."""
    folder = Path(cfg.output)
    make_folder(folder)
    recipes = {task: checked(task, stage) for task, stage in cfg.tasks.items()}
    mixed = mix(folder, recipes)
    stages = Stages(folder, cfg.side_by_side)

    def teacher(task: str) -> None:
        own = common(cfg, cfg.tasks[task], task)
        stages.run(f"curate {task}", "curate", own, f"{task}-curation")
        data = recipes[task].data
        images = f"data.images={data.images or packaged(data.train).parent}"  # kept.jsonl is a copy
        kept = f"data.train={folder / f'{task}-curation' / 'kept.jsonl'}"
        stages.run(f"teacher {task}", "train", [*own, kept, images], task)

    def baseline() -> None:
        stages.run(
            "baseline", "train", [*common(cfg, cfg.baseline, "baseline"), *mixed], "baseline"
        )

    def student() -> None:
        loras = [f"algorithm.teachers.{t}.path={folder / t / LORA}" for t in cfg.tasks]
        words = [*common(cfg, cfg.student, "student"), *mixed, *loras]
        stages.run("student", "train", words, "student")

    teachers = [partial(teacher, task) for task in cfg.tasks]
    stages.all([baseline, *teachers], student, after=teachers)  # the longest first
    compare(cfg, folder, recipes)
    return folder


def checked(task: str, stage: StageConfig) -> Config:
    """A task's recipe, whose prompts must be files that can be mixed with the other tasks'."""
    cfg = load_config([stage.recipe, *stage.set])
    for split in ("train", "heldout"):
        path = packaged(getattr(cfg.data, split))
        if path.suffix != ".jsonl":
            raise ConfigError([f"tasks.{task}: data.{split} is {path}; wanted a .jsonl file"])
    if cfg.model.adapter != "lora":
        raise ConfigError([f"tasks.{task}: model.adapter is 'full'; wanted lora teachers"])
    return cfg


def common(cfg: PipelineConfig, stage: StageConfig, name: str) -> list[str]:
    """The words of a stage's command that all stages have."""
    own = [f"output={cfg.output}", f"run={name}", f"seed={cfg.seed}", "resume=auto"]
    return [stage.recipe, *stage.set, *own]


class Stages:
    """Runs stages' commands in processes of their own, `side_by_side` at a time.

    More than one share the CPU's threads out among them, and each line they print is led by the
    stage's name.
    """

    def __init__(self, folder: Path, side_by_side: int):
        self.folder, self.side_by_side = folder, side_by_side
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._lock = threading.Lock()  # of the two above

    def all(self, chains: Sequence[Chain], last: Chain, *, after: Sequence[Chain]) -> None:
        """Run chains of stages in their order, and `last` when those of `after` have ended.

        An error or Ctrl-C has all that run stopped, their state saved, and no other started; it is
        raised when they have ended.
        """
        with ThreadPoolExecutor(self.side_by_side) as pool, self._stopping():
            started = {chain: pool.submit(self._stopping()(chain)) for chain in chains}

            def waiting() -> None:
                for chain in after:
                    started[chain].result()
                last()

            for done in as_completed([*started.values(), pool.submit(waiting)]):
                done.result()

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """An error inside stops all that run, before anything else can start."""
        try:
            yield
        except BaseException:
            with self._lock:
                self._stopped = True
                for process in self._running:
                    process.terminate()
            raise

    def run(self, title: str, module: str, words: Sequence[str], run: str) -> None:
        """Run a stage's command unless it has come to its end; StageFailed where it fails.

        run: the folder in which such a command ends with summary.json. A stage that ended under
        other words is refused.
        """
        command = ["-m", f"qirl_fast.{module}", *words]
        if module == "curate":  # goes on by itself, and has no checkpoints
            command.remove("resume=auto")
        done = self.folder / run / "summary.json"
        note = self.folder / "stages" / f"{title.replace(' ', '-')}.json"
        say = self._say(title)
        if done.exists() and note.exists():
            was = json.loads(note.read_text(encoding="utf-8"))
            if was != command:
                raise ConfigError(
                    [
                        f"{title}: ended in {done.parent} as another command; go back to its "
                        "settings, or start anew under output=NAME. It was: "
                        + shlex.join(["python", *was])
                    ]
                )
            say(f"done before: {done}")
            return
        if self._process(command, say):
            raise StageFailed(f"{title} did not come to its end; what it said stands above")
        write_text(note, json.dumps(command) + "\n")

    def _say(self, title: str) -> Callable[[str], None]:
        """Prints a line of a stage: under a heading, or led by its name where stages mix."""
        if self.side_by_side == 1:
            Console().rule(title, align="left")
            return partial(print, flush=True)
        return lambda line: print(f"{title:12} | {line}", flush=True)

    def _process(self, command: Sequence[str], say: Callable[[str], None]) -> int:
        """The command's exit status."""
        kept: dict[str, Any] = {}
        if self.side_by_side > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // self.side_by_side)
            kept = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            kept["env"] = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with self._lock:
            if self._stopped:
                raise StageFailed("not started, as another has failed")
            say("python " + shlex.join(command))
            process = subprocess.Popen([sys.executable, *command], **kept)
            self._running.add(process)
        with process:
            for line in process.stdout or ():
                say(line.rstrip("\n"))
        with self._lock:
            self._running.discard(process)
        return process.returncode


def mix(folder: Path, recipes: Mapping[str, Config]) -> list[str]:
    """Write the rows of all tasks, in turn, into one file of training and one of held-out prompts;
    the words that name them. Each row says its `task`.
    """
    words = []
    for split, key in (("train", "images"), ("heldout", "heldout_images")):
        files = {task: packaged(getattr(cfg.data, split)) for task, cfg in recipes.items()}
        roots = {getattr(recipes[t].data, key) or str(f.parent) for t, f in files.items()}
        if len(roots) > 1:
            raise ConfigError(
                [f"data.{key}: tasks have images under {sorted(roots)}; wanted one folder"]
            )
        rows = [
            [json.dumps({"task": task, **json.loads(line)}) for line in lines if line.strip()]
            for task, file in files.items()
            if (lines := file.read_text(encoding="utf-8").splitlines())
        ]
        in_turn = [row for some in zip_longest(*rows) for row in some if row is not None]
        path = folder / f"mixed-{split}.jsonl"
        write_text(path, "\n".join(in_turn) + "\n")
        words += [f"data.{split}={path}", f"data.{key}={roots.pop()}"]
    return words


def compare(cfg: PipelineConfig, folder: Path, recipes: Mapping[str, Config]) -> None:
    """Draw and judge the held-out prompts with every model; write and print the comparison."""
    Console().rule("comparison", align="left")
    found: dict[str, dict[str, Evaluation]] = {}
    prompts: dict[str, list[Prompt]] = {}
    sources: dict[str, list[np.ndarray] | None] = {}
    guided = ["base", *(f"{task} teacher" for task in cfg.tasks), "baseline"]
    for task, stage in cfg.tasks.items():
        for guidance, models in ((cfg.guidance, guided), (1.0, UNGUIDED)):
            words = [*stage.set, f"evaluation.guidance={guidance}", f"output={cfg.output}"]
            words += [f"evaluation.prompts={cfg.prompts}", f"seed={cfg.seed}"]
            words += [f"evaluation.samples_per_prompt={cfg.samples_per_prompt}"]
            trainer = Trainer(load_config([stage.recipe, *words]))
            try:
                prompts[task] = trainer.heldout
                sources[task] = trainer.conditioning.sources(trainer.heldout)
                for model in models:
                    found.setdefault(model, {})[task] = drawn(trainer, folder, task, model)
            finally:
                trainer.close()
    judge = {task: stage.judge for task, stage in cfg.tasks.items()}
    scores = {
        model: {task: of_task[task].scores[judge[task]] for task in cfg.tasks}
        for model, of_task in found.items()
    }
    report(cfg, folder, scores)
    picture(folder, found, judge, prompts, sources)


def drawn(trainer: Trainer, folder: Path, task: str, model: str) -> Evaluation:
    """A model's held-out images and scores of one task, drawn once and kept in the folder."""
    path = folder / "evaluation" / f"{task}-{model.replace(' ', '-')}.npz"
    ids = np.array([p.id for p in trainer.heldout])
    how = np.array([repr(trainer.heldout_samples.how), str(trainer.cfg.evaluation)])
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if np.array_equal(kept["prompts"], ids) and np.array_equal(kept["how"], how):
                scores = {n.removeprefix("score_"): kept[n] for n in kept if n.startswith("score_")}
                return Evaluation(scores, [kept[f"image_{i}"] for i in range(len(ids))])
    print(f"{task}: {model}", flush=True)
    with weights(trainer, folder, model):
        result = trainer.evaluate_weights()
    arrays: dict[str, Any] = {f"score_{name}": v for name, v in result.scores.items()}
    arrays |= {f"image_{i}": image for i, image in enumerate(result.images)}
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f".{path.name}")
    np.savez(beside, prompts=ids, how=how, **arrays)
    beside.replace(path)
    return result


def weights(trainer: Trainer, folder: Path, model: str) -> AbstractContextManager[object]:
    """Inside, the trainer's model is the one that a stage made."""
    if model == "base":
        return trainer.model.reference()
    name = model.removesuffix(" teacher").removesuffix(" unguided")
    return LoraTeacher(trainer.model, name, folder / name / LORA).active()


def report(
    cfg: PipelineConfig, folder: Path, scores: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Print the table and what follows from it; write comparison.json and comparison.md."""
    base, student, baseline = (scores[name] for name in ("base", "student", "baseline"))
    rows = {
        model: {
            task: {"mean": float(own[task].mean()), "gain": gain(base[task], own[task])}
            for task in cfg.tasks
        }
        for model, own in scores.items()
    }
    said: dict[str, Estimate | None] = {
        f"student's share of the {task} teacher's gain": share(
            base[task], scores[f"{task} teacher"][task], student[task]
        )
        for task in cfg.tasks
    }
    said["student above the baseline, sum of tasks"] = lead(student, baseline)
    unguided = scores["baseline unguided"]
    said["student above the unguided baseline, sum of tasks"] = lead(student, unguided)
    said["student above the base, sum of tasks"] = lead(student, base)
    words = [f"{what}: {value or 'there is none'}" for what, value in said.items()]
    console, lines = Console(), []
    columns = ("model", "guidance", "score", "gain over the base (95 %)")
    for task, stage in cfg.tasks.items():
        held_out = f"{cfg.prompts} held-out prompts x {cfg.samples_per_prompt}"
        title = f"{task}: {stage.judge}, {held_out}"
        table = Table(*columns, title=title)
        lines += [title, "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for model, tasks in rows.items():
            found = tasks[task]
            gained = "" if model == "base" else str(found["gain"])
            guided = "none" if model in UNGUIDED else f"{cfg.guidance:g}"
            cells = (model.removesuffix(" unguided"), guided, f"{found['mean']:.3f}", gained)
            table.add_row(*cells)
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        console.print(table)
    for text in words:
        console.print(text, highlight=False, soft_wrap=True)
    lines += [f"- {text}" for text in words]
    plain = json.dumps({"models": rows, "statements": said}, default=vars, indent=2)
    write_text(folder / "comparison.json", plain + "\n")
    write_text(folder / "comparison.md", "\n".join(lines) + "\n")


def picture(
    folder: Path,
    found: Mapping[str, Mapping[str, Evaluation]],
    judge: Mapping[str, str],
    prompts: Mapping[str, Sequence[Prompt]],
    sources: Mapping[str, Sequence[np.ndarray] | None],
) -> None:
    """comparison.png: some prompts of each task, a column a model; what is edited stands first."""
    chosen = [(task, i) for task, rows in prompts.items() for i in spread(rows)]
    shown = [own[i] if (own := sources[task]) else None for task, i in chosen]
    columns = {"source": shown} if any(image is not None for image in shown) else {}
    columns |= {m: [own[task].images[i] for task, i in chosen] for m, own in found.items()}
    scores = {
        m: [float(own[task].scores[judge[task]][i]) for task, i in chosen]
        for m, own in found.items()
    }
    texts = [prompts[task][i].prompt for task, i in chosen]
    path = image_grid(columns, texts, scores, folder / "comparison.png", per_column=len(chosen))
    print(f"picture {path}\ntable   {folder / 'comparison.md'}")


def spread(rows: Sequence[Prompt]) -> Iterator[int]:
    """SHOWN rows: the first of each category in turn."""
    tags = [row.category for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (tags[:i].count(tags[i]), i))
    yield from order[:SHOWN]


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 a stage failed, 2 the settings are wrong, 130 Ctrl-C."""

    def work(args: list[str]) -> None:
        pipeline(load_settings(args, PipelineConfig, configs_dir() / DEFAULT))

    return run(argv, __doc__, work, wrong=ConfigError, stopped=StageFailed)


if __name__ == "__main__":
    sys.exit(main())
