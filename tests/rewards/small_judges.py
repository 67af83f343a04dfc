"""Small random Qwen-VL folders, judgements of drawn scenes, and a plain way to score: no cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from qirl_fast.processor import QwenVLProcessor
from qirl_fast.tiny import scenes
from qirl_fast.tiny.model import build_processor, build_text_encoder

RUBRIC = "judge the photo."
REASONS = {True: "a red circle", False: "two blue squares"}  # few tokens, easy to learn


def write_base(folder: Path, seed: int = 0) -> Path:
    """A Qwen3-VL of two layers whose tokenizer also has Yes and No."""
    torch.manual_seed(seed)
    processor = build_processor()
    processor.tokenizer.add_tokens(["Yes", "No"])
    model = build_text_encoder(processor)
    with torch.no_grad():  # tied and small: random logits would all be alike
        model.model.language_model.embed_tokens.weight.mul_(5.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_qwen2_5(folder: Path) -> Path:
    """A Qwen2.5-VL of two layers, windows of 56 pixels in its vision tower."""
    torch.manual_seed(1)
    qwen3 = build_processor()
    tokenizer: PreTrainedTokenizerFast = qwen3.tokenizer
    images = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 448 * 448}
    )
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)
    model.save_pretrained(folder)
    QwenVLProcessor(tokenizer, images).save_pretrained(folder)
    return folder


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_rows(folder: Path, count: int = 12, heldout: int = 4) -> Path:
    """Judgements of scenes: right ones 4.6, wrong ones 1.4, with a few words as rationale."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [row for row in scenes.all_rows() if row["tag"] == "colors"][:count]
    lines = []
    for i, row in enumerate(rows):
        right = i % 2 == 0
        shown = row if right else rows[(i + 5) % count]
        image = scenes.render(scenes.sample_scene(shown, rng), 64)
        Image.fromarray(image).save(folder / f"{i}.png")
        lines.append(
            {
                "image": f"{i}.png",
                "prompt": row["prompt"],
                "dimension": "alignment",
                "rationale": REASONS[right],
                "score": 4.6 if right else 1.4,
                "category": row["tag"],
                "split": "heldout" if i >= count - heldout else "train",
            }
        )
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def next_logprobs(model: Any, processor: Any, text: str, images: list[np.ndarray]) -> torch.Tensor:
    """Log-probabilities float64 [V] after a text with image slots: one plain stock forward."""
    inputs = processor(text=text, images=images, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, -1]
    return logits.double().log_softmax(0)


def talk(processor: Any, text: str, images: int) -> str:
    """The opened conversation of a question as text."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def expected(model: Any, processor: Any, text: str, images: list[np.ndarray]) -> float:
    """Expected score after a text that ends in "Score: "."""
    logp = next_logprobs(model, processor, text, images)
    ids = [processor.tokenizer.convert_tokens_to_ids(str(s)) for s in range(1, 6)]
    p = logp[ids].softmax(0)
    return float((p * torch.arange(1.0, 6.0, dtype=torch.float64)).sum())
