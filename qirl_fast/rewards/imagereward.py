"""ImageReward (arXiv 2304.05977; THUDM/ImageReward) from a local folder: `kind: imagereward`.

A BLIP (ViT and a BERT with cross-attention to its patches) reads image and prompt together; a
linear head of five layers (768-1024-128-64-16-1, no activation between) scores the hidden state h
of the first token, and the score is standardised over the authors' data:

    score = (head(h) - MEAN) / STD        about N(0, 1) there, without a bound

The folder holds the weights as safetensors under ImageReward's own names, med_config.json as
published beside them, and the vocabulary (vocab.txt) of bert-base-uncased. The size of the ViT is
read off the weights, its heads being 64 wide as in every BLIP. Images are scaled to the shortest
side, cropped in the middle and normalised as CLIP's; prompts are cut at 35 tokens, and each that
is, is logged once. Everything is float32; rows go in chunks of one shape, as `clip.py` does it,
and a row's score depends on its place in a chunk by less than 1e-5 (with `batch: 1` not at all).

It differs from the source in that weights that do not fit are an error (there: strict=False), and
that "[DEC]" and "[ENC]" in a prompt are no special tokens.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from qirl_fast.rewards.judge import Row
from qirl_fast.rewards.prompted import CutLog, check_prompt, filled_chunks
from qirl_fast.rewards.segment import check_images
from qirl_fast.rewards.weights import check_keys, folder_of, load_tensors
from qirl_fast.section import Count, Section, Text

MEAN = 0.16717362830052426
STD = 1.0333394966054072
LENGTH = 35
HEAD = (1024, 128, 64, 16, 1)
HEAD_LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
HEAD_WIDTH = 64

TEXT, VISION, MLP = "blip.text_encoder.", "blip.visual_encoder.", "mlp."
# Of BLIP's pretraining, and counting buffers: the reward does not use them.
UNUSED = re.compile(r"blip\.(vision|text)_proj\..*|.*\.position_ids")

# Sizes are read off these.
NEEDED = (
    VISION + "patch_embed.proj.weight",
    VISION + "pos_embed",
    VISION + "blocks.0.mlp.fc1.weight",
)

VISION_TOP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
VISION_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


class Settings(Section):
    """The judge ImageReward, from a local folder."""

    kind: Literal["imagereward"] = Field(description="ImageReward v1.0")
    folder: Text = Field(
        description="local folder with the weights (safetensors), med_config.json and vocab.txt"
    )
    batch: Count = Field(default=8, description="rows the model takes at a time")


class Judge:
    """The judge of `Settings`, on `device`, in float32.

    Construction raises FileNotFoundError or ValueError for a folder that cannot be used.
    """

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        from transformers import BertTokenizer, CLIPImageProcessorPil

        self.settings = settings
        self.device = torch.device(device)
        files = ["med_config.json", "vocab.txt"]
        folder = folder_of(settings.folder, files, "ImageReward")
        parts = _parts(load_tensors(folder))
        self.text = _text_model(parts[TEXT], parts[VISION], folder).to(self.device).eval()
        self.vision = _vision_model(parts[VISION]).to(self.device).eval()
        self.head = _head(parts[MLP], self.text.config.hidden_size).to(self.device).eval()
        self.tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        if len(self.tokenizer) > self.text.config.vocab_size:
            raise ValueError(
                f"{folder}/vocab.txt has {len(self.tokenizer)} tokens, the model "
                f"{self.text.config.vocab_size}; wanted the vocabulary of bert-base-uncased"
            )
        side = self.vision.config.image_size
        self.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        self._log_cut = CutLog(settings.kind, self.tokenizer, LENGTH)

    def check_row(self, row: Row) -> None:
        """ValueError for a row without a prompt."""
        check_prompt(self.settings.kind, row)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, metadata: list[Row]) -> np.ndarray:
        """Score uint8 images [B, H, W, 3] against the prompts of their rows; float32 [B]."""
        check_images(images, metadata)
        for row in metadata:
            self.check_row(row)
        prompts = [row["prompt"] for row in metadata]
        self._log_cut(prompts)
        scores = [np.zeros(0, np.float32)]
        for chunk, real in filled_chunks(
            list(zip(images, prompts, strict=True)), self.settings.batch
        ):
            reward = self._reward([image for image, _ in chunk], [prompt for _, prompt in chunk])
            scores.append(reward[:real].float().cpu().numpy())
        return np.concatenate(scores)

    def _reward(self, images: list[np.ndarray], prompts: list[str]) -> torch.Tensor:
        from PIL import Image

        pictures = [Image.fromarray(image) for image in images]
        pixels = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(self.device)
        hidden = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=self.vision(pixels.to(self.device)).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        return (self.head(hidden[:, 0])[:, 0] - MEAN) / STD


def _parts(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of text encoder, image encoder and head, the latter two under new names."""
    parts: dict[str, dict[str, torch.Tensor]] = {TEXT: {}, VISION: {}, MLP: {}}
    for name, tensor in state.items():
        if UNUSED.fullmatch(name):
            continue
        prefix = next((p for p in parts if name.startswith(p)), None)
        if prefix is None:
            raise ValueError(f"{name!r} is no tensor of ImageReward; wanted its own checkpoint")
        parts[prefix][name.removeprefix(prefix)] = tensor.float()
    if missing := [name for name in NEEDED if name not in state]:
        raise ValueError(
            f"the weights have no {', '.join(missing)}; wanted ImageReward's own checkpoint"
        )
    parts[VISION] = {_vision_name(name): tensor for name, tensor in parts[VISION].items()}
    return parts


def _vision_name(name: str) -> str:
    block = BLOCK.fullmatch(name)
    if block and block[2] in VISION_LAYER:
        return f"encoder.layers.{block[1]}.{VISION_LAYER[block[2]]}.{block[3]}"
    if name in VISION_TOP:
        return VISION_TOP[name]
    raise ValueError(f"{VISION + name!r} is no tensor of BLIP's image encoder")


def _vision_model(state: dict[str, torch.Tensor]) -> Any:
    from transformers import BlipVisionConfig, BlipVisionModel

    patches = state["embeddings.patch_embedding.weight"]
    width, patch = int(patches.shape[0]), int(patches.shape[-1])
    positions = int(state["embeddings.position_embedding"].shape[1])
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=int(state["encoder.layers.0.mlp.fc1.weight"].shape[0]),
        num_hidden_layers=len({k.split(".")[2] for k in state if k.startswith("encoder.layers.")}),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return _filled(BlipVisionModel, config, state)


def _text_model(
    state: dict[str, torch.Tensor], vision: dict[str, torch.Tensor], folder: Path
) -> Any:
    from transformers import BlipTextConfig, BlipTextModel

    given = json.loads((folder / "med_config.json").read_text())
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "vocab_size",
        "pad_token_id",
    )
    if missing := [key for key in keys if key not in given]:
        raise ValueError(f"{folder}/med_config.json lacks {', '.join(missing)}")
    config = BlipTextConfig(
        **{key: given[key] for key in keys},
        encoder_hidden_size=int(vision["embeddings.patch_embedding.weight"].shape[0]),
    )
    return _filled(BlipTextModel, config, state, add_pooling_layer=False)


def _filled(cls: Any, config: Any, state: dict[str, torch.Tensor], **options: Any) -> Any:
    with torch.device("meta"):
        check_keys(state, cls(config, **options).state_dict())
    return cls.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, **options
    ).requires_grad_(False)


def _head(state: dict[str, torch.Tensor], width: int) -> nn.Sequential:
    """The head without its dropouts, which do nothing here."""
    sizes = zip((width, *HEAD), HEAD, strict=False)
    head = nn.Sequential(*(nn.Linear(a, b) for a, b in sizes)).requires_grad_(False)
    names = {f"{i}.{x}": f"{n}.{x}" for i, n in enumerate(HEAD_LAYERS) for x in ("weight", "bias")}
    check_keys(state, {names[k]: v for k, v in head.state_dict().items()})
    head.load_state_dict({k: state[name] for k, name in names.items()})
    return head
