"""The editing stage of the tiny model's pre-training: laid out as the stock pipeline does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qirl_fast.models import load_model
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.tiny import edits, pretrain, pretrain_edits
from qirl_fast.tiny.pretrain_edits import Pool, Recipe, encode

FEW = Recipe(steps=6, wrong_steps=2, pool=32, drawing=pretrain.Recipe(dit_scenes=256))


@pytest.fixture
def model(weights: Path) -> QwenImage21:
    loaded = load_model(weights, "qwenimage21", torch.float32, "cpu")
    assert isinstance(loaded, QwenImage21)
    return loaded


@pytest.fixture
def pool(model: QwenImage21) -> Pool:
    return Pool(model, FEW, 0.0, lambda *_: None)


def test_a_batch_is_encoded_as_the_stock_pipeline_encodes_each(
    model: QwenImage21, pool: Pool
) -> None:
    """Pictures of their own, instructions of one token count, and the blank one."""
    longest = max(pool.same_count.values(), key=len)[:3]
    for texts in ([pool.instructions[i] for i in longest], [" "] * len(longest)):
        images = [pool.pictures[i] for i in longest]
        with torch.no_grad():
            found, slots = encode(model, texts, np.stack(images))
            for row, (text, image) in enumerate(zip(texts, images, strict=True)):
                stock, mask, stock_slots = model.pipeline.encode_prompt(
                    text, image=[Image.fromarray(image)], device=model.device
                )
                assert mask is None and torch.equal(slots[row], stock_slots[0])
                # float32 sums in another order, of a batch and of one; of some 60 products
                assert (found[row] - stock[0]).abs().max() < 1e-5 * stock.abs().max()
        assert slots.sum(1).tolist() == [4] * len(texts)
    assert not torch.equal(found[0], found[1]), "the text encoder sees the picture"


def test_the_hook_does_not_stay(model: QwenImage21, pool: Pool) -> None:
    norm = model.pipeline.text_encoder.model.language_model.norm
    with pytest.raises(ValueError):
        encode(model, ["a", "b"], np.stack(pool.pictures[:1]))
    encode(model, ["a"], np.stack(pool.pictures[:1]))
    assert not norm._forward_hooks


def test_no_row_that_is_measured_is_trained_on(model: QwenImage21, monkeypatch) -> None:
    drawn = [edits.random_edit("add", np.random.default_rng(i)) for i in range(5)]
    sequence = iter([*drawn, *(edits.random_edit("add", np.random.default_rng(9)),) * 9])
    monkeypatch.setattr(edits, "random_edit", lambda *_: next(sequence))
    monkeypatch.setattr(edits, "asked_keys", lambda: {drawn[1].key, drawn[3].key})
    pool = Pool(model, replace(FEW, pool=4), 0.0, lambda *_: None)
    texts = set(drawn[1].wordings() + drawn[3].wordings())
    assert len(pool.instructions) == 4 and not texts & set(pool.instructions)


def test_training_moves_all_that_edits_go_through(model: QwenImage21) -> None:
    """And leaves the autoencoder; phases are reported to their end."""
    said: dict[str, tuple[int, int]] = {}
    before = {n: p.clone() for n, p in model.pipeline.text_encoder.model.named_parameters()}
    vae = [p.clone() for p in model.vae.parameters()]
    torch.manual_seed(0)
    pretrain_edits.train(model, FEW, lambda phase, n, of, _: said.update({phase: (n, of)}))
    assert all(n == of for n, of in said.values()) and said["editing"] == (6, 6)
    moved = {
        part: any(
            not torch.equal(p, before[n])
            for n, p in model.pipeline.text_encoder.model.named_parameters()
            if n.startswith(part)
        )
        for part in ("visual", "language_model")
    }
    assert all(moved.values()), moved
    assert all(torch.equal(a, b) for a, b in zip(vae, model.vae.parameters(), strict=True))
    assert not any(p.requires_grad for p in model.transformer.parameters())
