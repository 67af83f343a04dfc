"""Fine-tuning a judge: the loss by hand, and whole runs on a handful of drawn scenes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_judges import REASONS, RUBRIC, picture, write_base, write_rows

from qirl_fast import train_reward
from qirl_fast.config import ConfigError
from qirl_fast.config.load import load_settings
from qirl_fast.config.reward import RewardConfig
from qirl_fast.evaluation import write_validation
from qirl_fast.reward_trainer import RewardTrainer, place_of
from qirl_fast.rewards.judge import SCORED
from qirl_fast.rewards.vlm.data import load_rows
from qirl_fast.rewards.vlm.folder import load_model, load_processor
from qirl_fast.rewards.vlm.images import read_image
from qirl_fast.rewards.vlm.local import Settings, Vlm
from qirl_fast.rewards.vlm.loss import batch_losses, build_sample
from qirl_fast.rewards.vlm.prompt import score_ids
from qirl_fast.rewards.vlm.rubric import question
from qirl_fast.train_reward import judge_rows, main

RECIPES = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def stock(base: Path) -> tuple[Any, Any]:
    return load_model(base, None, "float32", "cpu"), load_processor(base)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, base: Path, rows: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "judge.yaml"
    path.write_text(
        f"run: judge\nthreads: 1\nmodel: {{path: {base}, adapter: full, vision: true}}\n"
        f"data: {{file: {rows}, rubrics: {{alignment: {RUBRIC!r}}}}}\n"
        "train: {steps: 3, batch: 4, micro_batch: 2, lr: 0.003}\n"
        "validation: {reasonings: 0, bootstrap: 100}\n"
        "tracking: {tensorboard: false, checkpoint_every: 1}\n"
    )
    return path


def samples(stock: tuple[Any, Any], labels: list[tuple[str, float]]) -> list[Any]:
    processor = stock[1]
    ids5 = score_ids(processor)
    sizes = ((64, 64), (96, 64), (64, 128))
    return [
        build_sample(processor, ids5, [picture(*sizes[i % 3], i)], RUBRIC + " " * i, label)
        for i, label in enumerate(labels)
    ]


LABELS = [("a red circle", 4.5), ("", 1.0), ("two blue squares and a circle", 2.4)]


def test_the_loss_by_hand(stock: tuple[Any, Any]) -> None:
    """Token by token, from stock forwards of one sample at a time, in float64."""
    model, processor = stock
    ids5 = score_ids(processor)
    built = samples(stock, LABELS)
    losses = batch_losses(model, built, ids5, 0.7, 0.3)
    for i, (sample, (rationale, score)) in enumerate(zip(built, LABELS, strict=True)):
        text = processor.tokenizer.decode(sample.ids[sample.start :])
        digit = {4.5: "5", 1.0: "1", 2.4: "2"}[score]
        assert text == (f"{rationale}\n" if rationale else "") + f"Score: {digit}<|im_end|>"
        assert sample.ids[sample.place] == ids5[int(digit) - 1]
        with torch.no_grad():
            logits = model(
                input_ids=sample.ids[None],
                mm_token_type_ids=sample.kinds[None],
                pixel_values=sample.pixels,
                image_grid_thw=sample.grids,
                use_cache=False,
            ).logits[0]
        logp = logits.double().log_softmax(1)
        terms = []
        for place in range(sample.start, len(sample.ids)):
            if place != sample.place:
                terms.append(-logp[place - 1, sample.ids[place]])
            else:
                terms.append(-logp[place - 1, ids5].exp().sum().log())
        p = logp[sample.place - 1, ids5].softmax(0)
        expected = float((p * torch.arange(1.0, 6.0, dtype=torch.float64)).sum())
        text_loss = float(torch.stack(terms).mean())
        total = 0.7 * (expected - score) ** 2 + 0.3 * text_loss
        assert losses.expected[i].item() == pytest.approx(expected, abs=1e-5)
        assert losses.text[i].item() == pytest.approx(text_loss, abs=1e-5)
        assert losses.total[i].item() == pytest.approx(total, rel=1e-5)


def gradient(model: Any, built: list[Any], ids5: list[int], size: int) -> dict[str, Any]:
    model.requires_grad_(True)
    for start in range(0, len(built), size):
        losses = batch_losses(model, built[start : start + size], ids5, 1.0, 0.5)
        (losses.total.sum() / len(built)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    return found


def test_accumulating_is_one_big_batch(stock: tuple[Any, Any]) -> None:
    """And so a sample weighs the same whatever it is batched with; to float32 rounding."""
    model, processor = stock
    built, ids5 = samples(stock, LABELS), score_ids(processor)
    big = gradient(model, built, ids5, 3)
    for size in (1, 2):
        parts = gradient(model, built, ids5, size)
        assert parts.keys() == big.keys()
        for name, grad in big.items():
            scale = grad.abs().max().item()
            assert torch.allclose(parts[name], grad, rtol=0, atol=2e-5 * scale + 1e-8), name
    assert any(grad.abs().max() > 1e-3 for grad in big.values())
    assert "model.visual.blocks.0.attn.qkv.weight" in big


def run(recipe: Path, output: Path, *more: str) -> Path:
    assert main([str(recipe), f"output={output}", *more]) == 0
    return output / "judge"


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(folder: Path, rows: Path, **settings: Any) -> np.ndarray:
    given = {"kind": "vlm", "path": str(folder), "dimension": "alignment", "reasonings": 0}
    judge = Vlm(Settings.model_validate(given | settings))
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    found = judge.score_rows([read_image(rows.parent / line["image"]) for line in lines], lines)
    assert (found.status == SCORED).all()
    return found.values


def test_a_run_learns_its_rows(recipe: Path, rows: Path, base: Path, tmp_path: Path) -> None:
    more = ("train={steps: 45, batch: 8, micro_batch: 8, lr: 0.005, warmup: 5}", "loss.text=1.0")
    more += ("tracking.checkpoint_every=0", "validation={reasonings: 1, max_new_tokens: 24}")
    folder = run(recipe, tmp_path, *more)
    lines = metrics(folder)
    first = np.mean([line["loss"] for line in lines[:4]])
    last = np.mean([line["loss"] for line in lines[-4:]])
    assert last < 0.3 * first
    assert lines[-1]["outside"] < 0.1 < 0.5 < lines[0]["outside"]
    judge = folder / "judge"
    labels = np.array([json.loads(line)["score"] for line in rows.read_text().splitlines()])
    train = slice(0, 8)
    before = scores(base, rows, rubric=RUBRIC, reasonings=1, max_new_tokens=24)
    after = scores(judge, rows, reasonings=1, max_new_tokens=24)
    errors = [np.abs(values[train] - labels[train]).mean() for values in (before, after)]
    assert errors[1] < 0.5 < errors[0]
    given = {"kind": "vlm", "path": str(judge), "dimension": "alignment", "max_new_tokens": 24}
    asked = Vlm(Settings.model_validate(given))
    found = asked.score_rows(
        [read_image(rows.parent / "0.png")], [json.loads(rows.open().readline())]
    )
    assert asked.last["closed"] == 0 and found.values[0] > 3.5
    ask = asked._ask(read_image(rows.parent / "0.png"), json.loads(rows.open().readline()))
    ((answer,),) = asked.engine.ask([ask])
    assert answer.text == f"{REASONS[True]}\nScore:", "it writes what it was taught"
    tree = json.loads((judge / "validation.json").read_text())
    assert tree["dimensions"]["alignment"]["n"] == 4
    assert {p.name for p in judge.iterdir()} >= {"validation.md", "validation.png", "judge.json"}


def test_lora_trains_the_adapter_alone_and_comes_back_as_it_was(
    recipe: Path, rows: Path, base: Path, tmp_path: Path
) -> None:
    lora = "model={adapter: lora, lora: {rank: 4, alpha: 8}}"
    cfg = load_settings([str(recipe), f"output={tmp_path}", lora], RewardConfig)
    trainer = RewardTrainer(cfg)
    assert all("lora_" in name for name in trainer.trainable)
    assert any("visual.blocks" in name for name in trainer.trainable)
    for step in (1, 2, 3):
        trainer.update(step)
    built = trainer.loader.submit(trainer._samples, trainer.splits["train"], [True] * 8).result()
    with torch.no_grad():
        inside = batch_losses(trainer.model, built, trainer.ids5, 1.0, 1.0).expected.numpy()
    trainer.export(tmp_path / "out")
    trainer.close()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "judge.json"} <= names
    assert not names & {"model.safetensors", "config.json", "README.md"}
    first, again = scores(tmp_path / "out", rows), scores(tmp_path / "out", rows)
    assert first.tolist() == again.tolist(), "loaded twice: the same to the bit"
    # Loading merges the adapter into the weights, which rounds once, in float32.
    np.testing.assert_allclose(first[:8], inside, rtol=0, atol=1e-4)
    unchanged = scores(base, rows, rubric=RUBRIC)
    assert np.abs(first - unchanged).max() > 0.01
    text_only = load_settings(
        [str(recipe), "model={adapter: lora, vision: false, lora: {rank: 2}}"], RewardConfig
    )
    trainer = RewardTrainer(text_only)
    trainer.close()
    assert not any("visual" in name for name in trainer.trainable)


def test_full_training_leaves_the_vision_tower_alone_unless_asked(recipe: Path, base: Path) -> None:
    cfg = load_settings([str(recipe), "model.vision=false"], RewardConfig)
    trainer = RewardTrainer(cfg)
    trainer.close()
    assert trainer.trainable and not any("visual" in name for name in trainer.trainable)


def test_gradient_checkpointing_changes_no_number(recipe: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    for mode in ("lora", "full"):
        for on in ("false", "true"):
            more = [f"model.adapter={mode}", f"model.gradient_checkpointing={on}"]
            trainer = RewardTrainer(load_settings([str(recipe), *more], RewardConfig))
            calls: list[int] = []
            block = trainer.model.model.language_model.layers[0].self_attn
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            found.append((trainer.update(1), len(calls)))
            trainer.close()
    plain = 2  # forwards of 2 samples make a batch of 4
    for (off, once), (on, twice) in (found[:2], found[2:]):
        assert off == on and (once, twice) == (plain, 2 * plain)


@pytest.mark.slow
def test_bfloat16(recipe: Path, rows: Path, tmp_path: Path) -> None:
    for mode in ("lora", "full"):
        more = (f"model.adapter={mode}", "model.dtype=bfloat16", "train.steps=1", f"run={mode}")
        assert main([str(recipe), f"output={tmp_path}", *more]) == 0
        checkpoint = tmp_path / mode / "checkpoints" / "checkpoint-1"
        weights = load_file(checkpoint / "state.safetensors")
        kinds = {w.dtype for n, w in weights.items() if n.startswith("weights")}
        assert kinds == {torch.float32}, "what is trained"
        judge = tmp_path / mode / "judge"
        half = scores(judge, rows, dtype="bfloat16")
        # bfloat16 has 8 bits: logits of a few units are off by hundredths.
        np.testing.assert_allclose(half, scores(judge, rows), rtol=0, atol=0.15)


START = """
import sys
from qirl_fast.train_reward import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run(recipe: Path, meddle, tmp_path: Path) -> None:
    whole = run(recipe, tmp_path / "whole", "train.steps=5", "validation.every=2")
    argv = [str(recipe), f"output={tmp_path / 'cut'}", "train.steps=5", "validation.every=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    dies = meddle("checkpoint.store._point_latest", 2, "os.kill(os.getpid(), signal.SIGKILL)")
    process = subprocess.run([sys.executable, "-c", dies + START, *argv], env=environment)
    assert process.returncode == -signal.SIGKILL
    place = tmp_path / "cut" / "judge"
    assert (place / "checkpoints" / "checkpoint-2").is_dir() and not (place / "judge").exists()
    assert main([*argv, "resume=auto"]) == 0
    assert (place / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "judge.json", "validation.json"):
        assert (place / "judge" / name).read_bytes() == (whole / "judge" / name).read_bytes(), name
    assert any("heldout/mse" in line for line in metrics(whole))


def test_a_run_goes_on_under_its_own_settings_only(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe, tmp_path, "train.steps=1")
    assert main([str(recipe), f"output={tmp_path}", "train.steps=1"]) == 2
    assert "already holds a run; go on with it by resume=auto" in capsys.readouterr().err
    assert main([str(recipe), f"output={tmp_path}", "resume=auto", "train.lr=0.1"]) == 2
    assert "train.lr: was 0.003, is now 0.1" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_data_only(
    recipe: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data" / "rows.jsonl"
    shutil.copytree(rows.parent, file.parent)
    argv = [str(recipe), f"output={tmp_path}", f"data.file={file}", "train.steps=1"]
    assert main(argv) == 0
    argv.append("resume=auto")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    image = file.parent / "0.png"
    shown = image.read_bytes()

    def write(place: int | None = None, **change: Any) -> None:
        changed = [line | change if i == place else line for i, line in enumerate(lines)]
        file.write_text("".join(json.dumps(line) + "\n" for line in changed))

    def refused(which: str) -> None:
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert f"was made from other {which} rows than those that data.file, {file}" in said
        assert "start anew under run=NAME" in said

    write(0, score=4.5)
    refused("train")
    write(0, rationale="another")
    refused("train")
    write(11, score=1.5)
    refused("heldout")
    lines.reverse()
    write()
    refused("train and heldout")
    lines.reverse()
    write()
    Image.fromarray(picture(64, 64, 0)).save(image)
    refused("train")
    image.write_bytes(shown)
    assert main(argv) == 0


def judged(base: Path, rows: Path, recipe: Path, validation: str) -> tuple[list[Any], list[str]]:
    heldout = [row for row in load_rows(rows, 0.0) if row.split == "heldout"]
    cfg = load_settings([str(recipe), f"validation={{{validation}}}"], RewardConfig)
    return judge_rows(cfg, base, heldout, "cpu")


def test_repeats_are_compared_with_each_other_alone(
    base: Path, rows: Path, recipe: Path, tmp_path: Path
) -> None:
    how = "reasonings: 1, max_new_tokens: 4"
    plain, _ = judged(base, rows, recipe, how)
    found, failed = judged(base, rows, recipe, how + ", repeats: 3, repeat_rows: 2")
    assert not failed and [len(item.repeats) for item in plain] == [0] * 4
    assert [len(item.repeats) for item in found] == [3, 3, 0, 0]
    assert len(set(found[0].repeats)) > 1, "sampled, not one greedy reasoning three times"
    assert [replace(item, repeats=()) for item in found] == plain, "what people are compared with"
    tree = write_validation(found, tmp_path, n_boot=100)
    assert tree["dimensions"]["alignment"]["repeats"]["n"] == 2
    averaged, _ = judged(base, rows, recipe, "reasonings: 3, max_new_tokens: 4")
    assert averaged[0].repeats == found[0].repeats
    assert averaged[0].predicted == pytest.approx(np.mean(found[0].repeats))
    every, _ = judged(base, rows, recipe, "reasonings: 0, max_new_tokens: 4, repeats: 2")
    assert [len(item.repeats) for item in every] == [2] * 4


def test_a_row_whose_repeats_fail_is_kept_without_and_told(
    base: Path, rows: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_row = train_reward.judge_row

    def torn(judge: Any, row: Any) -> Any:
        return ((), "no reading") if judge.how.reasonings == 3 else judge_row(judge, row)

    monkeypatch.setattr(train_reward, "judge_row", torn)
    heldout = [row for row in load_rows(rows, 0.0) if row.split == "heldout"]
    more = "validation={reasonings: 0, repeats: 3, repeat_rows: 1, bootstrap: 100}"
    cfg = load_settings([str(recipe), more], RewardConfig)
    folder = shutil.copytree(base, tmp_path / "judge")
    said = train_reward.validate(cfg, folder, heldout, "cpu")
    assert "0 of 4 rows failed, 1 more in their repeats" in said
    assert f"failed: {rows}:9: its repeats: no reading" in said
    assert json.loads((folder / "validation.json").read_text())["dimensions"]["alignment"]["n"] == 4


def test_a_loss_that_is_not_finite_stops_the_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    cfg = load_settings([str(recipe)], RewardConfig)
    trainer = RewardTrainer(cfg)
    before = {n: p.clone() for n, p in trainer.trainable.items()}
    with torch.no_grad():
        trainer.model.model.language_model.norm.weight.fill_(float("inf"))
    before["model.language_model.norm.weight"].fill_(float("inf"))
    from qirl_fast.reward_trainer import TrainingFailed

    with pytest.raises(TrainingFailed, match=r"step 1: loss.* not finite, so the update was not"):
        trainer.update(1)
    trainer.close()
    assert all(torch.equal(p, before[n]) for n, p in trainer.trainable.items())

    def fail(self: Any, step: int) -> None:
        raise TrainingFailed(f"step {step}: no good")

    monkeypatch.setattr(RewardTrainer, "update", fail)
    assert main([str(recipe), f"output={tmp_path}"]) == 1
    assert "run the same command with resume=auto" in capsys.readouterr().err


def test_samples_come_in_shuffled_epochs() -> None:
    order = [place_of(number, 7, 3) for number in range(21)]
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [place_of(n, 7, 4) for n in range(7)] != epochs[0]


def test_the_learning_rate(recipe: Path) -> None:
    more = "train={steps: 10, warmup: 2, lr: 1.0}"
    rates = {}
    for schedule in ("cosine", "linear", "constant"):
        cfg = load_settings([str(recipe), more, f"train.schedule={schedule}"], RewardConfig)
        trainer = RewardTrainer.__new__(RewardTrainer)
        trainer.cfg = cfg
        rates[schedule] = [trainer.rate(step) for step in range(1, 11)]
    assert rates["constant"] == [0.5, *[1.0] * 9]
    assert rates["linear"] == pytest.approx([0.5, 1, *[1 - i / 8 for i in range(8)]])
    cosine = [0.5 * (1 + np.cos(np.pi * i / 8)) for i in range(8)]
    assert rates["cosine"] == pytest.approx([0.5, 1, *cosine])


def test_direct_samples_leave_their_rationale_out(recipe: Path) -> None:
    share = {}
    for direct in ("0.0", "0.5", "1.0"):
        trainer = RewardTrainer(load_settings([str(recipe), f"loss.direct={direct}"], RewardConfig))
        built = [s for step in range(1, 11) for s in trainer._submit(step).result()]
        trainer.close()
        share[direct] = np.mean([s.place - s.start < 8 for s in built])
    assert all(s.start == s.place for s in built), "the lead is given, not learnt"
    assert share["0.0"] == 0.0 and share["1.0"] == 1.0 and 0.2 < share["0.5"] < 0.8


def test_a_dry_run_reads_everything_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe), f"output={tmp_path / 'x'}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "# epochs      1.50 of 8 rows" in shown
    assert "# heldout     4 rows of 4 prompts: 4 alignment" in shown
    assert f"# alignment: {RUBRIC}" in shown
    assert not (tmp_path / "x").exists()


def test_bad_settings_and_data_are_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(
            [
                str(recipe),
                "train.micro_batch=3",
                "train.warmup=3",
                "model.path=/nowhere",
                "data.file=/nowhere.jsonl",
                "data.tiers.order=[alignment, alignment]",
                "validation={repeats: 1, reasonings: 2}",
            ],
            RewardConfig,
        )
    shown = str(caught.value)
    for words in (
        "train.batch 4 is no multiple of train.micro_batch 3",
        "train.warmup 3 is not below train.steps 3",
        "model.path: '/nowhere' holds no config.json",
        "data.file: no such file: '/nowhere.jsonl'",
        "data.tiers.order names a dimension twice",
        "validation.repeats 1: one reasoning has nothing to agree with; allowed: 0, or 2 and more",
        "several reasonings of a row are compared with each other already; set repeats to 0",
    ):
        assert words in shown, words
    with pytest.raises(ConfigError, match=r"train\.step: unknown key; did you mean train\.steps"):
        load_settings([str(recipe), "train.step=3"], RewardConfig)
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"image": "x.png"}\n')
    assert main([str(recipe), f"output={tmp_path / 'o'}", f"data.file={rows}"]) == 2
    assert f"{rows}:1: dimension is missing" in capsys.readouterr().err
    assert not (tmp_path / "o" / "judge").exists(), "the mended command finds its place free"
    assert (
        main([str(recipe), f"output={tmp_path / 'o'}", "data.heldout_share=1.0", "--dry-run"]) == 0
    )


def test_all_held_out_is_refused(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    folder = write_rows(tmp_path, 4, 4)
    assert main([str(recipe), f"output={tmp_path}", f"data.file={folder}"]) == 2
    assert "all 4 rows of" in capsys.readouterr().err


def test_nothing_held_out_is_said(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    folder = write_rows(tmp_path, 6, 0)
    more = (f"data={{file: {folder}, heldout_share: 0.0}}", "train.steps=1")
    judge = run(recipe, tmp_path, *more) / "judge"
    assert "no held-out rows: validation.json is not written" in capsys.readouterr().out
    assert not (judge / "validation.json").exists()


@pytest.mark.parametrize("name", ["reward_t2i.yaml", "reward_edit.yaml"])
def test_the_recipes_are_valid(name: str, base: Path, rows: Path) -> None:
    cfg = load_settings(
        [str(RECIPES / name), f"model.path={base}", f"data.file={rows}"], RewardConfig
    )
    assert cfg.validation.reasonings == 1 and cfg.validation.repeats >= 2
    assert cfg.model.adapter == "lora" and cfg.model.dtype == "bfloat16"


def test_the_question_of_training_is_that_of_judging() -> None:
    asked = question("instruction", "make it red", "R")
    assert asked == "R\nInstruction: make it red"
    assert question("portrait", "a face", "R") == "R\nPrompt: a face"
