"""The torchvision-free Qwen3-VL processor: text, images, slots, and what it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, ProcessorMixin

from qirl_fast.processor import QwenVLProcessor

SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
MERGED = 32  # pixels along one side of one image token: patch 16, merged 2 x 2


@pytest.fixture(scope="module")
def processor(weights: Path) -> QwenVLProcessor:
    return QwenVLProcessor.from_pretrained(weights / "processor")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_text_is_the_tokenizer(processor: QwenVLProcessor, weights: Path) -> None:
    texts = ["a photo of a red circle", "a photo of two blue squares and a triangle"]
    tokenizer = AutoTokenizer.from_pretrained(weights / "processor")
    ours = processor(text=texts, padding=True, padding_side="left", return_tensors="pt")
    plain = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    assert set(ours) == {"input_ids", "attention_mask"}
    for name in ours:
        assert torch.equal(ours[name], plain[name])
    assert not ours["attention_mask"][0, 0] and ours["attention_mask"][:, -1].all()
    (alone,) = processor(text=texts[0])["input_ids"]
    assert alone == tokenizer(texts[0])["input_ids"]
    assert processor.batch_decode([alone]) == [texts[0]]


def test_a_slot_grows_to_the_tokens_of_its_image(processor: QwenVLProcessor) -> None:
    """Two images of different sizes in one text, one in another; counts by hand."""
    images = [picture(64, 64), picture(96, 64, 1), picture(32, 64, 2)]
    texts = [f"first {SLOT} then {SLOT} end", f"{SLOT} alone"]
    out = processor(text=texts, images=images, padding=True, return_tensors="pt")
    counts = [(w // MERGED) * (h // MERGED) for w, h in ((64, 64), (96, 64), (32, 64))]
    is_image = out["input_ids"] == processor.image_token_id
    assert is_image.sum(1).tolist() == [counts[0] + counts[1], counts[2]]
    runs = [len(list(run)) for flag, run in itertools.groupby(is_image[0].tolist()) if flag]
    assert runs == counts[:2]
    assert torch.equal(out["mm_token_type_ids"], is_image.long())
    grids = [[1, 2 * h // MERGED, 2 * w // MERGED] for w, h in ((64, 64), (96, 64), (32, 64))]
    assert out["image_grid_thw"].tolist() == grids
    patches = 4 * sum(counts)
    assert out["pixel_values"].shape == (patches, 3 * 2 * 16 * 16)
    assert out["pixel_values"].min() >= -1 and out["pixel_values"].max() <= 1


def test_without_an_image_slots_stay_as_written(processor: QwenVLProcessor) -> None:
    out = processor(text=f"a {SLOT} b", return_tensors="pt")
    assert (out["input_ids"] == processor.image_token_id).sum() == 1
    assert "mm_token_type_ids" not in out


def test_the_text_encoder_takes_what_comes_out(processor, frozen_model) -> None:
    """Image features enter at the slots: another picture gives another encoding."""
    encoder = frozen_model.pipeline.text_encoder
    states = []
    for seed in (0, 1):
        inputs = processor(
            text=f"see {SLOT} it", images=[picture(64, 64, seed)], return_tensors="pt"
        )
        with torch.no_grad():
            states.append(encoder(**inputs, output_hidden_states=True).hidden_states[-1])
    assert states[0].shape == states[1].shape
    assert torch.equal(states[0][0, 0], states[1][0, 0]), "text before the image does not see it"
    assert not torch.allclose(states[0][0, -1], states[1][0, -1])


def test_chat_template(processor: QwenVLProcessor) -> None:
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    ]
    text = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        f"<|im_start|>user\n{SLOT}what?<|im_end|>\n<|im_start|>assistant\n"
    )
    ((ids,), plain) = (
        processor.apply_chat_template(talk, tokenize=True, return_dict=False),
        processor.tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False),
    )
    assert ids == plain and processor.image_token_id in ids


def test_what_it_cannot_do_is_refused(processor: QwenVLProcessor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 <\|image_pad\|> slots in the text but 2 images"):
        processor(text=SLOT, images=[picture(64, 64), picture(64, 64)])
    with pytest.raises(ValueError, match=r"0 .* slots in the text but 1 images"):
        processor(text="no slot", images=[picture(64, 64)])
    with pytest.raises(ValueError, match="for videos install torchvision"):
        processor(text="x", videos=[[picture(64, 64)]])
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json: pass the processor/"):
        QwenVLProcessor.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_family_is_refused(processor: QwenVLProcessor) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
        unk_token="[UNK]",
    )
    with pytest.raises(ValueError, match=r"no <\|image_pad\|> token: not a Qwen-VL tokenizer"):
        QwenVLProcessor(plain, processor.image_processor)


def test_saved_and_read_back_it_is_the_same(processor: QwenVLProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = QwenVLProcessor.from_pretrained(tmp_path)
    assert isinstance(again, ProcessorMixin), "stock pipelines take nothing else as processor="
    call = {"text": f"a {SLOT} b", "images": [picture(64, 96)], "return_tensors": "pt"}
    first, second = processor(**call), again(**call)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.chat_template == processor.chat_template
