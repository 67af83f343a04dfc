"""Qwen-Image-Edit and Qwen-Image-Edit-Plus (2509, 2511): Qwen-Image with condition images.

The condition images' latent tokens follow the target's in the image stream, with rotations of their
own frame index; text and images see each other whole, at every noise level, so nothing of a prompt
but its projections can be shared over steps. Only the target's rows come back: condition tokens are
no part of x, of the trajectory or of its likelihood. Under zero_cond_t (2511) condition tokens are
modulated at t = 0, text and target at the sample's noise level.

The text encoder sees the images too: Edit the autoencoder's version of its one image, Plus a
smaller one of each. Alpha is put over white; the stock pipelines fail on it.

diffusers 0.42 does not hand the processor's mm_token_type_ids to the text encoder, so with
transformers 5 the encoder counts an image's tokens as text positions (diffusers issue 14194).
`condition` runs the pipeline's own encode_prompt and agrees with the installed one, either way;
`load` warns.

Shapes: as in qwenimage.py; M latent tokens of condition images.
Source: diffusers `pipeline_qwenimage_edit.py`, `pipeline_qwenimage_edit_plus.py`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from torch import Tensor

from qirl_fast.models.condition import condition_size, image_slots, latent_tokens, pictures
from qirl_fast.models.graphs import hold
from qirl_fast.models.loading import load_part
from qirl_fast.models.prefix import Conditioned, by_layout, row_order, spread, spread_rows
from qirl_fast.models.qwenimage import PIXELS_PER_TOKEN, Grids, QwenImage, Texts
from qirl_fast.processor import QwenVLProcessor

logger = logging.getLogger(__name__)

ENCODER_PIXELS = 384 * 384  # of an image for Plus's text encoder, at most
DROPPED = 64  # tokens of the template before the prompt, which the pipelines drop
SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Edits:
    """What `velocity` needs to know of B rows: groups whose condition images have the same grids.

    `order` sorts the rows by group, `inverse` undoes it; None where there is one group.
    """

    groups: tuple[Texts, ...]
    grids: tuple[Grids, ...]  # of each group's condition images
    order: Tensor | None
    inverse: Tensor | None
    batch: int

    @property
    def lengths(self) -> list[tuple[int, int, int]]:
        """(rows, image tokens beside the target's, text tokens) of each run of rows."""
        return [run for group in self.groups for run in group.lengths]

    @property
    def tensors(self) -> list[Tensor]:
        """What is held of the prompts."""
        return [t for group in self.groups for t in group.tensors]


hold(Edits)


class QwenImageEdit(QwenImage):
    """The adapter of Qwen-Image-Edit: one condition image."""

    family = "qwenimage_edit"
    needs_images = True
    shards = False  # blocks run as often as a chunk has condition grids
    splits = False
    pipeline_class = QwenImageEditPipeline
    refused = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")
    reads: ClassVar[dict[str, Any]] = {
        **QwenImage.reads,
        "processor": QwenVLProcessor.from_pretrained,
    }
    slot = SLOT  # in the template, of image number {}

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype, device: str = "cpu", spread: bool = False
    ) -> Self:
        """As `Adapter.load`; warns where the installed pipeline drops the positions of images."""
        code = cls.pipeline_class._get_qwen_prompt_embeds.__code__
        if "mm_token_type_ids" not in {*code.co_names, *code.co_consts}:
            logger.warning(
                "%s of the installed diffusers hands the text encoder no mm_token_type_ids, so "
                "transformers 5 numbers an image's tokens like text (diffusers issue 14194); "
                "training conditions on the same embeddings as this pipeline, and another "
                "implementation may draw from others",
                cls.pipeline_class.__name__,
            )
        return super().load(folder, dtype, device, spread)

    @classmethod
    def takes_images(cls) -> bool:
        """Whether prompts may come with condition images."""
        return True

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """ValueError: there is no prompt without an image in this family."""
        raise ValueError(
            f"{self.pipeline_class.__name__} edits images, and these prompts have none: "
            f"{list(prompts)[:3]}; use condition(prompt, images)"
        )

    @classmethod
    def condition_sizes(cls, image: tuple[int, int], pixels: int) -> tuple[tuple[int, int], ...]:
        """One size: text encoder and autoencoder see the same pixels."""
        return (condition_size(image, pixels),)

    @torch.no_grad()
    def condition(self, prompt: str, images: Sequence[Sequence[np.ndarray]]) -> Conditioned:
        """Embeddings and latents of a prompt with its condition images: see `Adapter.condition`.

        The empty prompt (the unconditional branch) is encoded as one space, the pipelines' habit.
        """
        versions = len(self.condition_sizes((1, 1), ENCODER_PIXELS))
        shown = pictures(images, versions, "RGB")
        text = self._encode_with([image[-1] for image in shown], prompt or " ")
        latents = latent_tokens(self.pipeline, [image[0] for image in shown], self._decoding)
        sizes = [(image[0].height, image[0].width) for image in shown]
        grids = tuple((h // PIXELS_PER_TOKEN, w // PIXELS_PER_TOKEN) for h, w in sizes)
        slots = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        return Conditioned(text, slots, latents, grids)

    def _encode_with(self, shown: Sequence[Any], prompt: str) -> Tensor:
        """Embeddings [L, C] of the prompt beside what the text encoder sees of its images."""
        if len(shown) != 1:
            raise ValueError(
                f"Qwen-Image-Edit takes one condition image and got {len(shown)}; use a model of "
                "QwenImageEditPlusPipeline (2509, 2511)"
            )
        embeddings: Tensor = self.pipeline.encode_prompt(prompt, shown[0], self.device)[0][0]
        return embeddings

    @classmethod
    def prompt_tokens(
        cls, folder: Path, prompt: str, sizes: Sequence[Sequence[tuple[int, int]]] = ()
    ) -> int:
        """Tokens of the prompt's embedding, from the files of a model folder.

        sizes: of each condition image its versions, as `condition_sizes` gives them.
        """
        processor = load_part(QwenVLProcessor.from_pretrained, folder / "processor")
        slots = "".join(cls.slot.format(i + 1) for i in range(len(sizes)))
        whole = processor.tokenizer(TEMPLATE.format(slots + prompt))["input_ids"]
        more = sum(image_slots(processor, versions[-1]) - 1 for versions in sizes)
        return len(whole) - DROPPED + more

    def prefix(
        self,
        prompts: Sequence[Any],
        owner: Sequence[int],
        height: int,
        width: int,
    ) -> Any:
        """`Edits`: the prompts of B rows and their condition images, projected once each.

        Args:
            prompts: P prompts with condition images; owner: B prompt indices, `owner[r]` the
                prompt of row r.
            height, width: size of the target in pixels, multiples of 16.
        """
        self.latent_shape(height, width)
        target = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        grids = {p: _grids(prompts[p]) for p in sorted(set(owner))}
        groups, layouts, runs = [], [], []
        for layout, used, rows in by_layout(owner, grids):
            places = [used.index(owner[r]) for r in rows]
            texts = self._texts([prompts[p].text for p in used], places, (target, *layout))
            latents = torch.stack([prompts[p].latents for p in used])
            groups.append(self._conditioned(texts, latents, places, target[0] * target[1]))
            layouts.append(layout)
            runs.append(rows)
        order, inverse = row_order(runs, self.device)
        return Edits(tuple(groups), tuple(layouts), order, inverse, len(owner))

    def _conditioned(
        self, texts: Texts, latents: Tensor, places: Sequence[int], tokens: int
    ) -> Texts:
        """The texts with the latents [P, M, Z] of their rows' prompts; places[r] is row r's."""
        latents = self.transformer.img_in(latents.to(self.device, self.dtype))
        if len(latents) == 1:
            condition = spread(latents, len(places))
        else:
            source = torch.tensor(places, device=self.device)
            condition = latents[source if texts.order is None else source[texts.order]]
        texts = replace(texts, condition=condition)
        if not self.transformer.config.zero_cond_t:
            return texts
        at_t0 = torch.arange(tokens + latents.shape[1], device=self.device) >= tokens
        rows_t0 = self.modulations.rows([0.0])[:-1:2]  # without the text's and the last norm's
        return replace(texts, at_t0=at_t0, rows_t0=rows_t0)

    def join(self, first: Any, second: Any) -> Any:
        """What `velocity` needs of the rows of `first`, then those of `second`.

        Groups of the same condition grids run as one.
        """
        groups: dict[Grids, Texts] = {}
        rows: dict[Grids, Tensor] = {}
        for prefix, start in ((first, 0), (second, first.batch)):
            own = torch.arange(prefix.batch, device=self.device)
            own = own if prefix.order is None else prefix.order
            parts = (own + start).split([group.batch for group in prefix.groups])
            for grids, group, part in zip(prefix.grids, prefix.groups, parts, strict=True):
                known = grids in groups
                groups[grids] = super().join(groups[grids], group) if known else group
                rows[grids] = torch.cat([rows[grids], part]) if known else part
        order = torch.cat(list(rows.values())) if len(rows) > 1 else None
        inverse = None if order is None else order.argsort()
        batch = first.batch + second.batch
        return Edits(tuple(groups.values()), tuple(groups), order, inverse, batch)

    def forward(self, x: Tensor, rows: Sequence[Tensor], prefix: Any) -> Tensor:
        """`velocity` of rows of modulation as `modulation` gives them, group by group."""
        if len(prefix.groups) == 1:
            return super().forward(x, rows, prefix.groups[0])
        sizes = [group.batch for group in prefix.groups]
        parts = [
            [row] * len(sizes)
            if len(row) == 1
            else list(spread_rows(row, len(x), prefix.order).split(sizes))
            for row in rows
        ]
        out = []
        for part, *own, group in zip(
            x[prefix.order].split(sizes), *parts, prefix.groups, strict=True
        ):
            out.append(super().forward(part, own, group))
        return torch.cat(out)[prefix.inverse]


class QwenImageEditPlus(QwenImageEdit):
    """The adapter of Qwen-Image-Edit-Plus, 2509 and 2511: several condition images."""

    family = "qwenimage_edit_plus"
    pipeline_class = QwenImageEditPlusPipeline
    slot = "Picture {}: " + SLOT

    @classmethod
    def condition_sizes(cls, image: tuple[int, int], pixels: int) -> tuple[tuple[int, int], ...]:
        """The autoencoder's version, then the text encoder's, of at most 384 x 384 pixels."""
        return condition_size(image, pixels), condition_size(image, min(ENCODER_PIXELS, pixels))

    def _encode_with(self, shown: Sequence[Any], prompt: str) -> Tensor:
        embeddings: Tensor = self.pipeline.encode_prompt(prompt, list(shown), self.device)[0][0]
        return embeddings


def _grids(prompt: Any) -> Grids:
    """The grids of a conditioned prompt; ValueError where there are none or they do not fit."""
    if not isinstance(prompt, Conditioned) or not prompt.grids:
        raise ValueError(
            "a prompt without condition images: this family edits images; wanted what "
            "condition(prompt, images) returns"
        )
    tokens = sum(h * w for h, w in prompt.grids)
    if tokens != len(prompt.latents):
        raise ValueError(
            f"a prompt with {len(prompt.latents)} latent tokens and grids {list(prompt.grids)}, "
            f"which hold {tokens}; wanted as many"
        )
    return prompt.grids
