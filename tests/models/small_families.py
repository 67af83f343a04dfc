"""Small pipelines of SD 3.5, FLUX.1, FLUX.2 and Z-Image with random weights, in the stock format.

Text encoders are of the stock classes, a few thousand weights each; tokenizers know the words of
the tests' prompts by their letters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from small_transformers import randomised
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT_WIDTH = 32
HEADS = {"attention_head_dim": 16, "num_attention_heads": 3}


def sd3(**changes: Any) -> Any:
    """Dual attention in the first of three blocks, as in 3.5 Medium; `qk_norm` as in all 3.5."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 48,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return randomised(SD3Transformer2DModel(**(HEADS | config | changes)))


def flux(**changes: Any) -> Any:
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": 24,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return randomised(FluxTransformer2DModel(**(HEADS | config | changes)))


def flux2(**changes: Any) -> Any:
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": 3 * 16,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return randomised(Flux2Transformer2DModel(**(HEADS | config | changes)))


def zimage(**changes: Any) -> Any:
    config = {
        "in_channels": 4,
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 16, 16],
    }
    return randomised(ZImageTransformer2DModel(**(config | changes)))


def small_vae(kind: type[Any] = AutoencoderKL, levels: int = 4, **changes: Any) -> Any:
    config = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    torch.manual_seed(0)
    return kind(**(config | changes)).eval()


def _clip(kind: type[Any], width: int, **changes: Any) -> tuple[Any, CLIPTokenizer]:
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*ends, *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(vocabulary)}, merges=[], model_max_length=77
    )
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(vocabulary),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **changes,
    )
    return randomised(kind(config)), tokenizer


def _t5() -> tuple[Any, T5TokenizerFast]:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer = T5TokenizerFast(
        vocab=[*words, *((letter, -3.0) for letter in LETTERS)], extra_ids=0
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return randomised(T5EncoderModel(config)), tokenizer


def _qwen(weights: Path) -> Qwen2Tokenizer:
    tokenizer = Qwen2Tokenizer.from_pretrained(weights / "processor")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _qwen3(tokenizer: Any, **sizes: int) -> Qwen3Config:
    return Qwen3Config(
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        **sizes,
    )


def _scheduler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def sd3_pipeline(weights: Path) -> StableDiffusion3Pipeline:
    first, tokenizer = _clip(CLIPTextModelWithProjection, 12, projection_dim=16)
    second, tokenizer_2 = _clip(CLIPTextModelWithProjection, 16, projection_dim=24)
    third, tokenizer_3 = _t5()
    return StableDiffusion3Pipeline(
        transformer=sd3(),
        scheduler=_scheduler(shift=3.0),
        vae=small_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
    )


def flux_pipeline(weights: Path) -> FluxPipeline:
    first, tokenizer = _clip(CLIPTextModel, 24)
    second, tokenizer_2 = _t5()
    return FluxPipeline(
        scheduler=_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        transformer=flux(),
    )


def flux2_pipeline(weights: Path) -> Flux2Pipeline:
    """The encoder has the 30 layers that the pipeline reads; the transformer guidance embedded."""
    tokenizer = _qwen(weights)
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
    )
    return Flux2Pipeline(
        scheduler=_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae_with_statistics(),
        text_encoder=randomised(Mistral3ForConditionalGeneration(config)),
        tokenizer=tokenizer,
        transformer=flux2(),
    )


def flux2_klein_pipeline(weights: Path) -> Flux2KleinPipeline:
    """The encoder has the 27 layers that the pipeline reads."""
    tokenizer = _qwen(weights)
    config = _qwen3(tokenizer, hidden_size=16, num_hidden_layers=28, head_dim=8)
    return Flux2KleinPipeline(
        scheduler=_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae_with_statistics(),
        text_encoder=randomised(Qwen3ForCausalLM(config)),
        tokenizer=tokenizer,
        transformer=flux2(guidance_embeds=False),
    )


def _vae_with_statistics() -> AutoencoderKLFlux2:
    vae = small_vae(AutoencoderKLFlux2)
    g = torch.Generator().manual_seed(1)
    vae.bn.running_mean.copy_(0.3 * torch.randn(16, generator=g))
    vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=g))
    return vae


def zimage_pipeline(weights: Path) -> ZImagePipeline:
    tokenizer = _qwen(weights)
    config = _qwen3(tokenizer, hidden_size=TEXT_WIDTH, num_hidden_layers=2, head_dim=16)
    return ZImagePipeline(
        scheduler=_scheduler(shift=3.0),
        vae=small_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=randomised(Qwen3Model(config)),
        tokenizer=tokenizer,
        transformer=zimage(),
    )


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "flux2": flux2_pipeline,
    "flux2_klein": flux2_klein_pipeline,
    "zimage": zimage_pipeline,
}
