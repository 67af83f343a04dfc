"""The attention setting: what was asked for is what runs, or an error says why not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from torch import Tensor
from torch.nn import functional as F

from qirl_fast.config import ConfigError, load_config
from qirl_fast.models.fused import attention
from qirl_fast.models.fused.attention import BACKENDS, use_attention

SIZE = 64


def velocity(model, text) -> torch.Tensor:
    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.velocity(x, [0.7], model.prefix(text, [0, 0, 1, 1], SIZE, SIZE))


def test_sdpa_is_what_auto_runs(make_model, prompts, caplog) -> None:
    model = make_model()
    text = model.encode(prompts[:2])
    before = velocity(model, text)
    with caplog.at_level(logging.INFO, logger="qirl_fast"):
        use_attention(model.transformer, "auto")
        assert torch.equal(velocity(model, text), before)
        use_attention(model.transformer, "sdpa")
    assert torch.equal(velocity(model, text), before)
    ours = [r.message for r in caplog.records if r.name.startswith("qirl_fast")]
    assert ours == ["attention: auto, diffusers' default: native", "attention: sdpa"]


def test_the_choice_reaches_the_blocks_and_masks_stay_with_sdpa(
    make_model, prompts, monkeypatch
) -> None:
    """flex serves a forward on a CPU: the target's calls go there, a prompt's masked ones not."""
    model = make_model()
    text = model.encode(prompts[:2])
    before = velocity(model, text)
    monkeypatch.setattr(attention, "GPU_ONLY", ())
    use_attention(model.transformer, "flex")
    calls: list[tuple[str, bool]] = []
    dispatch = attention.dispatch_attention_fn

    def record(q, k, v, **settings):
        backend = settings["backend"]
        calls.append((backend and backend.value, settings["attn_mask"] is not None))
        return dispatch(q, k, v, **settings)

    monkeypatch.setattr(attention, "dispatch_attention_fn", record)
    after = velocity(model, text)
    assert set(calls) == {("native", True), ("flex", False)}
    other = make_model()
    calls.clear()
    assert torch.equal(velocity(other, text), before), "another model keeps its own"
    assert not torch.equal(after, before), "another library sums in another order"
    assert (after - before).abs().max() <= 3e-6 * before.abs().max()


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "sdpa"])
def test_a_gpu_library_is_refused_on_a_cpu(make_model, name: str) -> None:
    transformer = make_model().transformer
    with pytest.raises(
        ValueError, match=f"attention '{name}' runs on CUDA and the model is on cpu"
    ):
        use_attention(transformer, name)
    processors = [block.attn.processor for block in transformer.transformer_blocks]
    assert all(p._attention_backend is None for p in processors), "nothing was changed"


@pytest.mark.parametrize(("name", "package"), [("flash", "flash-attn"), ("xformers", "xformers")])
def test_a_library_that_is_not_installed_is_named(
    make_model, monkeypatch, name: str, package: str
) -> None:
    monkeypatch.setattr(attention, "GPU_ONLY", ())
    with pytest.raises(ValueError, match=rf"attention '{name}' was asked for: .*{package}"):
        use_attention(make_model(torch.bfloat16).transformer, name)


def test_float32_and_unknown_names_are_refused(make_model, monkeypatch) -> None:
    monkeypatch.setattr(attention, "GPU_ONLY", ())
    with pytest.raises(ValueError, match=r"'flash' serves no float32; set model\.dtype=bfloat16"):
        use_attention(make_model().transformer, "flash")
    with pytest.raises(ValueError, match="attention 'falsh': use auto, sdpa, cudnn, flash, flash3"):
        use_attention(make_model().transformer, "falsh")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Flash:
    """Stands in for a release of flash-attn: what it was told, and the numbers of sdpa."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: int):
        self.version, self.told = version, []
        name, installed = {
            2: ("flash_attn", "_CAN_USE_FLASH_ATTN"),
            3: ("flash_attn_interface", "_CAN_USE_FLASH_ATTN_3"),
        }[version]
        module = ModuleType(name)
        module.flash_attn_func = self  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(attention_dispatch, installed, True)
        monkeypatch.setattr(attention, "GPU_ONLY", ())

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool) -> Any:
        self.told.append(deterministic)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads).transpose(1, 2)
        return out if self.version == 2 else (out, out[..., 0])


@pytest.mark.parametrize(("name", "version"), [("flash", 2), ("flash3", 3)])
def test_flash_attn_is_told_whether_to_be_deterministic(
    make_model, prompts, monkeypatch, name: str, version: int
) -> None:
    """In both directions: the gradient's order is chosen in the forward's call."""
    model, flash = make_model(torch.bfloat16), Flash(monkeypatch, version)
    text = model.encode(prompts[:2])
    before = velocity(model, text)
    use_attention(model.transformer, name)
    trained = model.trainable("lora", 4, 8, None, 0)
    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    for wanted in (False, True, False):
        flash.told.clear()
        torch.use_deterministic_algorithms(wanted)
        try:
            v = model.velocity(x, [0.7], model.prefix(text, [0, 0, 1, 1], SIZE, SIZE))
            gradients = torch.autograd.grad(v.float().sum(), list(trained.values()))
        finally:
            torch.use_deterministic_algorithms(False)
        # Once in each of four blocks; a prompt's masked calls are sdpa's.
        assert flash.told == [wanted] * 4
        assert torch.equal(v, before) and any(g.any() for g in gradients)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["cudnn", "xformers"])
def test_a_library_without_an_order_is_refused(make_model, monkeypatch, name: str) -> None:
    monkeypatch.setattr(attention, "GPU_ONLY", ())
    model = make_model(torch.bfloat16)
    words = f"attention '{name}': its backward pass adds up in any order.*use sdpa, flash, flash3"
    with pytest.raises(ValueError, match=words):
        use_attention(model.transformer, name)
    use_attention(model.transformer, "auto")
    monkeypatch.setattr(
        attention_dispatch._AttentionBackendRegistry,
        "_active_backend",
        attention_dispatch.AttentionBackendName.SAGE,
    )
    with pytest.raises(ValueError, match=r"attention auto \(diffusers' default, sage\): its back"):
        use_attention(model.transformer, "auto")


def test_a_recipe_may_not_ask_for_both() -> None:
    for name in ("sdpa", "flash", "flash3", "flex"):
        load_config(["deterministic=true", f"model.attention={name}"])
    for name in ("cudnn", "xformers"):
        with pytest.raises(ConfigError, match=f"model.attention={name} adds up in any order"):
            load_config(["deterministic=true", f"model.attention={name}"])
