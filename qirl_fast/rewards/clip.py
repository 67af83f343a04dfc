"""CLIP-type judges from a local folder: `kind: clip`, `kind: pickscore`, `kind: hpsv2`.

With u, v the projected embeddings of image and prompt, cos = u v / (|u| |v|):

    clip       cos / divide_by                    (CLIPScore, arXiv 2104.08718, without its 2.5 max)
    pickscore  exp(logit_scale) cos / divide_by   (arXiv 2305.01569; flow_grpo divides by 26)
    hpsv2      cos / divide_by                    (arXiv 2306.09341; its tables print 100 cos)

`folder` holds a transformers CLIPModel: config.json, safetensors, the tokenizer's files and
preprocessor_config.json (the last two may stand in `processor`). The weights may have open_clip's
names instead, as HPSv2's checkpoint does; config.json then comes from the transformers folder of
the same architecture (ViT-H-14 of laion2B for HPSv2).

Images are scaled and cropped as CLIP does it; hpsv2 scales the longest side and pads with black.
HPSv2's own code scales a float image and may not smooth while scaling down, depending on its
torchvision: its scores can differ a little. Prompts are cut at the model's length (77 tokens), and
each that is, is logged once. Everything is float32.

Rows go through the model in chunks of one shape, `batch` rows, the last filled up: a row's score
does not depend on the size of its batch, and on its place in it by less than 1e-5 of the largest
possible score (how a BLAS rounds); with `batch: 1` not at all.

Shapes: B images, H, W pixels, D embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from qirl_fast.rewards.judge import Row
from qirl_fast.rewards.open_clip import is_open_clip, to_transformers
from qirl_fast.rewards.prompted import CutLog, check_prompt, filled_chunks
from qirl_fast.rewards.segment import check_images
from qirl_fast.rewards.weights import check_keys, folder_of, load_tensors
from qirl_fast.section import Count, Positive, Section, Text


@dataclass(frozen=True)
class Form:
    """What tells the kinds apart: is the cosine scaled by exp(logit_scale), how an image fits."""

    scaled: bool
    fit: Literal["crop", "pad"]


FORMS = {
    "clip": Form(scaled=False, fit="crop"),
    "pickscore": Form(scaled=True, fit="crop"),
    "hpsv2": Form(scaled=False, fit="pad"),
}


class Settings(Section):
    """A judge that compares image and prompt by a CLIP model in a local folder."""

    kind: Literal["clip", "pickscore", "hpsv2"] = Field(description="how the cosine is used")
    folder: Text = Field(description="local folder with the CLIP model")
    processor: Text | None = Field(
        default=None, description="local folder with tokenizer and image processor; null: `folder`"
    )
    divide_by: Positive = Field(
        default=1.0, description="the score is divided by this; 26 gives flow_grpo's PickScore"
    )
    batch: Count = Field(default=8, description="rows the model takes at a time")


class Judge:
    """The judge of `Settings`, on `device`, in float32.

    Construction raises FileNotFoundError or ValueError for a folder that cannot be used.
    """

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings, self.form = settings, FORMS[settings.kind]
        self.device = torch.device(device)
        self.model = _load_model(settings).to(self.device).eval().requires_grad_(False)
        self.tokenizer, self.image_processor = _load_processor(settings, self.model.config)
        self.side = int(self.model.config.vision_config.image_size)
        self.length = int(self.model.config.text_config.max_position_embeddings)
        self._log_cut = CutLog(settings.kind, self.tokenizer, self.length)

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
        different = list(dict.fromkeys(prompts))
        self._log_cut(different)
        text = self._embedded(different, self._embed_text)
        place = {prompt: i for i, prompt in enumerate(different)}
        image = self._embedded(list(images), self._embed_images)
        cosine = (image * text[[place[p] for p in prompts]]).sum(1)
        scale = float(self.model.logit_scale.exp()) if self.form.scaled else 1.0
        return (cosine * scale / self.settings.divide_by).astype(np.float32)

    def _embedded(
        self, items: Sequence[Any], embed: Callable[[list[Any]], torch.Tensor]
    ) -> np.ndarray:
        """Embeddings of length 1, float64 [len(items), D], by chunks of one shape."""
        pieces = [np.zeros((0, self.model.projection_dim))]
        for chunk, real in filled_chunks(items, self.settings.batch):
            x = embed(chunk)[:real].double().cpu().numpy()
            pieces.append(x / np.linalg.norm(x, axis=1, keepdims=True))
        return np.concatenate(pieces)

    def _embed_text(self, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(self.device)
        return self.model.get_text_features(**tokens).pooler_output

    def _embed_images(self, images: list[np.ndarray]) -> torch.Tensor:
        from PIL import Image

        pictures = [Image.fromarray(image) for image in images]
        options = {}
        if self.form.fit == "pad":
            pictures = [padded(picture, self.side) for picture in pictures]
            options = {"do_resize": False, "do_center_crop": False}
        pixels = self.image_processor(pictures, return_tensors="pt", **options)["pixel_values"]
        return self.model.get_image_features(pixels.to(self.device)).pooler_output


def padded(picture: Any, side: int) -> Any:
    """A PIL image scaled (bicubic) until its longest side is `side`, in the middle of black."""
    from PIL import Image, ImageOps

    scale = side / max(picture.size)
    width, height = (max(1, round(n * scale)) for n in picture.size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    x, y = side - width, side - height
    return ImageOps.expand(small, (x // 2, y // 2, x - x // 2, y - y // 2), fill=0)


def _load_model(settings: Settings) -> Any:
    from transformers import CLIPConfig, CLIPModel

    folder = folder_of(settings.folder, ["config.json"], f"a CLIP model ({settings.kind})")
    config = CLIPConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "clip":
        raise ValueError(f"{folder} holds a {config.model_type!r} model; wanted 'clip'")
    state = load_tensors(folder)
    if is_open_clip(state):
        state = to_transformers(state)
    # Old checkpoints keep these counting buffers, which the model makes itself.
    state = {k: v.float() for k, v in state.items() if not k.endswith(".position_ids")}
    with torch.device("meta"):
        check_keys(state, CLIPModel(config).state_dict())
    return CLIPModel.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def _load_processor(settings: Settings, config: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    folder = folder_of(
        settings.processor or settings.folder,
        ["preprocessor_config.json"],
        "CLIP's tokenizer and image processor",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    images = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    text, side = config.text_config, config.vision_config.image_size
    # transformers' CLIP reads the text's embedding at the end token; for the id 2, which old
    # configs have there, at the greatest id.
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != end or len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and ends a text with "
            f"{tokenizer.eos_token_id}; the model wants at most {text.vocab_size} and {end}: "
            "put the tokenizer the model was trained with there"
        )
    crop = images.crop_size
    if (crop["height"], crop["width"]) != (side, side):
        raise ValueError(
            f"the image processor in {folder} crops to {crop['height']} x {crop['width']}; the "
            f"model takes {side} x {side}"
        )
    return tokenizer, images
