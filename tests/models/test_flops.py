"""Model FLOPs against those that PyTorch counts as the blocks run, operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from small_families import PIPELINES
from small_transformers import draw, edit_folder, qwen_parts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qirl_fast.models import load_model
from qirl_fast.models.prefix import Conditioned

FAMILIES = ("qwenimage21", "qwenimage", "edit", *PIPELINES)
SIZE, TOKENS = 64, 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Any:
    root = tmp_path_factory.mktemp("flops")

    def folder(name: str) -> Path:
        path = root / name
        if name == "qwenimage21":
            return weights
        if not path.exists() and name == "edit":
            return edit_folder(name, weights, path)
        if not path.exists():
            made = QwenImagePipeline(**qwen_parts(weights)) if name == "qwenimage" else None
            (made or PIPELINES[name](weights)).save_pretrained(path)
        return path

    return folder


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """FLOPs of what runs inside; of attention as the matrix products it is made of."""
    found: list[int] = []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield found
    found.append(counter.get_total_flops())


def prompts(model: Any) -> tuple[list[Any], list[int]]:
    """Two prompts, where the family allows of two lengths, and the owners of three rows."""
    config = model.transformer.config
    width = config.get("cap_feat_dim") or config.get("joint_attention_dim")
    width = width or config.context_in_dim
    lengths = (7, 7) if model.family in ("sd3", "flux", "flux2", "flux2_klein") else (7, 40)
    texts: list[Any] = [draw(n, width, seed=i) for i, n in enumerate(lengths)]
    if model.family == "qwenimage_edit":
        shown = draw(8, model.latent_channels(config), seed=5)
        texts = [
            Conditioned(t, torch.zeros(len(t), dtype=torch.bool), shown, ((2, 4),)) for t in texts
        ]
    return texts, [0, 0, 1]


def outside(model: Any, rows: int) -> int:
    """What the count leaves out: the products of embedding and output, of each row's modulation."""
    t, total = model.transformer, 0
    blocks = {id(m) for block in model.blocks for m in block.modules()}
    for name, m in t.named_modules():
        if not isinstance(m, torch.nn.Linear | torch.nn.Conv2d):
            continue
        if id(m) in blocks and ("norm" in name or "adaLN" in name):  # of the noise level, by row
            total += rows * m.weight.numel()
        elif name in ("img_in", "x_embedder", "proj_out", "pos_embed.proj") or "all_x_" in name:
            total += rows * TOKENS * m.weight.numel()
        elif "all_final_layer" in name:
            total += rows * m.weight.numel() * (1 if "adaLN" in name else TOKENS)
        elif name == "norm_out.linear" and model.family in ("sd3", "flux"):
            total += rows * m.weight.numel()
    return 2 * total


def unseen(model: Any, prefix: Any) -> int:
    """What is counted and not run: of the last block's text, and its condition images, which
    nothing looks at once their keys and values are there.
    """
    if not model.family.startswith("qwenimage") or model.family == "qwenimage21":
        return 0
    size = {n: p.numel() for n, p in model.blocks[-1].named_parameters()}
    total = 0
    for rows, beside, text in prefix.lengths:
        of_text = ("attn.to_add_out.weight", "txt_mlp.net.")
        of_image = ("attn.to_out.0.weight", "img_mlp.net.")
        for names, tokens in ((of_text, text), (of_image, beside)):
            own = sum(
                n for name, n in size.items() if name.startswith(names) and "bias" not in name
            )
            total += rows * tokens * 2 * own
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_a_velocity(folders, name: str) -> None:
    model = load_model(folders(name), "auto", torch.float32, "cpu")
    rows, (texts, owner) = 3, prompts(model)
    x = draw(rows, TOKENS, model.latent_shape(SIZE, SIZE)[1] if name != "qwenimage21" else 16)
    with torch.no_grad():
        prefix = model.prefix(texts, owner, SIZE, SIZE)
        model.velocity(x, [0.5], prefix)  # what depends on the level alone is kept
        before = model.work.done
        with counted(model) as found:
            model.velocity(x, [0.5], prefix)
    ours = model.work.done - before
    assert ours == found[0] - outside(model, rows) + unseen(model, prefix)


def test_a_prefix_and_the_gradient_of_all_weights(folders) -> None:
    """To 3 %, which embeddings and modulation take of so small a model; the gradient to 5 %, as
    the last block's prefix has one through its keys and values alone.
    """
    model = load_model(folders("qwenimage21"), "auto", torch.float32, "cpu")
    model.trainable("full", 0, 0, None, 0)
    texts, owner = prompts(model)
    x = draw(3, TOKENS, 16)

    def loss() -> torch.Tensor:
        return model.velocity(x, [0.5], model.prefix(texts, owner, SIZE, SIZE)).sum()

    with torch.no_grad(), counted(model) as forward:
        loss()
    once = model.work.done
    with counted(model) as both:
        loss().backward()
    assert forward[0] == pytest.approx(once, rel=0.03)
    assert model.work.done - once == 3 * once
    assert both[0] == pytest.approx(3 * once, rel=0.05)


def test_a_lora_adds_its_own_and_spares_the_gradient_of_the_base(folders) -> None:
    model = load_model(folders("qwenimage21"), "auto", torch.float32, "cpu")
    with torch.no_grad():
        model.count(1, TOKENS, 7)
    plain = model.work.done
    base = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    lora = sum(p.numel() for p in model.trainable("lora", 4, 8, None, 0).values())
    model.count(1, TOKENS, 7)
    attention = plain - 2 * TOKENS * base
    wanted = 2 * TOKENS * (2 * base + 3 * lora) + 3 * attention
    assert model.work.done - plain == wanted
    model.count(1, TOKENS, 7)
    assert model.work.done - plain == 2 * wanted
