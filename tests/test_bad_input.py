"""What cannot be run is refused before anything is computed: which key or file, what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

Start = Callable[..., Any]


@pytest.fixture
def refused(small: tuple[str, ...], start: Start, tmp_path: Path) -> Callable[..., str]:
    """`refused(*settings)` runs, expects exit 2 and nothing computed, and returns what was said."""
    output = tmp_path / "out"

    def run(*settings: str) -> str:
        process = start([*small, f"output={output}", "run=r", *settings])
        code, said = process.wait(), process.output()
        assert code == 2, said
        assert "Traceback" not in said and re.search("^error: ", said, re.M)
        assert not (output / "r").exists(), "nothing is left that the next attempt would trip over"
        return said

    return run


SETTINGS = {
    "unknown section": (["trian.lr=1"], r"trian.*did you mean.*train"),
    "mistyped key": (["rollout.group_sise=4"], r"rollout\.group_sise.*rollout\.group_size"),
    "wrong type": (["train.steps=many"], r"train\.steps: got 'many'.*whole number"),
    "list for a section": (["rewards=[alignment]"], r"rewards: got \['alignment'\]"),
    "list for settings": (["train=[1]"], r"train: got \[1\]"),
    "section for a number": (["train.steps={a: 1}"], r"train\.steps: got \{'a': 1\}"),
    "eta out of range": (["rollout.eta=1.0e-30"], r"rollout\.eta: step 0: .*eta = 1e-30"),
    "no GPU here": (["device=cuda"], r"device: got cuda.*allowed: cpu, auto"),
    "bool for number": (["rollout.eta=true"], r"rollout\.eta: got True"),
    "updates do not divide": (
        ["train.updates_per_rollout=3"],
        r"updates_per_rollout: got 3, which does not divide the 8 samples.*allowed: 1, 2, 4, 8",
    ),
    "more prompts than there are": (
        ["data.prompts_per_step=5000"],
        r"data\.prompts_per_step: got 5000; tiny:train has \d+.*allowed: 1 to \d+",
    ),
    "group of one": (
        ["rollout.group_size=1"],
        r"rollout\.group_size: got 1; grpo compares samples.*2 or more",
    ),
    "window outside": (
        ["rollout.window={start: 2, size: 2}"],
        r"rollout\.window: steps 2 to 3 do not fit; with rollout\.steps=4.*steps 0 to 2",
    ),
    "guided without a mode": (
        ["rollout.ratio_mode=null"],
        r"rollout\.ratio_mode: not declared, but rollout\.guidance=1\.5.*'frozen_offset'",
    ),
    "unknown judge": (["rewards={aligment: 1}"], r"aligment'.*did you mean 'alignment'"),
    "no such model": (["model.path=/no/model"], r"model\.path: no such folder: '/no/model'"),
    "image size": (["rollout.height=48"], r"rollout\.height.*multiples of 32 pixels; try 64 x 64"),
    "one step evaluation": (["evaluation.steps=1"], r"evaluation\.steps: .*num_steps >= 2"),
    "more held out than there are": (
        ["evaluation.prompts=5000"],
        r"evaluation\.prompts: got 5000; tiny:heldout has \d+.*allowed: 2 to \d+",
    ),
    "one held out": (["evaluation.prompts=1"], r"evaluation\.prompts: got 1.*needs two"),
    "LoRA targets": (["model.lora.targets=[nope]"], r"LoRA targets \['nope'\] match no module"),
    "full in bfloat16": (
        ["model.adapter=full", "model.dtype=bfloat16"],
        r"set model\.dtype=float32, model\.adapter=lora, or processes\.shard",
    ),
    "no such checkpoint": (["resume=/no/checkpoint"], r"resume: no such checkpoint folder"),
    "no such recipe": (["no.yaml"], r"no\.yaml: no such recipe file"),
    "not a setting": (["train"], r"train: not understood; wanted a \.yaml recipe or key=value"),
}


@pytest.mark.parametrize("case", list(SETTINGS))
def test_settings(refused, case: str) -> None:
    settings, message = SETTINGS[case]
    assert re.search(message, refused(*settings), re.S)


def test_all_problems_are_reported_together(refused) -> None:
    said = refused("rollout.height=48", "evaluation.prompts=5000", "data.prompts_per_step=5000")
    assert len(said.splitlines()) == 3
    said = refused("train.steps=many", "rollout.group_size=1", "trian.lr=1")
    assert len(said.splitlines()) == 3, "and these three, which the recipe shows by itself"


GOOD = (
    '{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], '
    '"prompt": "a photo of a red circle"}\n'
    '{"tag": "counting", "include": [{"class": "square", "count": 2}], '
    '"prompt": "a photo of two squares"}\n'
)
PROMPTS = {
    "empty": ("", r"the file is empty"),
    "malformed": (GOOD + '{"prompt": "a"\n', r"p\.jsonl:3: malformed JSON at column"),
    "no prompt": (GOOD + '{"tag": "colors"}\n', r"p\.jsonl:3: no 'prompt' among the keys \(tag\)"),
    "blank prompt": (GOOD + '{"prompt": " "}\n', r"p\.jsonl:3: the prompt is blank"),
    "blank line": (GOOD + "\n" + GOOD, r"p\.jsonl:3: got a blank line"),
    "half a character": ('{"prompt": "a \\ud800 b"}\n', r"p\.jsonl:1: the prompt holds half a"),
    "too deep": ("[" * 100_000 + "\n", r"p\.jsonl:1: maximum recursion depth"),
    "a list": ("[1]\n", r"p\.jsonl:1: got a list"),
    "unknown class": (
        GOOD + GOOD.replace("circle", "dog"),
        r"p\.jsonl:3: judge 'alignment' cannot score this row: class 'dog' is not one the judge",
    ),
    "nothing to judge by": (
        GOOD + '{"prompt": "a dog"}\n',
        r"p\.jsonl:3: judge 'alignment' cannot score this row: the row has no 'include'",
    ),
}


@pytest.mark.parametrize("which", ["train", "heldout"])
@pytest.mark.parametrize("case", list(PROMPTS))
def test_prompt_files(refused, tmp_path: Path, case: str, which: str) -> None:
    text, message = PROMPTS[case]
    (tmp_path / "p.jsonl").write_text(text)
    said = refused(f"data.{which}={tmp_path / 'p.jsonl'}", "evaluation.prompts=2")
    assert re.search(message, said, re.S) and str(tmp_path / "p.jsonl") in said


def test_prompt_files_that_are_none(refused, tmp_path: Path) -> None:
    assert "data.train: no such file" in refused(f"data.train={tmp_path}/missing.jsonl")
    assert "data.heldout: got 'tiny:test'; packaged" in refused("data.heldout=tiny:test")
    (tmp_path / "p.csv").write_text(GOOD)
    assert "got a .csv file; wanted .jsonl or .txt" in refused(f"data.train={tmp_path}/p.csv")
    (tmp_path / "p.jsonl").write_bytes(GOOD.encode("utf-16"))
    assert "is not UTF-8" in refused(f"data.train={tmp_path}/p.jsonl")


def without(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        path = model / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def truncated(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).write_bytes((model / name).read_bytes()[:-1000])

    return damage


def overwritten(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(text) and None


def edited(name: str, **values: object) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(config | values))

    return damage


def lacking_a_weight(name: str) -> Callable[[Path], None]:
    """Libraries fill such a hole with random numbers and go on."""

    def damage(model: Path) -> None:
        tensors = load_file(model / name)
        del tensors[sorted(tensors)[3]]
        save_file(tensors, model / name, metadata={"format": "pt"})

    return damage


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
HALVES = {
    "no index": (without("model_index.json"), r"holds no model_index\.json"),
    "no component": (without("vae"), r"half a model: .*vae is missing or empty"),
    "no scheduler": (without("scheduler"), r"half a model: .*scheduler is missing or empty"),
    "no weights": (without(TRANSFORMER), r"half a model: .*transformer holds no \.safetensors"),
    "no config": (without("vae/config.json"), r"half a model: .*vae/config\.json is missing"),
    "no tokenizer": (without("processor/tokenizer.json"), r"holds no tokenizer\.json"),
    "no class": (overwritten("model_index.json", "{}"), r"no adapter for pipeline None"),
    "bad scheduler": (
        overwritten("scheduler/scheduler_config.json", "{"),
        r"half a model: .*scheduler cannot be loaded",
    ),
    "bad tokenizer": (
        overwritten("processor/tokenizer.json", '{"model": 3}'),
        r"half a model: .*processor cannot be loaded",
    ),
    "empty config": (
        overwritten("text_encoder/config.json", "{}"),
        r"half a model: .*text_encoder/config\.json names no model",
    ),
    "another model's config": (
        edited("transformer/config.json", num_layers=3),
        r"transformer hold, beyond the config, \d+ weights \(",
    ),
    "another class": (
        edited("transformer/config.json", _class_name="FluxTransformer2DModel"),
        r"config\.json names _class_name 'FluxTransformer2DModel'; wanted 'QwenImage21",
    ),
    "another text encoder": (
        edited("text_encoder/config.json", model_type="llama"),
        r"config\.json names model_type 'llama'; wanted 'qwen3_vl'",
    ),
    "another scheduler": (
        edited("scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        r"names _class_name 'DDIMScheduler'; wanted 'FlowMatchEuler",
    ),
    "a config without sizes": (  # the library's default: billions of weights
        edited("text_encoder/config.json", text_config=None),
        r"text_encoder cannot be loaded: the config describes [\d,]+ weights, the files hold",
    ),
    "cut transformer": (truncated(TRANSFORMER), r"half a model: .*transformer cannot be loaded"),
    "cut text encoder": (truncated(TEXT), r"half a model: .*text_encoder cannot be loaded"),
    "hole in transformer": (lacking_a_weight(TRANSFORMER), r"transformer lack 1 weights \("),
    "hole in vae": (lacking_a_weight(VAE), r"vae lack 1 weights \("),
    "hole in text encoder": (lacking_a_weight(TEXT), r"text_encoder lack 1 weights \(model\."),
}


@pytest.mark.parametrize("case", list(HALVES))
def test_half_a_model(small, start: Start, tmp_path: Path, model_copy: Path, case: str) -> None:
    damage, message = HALVES[case]
    damage(model_copy)
    run = start([*small, f"output={tmp_path}/out", f"model.path={model_copy}"])
    assert run.wait() == 2, run.output()
    assert re.search(rf"^error: .*{message}", run.output(), re.S | re.M)
    assert "Traceback" not in run.output() and not (tmp_path / "out" / "tiny_grpo-seed0").exists()


def test_output_that_cannot_be_written(small, start: Start, tmp_path: Path) -> None:
    """A path below a plain file, which not even root can make a folder of."""
    (tmp_path / "file").write_text("")
    run = start([*small, f"output={tmp_path}/file/out"])
    assert run.wait() == 2, run.output()
    assert re.search(
        r"error: output: cannot write to .*choose another by output=PATH", run.output()
    )


def test_a_folder_of_another_run(small, start: Start, finished, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(finished("plain"), folder, symlinks=True)
    argv = [*small, f"output={tmp_path}", "run=plain"]
    refusals = {
        (): "already holds a run; go on with it by resume=auto",
        ("resume=auto", "seed=5"): "seed: was 0, is now 5",
        ("resume=auto", "rollout.eta=0.5"): "rollout.eta: was 0.7, is now 0.5",
    }
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for settings, message in refusals.items():
        run = start([*argv, *settings])
        assert run.wait() == 2 and message in run.output(), run.output()
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_after_mending_the_same_command_runs(small, start: Start, tmp_path: Path) -> None:
    """A refusal leaves nothing that the next attempt would take for a run, and no run is lost."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(GOOD + "{\n")
    argv = [*small, f"output={tmp_path}", "run=r", f"data.train={prompts}", "train.steps=1"]
    assert start(argv).wait() == 2
    prompts.write_text(GOOD)
    run = start(argv)
    assert run.wait() == 0, run.output()
    prompts.write_text("{\n")
    assert start([*argv, "resume=auto"]).wait() == 2
    assert (tmp_path / "r" / "checkpoints" / "checkpoint-1" / "manifest.json").exists()
