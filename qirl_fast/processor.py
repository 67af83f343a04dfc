"""A Qwen-VL processor that needs no torchvision.

transformers' `Qwen3VLProcessor` and `Qwen2VLProcessor` cannot be built without torchvision (their
video processor needs it). This one reads the same folder, tokenizes text and images the same way,
and goes into stock pipelines as `processor=`, which take nothing but a ProcessorMixin. Videos
raise.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers import Qwen2VLImageProcessorPil as ImageProcessor


class QwenVLProcessor(ProcessorMixin):
    """Tokenizer + PIL image processor + expansion of each image slot to its number of tokens.

    `processor(text, images)` gives `input_ids`, `attention_mask` and, with images, `pixel_values`
    [patches, channels * temporal * patch * patch], `image_grid_thw` [images, 3] and
    `mm_token_type_ids` (1 at image tokens).
    """

    image_token = "<|image_pad|>"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = tokenizer.chat_template
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no {self.image_token} token: not a Qwen-VL tokenizer"
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> "QwenVLProcessor":
        """Load from a `processor/` folder in transformers' format."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no tokenizer.json: pass the processor/ folder of a Qwen-VL model"
            )
        return cls(AutoTokenizer.from_pretrained(folder), ImageProcessor.from_pretrained(folder))

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write tokenizer and image processor in transformers' format."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        """The tokenizer's chat template; tokens come as a batch of one, as in transformers."""
        out = self.tokenizer.apply_chat_template(conversation, **kwargs)
        return [out] if kwargs.get("tokenize") and not kwargs.get("return_dict", True) else out

    def __call__(
        self, text: str | list[str], images: Any = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Tokenize `text`; every `<|image_pad|>` grows to the token count of its image."""
        if videos is not None:
            raise ValueError("this processor takes text and images; for videos install torchvision")
        texts = [text] if isinstance(text, str) else list(text)
        tensors = kwargs.pop("return_tensors", None)
        data: dict[str, Any] = {}
        if images is not None:
            data.update(self.image_processor(images=images, return_tensors=tensors))
            merge = self.image_processor.merge_size**2
            counts = [int(grid.prod()) // merge for grid in data["image_grid_thw"]]
            texts = self._expand(texts, counts)
        data.update(self.tokenizer(texts, return_tensors=tensors, **kwargs))
        data.pop("token_type_ids", None)
        if images is not None:
            data["mm_token_type_ids"] = (data["input_ids"] == self.image_token_id).long()
        return BatchFeature(data=data, tensor_type=tensors)

    def _expand(self, texts: list[str], counts: list[int]) -> list[str]:
        slots = sum(text.count(self.image_token) for text in texts)
        if slots != len(counts):
            raise ValueError(
                f"{slots} {self.image_token} slots in the text but {len(counts)} images"
            )
        remaining = iter(counts)
        expanded = []
        for text in texts:
            head, *tails = text.split(self.image_token)
            expanded.append(head + "".join(self.image_token * next(remaining) + t for t in tails))
        return expanded

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Token ids to text."""
        return self.tokenizer.batch_decode(*args, **kwargs)
