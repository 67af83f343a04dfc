"""Condition images as the stock pipelines take them: their sizes, their pixels, their latents.

Sizes keep the aspect ratio at an area, rounded to multiples of 32 pixels. Latents are the mode of
the autoencoder's posterior, normalised and packed into tokens: the stock pipeline's own methods.

Shapes: M latent tokens of all images, Z channels of a token.
Source: diffusers `pipeline_qwenimage_edit.py`, `pipeline_qwenimage_edit_plus.py`,
`pipeline_qwenimage21.py` (calculate_dimensions, _encode_vae_image, _pack_latents).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from torch import Tensor

MULTIPLE = 32  # pixels


def condition_size(image: tuple[int, int], pixels: int) -> tuple[int, int]:
    """(height, width), multiples of 32, of an image (height, width) resized to about `pixels`.

    ValueError for an image so long that one side would vanish.
    """
    height, width = image
    if height <= 0 or width <= 0 or pixels <= 0:
        raise ValueError(
            f"condition image of {height} x {width} at an area of {pixels} pixels: wanted positive "
            "sides and a positive area"
        )
    new_width, new_height, _ = calculate_dimensions(pixels, width / height)
    if not new_width or not new_height:
        raise ValueError(
            f"condition image of {height} x {width}: resized to {pixels} pixels its short side "
            f"rounds to 0 multiples of {MULTIPLE} pixels; crop the image or allow more pixels"
        )
    return int(new_height), int(new_width)


def pictures(
    images: Sequence[Sequence[np.ndarray]], versions: int, mode: str
) -> list[list[Image.Image]]:
    """Each image's versions for PIL. mode: "RGBA", or "RGB", where alpha is put over white.

    ValueError for no images, and for arrays that are not as the adapter's condition_sizes asks.
    """
    if not images:
        raise ValueError("no condition images: wanted at least one; encode serves a prompt alone")
    for number, image in enumerate(images):
        if len(image) != versions:
            raise ValueError(
                f"condition image {number} came in {len(image)} sizes; wanted {versions}, those of "
                "condition_sizes"
            )
        for array in image:
            _require_picture(array, f"condition image {number}")
    return [[_picture(array, mode) for array in image] for image in images]


def _require_picture(array: np.ndarray, name: str) -> None:
    shape = array.shape
    if array.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (3, 4):
        raise ValueError(
            f"{name} is {array.dtype} {list(shape)}; wanted uint8 [height, width, 3 or 4]"
        )
    if not shape[0] or not shape[1] or shape[0] % MULTIPLE or shape[1] % MULTIPLE:
        raise ValueError(
            f"{name} is {shape[0]} x {shape[1]} pixels; wanted multiples of {MULTIPLE}, as "
            "condition_sizes gives them"
        )


def _picture(array: np.ndarray, mode: str) -> Image.Image:
    picture = Image.fromarray(array)
    if picture.mode == mode:
        return picture
    if mode == "RGBA":
        return picture.convert(mode)
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def latent_tokens(
    pipeline: Any, images: Sequence[Image.Image], lock: AbstractContextManager[Any]
) -> Tensor:
    """[M, Z] of the images one after the other, on the autoencoder's device and in its dtype.

    lock: held while the autoencoder runs, which keeps state on itself.
    """
    like, tokens = pipeline.vae, []
    for image in images:
        pixels = pipeline.image_processor.preprocess(image, image.height, image.width).unsqueeze(2)
        with lock:
            z = pipeline._encode_vae_image(pixels.to(like.device, like.dtype), None)
        tokens.append(pipeline._pack_latents(z, 1, z.shape[1], *z.shape[3:])[0])
    return torch.cat(tokens)


def image_slots(processor: Any, size: tuple[int, int]) -> int:
    """Embeddings that stand for an image (height, width) in a prompt."""
    images = processor.image_processor
    return int(images.get_number_of_image_patches(*size)) // int(images.merge_size) ** 2
