"""On-policy distillation: loss and gradient against float64, routing, teachers, real runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qirl_fast.algorithms import Policy, opd
from qirl_fast.checkpoint.lora import lora_state, write_lora
from qirl_fast.config import ConfigError, load_config
from qirl_fast.models.adapter import Adapter
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.models.teachers import (
    FolderTeacher,
    LoraTeacher,
    load_teacher,
    low_rank,
    start_from,
)
from qirl_fast.preflight import SHARED, contents
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import velocities
from qirl_fast.rollout.sample import Sampling, Trajectory, sample
from qirl_fast.rollout.workers import Workers

SCHEDULER = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
GROUP, STEPS = 4, 5
TASKS = ["t2i"] * GROUP + ["edit"] * GROUP + ["t2i"] * GROUP  # of three prompts' rows
TARGET = Path(__file__).resolve().parents[2] / "qirl_fast" / "tiny"


class Stub:
    """A teacher that is a model of its own; `seen` counts the rows it answered for."""

    def __init__(self, model: Any):
        self.model, self.fetched = model, 0

    def fetch(self) -> None:
        self.fetched += 1

    @contextmanager
    def active(self) -> Iterator[Any]:
        yield self.model


@pytest.fixture
def distil(make_toy, toy_text, monkeypatch: pytest.MonkeyPatch):
    """`distil(dtype, dynamics, **settings)`: (algorithm, chunk, teachers) over toy models."""

    def make(dtype=torch.float32, dynamics: str = "ode", **settings: Any) -> Any:
        models = {"t2i": make_toy(dtype, 1), "edit": make_toy(dtype, 2)}
        for model in models.values():
            model.norm_rescaled_guidance = False
        student = make_toy(dtype)
        student.norm_rescaled_guidance = False
        stubs = {name: Stub(model) for name, model in models.items()}
        monkeypatch.setattr(opd, "load_teacher", lambda model, name, folder: stubs[name])
        teachers = {
            "t2i": {"path": "a", "tasks": ["t2i"], "guidance": 2.5},
            "edit": {"path": "b", "tasks": ["edit"]},
        }
        own = opd.Settings(name="opd", teachers=teachers, **settings)
        how = Sampling(64, 64, STEPS, Guidance(), dynamics, replay_steps=2, keeps="states")
        policy = Policy(student, dict(student.named_parameters()), how, Workers(1))
        algorithm = opd.Opd(own, policy)
        rollout = type("Rollout", (), {"steps": STEPS, "dynamics": dynamics})
        chunks = sample(
            make_toy(),
            *toy_text,
            how,
            SCHEDULER,
            group_size=GROUP,
            seed=1,
            update=3,
            recorded=algorithm.record(rollout, 0, 1),
        )
        return algorithm, *chunks, stubs

    return make


def expected(algorithm: opd.Opd, chunk: Trajectory, stubs: dict[str, Stub]) -> Tensor:
    """The loss by the definition, state by state and row by row."""
    total, student = torch.zeros((), dtype=torch.float64), algorithm.model
    settings = algorithm.settings
    for i, k in enumerate(chunk.coefficients):
        x, sigma = chunk.x[i].double(), [chunk.sigmas[i]]
        prefix = chunk.prompts.prefix(student)
        v = student.velocity(x, sigma, prefix)
        rows = []
        for r, task in enumerate(TASKS):
            teacher, own = stubs[task].model, chunk.prompts.of([r])
            with torch.no_grad():
                answer = teacher.velocity(x[r : r + 1], sigma, own.prefix(teacher))
                if task == "t2i":
                    null = teacher.velocity(x[r : r + 1], sigma, own.null_prefix(teacher))
                    answer = null + 2.5 * (answer - null)
            rows.append(answer)
        gap = v - torch.cat(rows)
        weight = {"velocity": 1.0, "mean": k.c**2, "x0": chunk.sigmas[i] ** 2}.get(settings.target)
        weight = k.c**2 / (2 * k.s**2) if weight is None else weight
        total = total + weight * gap.square().mean()
        if settings.anchor is not None:
            with torch.no_grad(), student.reference():
                held = student.velocity(x, sigma, chunk.prompts.prefix(student))
            total = total + settings.anchor.weight * (v - held).square().mean()
    return total / len(chunk.recorded)


@pytest.mark.parametrize(
    ("dynamics", "settings"),
    [
        ("ode", {}),
        ("ode", {"target": "mean"}),
        ("ode", {"target": "x0"}),
        ("flow_sde", {"target": "kl"}),
        ("ode", {"steps": {"count": 2, "first": 1}}),
        ("ode", {"anchor": {"weight": 0.3}}),
    ],
    ids=str,
)
def test_loss_and_gradient(distil, dynamics: str, settings: dict[str, Any]) -> None:
    """float32 against float64: sums of some hundred products of about 1, so 1e-5 of the largest."""
    ours, chunk, _ = distil(torch.float32, dynamics, **settings)
    exact, _, stubs = distil(torch.float64, dynamics, **settings)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p, q in zip(ours.model.parameters(), exact.model.parameters(), strict=True):
            q.add_(0.1 * torch.randn(q.shape, generator=generator))
            p.copy_(q)
    (prepared,) = ours.prepare([chunk], TASKS)
    steps = list(ours.loss(chunk, None, prepared))
    loss = torch.stack([step.loss for step in steps]).mean()
    loss.backward()
    theirs = expected(exact, chunk, stubs)
    theirs.backward()
    assert len(steps) == len(chunk.recorded) and all(step.ratio is None for step in steps)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    for p, q in zip(ours.model.parameters(), exact.model.parameters(), strict=True):
        assert q.grad.abs().max() > 0
        assert (p.grad - q.grad).abs().max() < 1e-5 * q.grad.abs().max()


def test_what_is_recorded(distil) -> None:
    _, chunk, _ = distil()
    assert chunk.recorded == tuple(range(STEPS)) and len(chunk.x) == STEPS
    assert chunk.x_next == chunk.logp == chunk.delta == ()
    _, chunk, _ = distil(dynamics="flow_sde")
    assert chunk.recorded == tuple(range(STEPS - 1)), "the last step's noise is never recorded"
    some, _, _ = distil(steps={"count": 2, "first": 2})
    rollout = type("Rollout", (), {"steps": STEPS, "dynamics": "ode"})
    drawn = {some.record(rollout, 0, update) for update in range(1, 60)}
    assert drawn == {(2, 3), (2, 4), (3, 4)}


def test_a_teacher_answers_for_its_own_rows_alone(distil) -> None:
    algorithm, chunk, stubs = distil()
    for stub in stubs.values():
        stub.model.rows = 0
    algorithm.prepare([chunk], TASKS)
    assert stubs["t2i"].model.rows == 2 * 2 * GROUP * STEPS  # both branches
    assert stubs["edit"].model.rows == GROUP * STEPS
    assert stubs["edit"].fetched >= 1
    with pytest.raises(ValueError, match=r"\['video'\]: teachers answer for \['edit', 't2i'\]"):
        algorithm.prepare([chunk], ["video"] * len(TASKS))
    bare = replace(chunk, prompts=replace(chunk.prompts, nulls=(None,)))
    with pytest.raises(ValueError, match=r"guidance is 2.5, .* without an unconditional embedding"):
        algorithm.prepare([bare], TASKS)
    # All rows of one task: nothing is cut out, and the other is not asked.
    stubs["edit"].model.rows = 0
    algorithm.prepare([chunk], ["t2i"] * len(TASKS))
    assert stubs["edit"].model.rows == 0


# ---- real teachers -------------------------------------------------------------------------------


def adapter_folder(folder: Path, rank: int, seed: int, targets: tuple[str, ...] = ()) -> Path:
    """A PEFT adapter of the packaged model with weights that matter, as a run writes it."""
    model = QwenImage21.load(TARGET / "weights", torch.float32)
    model.trainable("lora", rank, 2 * rank, targets or None, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.transformer.named_parameters():
            if "lora_B" in name:
                p.copy_(0.15 * torch.randn(p.shape, generator=generator))
    folder.mkdir(parents=True)
    write_lora(folder, lora_state(model.transformer))
    return folder / "lora"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    return {
        "t2i": adapter_folder(root / "t2i", 4, 1),
        "edit": adapter_folder(root / "edit", 6, 2, ("attn.to_q", "img_mlp.out")),
    }


def answers(model: Adapter, chunk: Trajectory) -> Tensor:
    with torch.no_grad():
        return torch.stack(list(velocities(model, chunk, Guidance(), 1)))


def rolled(model: QwenImage21, prompts: Any) -> Trajectory:
    how = Sampling(64, 64, 3, Guidance(), keeps="states")
    with torch.no_grad():
        text, null = model.encode(prompts[:2]), model.encode([""])[0]
    config = dict(model.pipeline.scheduler.config)
    (chunk,) = sample(
        model, text, null, how, config, group_size=2, seed=0, update=1, recorded=(0, 1, 2)
    )
    return chunk


def relative(a: Tensor, b: Tensor) -> float:
    assert b.abs().max() > 0
    return ((a - b).abs().max() / b.abs().max()).item()


def merged_folder(lora: Path, folder: Path) -> Path:
    """The packaged model with a LoRA merged into its transformer, as a folder."""
    shutil.copytree(TARGET / "weights", folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    config = json.loads((lora / "adapter_config.json").read_text())
    found = load_file(lora / "adapter_model.safetensors")
    for key, a in found.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            b = found[key.replace("lora_A", "lora_B")]
            scale = config["lora_alpha"] / config["r"]
            weights[name] = (weights[name].double() + scale * b.double() @ a.double()).float()
    save_file(weights, file, {"format": "pt"})
    return folder


def test_a_lora_teacher_is_the_model_with_its_adapter_merged(loras, prompts, tmp_path) -> None:
    """Merging rounds each weight once, 6e-8 of it; some ten layers, so 1e-5 of the largest."""
    student = QwenImage21.load(TARGET / "weights", torch.float32)
    trained = student.trainable("lora", 8, 16, None, 0)
    before = {name: p.detach().clone() for name, p in trained.items()}
    chunk = rolled(student, prompts)
    own = answers(student, chunk)
    teacher = load_teacher(student, "t2i", loras["t2i"])
    other = load_teacher(student, "edit", loras["edit"])
    assert isinstance(teacher, LoraTeacher)
    found = {}
    for name, one in (("t2i", teacher), ("edit", other)):
        with one.active() as model:
            found[name] = answers(model, chunk)
        merged = QwenImage21.load(merged_folder(loras[name], tmp_path / name), torch.float32)
        assert relative(found[name], answers(merged, chunk)) < 1e-5
        assert relative(found[name], own) > 1e-3
    # The student is as it was: weights, what is trained, its own answers, to the bit.
    assert torch.equal(answers(student, chunk), own)
    assert all(torch.equal(p, before[name]) for name, p in trained.items())
    opened = {n for n, p in student.transformer.named_parameters() if p.requires_grad}
    assert opened == set(trained)
    # A folder of whole weights answers alike.
    folder = load_teacher(student, "whole", tmp_path / "t2i")
    assert isinstance(folder, FolderTeacher)
    with folder.active() as model:
        assert relative(answers(model, chunk), found["t2i"]) < 1e-5
    assert torch.equal(answers(student, chunk), own)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_folder_teacher_waits_on_the_host(prompts) -> None:
    """Its answers on the GPU are those of the student's own weights, which are the same."""
    student = QwenImage21.load(TARGET / "weights", torch.float32, "cuda")
    student.trainable("lora", 8, 16, None, 0)
    teacher = load_teacher(student, "whole", TARGET / "weights")
    assert isinstance(teacher, FolderTeacher)
    weights = list(teacher.model.transformer.parameters())
    chunk = rolled(student, prompts)
    for _ in range(2):
        assert all(p.device.type == "cpu" and p.is_pinned() for p in weights)
        teacher.fetch()
        with teacher.active() as model:
            assert all(p.device.type == "cuda" for p in weights)
            found = answers(model, chunk)
        assert torch.equal(found, answers(student, chunk))


def test_a_student_begins_as_its_teachers_merged(loras, prompts) -> None:
    """Rank 10 holds the mean of ranks 4 and 6 whole; rank 3 the best three directions."""
    student = QwenImage21.load(TARGET / "weights", torch.float32)
    student.trainable("lora", 10, 20, None, 0)
    teachers = [LoraTeacher(student, name, loras[name]) for name in loras]
    start_from(student, teachers)
    for path, layer in student.transformer.named_modules():
        if not hasattr(layer, "lora_A"):
            continue

        def change(name: str, layer: Any = layer) -> Tensor:
            if name not in layer.lora_A:
                return torch.zeros(())
            b, a = layer.lora_B[name].weight, layer.lora_A[name].weight
            return layer.scaling[name] * b.double() @ a.double()

        wanted = (change("teacher_t2i") + change("teacher_edit")) / 2
        assert (change("default") - wanted).abs().max() < 1e-6 * wanted.abs().max(), path


def test_low_rank_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(r, 9, generator=generator), torch.randn(7, r, generator=generator))
        for r in (2, 3)
    ]
    whole = sum(b.double() @ a.double() for a, b in pairs)
    for rank in (2, 5, 8):
        b, a = low_rank(pairs, rank)
        assert a.shape[0] == b.shape[1] <= rank
        missed = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
        assert torch.linalg.norm(whole - b @ a) == pytest.approx(missed.item(), abs=1e-9)


@pytest.mark.parametrize("fault", ["shape", "layer", "lacking"])
def test_an_adapter_that_does_not_fit_is_refused(loras, tmp_path: Path, fault: str) -> None:
    folder = Path(shutil.copytree(loras["edit"], tmp_path / "lora"))
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(name for name in weights if "to_q.lora_A" in name)
    words = {
        "shape": r"does not fit: .*to_q.lora_A.weight is \[6, 32\], the student's .* maps 96 to 96",
        "layer": "adapts other.attn.to_q, and the student's QwenImage21.* has no linear layer",
        "lacking": "lacks 1 weights of the layers that its adapter_config.json names",
    }
    if fault == "shape":
        weights[key] = weights[key][:, :32].contiguous()
    elif fault == "layer":
        weights["base_model.model.other.attn.to_q.lora_A.weight"] = weights.pop(key)
    else:
        del weights[key]
    save_file(weights, file)
    student = QwenImage21.load(TARGET / "weights", torch.float32)
    student.trainable("lora", 8, 16, None, 0)
    with pytest.raises(ValueError, match=f"teacher 'e' .*{words[fault]}"):
        load_teacher(student, "e", folder)


def test_a_model_of_another_shape_is_refused(model_copy: Path) -> None:
    config = model_copy / "transformer" / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"num_layers": plain["num_layers"] + 1}))
    student = QwenImage21.load(TARGET / "weights", torch.float32)
    with pytest.raises(ValueError, match=r"another architecture: num_layers is \d, the student's"):
        load_teacher(student, "big", model_copy)


def test_a_student_without_the_teachers_layers_is_refused(loras) -> None:
    student = QwenImage21.load(TARGET / "weights", torch.float32)
    student.trainable("lora", 8, 16, ("attn.to_k",), 0)
    teacher = LoraTeacher(student, "t2i", loras["t2i"])
    with pytest.raises(ValueError, match=r"layers that the student does not .*model.lora.targets"):
        start_from(student, [teacher])


# ---- recipes and runs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(loras, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The packaged recipe on small teachers, mixed prompts and two updates."""
    folder = tmp_path_factory.mktemp("opd")
    prompts = TARGET / "prompts"
    for split in ("train", "heldout"):
        files = [(prompts / f"{kind}{split}.jsonl").read_text() for kind in ("", "edit-")]
        lines = [line for pair in zip(*(f.splitlines() for f in files)) for line in pair]  # noqa: B905
        (folder / f"{split}.jsonl").write_text("\n".join(lines[:24]) + "\n")
    root = Path(__file__).resolve().parents[2]
    return [
        str(root / "configs" / "tiny_opd.yaml"),
        f"output={folder / 'runs'}",
        "threads=1",
        f"data.train={folder / 'train.jsonl'}",
        f"data.heldout={folder / 'heldout.jsonl'}",
        f"data.images={prompts}",
        f"data.heldout_images={prompts}",
        "data.prompts_per_step=4",
        "rollout={group_size: 2, steps: 3, max_rows: 4}",
        "train={steps: 3, lr: 0.002, warmup: 0, decay: 0, replay_steps: 3}",
        "evaluation={prompts: 4, samples_per_prompt: 1, steps: 3}",
        "tracking={checkpoint_every: 1, tensorboard: false}",
        *(f"algorithm.teachers.{name}.path={path}" for name, path in loras.items()),
    ]


def test_a_run_comes_nearer_to_its_teachers_and_resumes(recipe, start, read_jsonl) -> None:
    recipe = [*recipe, "algorithm.init=base", "train={steps: 5, lr: 0.003}"]
    run = start([*recipe, "run=whole"])
    assert run.wait() == 0, run.output()
    folder = Path(load_config([*recipe, "run=whole"]).output)
    rows = read_jsonl(folder / "whole" / "metrics.jsonl")
    losses = [row["teacher_mse"] for row in rows]
    assert losses[-1] < 0.9 * losses[0]
    assert "pre_update_ratio_error" not in rows[0] and "reward" not in rows[0]
    assert {"reward/alignment", "reward/edit_accuracy"} <= rows[0].keys()
    assert start([*recipe, "run=parts", "train.steps=1"]).wait() == 0
    second = start([*recipe, "run=parts", "resume=auto"])
    assert second.wait() == 0, second.output()
    assert read_jsonl(folder / "parts" / "metrics.jsonl") == rows
    kept = [
        load_file(folder / run / "checkpoints/latest/lora/adapter_model.safetensors")
        for run in ("whole", "parts")
    ]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    assert all("teacher" not in name for name in kept[0])


def test_a_run_needs_no_judge(recipe, start, read_jsonl) -> None:
    run = start([*recipe, "run=bare", "watch=[]", "train.steps=1"])
    assert run.wait() == 0, run.output()
    folder = Path(load_config([*recipe, "run=bare"]).output) / "bare"
    assert not [k for k in read_jsonl(folder / "metrics.jsonl")[0] if k.startswith("reward")]
    assert (folder / "samples" / "before_after.png").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["rollout.guidance=1.5"], "rollout.guidance: got 1.5, .* guide the teachers"),
        (["rollout.window={start: 0, size: 2}"], "choose steps of a ratio, and opd has none"),
        (["rewards={alignment: 1}"], "opd optimises no reward; set rewards to {}"),
        (["algorithm.target=kl"], "'kl' compares densities"),
        (["algorithm.steps={count: 3, first: 1}"], "3 from step 1 on; there are states of .* 2"),
        (["algorithm.init=other"], "algorithm.init: got 'other'; allowed: base, merged, t2i, edit"),
        (["algorithm.anchor={teacher: x, weight: 1}"], "anchor.teacher: got 'x'; allowed: base"),
        (["algorithm.teachers.edit.tasks=[t2i]"], "both answer for 't2i' rows"),
        (["algorithm.teachers.t2i.path=nowhere"], "'nowhere' is no teacher; wanted a PEFT adapter"),
        (["algorithm.teachers.t2i.guidence=2"], "unknown key; did you mean .*guidance"),
        (["algorithm.name=odp"], "algorithm.name: got 'odp'; wanted one of 'awm', 'dppo'"),
        (["model.adapter=full"], "got 'full', which changes the base that LoRA teachers sit on"),
        (["model.fp8={mode: corrected}"], "model.fp8.mode: got 'corrected'"),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_contradictions_are_refused(recipe, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config([*recipe, *settings])


def test_versions_noted_in_a_config_make_no_other_model(model_copy) -> None:
    weights = TARGET / "weights"
    config = model_copy / "scheduler" / "scheduler_config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"_diffusers_version": "0.99"}))
    text = model_copy / "text_encoder" / "config.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | {"transformers_version": "9"}))
    for parts in SHARED.values():
        assert contents(weights, parts) and contents(weights, parts) == contents(model_copy, parts)
    config.write_text(json.dumps(plain | {"shift": 2.0}))
    assert contents(weights, ("scheduler",)) != contents(model_copy, ("scheduler",))


def test_rows_and_models_without_a_teacher_are_refused(recipe, model_copy, start, tmp_path) -> None:
    rows = start([*recipe, "run=rows", "algorithm.teachers.edit.tasks=[video]"])
    assert rows.wait() == 2
    said = " ".join(rows.output().split())
    assert "the row's task is 'edit'" in said and "answer for t2i, video alone" in said
    config = model_copy / "scheduler" / "scheduler_config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"max_shift": 1.15}))
    vae = next((model_copy / "vae").glob("*.safetensors"))
    weights = load_file(vae)
    save_file({name: value * 1.5 for name, value in weights.items()}, vae, {"format": "pt"})
    run = start(
        [*recipe, "run=m", f"algorithm.teachers.t2i.path={model_copy}", "algorithm.init=base"]
    )
    assert run.wait() == 2
    said = " ".join(run.output().split())
    assert "teacher 't2i'" in said and "another scheduler" in said and "another autoencoder" in said
    assert "another text encoder" not in said
