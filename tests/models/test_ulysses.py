"""Processes that share tokens compute what one does, and their gradients add up to its gradient.

The processes are threads here, whose exchange is a list; real ones are in tests/test_sequence.py.
Attention sees the same tokens in the same order, head by head, so what differs is the order of sums
in matrix products of other heights, and that weights' gradients are added up process by process: of
float32 sums of some hundred terms each. A tenth of CLOSE was seen.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel, QwenImagePipeline
from small_transformers import draw, qwen_parts, randomised
from torch import Tensor

from qirl_fast.models.prefix import Conditioned
from qirl_fast.models.qwenimage import QwenImage
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.models.sequence import Ulysses
from qirl_fast.tiny import packaged

CLOSE = 1e-5
HEADS = 4


class Threads(Ulysses):
    """Ulysses of threads; group: a barrier, and what each sends, by rank."""

    def _exchange(self, pieces: Any, shapes: list[list[Any]]) -> Any:
        barrier, sent = self.group
        sent[self.rank] = [[piece.detach().clone() for piece in own] for own in pieces]
        barrier.wait(60)
        found = [sent[k][self.rank] for k in range(self.size)]
        barrier.wait(60)
        assert [[p.shape for p in own] for own in found] == [
            [torch.Size(shape) for shape in own] for own in shapes
        ]
        return found


def together(size: int, work: Callable[[Ulysses], Any]) -> list[Any]:
    """`work` of each of `size` threads that are a group."""
    barrier, sent = threading.Barrier(size), [None] * size

    def one(rank: int) -> Any:
        try:
            return work(Threads(rank, size, (barrier, sent)))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def qwenimage() -> QwenImage:
    parts = qwen_parts(packaged("tiny"), num_attention_heads=HEADS)
    return QwenImage(QwenImagePipeline(**parts))


def qwenimage21() -> QwenImage21:
    model = QwenImage21.load(packaged("tiny"), torch.float32)
    config = dict(model.transformer.config) | {"num_attention_heads": HEADS, "num_layers": 3}
    transformer = randomised(QwenImage21Transformer2DModel.from_config(config))
    parts = dict(model.pipeline.components) | {"transformer": transformer}
    return QwenImage21(type(model.pipeline)(**parts))


MODELS: dict[str, tuple[Callable[[], Any], int, int]] = {  # and channels of text and latents
    "qwenimage": (qwenimage, 32, 16),
    "qwenimage21": (qwenimage21, 64, 16),
}
ADAPTERS = ("lora", "full")


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, str], Any]:
    return {}


def adapted(made: dict[tuple[str, str], Any], family: str, adapter: str) -> tuple[Any, Any]:
    """The model and its trainable weights, LoRA's B among them not at 0."""
    if (family, adapter) not in made:
        model = MODELS[family][0]()
        trained = model.trainable(adapter, 4, 8.0, None, 0)
        if adapter == "lora":
            with torch.no_grad():
                for k, p in enumerate(trained.values()):
                    p.copy_(0.05 * draw(*p.shape, seed=k))
        made[family, adapter] = model, trained
    return made[family, adapter]


def found_by(model: Any, trained: dict[str, Tensor], family: str, case: str) -> list[Tensor]:
    """The velocity without gradient and with it, and the gradient of a sum over it."""
    _, width, channels = MODELS[family]
    lengths = {"one layout": (7,), "layouts": (5, 3, 5), "short": (1, 2)}[case.split(",")[0]]
    prompts: list[Any] = [draw(n, width, seed=n + k) for k, n in enumerate(lengths)]
    if "images" in case:
        slots = torch.tensor([False, True, True, False, False])
        prompts[0] = Conditioned(prompts[0], slots, draw(8, channels, seed=8), ((2, 4),))
    owner = [k % len(prompts) for k in (2, 0, 1, 0)]
    size = (32, 96) if family == "qwenimage21" else (48, 80)  # 12 tokens and 15
    tokens, _ = model.latent_shape(*size)
    x, velocities = draw(4, tokens, channels), []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            prefix = model.prefix(prompts, owner, *size)
            both = model.join(prefix, model.prefix(prompts[:1], [0] * 4, *size))
            v = model.velocity(torch.cat([x, x]), [0.7], both)
            w = model.velocity(x, [0.3], prefix)
        velocities.append(torch.cat([v, w]))
    loss = (velocities[1] * draw(*velocities[1].shape, seed=3)).sum()
    gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    return [velocities[0], velocities[1].detach(), *gradients]


CASES = [
    ("qwenimage", "lora", 2, "layouts"),
    ("qwenimage", "full", 4, "short"),
    ("qwenimage", "full", 2, "one layout, again"),
    ("qwenimage21", "lora", 2, "layouts"),
    ("qwenimage21", "full", 4, "one layout, again"),
    ("qwenimage21", "full", 2, "layouts, images"),
]


@pytest.mark.parametrize(("family", "adapter", "size", "case"), CASES)
def test_shares_of_the_tokens_add_up(made, family, adapter, size, case) -> None:
    """15 tokens of image, or 12, and 1 to 7 of text: they divide by few sizes, some processes get
    no text. "again": blocks are computed again in backward.
    """
    model, trained = adapted(made, family, adapter)
    wanted = found_by(model, trained, family, case)

    def share(among: Ulysses) -> list[Tensor]:
        own = copy.copy(model)
        own.sequence, own.recompute_blocks = among, 2 if "again" in case else 0
        return found_by(own, trained, family, case)

    found = together(size, share)
    for own in found:
        assert torch.equal(own[0], own[1]), "rollout and replay"
        assert torch.equal(own[0], found[0][0]), "the same for all"
    close(found[0][0], wanted[0], "velocity")
    for k, (name, of_one) in enumerate(zip(trained, wanted[2:], strict=True), start=2):
        close(sum(own[k] for own in found), of_one, name)


def close(found: Any, wanted: Tensor, name: str) -> None:
    far = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    assert far <= CLOSE, (name, far.item())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_heads_and_tokens_are_exchanged_and_nothing_else(size) -> None:
    """Head by head and token by token, for fewer tokens than processes too, and there and back."""
    lengths, heads = (size + 3, size - 1, 5), 2 * size
    whole = [draw(2, n, heads, 3, seed=n) for n in lengths]

    def exchange(among: Ulysses) -> None:
        own = [among.own(t) for t in whole]
        for n, t, mine in zip(lengths, whole, own, strict=True):
            first = sum(among.counts(n)[: among.rank])
            count = among.counts(n)[among.rank]
            assert torch.equal(mine[:, :count], t[:, first : first + count])
        of_heads = among.to_heads(lengths, own)
        for t, mine in zip(whole, of_heads, strict=True):
            assert torch.equal(mine, t[:, :, 2 * among.rank : 2 * among.rank + 2])
            assert torch.equal(mine, among.own_heads(t))
        for n, mine, again in zip(lengths, own, among.to_tokens(of_heads), strict=True):
            sent = among.counts(n)[among.rank] > 0
            assert torch.equal(again, mine if sent else torch.zeros_like(mine))
        for n, t, mine in zip(lengths, whole, own, strict=True):
            leaf = mine.flatten(2).requires_grad_()
            all_of_it = among.whole(leaf, n)
            assert torch.equal(all_of_it, t.flatten(2))
            (gradient,) = torch.autograd.grad(all_of_it.sum(), leaf)
            sent = among.counts(n)[among.rank] > 0
            assert torch.equal(gradient, torch.full_like(gradient, sent)), (
                "its own, not a stand-in's"
            )

    together(size, exchange)


@pytest.mark.parametrize("size", [2, 4])
def test_as_much_is_sent_as_docs_distributed_says(made, size) -> None:
    """q, k, v and the answer in three blocks, for 16 tokens of image and 8 of text; a velocity."""
    model, _ = adapted(made, "qwenimage", "lora")
    tokens, width, channels = 16 + 8, 16 * HEADS, 16

    def sent(among: Ulysses) -> int:
        own, numbers = copy.copy(model), []

        def exchange(pieces: Any, shapes: Any) -> Any:
            others = [of for k, of in enumerate(pieces) if k != among.rank]
            numbers.append(sum(piece.numel() for of in others for piece in of))
            return Threads._exchange(among, pieces, shapes)

        object.__setattr__(among, "_exchange", exchange)
        own.sequence = among
        with torch.no_grad():
            own.velocity(draw(1, 16, 16), [0.7], own.prefix([draw(8, 32)], [0], 64, 64))
        return sum(numbers)

    blocks = 3 * 4 * (size - 1) * tokens * width // size**2
    assert together(size, sent) == [blocks + (size - 1) * 16 // size * channels] * size


def test_a_plan_sends_nothing() -> None:
    among = Ulysses(0, 2, None)
    (x,) = among.to_heads([5], [torch.zeros(1, 2, 4, 3)])
    assert x.shape == (1, 5, 2, 3) and among.to_tokens([x])[0].shape == (1, 2, 4, 3)
