"""LoRA files: what PEFT and stock diffusers load acts exactly as the adapter that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qirl_fast.checkpoint import lora_state, save_checkpoint

pytest.importorskip("diffusers", minversion="0.42")

from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from peft import LoraConfig, PeftModel

TARGETS = ["attn.to_q", "attn.to_v", "attn.to_out.0", "img_mlp.proj", "img_mlp.out"]
# alpha != rank in all: a loader that loses alpha takes alpha = rank and gives another velocity
CONFIGS: dict[str, dict[str, Any]] = {
    "alpha above rank": {"r": 4, "lora_alpha": 10},
    "alpha below rank": {"r": 8, "lora_alpha": 2},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "ranks by layer": {"r": 4, "lora_alpha": 6, "rank_pattern": {"attn.to_q": 2}},
}


def make_transformer() -> Any:
    torch.manual_seed(0)
    model: Any = QwenImage21Transformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=16,
        out_channels=16,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return model.eval()


def with_lora(**settings: Any) -> Any:
    """Return the transformer with an adapter whose matrices are all random, as after training."""
    model = make_transformer()
    model.add_adapter(LoraConfig(target_modules=TARGETS, **settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def velocity(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    slots, text = 1, 3  # one slot of the language model stands for four latent tokens
    out = model(
        hidden_states=torch.randn(1, 4 * slots, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, text, 32, generator=generator),
        encoder_hidden_states_mask=torch.ones(1, text, dtype=torch.bool),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 2, 2)]],
        img_mask=torch.tensor([[False] * text + [True] * slots]),
        return_dict=False,
    )
    return out[0]


def load_stock(transformer: torch.nn.Module, folder: Path) -> None:
    """What `pipeline.load_lora_weights(folder)` does, for a transformer without its pipeline."""
    weights, metadata = QwenImage21Pipeline.lora_state_dict(folder, return_lora_metadata=True)
    QwenImage21Pipeline.load_lora_into_transformer(weights, transformer, metadata=metadata)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_formats_reproduce_the_velocity_bit_for_bit(tmp_path: Path, name: str) -> None:
    trained = with_lora(**CONFIGS[name])
    path = save_checkpoint(tmp_path, 1, {}, {}, lora_state(trained), keep=1)
    expected, base = velocity(trained), velocity(make_transformer())
    assert (expected - base).abs().max() > 1e-3, "the adapter must matter"

    stock = make_transformer()
    load_stock(stock, path)
    assert torch.equal(velocity(stock), expected)

    peft = PeftModel.from_pretrained(make_transformer(), path / "lora")
    assert torch.equal(velocity(peft), expected)


def test_same_tensors_and_settings_as_the_stock_writer(tmp_path: Path) -> None:
    trained = with_lora(**CONFIGS["alpha above rank"])
    weights, config = lora_state(trained)
    path = save_checkpoint(tmp_path, 1, {}, {}, (weights, config), keep=1)
    QwenImage21Pipeline.save_lora_weights(
        tmp_path / "stock",
        transformer_lora_layers=weights,
        transformer_lora_adapter_metadata=trained.peft_config["default"].to_dict(),
    )
    name = "pytorch_lora_weights.safetensors"
    ours, stock = load_file(path / name), load_file(tmp_path / "stock" / name)
    assert ours.keys() == stock.keys() and len(ours) == 2 * 2 * len(TARGETS)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    headers = []
    for file in (path / name, tmp_path / "stock" / name):
        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()["lora_adapter_metadata"])
        plain = {key.removeprefix("transformer."): value for key, value in header.items()}
        plain["target_modules"] = sorted(plain["target_modules"])
        headers.append(LoraConfig(**plain).to_dict())
    assert headers[0] == headers[1]


def test_files_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Target modules are a set in PEFT: unsorted, their order would follow the hash seed."""
    _, config = lora_state(with_lora(r=2, lora_alpha=3))
    assert config["target_modules"] == sorted(TARGETS)
    assert config["r"] == 2 and config["lora_alpha"] == 3
    json.dumps(config, allow_nan=False)


def test_missing_adapter_is_named() -> None:
    with pytest.raises(ValueError, match=r"no LoRA adapter 'default' .* it has: none"):
        lora_state(make_transformer())
    with pytest.raises(ValueError, match=r"no LoRA adapter 'b' .* it has: default"):
        lora_state(with_lora(r=2), "b")
