"""python -m bench step: its rows compute the same step, and the file says what it must."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import qirl_fast
from bench import block, models, step
from bench.baselines import stock
from qirl_fast.rollout.guidance import Guidance

ROWS = ["stock", "+ fused step", "+ fused blocks", "+ shared prefix", "+ dual forward"]
ROWS += ["+ kept modulation", "+ batched replay", "all"]


@pytest.fixture(scope="module")
def small() -> step.Options:
    return step.Options(px=64, steps=4, window=2, group=3, text_tokens=12)


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of one head; no gigabyte copy, no large product."""
    small = {"cpu": models.Scale(2, 1)}
    monkeypatch.setattr(step, "MODELS", dict.fromkeys(models.MODELS, small))
    monkeypatch.setattr(step, "copy_gbps", lambda device: 10.0)
    monkeypatch.setattr(step, "gemm_flops", lambda device: 1e11)


@pytest.mark.parametrize("model", list(models.MODELS))
def test_a_result_has_every_row_and_can_be_read(small: step.Options, tmp_path, model: str) -> None:
    small = dataclasses.replace(small, model=model)
    rows = [*ROWS[:3], "+ no padding" if model == "qwen-image" else ROWS[3], *ROWS[4:]]
    small.out = tmp_path / "step.json"
    result = step.run(small, say=lambda text: None)
    assert json.loads(small.out.read_text()) == result
    assert {"machine", "versions", "commit", "date", "copy_gbps", "rows"} <= set(result)
    assert [row["name"] for row in result["rows"]] == rows
    for row in result["rows"]:
        assert set(row["phases_s"]) == set(step.PHASES)
        assert all(seconds > 0 for seconds in row["phases_s"].values())
        assert row["images_per_s"] == pytest.approx(3 / sum(row["phases_s"].values()))
        assert row["peak_bytes"] >= 0 and 0 < row["mfu"] < 1
    assert result["rows"][0]["speedup_vs_stock"] == 1
    assert all(name in step.markdown(result) for name in rows)
    step.plot(result, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 1000


def loop(kind: type[stock.Loop], bench: step.Bench) -> stock.Loop:
    return kind(
        transformer=bench.model.transformer,
        text=bench.text,
        null=bench.null,
        grid=bench.grid,
        group=3,
        sigmas=bench.sigmas,
        window=range(2),
        scale=4.0,
        eta=0.7,
        condition=bench.condition,
    )


@pytest.mark.parametrize(
    ("model", "condition_px"),
    [("qwen-image-2.1", 0), ("qwen-image-2.1", 64), ("qwen-image", 0)],
    ids=["text", "editing", "qwen-image"],
)
def test_rows_compute_the_same_step(small: step.Options, model: str, condition_px: int) -> None:
    """Velocity with guidance, log-probability, loss and gradient; float32, some sums reordered."""
    bench = step.Bench(dataclasses.replace(small, model=model, condition_px=condition_px))
    qirl_fast.unpatch(bench.model.transformer)
    plain = loop(stock.Loop, bench)
    plain.rollout()
    advantage = torch.tensor([1.0, -0.5, 0.2])
    found = []
    for kind, fused in ((stock.Loop, False), (step.FusedStep, False), (step.FusedStep, True)):
        (qirl_fast.patch if fused else qirl_fast.unpatch)(bench.model.transformer)
        one = loop(kind, bench)
        one.recorded = plain.recorded
        loss = one.loss(plain.recorded[1], advantage)
        found.append((loss, *torch.autograd.grad(loss, bench.trainable, materialize_grads=True)))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()
    unused = sum(not g.any() for g in found[0][1:])  # the text's in Qwen-Image's last block
    assert unused <= (8 if model == "qwen-image" else 0)

    recorded = plain.recorded[1]
    sigma = torch.full((3,), recorded.sigma)
    with torch.no_grad():
        v_cond, v_uncond = (
            bench.model.velocity(recorded.x, sigma, bench.model.prefix([prompt], [0] * 3, 64, 64))
            for prompt in (bench.conditioned(bench.text), bench.conditioned(bench.null))
        )
        ours = Guidance(4.0, bench.model.norm_rescaled_guidance, "full").combine(v_cond, v_uncond)
        qirl_fast.unpatch(bench.model.transformer)
        theirs = plain.velocity(recorded.x, recorded.sigma)
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_joined_branches_run_one_by_one_too(small: step.Options) -> None:
    """Plain, whose rows come before the gains, gives the numbers of the adapter."""
    bench = step.Bench(small)
    x = torch.randn(6, bench.tokens, 16)
    prefixes = [bench.model.prefix([text], [0] * 3, 64, 64) for text in (bench.text, bench.null)]
    with torch.no_grad():
        found = [
            model.velocity(x, sigma, model.join(*prefixes))
            for model in (
                bench.model,
                step.Plain(bench.model, True),
                step.Plain(bench.model, False),
            )
            for sigma in ((0.7,), (0.7, 0.2))
        ]
    for k, v in enumerate(found[2:]):
        assert (v - found[k % 2]).abs().max() <= 2e-5 * v.abs().max()


def test_a_block_is_timed_against_stock(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "copy_gbps", lambda device: 10.0)
    out = tmp_path / "block.json"
    options = block.Options(px=64, heads=1, rounds=1, seconds=0.01, out=out)
    result = block.run(options, say=lambda text: None)
    assert json.loads(out.read_text()) == result
    names = [f"{model} {kind}" for model in block.MODELS for kind in ("stock", "fused")]
    assert {(r["name"], r["mode"]) for r in result["rows"]} == {
        (name, mode) for name in names for mode in block.MODES
    }
    assert all(r["saved_bytes_per_token"] > 0 and r["ms_p50"] > 0 for r in result["rows"])
