"""CLIP-type judges on tiny models saved by the tests, and open_clip's names against its math."""

import json
import logging
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from qirl_fast.rewards.clip import Judge, Settings, padded
from qirl_fast.rewards.open_clip import to_transformers

SIDE, WIDTH, LAYERS, HEADS, DIM, LENGTH = 32, 32, 2, 2, 24, 24
CHARACTERS = [chr(c) for c in range(33, 127)]
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_act": "gelu",
}


def vocabulary():
    words = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def config():
    size = len(vocabulary())
    text = {
        **TOWER,
        "vocab_size": size,
        "max_position_embeddings": LENGTH,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
    }
    vision = {**TOWER, "image_size": SIDE, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)


def save_processor(folder, side=SIDE):
    CLIPTokenizer(vocab=vocabulary(), merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)


def shaken(model):
    """The model with weights large enough for different inputs to give different scores."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("clip")
    shaken(CLIPModel(config())).save_pretrained(where)
    save_processor(where)
    return where


def images(b=5, h=48, w=48):
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (b, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((w, h))) for c in coarse])


def rows(b=5):
    prompts = ["a red cat", "two dogs!", "a house, at night", "x", "a red cat"]
    return [{"prompt": p, "tag": "t"} for p in prompts[:b]]


def judge_of(folder, kind="clip", **more):
    return Judge(Settings(kind=kind, folder=str(folder), **more))


def test_the_score_is_transformers_own_cosine(folder):
    """logits_per_image of CLIPModel, one row at a time, are exp(logit_scale) cos."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)
    want = []
    for image, row in zip(images(), rows(), strict=True):
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        inputs |= pixels(Image.fromarray(image), return_tensors="pt")
        with torch.no_grad():
            want.append(model(**inputs).logits_per_image.item())
    want = np.array(want)
    assert np.ptp(want) > 0.2 * np.abs(want).max()
    scale = math.exp(model.logit_scale.item())
    got = {kind: judge_of(folder, kind)(images(), rows()) for kind in ("clip", "pickscore")}
    np.testing.assert_allclose(got["pickscore"], want, atol=1e-5 * scale)
    np.testing.assert_allclose(got["clip"], want / scale, atol=1e-5)
    assert got["clip"].dtype == np.float32 and (np.abs(got["clip"]) <= 1).all()
    as_flow_grpo = judge_of(folder, "pickscore", divide_by=26.0)(images(), rows())
    np.testing.assert_allclose(as_flow_grpo, got["pickscore"] / 26, rtol=1e-6)


def test_hpsv2_pads_what_the_others_crop(folder):
    wide = images(2, 16, 32)
    black = np.stack([np.pad(image, ((8, 8), (0, 0), (0, 0))) for image in wide])
    hps, clip = judge_of(folder, "hpsv2"), judge_of(folder, "clip")
    assert np.array_equal(hps(wide, rows(2)), clip(black, rows(2)))
    assert np.abs(hps(wide, rows(2)) - clip(wide, rows(2))).max() > 1e-2
    np.testing.assert_allclose(hps(images(), rows()), clip(images(), rows()), atol=1e-6)


@pytest.mark.parametrize("size", [(64, 32), (31, 100), (32, 32), (17, 16), (1000, 2)])
def test_padded(size):
    picture = padded(Image.new("RGB", size, "white"), 32)
    inside = np.asarray(picture).all(2)
    assert picture.size == (32, 32)
    want = [max(1, round(n * 32 / max(size))) for n in size]
    assert [inside.any(0).sum(), inside.any(1).sum()] == want
    top, left = inside.any(1).argmax(), inside.any(0).argmax()
    assert (left, top) == ((32 - want[0]) // 2, (32 - want[1]) // 2)


@pytest.mark.parametrize("kind", ["clip", "pickscore", "hpsv2"])
def test_a_row_does_not_depend_on_its_batch(folder, kind):
    batch = judge_of(folder, kind, batch=2)
    whole = batch(images(), rows())
    assert np.array_equal(whole, batch(images(), rows()))
    most = math.exp(batch.model.logit_scale.item()) if kind == "pickscore" else 1.0
    for i in range(5):
        alone = batch(images()[i : i + 1], rows()[i : i + 1])
        assert abs(alone[0] - whole[i]) < 1e-5 * most
    np.testing.assert_allclose(judge_of(folder, kind)(images(), rows()), whole, atol=1e-5 * most)

    single = judge_of(folder, kind, batch=1)
    order = [3, 0, 4, 1, 2]
    turned = single(images()[order], [rows()[i] for i in order])
    assert np.array_equal(turned, single(images(), rows())[order])
    assert batch(images()[:0], []).shape == (0,)


def test_long_prompts_are_cut_and_each_is_logged_once(folder, caplog):
    judge = judge_of(folder)
    long = "abcdefghij" * 4
    some = [{"prompt": long}, {"prompt": long + "z"}, {"prompt": "q" + long}, {"prompt": "short"}]
    with caplog.at_level(logging.WARNING):
        scores = judge(np.repeat(images(1), 4, 0), some)
        judge(np.repeat(images(1), 4, 0), some)
    lines = [r.getMessage() for r in caplog.records if "reads the first" in r.getMessage()]
    assert lines == [
        f"clip reads the first 24 of 42 tokens of: {long}",
        f"clip reads the first 24 of 43 tokens of: {long}z",
        f"clip reads the first 24 of 43 tokens of: q{long}",
    ]
    assert abs(scores[0] - scores[1]) < 1e-5 < abs(scores[0] - scores[2])


class Block(nn.Module):
    """A pre-norm transformer block under open_clip's names."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)}
        )

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // 8) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Tower()
        self.proj = nn.Parameter(torch.randn(WIDTH, DIM))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """A CLIP with open_clip's names and conventions: x @ projection, one matrix for q, k, v."""

    def __init__(self):
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(len(vocabulary()), WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.transformer = Tower()
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, DIM))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        self.register_buffer("attn_mask", mask)

    def encode_text(self, ids):
        """Read at the end token, the greatest id; padded with 0 as open_clip does."""
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        return x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


def open_clip_folder(where):
    torch.manual_seed(1)
    model = shaken(OpenClip())
    config().save_pretrained(where)
    save_processor(where)
    save_file(model.state_dict(), where / "HPS_v2.1.safetensors")
    return model


def test_an_open_clip_checkpoint_scores_as_its_own_math_does(tmp_path):
    model = open_clip_folder(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = torch.zeros(5, LENGTH, dtype=torch.long)
    for i, row in enumerate(rows()):
        tokens = torch.tensor(tokenizer(row["prompt"])["input_ids"])
        ids[i, : len(tokens)] = tokens
    x = torch.from_numpy(images(5, SIDE, SIDE)).permute(0, 3, 1, 2) / 255
    mean, std = CLIPImageProcessorPil.image_mean, CLIPImageProcessorPil.image_std
    x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        want = torch.cosine_similarity(model.visual(x), model.encode_text(ids))
    got = judge_of(tmp_path, "hpsv2")(images(5, SIDE, SIDE), rows())
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    assert np.ptp(got) > 0.05


def test_open_clip_names_that_are_not_known(tmp_path):
    state = OpenClip().state_dict()
    assert len(to_transformers(state)) == len(CLIPModel(config()).state_dict())
    with pytest.raises(ValueError, match=r"'text\.transformer\.x' is no tensor of an open_clip"):
        to_transformers(state | {"text.transformer.x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"resblocks\.0\.ls_1\.gamma' is no tensor"):
        to_transformers(state | {"visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(1)})


def test_weights_may_be_sharded_half_and_of_an_older_transformers(folder, tmp_path):
    want = judge_of(folder)(images(), rows())
    state = load_file(folder / "model.safetensors")
    keys = sorted(state)
    old = {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}
    save_file({k: state[k] for k in keys[::2]} | old, tmp_path / "model-00001-of-00002.safetensors")
    save_file({k: state[k] for k in keys[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    save_file(state, tmp_path / "open_clip_model.safetensors")
    config().save_pretrained(tmp_path)
    judge = judge_of(tmp_path, processor=str(folder))
    assert np.array_equal(judge(images(), rows()), want)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "x.safetensors")
    half = judge_of(tmp_path, processor=str(folder))
    assert half.model.dtype == torch.float32
    np.testing.assert_allclose(half(images(), rows()), want, atol=5e-3)


def test_a_folder_that_cannot_be_used_says_why(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; wanted the local folder"):
        judge_of(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"lacks config.json, which a CLIP.*holds: nothing"):
        judge_of(tmp_path)
    config().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file$"):
        judge_of(tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lacks preprocessor_config.json"):
        judge_of(tmp_path)
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"holds a\.safetensors, b\.safetensors; call the one"
    ):
        judge_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="'siglip' model; wanted 'clip'"):
        judge_of(tmp_path)


def test_a_pickle_is_refused_with_a_command_that_converts_it(folder, tmp_path, monkeypatch):
    state = load_file(folder / "model.safetensors")
    config().save_pretrained(tmp_path)
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(FileNotFoundError, match=r"HPS_v2\.1_compressed.pt is a pickle") as raised:
        judge_of(tmp_path, processor=str(folder))
    code = re.search(r"<<'END'\n(.*)\nEND$", str(raised.value), re.DOTALL)[1]
    exec(code, {})
    judge = judge_of(tmp_path, processor=str(folder))
    assert np.array_equal(judge(images(), rows()), judge_of(folder)(images(), rows()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("logit_scale"), "logit_scale is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not known"),
        (
            lambda s: s.update({"text_projection.weight": torch.zeros(3, WIDTH)}),
            r"text_projection.weight is \(3, 32\), wanted \(24, 32\)",
        ),
        (
            lambda s: [s.pop(k) for k in sorted(s) if k.startswith("vision_model")],
            "and 35 more; check that",
        ),
    ],
)
def test_weights_that_do_not_fit(folder, tmp_path, change, words):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        judge_of(tmp_path, processor=str(folder))


def test_a_processor_of_another_model(folder, tmp_path):
    save_processor(tmp_path, side=64)
    with pytest.raises(ValueError, match="crops to 64 x 64; the model takes 32 x 32"):
        judge_of(folder, processor=str(tmp_path))
    words = {**vocabulary(), "new": len(vocabulary())}
    CLIPTokenizer(vocab=words, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 191 tokens and ends a text with 189"):
        judge_of(folder, processor=str(tmp_path))


def test_bad_rows_and_images(folder):
    judge = judge_of(folder)
    for row in ({}, {"prompt": ""}, {"prompt": "  "}, {"prompt": 3}):
        with pytest.raises(ValueError, match="wants a 'prompt' that is text"):
            judge.check_row(row)
        with pytest.raises(ValueError, match="wants a 'prompt' that is text"):
            judge(images(1), [row])
    with pytest.raises(ValueError, match="5 images came with 4"):
        judge(images(), rows(4))
    with pytest.raises(ValueError, match="wanted a numpy uint8 array"):
        judge(images().astype(np.float32), rows())


def test_settings():
    for bad in (
        {"folder": "x"},
        {"kind": "clip"},
        {"kind": "blip", "folder": "x"},
        {"kind": "clip", "folder": "x", "divide_by": 0},
        {"kind": "clip", "folder": "x", "batch": 0},
    ):
        with pytest.raises(ValidationError):
            Settings.model_validate(bad)
    assert all(field.description for field in Settings.model_fields.values())
