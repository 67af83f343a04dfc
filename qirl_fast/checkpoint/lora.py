"""Write a LoRA so that both PEFT and diffusers load it.

`lora/adapter_model.safetensors` + `adapter_config.json` is what `PeftModel.from_pretrained` reads
(keys `base_model.model.<module>.lora_A.weight`). `pytorch_lora_weights.safetensors` is what
`pipeline.load_lora_weights` reads: keys `transformer.<module>.lora_A.weight`, and the LoraConfig as
JSON in the header, without which diffusers takes alpha = rank, another strength.

The header holds only the settings that are not PEFT's defaults: diffusers passes all of them to
`LoraConfig(...)`, and a PEFT that does not know one of them, default or not, refuses the file.
It is the only entry: safetensors orders several at random, and equal weights are to give equal
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qirl_fast.tensors import save_file

ALWAYS = ("r", "lora_alpha", "target_modules")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

Lora = tuple[Mapping[str, Tensor], Mapping[str, Any]]


def lora_state(
    transformer: nn.Module, adapter_name: str = "default"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (weights, config) of one adapter of a transformer after `add_adapter(LoraConfig)`.

    weights: PEFT's names without any prefix, on the CPU. config: LoraConfig as plain JSON; the
    target modules are the ones that carry the adapter, sorted.
    Raises ValueError if the transformer has no adapter of that name.
    """
    from peft import get_peft_model_state_dict

    configs = getattr(transformer, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"no LoRA adapter {adapter_name!r} in {type(transformer).__name__}; it has: "
            f"{', '.join(configs) or 'none'}"
        )
    weights = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in get_peft_model_state_dict(
            transformer, adapter_name=adapter_name
        ).items()
    }
    return weights, _plain(configs[adapter_name].to_dict())


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config as JSON types: sets sorted, enumerations by value."""
    values = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in config.items()}
    plain = json.loads(
        json.dumps(values, default=lambda value: getattr(value, "value", str(value)))
    )
    return dict(plain)


def _header(config: Mapping[str, Any]) -> str:
    """Return the config for diffusers' file: what is not PEFT's default, under `transformer.`."""
    from peft import LoraConfig

    defaults = _plain(LoraConfig().to_dict())
    kept = {k: v for k, v in config.items() if k in ALWAYS or v != defaults.get(k)}
    return json.dumps({f"transformer.{k}": v for k, v in kept.items()}, indent=2, sort_keys=True)


def write_lora(folder: Path, lora: Lora) -> None:
    """Write both forms of (weights, config), as `lora_state` returns them, into a folder."""
    weights, config = lora
    peft = folder / "lora"
    peft.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in weights.items()},
        peft / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    text = json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True)
    (peft / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    save_file(
        {f"transformer.{name}": tensor for name, tensor in weights.items()},
        folder / DIFFUSERS_FILE,
        metadata={"lora_adapter_metadata": _header(config)},
    )
