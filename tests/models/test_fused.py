"""Fused blocks against the stock diffusers models they stand in.

Tolerances. float32: 1e-5 of the largest value, output and every gradient, against the stock model
in float32; sums in another order over at most some hundred terms give a tenth of that. bfloat16:
both are compared with the stock model in float32 on the same (bfloat16) weights and inputs, and the
fused error, as the root of the mean square, may be twice stock's.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21FlexAttnProcessor,
    QwenImage21KVCache,
)
from peft import LoraConfig
from small_transformers import draw, inputs, inputs21, qwen, qwen21, randomised
from torch import Tensor, nn

import qirl_fast
from qirl_fast.models.fused import is_patched

CLOSE = 1e-5
LORA = ["to_q", "to_k", "to_v", "to_out.0"]


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "qwenimage21": (qwen21, inputs21),
    "qwenimage21-condition": (qwen21, lambda: inputs21(condition=True)),
    "qwenimage21-padded": (qwen21, lambda: inputs21(condition=True, padded=True)),
    "qwenimage21-one-row": (lambda: qwen21(causal_condition=False), inputs21),
    "qwenimage": (qwen, inputs),
    "qwenimage-padded": (qwen, lambda: inputs(padded=True)),
    "qwenimage-edit": (qwen, lambda: inputs(condition=True)),
    "qwenimage-zero-cond": (lambda: qwen(zero_cond_t=True), lambda: inputs(condition=True)),
}


def lora(model: Any) -> Any:
    """The model with two trained adapters, both active, and its own weights frozen."""
    model.requires_grad_(False)
    for name, rank in (("one", 4), ("two", 2)):
        model.add_adapter(LoraConfig(r=rank, lora_alpha=8, target_modules=LORA), name)
    model.set_adapter(["one", "two"])
    return randomised(model)


def run(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Output and the gradient of everything that requires one, latents and text included."""
    dtype = model.dtype
    leaves = {}
    for name in ("hidden_states", "encoder_hidden_states"):
        leaves[name] = given[name].to(dtype).requires_grad_()
    out = model(**(given | leaves), return_dict=False)[0]
    weight = draw(*out.shape, seed=3).to(dtype)
    wanted = leaves | {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((out * weight).sum(), list(wanted.values()), allow_unused=True)
    found = zip(wanted, gradients, strict=True)
    return {"out": out.detach()} | {n: g for n, g in found if g is not None}


def assert_close(ours: dict[str, Tensor], stock: dict[str, Tensor], tolerance: float) -> None:
    assert set(ours) == set(stock)
    largest = {n: t.abs().max().item() for n, t in stock.items()}
    errors = {n: (ours[n] - t).abs().max().item() for n, t in stock.items()}
    # The last block's text is used by nothing: the gradients of its queries are zero, in both.
    assert {n: e for n, e in errors.items() if not e <= tolerance * largest[n]} == {}


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", list(CASES))
def test_float32_is_the_stock_model(case: str, adapted: bool) -> None:
    make, given = CASES[case][0], CASES[case][1]()
    model = lora(make()) if adapted else make()
    stock = run(model, given)
    keys = list(model.state_dict())
    assert qirl_fast.patch(model) is model and is_patched(model)
    assert list(model.state_dict()) == keys
    fused = run(model, given)
    assert not torch.equal(fused["out"], stock["out"]), "the fused blocks did not run"
    assert_close(fused, stock, CLOSE)
    qirl_fast.unpatch(model)
    assert not is_patched(model)
    assert torch.equal(run(model, given)["out"], stock["out"])


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", list(CASES))
def test_bfloat16_errs_no_more_than_twice_stock(case: str, adapted: bool) -> None:
    make, given = CASES[case][0], CASES[case][1]()
    rounded = lora(make()) if adapted else make()
    rounded = rounded.to(torch.bfloat16)
    given = {
        n: v.bfloat16().float() if n.endswith("hidden_states") else v for n, v in given.items()
    }
    truth = run(copy.deepcopy(rounded).float(), given)
    stock = run(rounded, given)
    fused = run(qirl_fast.patch(rounded), given)
    assert fused["out"].dtype == torch.bfloat16

    def error(found: dict[str, Tensor], name: str) -> float:
        return (found[name].float() - truth[name]).square().mean().sqrt().item()

    assert set(fused) == set(truth)
    floor = {n: 2**-9 * t.square().mean().sqrt().item() for n, t in truth.items()}
    bad = {
        n: (error(fused, n), error(stock, n))
        for n in truth
        if not error(fused, n) <= 2 * max(error(stock, n), floor[n])
    }
    assert bad == {}


@pytest.mark.parametrize("condition", [False, True])
def test_the_stock_cache_of_prefix_keys_and_values(condition: bool) -> None:
    """extract, then cached: the stock pipeline's own loop."""
    model, given = qwen21(), inputs21(condition=condition)
    results = []
    for patched in (False, True):
        if patched:
            qirl_fast.patch(model)
        cache = QwenImage21KVCache(2)
        with torch.no_grad():
            for mode in ("extract", "cached"):
                out = model(**given, kv_cache=cache, kv_cache_mode=mode, return_dict=False)[0]
                results.append(out[:, -16:])
    assert_close({"0": results[2], "1": results[3]}, {"0": results[0], "1": results[1]}, CLOSE)


@pytest.mark.parametrize("case", ["qwenimage21-condition", "qwenimage-zero-cond"])
def test_gradient_checkpointing_changes_no_bit(case: str) -> None:
    make, given = CASES[case][0], CASES[case][1]()
    model = qirl_fast.patch(lora(make()))
    plain = run(model, given)
    model.enable_gradient_checkpointing()
    model.train()
    checkpointed = run(model, given)
    assert set(plain) == set(checkpointed)
    assert [n for n in plain if not torch.equal(plain[n], checkpointed[n])] == []


@pytest.mark.parametrize("case", ["qwenimage21-condition", "qwenimage-zero-cond"])
def test_compiled_blocks_have_no_graph_break(case: str) -> None:
    make, given = CASES[case][0], CASES[case][1]()
    model = qirl_fast.patch(lora(make()))
    plain = run(model, given)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert_close(run(model, given), plain, CLOSE)


def test_adapters_are_switched_between_calls() -> None:
    """Teacher and student on one base: the fused path follows what PEFT has active."""
    model, given = qirl_fast.patch(lora(qwen21())), inputs21()
    outputs = {}
    for active in (["one", "two"], ["one"], ["two"]):
        model.set_adapter(active)
        outputs[tuple(active)] = run(model, given)["out"]
    model.disable_adapters()
    with torch.no_grad():
        outputs[()] = model(**given, return_dict=False)[0]
    qirl_fast.unpatch(model)
    for active, ours in outputs.items():
        model.enable_adapters() if active else model.disable_adapters()
        if active:
            model.set_adapter(list(active))
        with torch.no_grad():
            stock = model(**given, return_dict=False)[0]
        assert_close({"out": ours}, {"out": stock}, CLOSE)
    assert len({o.sum().item() for o in outputs.values()}) == 4


@pytest.mark.parametrize("size", [1, 2])
def test_fsdp2_shards_fused_blocks(tmp_path, size: int) -> None:
    """What is compared: see fsdp_cases.py."""
    script = Path(__file__).with_name("fsdp_cases.py")
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(size), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * size, said[0]


def with_dropout() -> nn.Module:
    model = qwen()
    model.transformer_blocks[1].img_mlp.net[1].p = 0.1
    return model


def with_flex() -> nn.Module:
    model = qwen21()
    model.transformer_blocks[0].attn.set_processor(QwenImage21FlexAttnProcessor())
    return model


def with_mixed_dtypes() -> nn.Module:
    model = qwen21()
    model.transformer_blocks[1].img_mlp.bfloat16()
    return model


def with_odd_heads(make: Callable[[], Any]) -> nn.Module:
    model = make()
    model.transformer_blocks[1].attn.heads = 16  # of 48 channels
    return model


REFUSED = {
    "odd heads": (lambda: with_odd_heads(qwen), r"block 1 has heads of 3 channels"),
    "odd heads 2.1": (lambda: with_odd_heads(qwen21), r"block 1 has heads of 3 channels"),
    "dropout": (with_dropout, r"block 1 has dropout 0\.1"),
    "processor": (with_flex, r"block 0 has the attention processor QwenImage21FlexAttnProcessor"),
    "mixed": (with_mixed_dtypes, r"its blocks mix torch\.bfloat16, torch\.float32; cast them"),
    "half": (lambda: qwen21().half(), r"its blocks are torch\.float16; cast them to float32"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_fused_is_refused_whole(what: str) -> None:
    make, words = REFUSED[what]
    model = make()
    with pytest.raises(ValueError, match=f"cannot be fused: .*{words}"):
        qirl_fast.patch(model)
    assert not any("forward" in vars(block) for block in model.transformer_blocks)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), PixArtTransformer2DModel])
def test_other_classes_are_refused_by_name(model: Any) -> None:
    if isinstance(model, type):
        model = model(num_layers=1, num_attention_heads=1, attention_head_dim=8, sample_size=8)
    words = rf"got {type(model).__name__}; fused blocks exist for QwenImage21Transformer2DModel, "
    with pytest.raises(TypeError, match=words):
        qirl_fast.patch(model)
