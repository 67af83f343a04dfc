"""`python -m bench block`: one transformer block with LoRA, stock diffusers with PEFT and fused.

Random weights at the true head size; on a CPU six heads, on a GPU 24. Forward is timed without
gradient, backward alone, and both, stock and fused in the same rounds. `saved_bytes_per_token` is
what autograd keeps for backward, for each token of the block's input.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor

import qirl_fast
from bench.machine import about
from bench.timing import copy_gbps, interleaved
from qirl_fast.memory import SavedTensors

HEAD_DIM, RANK, TEXT_TOKENS = 128, 32, 128
MODES = ("forward", "backward", "both")
Call = Callable[[], object]


@dataclass
class Options:
    """What `python -m bench block` was asked for."""

    px: int = 512
    device: str = "cpu"
    heads: int = 6
    rounds: int = 5
    seconds: float = 30.0
    out: Path | None = None


def qwen_image_21(o: Options) -> tuple[Any, dict[str, Any]]:
    side = o.px // 16
    model = QwenImage21Transformer2DModel(
        in_channels=64, num_layers=1, num_attention_heads=o.heads, context_in_dim=64
    )
    slots = [[False] * TEXT_TOKENS + [True] * (side * side // 4)]
    return model, {
        "hidden_states": torch.randn(1, side * side, 64),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 64),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, side, side)]],
        "img_mask": torch.tensor(slots),
    }


def qwen_image(o: Options) -> tuple[Any, dict[str, Any]]:
    side = o.px // 16
    model = QwenImageTransformer2DModel(
        num_layers=1, num_attention_heads=o.heads, joint_attention_dim=64
    )
    return model, {
        "hidden_states": torch.randn(1, side * side, 64),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 64),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, side, side)]],
    }


MODELS = {"qwen-image-2.1": qwen_image_21, "qwen-image": qwen_image}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj", "gate_layer", "out", "net.2"]


def block_call(model: Any, given: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The first block and the arguments that the model gives it."""
    block, seen = model.transformer_blocks[0], []
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**given)
    hook.remove()
    args, kwargs = seen[0]
    leaves = {"hidden_states", "encoder_hidden_states"}
    ready = {k: v.requires_grad_() if k in leaves else v for k, v in kwargs.items()}
    return block, tuple(a.requires_grad_() if i == 0 else a for i, a in enumerate(args)), ready


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def variants(run: Callable[[], Any], leaves: list[Tensor]) -> dict[str, Call]:
    """One call a mode."""

    def forward() -> object:
        with torch.no_grad():
            return run()

    made = outputs(run())
    gradients = [torch.randn_like(t) for t in made]

    def backward() -> object:
        return torch.autograd.grad(made, leaves, gradients, retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(outputs(run()), leaves, gradients)

    return dict(zip(MODES, (forward, backward, both), strict=True))


def run(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The result, written to options.out as well."""
    result: dict[str, Any] = about(options.device) | {"copy_gbps": copy_gbps(options.device)}
    result |= {"settings": {"px": options.px, "heads": options.heads, "rank": RANK}, "rows": []}
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, given = make(options)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        model = model.to(options.device, dtype)
        given = {
            k: v.to(options.device, dtype if v.is_floating_point() else v.dtype)
            if isinstance(v, Tensor)
            else v
            for k, v in given.items()
        }
        block, args, kwargs = block_call(model, given)
        adapter = [p for p in block.parameters() if p.requires_grad]
        leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
        tokens = sum(t.shape[1] for t in leaves)
        saved, calls = {}, {}
        for kind, swap in (("stock", qirl_fast.unpatch), ("fused", qirl_fast.patch)):
            swap(model)
            step = partial(block.forward, *args, **kwargs)  # patching changes the attribute
            with SavedTensors(model.parameters()) as kept:
                alive = step()
            saved[kind] = kept.bytes / tokens
            del alive
            for mode, call in variants(step, [*leaves, *adapter]).items():
                calls[kind, mode] = call
        for mode in MODES:
            times = interleaved(
                {kind: calls[kind, mode] for kind in saved},
                options.rounds,
                options.device,
                options.seconds,
            )
            for kind, t in times.items():
                row = {
                    "name": f"{name} {kind}",
                    "mode": mode,
                    "ms_p20": t.p20,
                    "ms_p50": t.p50,
                    "ms_p80": t.p80,
                    "speedup_vs_stock": times["stock"].p50 / t.p50,
                    "saved_bytes_per_token": saved[kind],
                }
                result["rows"].append(row)
                say(
                    f"{row['name']:22} {mode:9} {t.p50:9.2f} ms  {row['speedup_vs_stock']:5.2f}x  "
                    f"saved {saved[kind] / 1024:.1f} KiB a token"
                )
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result
