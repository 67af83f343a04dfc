"""The tiny judge's base, untrained: a Qwen3-VL of 0.8 million parameters, and its tokenizer.

At 64 x 64 pixels, with patches of 16 and two merged each way, one image token is one quarter of
the canvas, where the tiny world has at most one object.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from qirl_fast.processor import QwenVLProcessor
from qirl_fast.tiny import scenes
from qirl_fast.tiny.model import CHAT_TEMPLATE, PRE_TOKENIZE, SPECIAL_TOKENS

VOCABULARY = 512
WIDTH = 96
LAYERS = 4
VISION_WIDTH = 64
VISION_LAYERS = 3
ENGLISH = (
    "Rate how well the image shows the prompt.",
    "Rate how cleanly the image is drawn.",
    "Describe the image.",
    "How many red circles? one two three four none",
    "Is there a red circle above a blue square? yes no",
    "Look at the image and think step by step, then answer.",
    "\nPrompt: \nInstruction: \nScore: \nAnswer: ",
    "assistant\n",
    "Score: Yes No user",
    "Say: ",
    "yes, partly, no, odd shape, none, extra none, extra one, extra two, extra many.",
    "the background is clean, the edges are sharp, the colors are even, good, fair, bad.",
)


def corpus() -> list[str]:
    """What the tokenizer is trained on: every caption of the world, and the judge's own words."""
    own = [row["prompt"] for row in scenes.all_rows()]
    lists = [
        f"{color} {shape}, {other} {shape}, none, odd shape. {color} yes, {shape} no, extra one."
        for color in scenes.COLORS
        for other in scenes.COLORS
        for shape in scenes.SHAPES
    ]
    return own + lists + list(ENGLISH) * 50


def build_processor() -> QwenVLProcessor:
    """Byte-level BPE with Qwen's special tokens and splitting; a digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    images = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={"shortest_edge": 32 * 32, "longest_edge": 512 * 512},
    )
    return QwenVLProcessor(tokenizer, images)


def build_model(processor: QwenVLProcessor) -> Qwen3VLForConditionalGeneration:
    """Four layers, 96 wide, with a vision tower of three layers; weights from torch's generator."""
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "initializer_range": 0.05,
            "pad_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 2 * VISION_WIDTH,
            "num_heads": 4,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1],
            "initializer_range": 0.05,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config)
