"""ImageReward's loader against BLIP's math written out here on the original tensor names."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPImageProcessorPil

from qirl_fast.rewards.imagereward import Judge, Settings

PATCH, SIDE, VIT, LAYERS, TEXT, HEADS = 8, 32, 128, 2, 48, 4
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + x for x in LETTERS)]
MED = {
    "hidden_size": TEXT,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 40,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "vocab_size": len(VOCABULARY) + 2,
    "pad_token_id": 0,
    "encoder_width": 768,
    "add_cross_attention": True,
    "hidden_dropout_prob": 0.1,
}


def shapes():
    """Name -> shape of every tensor of a small ImageReward checkpoint."""
    found = {}

    def linear(name, out, into):
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, into), (out,)

    def norm(name, width):
        found[f"{name}.weight"], found[f"{name}.bias"] = (width,), (width,)

    vit, text = "blip.visual_encoder.", "blip.text_encoder."
    found[vit + "cls_token"] = (1, 1, VIT)
    found[vit + "pos_embed"] = (1, (SIDE // PATCH) ** 2 + 1, VIT)
    found[vit + "patch_embed.proj.weight"] = (VIT, 3, PATCH, PATCH)
    found[vit + "patch_embed.proj.bias"] = (VIT,)
    norm(vit + "norm", VIT)
    for i in range(LAYERS):
        block = f"{vit}blocks.{i}."
        norm(block + "norm1", VIT)
        norm(block + "norm2", VIT)
        linear(block + "attn.qkv", 3 * VIT, VIT)
        linear(block + "attn.proj", VIT, VIT)
        linear(block + "mlp.fc1", 4 * VIT, VIT)
        linear(block + "mlp.fc2", VIT, 4 * VIT)
    found[text + "embeddings.word_embeddings.weight"] = (MED["vocab_size"], TEXT)
    found[text + "embeddings.position_embeddings.weight"] = (40, TEXT)
    norm(text + "embeddings.LayerNorm", TEXT)
    for i in range(LAYERS):
        layer = f"{text}encoder.layer.{i}."
        for kind, width in (("attention", TEXT), ("crossattention", VIT)):
            linear(f"{layer}{kind}.self.query", TEXT, TEXT)
            linear(f"{layer}{kind}.self.key", TEXT, width)
            linear(f"{layer}{kind}.self.value", TEXT, width)
            linear(f"{layer}{kind}.output.dense", TEXT, TEXT)
            norm(f"{layer}{kind}.output.LayerNorm", TEXT)
        linear(layer + "intermediate.dense", 96, TEXT)
        linear(layer + "output.dense", TEXT, 96)
        norm(layer + "output.LayerNorm", TEXT)
    linear("blip.vision_proj", 16, VIT)
    linear("blip.text_proj", 16, TEXT)
    for i, (out, into) in {
        0: (1024, TEXT),
        2: (128, 1024),
        4: (64, 128),
        6: (16, 64),
        7: (1, 16),
    }.items():
        linear(f"mlp.layers.{i}", out, into)
    return found


def weights():
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes().items():
        fan = shape[-1] if len(shape) == 2 else 1
        scale = fan**-0.5 if len(shape) == 2 and "embeddings" not in name else 0.3
        state[name] = scale * torch.randn(shape, generator=g)
        if re.search(r"(norm\d?|LayerNorm)\.weight$", name):
            state[name] += 1.0
    return state


def attend(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Original:
    """The reward of one row in float64, after the description of ImageReward and BLIP."""

    def __init__(self, state):
        self.state = {k: v.double() for k, v in state.items()}

    def linear(self, x, name):
        return F.linear(x, self.state[name + ".weight"], self.state[name + ".bias"])

    def norm(self, x, name, eps):
        w, b = self.state[name + ".weight"], self.state[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], w, b, eps)

    def image(self, pixels):
        s, vit = self.state, "blip.visual_encoder."
        w, b = s[vit + "patch_embed.proj.weight"], s[vit + "patch_embed.proj.bias"]
        x = F.conv2d(pixels.double(), w, b, stride=PATCH).flatten(2).transpose(1, 2)
        x = torch.cat([s[vit + "cls_token"].expand(len(x), 1, -1), x], 1) + s[vit + "pos_embed"]
        for i in range(LAYERS):
            block = f"{vit}blocks.{i}."
            h = self.linear(self.norm(x, block + "norm1", 1e-6), block + "attn.qkv")
            x = x + self.linear(attend(*h.chunk(3, -1), VIT // 64), block + "attn.proj")
            h = F.gelu(self.linear(self.norm(x, block + "norm2", 1e-6), block + "mlp.fc1"))
            x = x + self.linear(h, block + "mlp.fc2")
        return self.norm(x, vit + "norm", 1e-6)

    def attention(self, x, other, name, mask):
        q = self.linear(x, name + ".self.query")
        k, v = (self.linear(other, f"{name}.self.{part}") for part in ("key", "value"))
        y = self.linear(attend(q, k, v, HEADS, mask), name + ".output.dense")
        return self.norm(x + y, name + ".output.LayerNorm", 1e-12)

    def reward(self, pixels, ids, mask):
        s, text = self.state, "blip.text_encoder."
        patches = self.image(pixels)
        x = s[text + "embeddings.word_embeddings.weight"][ids]
        x = x + s[text + "embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(x, text + "embeddings.LayerNorm", 1e-12)
        for i in range(LAYERS):
            layer = f"{text}encoder.layer.{i}."
            x = self.attention(x, x, layer + "attention", mask)
            x = self.attention(x, patches, layer + "crossattention", None)
            h = F.gelu(self.linear(x, layer + "intermediate.dense"))
            h = self.linear(h, layer + "output.dense")
            x = self.norm(x + h, layer + "output.LayerNorm", 1e-12)
        x = x[:, 0]
        for i in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{i}")
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def save(where, state):
    save_file(state, where / "ImageReward.safetensors")
    (where / "med_config.json").write_text(json.dumps(MED))
    (where / "vocab.txt").write_text("\n".join(VOCABULARY))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("imagereward")
    buffer = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    save(where, weights() | buffer)
    return where


def judge_of(folder, **more):
    return Judge(Settings(kind="imagereward", folder=str(folder), **more))


def images(b=5, h=48, w=40):
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (b, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((w, h))) for c in coarse])


def rows():
    return [{"prompt": p} for p in ("a cat", "Two Dogs", "x", "q" * 60, "a cat")]


def test_rewards_are_those_of_the_original(folder):
    original = Original(weights())
    tokenizer = BertTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    want = []
    for image, row in zip(images(), rows(), strict=True):
        tokens = tokenizer(row["prompt"], truncation=True, max_length=35, return_tensors="pt")
        pixels = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        want.append(original.reward(pixels, tokens["input_ids"], tokens["attention_mask"]).item())
    judge = judge_of(folder)
    got = judge(images(), rows())
    assert judge.vision.config.layer_norm_eps == 1e-6  # too little to show in these scores
    assert got.dtype == np.float32 and np.ptp(want) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_image_and_prompt_both_matter(folder):
    judge = judge_of(folder)
    same_image = judge(np.repeat(images(1), 5, 0), rows())
    same_prompt = judge(images(), [rows()[0]] * 5)
    assert np.unique(same_prompt.round(4)).size == 5
    assert np.unique(same_image.round(4)).size == 4  # two prompts are alike


def test_the_heads_of_blips_pretraining_are_not_used(folder, tmp_path):
    state = load_file(folder / "ImageReward.safetensors")
    heads = [name for name in state if re.match(r"blip\.(vision|text)_proj", name)]
    assert len(heads) == 4
    for name in heads:
        del state[name]
    save(tmp_path, state)
    assert np.array_equal(judge_of(tmp_path)(images(), rows()), judge_of(folder)(images(), rows()))


def test_a_row_does_not_depend_on_its_batch(folder):
    batch = judge_of(folder, batch=2)
    whole = batch(images(), rows())
    assert np.array_equal(whole, batch(images(), rows()))
    for i in range(5):
        assert abs(batch(images()[i : i + 1], rows()[i : i + 1])[0] - whole[i]) < 1e-5
    single = judge_of(folder, batch=1)
    order = [3, 0, 4, 1, 2]
    turned = single(images()[order], [rows()[i] for i in order])
    assert np.array_equal(turned, single(images(), rows())[order])
    assert batch(images()[:0], []).shape == (0,)


def test_long_prompts_are_cut_and_logged_once(folder, caplog):
    judge = judge_of(folder)
    with caplog.at_level(logging.WARNING):
        judge(images(), rows())
        judge(images(), rows())
    lines = [r.getMessage() for r in caplog.records if "reads the first" in r.getMessage()]
    assert lines == [f"imagereward reads the first 35 of 62 tokens of: {'q' * 60}"]


def test_a_pickle_is_refused_with_a_command_that_converts_it(folder, tmp_path):
    save(tmp_path, {})
    (tmp_path / "ImageReward.safetensors").unlink()
    torch.save(weights(), tmp_path / "ImageReward.pt")
    with pytest.raises(FileNotFoundError, match=r"ImageReward\.pt is a pickle") as raised:
        judge_of(tmp_path)
    code = re.search(r"<<'END'\n(.*)\nEND$", str(raised.value), re.DOTALL)[1]
    exec(code, {})
    assert np.array_equal(judge_of(tmp_path)(images(), rows()), judge_of(folder)(images(), rows()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("mlp.layers.7.bias"), r"layers\.7\.bias is missing"),
        (
            lambda s: s.update({"mlp.layers.9.bias": torch.zeros(1)}),
            r"layers\.9\.bias is not known",
        ),
        (lambda s: s.update({"clip.x": torch.zeros(1)}), r"'clip\.x' is no tensor of ImageReward"),
        (
            lambda s: s.update({"blip.visual_encoder.blocks.0.gamma": torch.zeros(1)}),
            r"blocks\.0\.gamma' is no tensor of BLIP's image encoder",
        ),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), "have no blip.visual_encoder.pos_embed"),
        (
            lambda s: s.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"),
            r"layer\.1\.crossattention\.self\.key\.weight is missing",
        ),
        (
            lambda s: s.update({"mlp.layers.0.weight": torch.zeros(1024, 9)}),
            r"layers\.0\.weight is \(1024, 9\), wanted \(1024, 48\)",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, words):
    state = weights()
    change(state)
    save(tmp_path, state)
    with pytest.raises(ValueError, match=words):
        judge_of(tmp_path)


def test_a_folder_that_cannot_be_used_says_why(tmp_path):
    save(tmp_path, weights())
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "more", "and", "more2"]))
    with pytest.raises(ValueError, match=r"vocab.txt has \d+ tokens, the model 59"):
        judge_of(tmp_path)
    (tmp_path / "med_config.json").write_text('{"hidden_size": 48}')
    with pytest.raises(ValueError, match=r"med_config\.json lacks intermediate_size, num_hidden"):
        judge_of(tmp_path)
    (tmp_path / "med_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks med_config\.json, which ImageReward wants"):
        judge_of(tmp_path)


def test_bad_rows_and_settings(folder):
    judge = judge_of(folder)
    for row in ({}, {"prompt": " "}, {"prompt": 3}):
        with pytest.raises(ValueError, match="the imagereward judge wants a 'prompt'"):
            judge.check_row(row)
        with pytest.raises(ValueError, match="the imagereward judge wants a 'prompt'"):
            judge(images(1), [row])
    with pytest.raises(ValueError, match="5 images came with 1"):
        judge(images(), rows()[:1])
    for bad in ({"folder": "x"}, {"kind": "imagereward"}, {"kind": "clip", "folder": "x"}):
        with pytest.raises(ValidationError):
            Settings.model_validate(bad)
    assert all(field.description for field in Settings.model_fields.values())
