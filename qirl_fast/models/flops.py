"""Model FLOPs: what the matrix products of a transformer's blocks need, counted from shapes.

    forward   2 weights tokens + 4 queries keys width        attention without its mask
    backward  2 weights tokens for the gradient of what goes in, 2 of trained weights for their own,
              twice attention's

A product and a sum are two operations. Left out: embeddings, modulation, norms, text encoder,
autoencoder, judges; and what is computed a second time (train.recompute_blocks), as it adds nothing
to the model's.
"""

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Of the parameters of a block: the text stream's; those of a row and not of its tokens.
TEXT = re.compile(r"(^|\.)(add_[qkv]_proj|to_add_out|txt_mlp|ff_context)\.")
MODULATION = re.compile(r"(^|\.)(img_mod|txt_mod|adaLN_modulation|norm\d?(_context)?\.linear)\.")
OTHERS = re.compile(r"\.lora_[AB]\.(?!default\.)")  # adapters beside the trained one


@dataclass(frozen=True)
class Pass:
    """One row through a block: `image` tokens see its weights (those of the image stream where
    there are two), `text` tokens the text stream's; all of them look at `keys` tokens.
    """

    block: Any
    image: int
    text: int
    keys: int


def flops(passes: Iterable[Pass]) -> tuple[int, int]:
    """(forward, backward) of the passes together."""
    forward = backward = 0
    for one in passes:
        attn = one.block.attn if hasattr(one.block, "attn") else one.block.attention
        attention = 4 * (one.image + one.text) * one.keys * attn.inner_dim
        if getattr(one.block, "attn2", None) is not None:  # the image's own (SD 3.5 Medium)
            attention += 4 * one.image**2 * attn.inner_dim
        forward += attention
        backward += 2 * attention
        for name, weight in one.block.named_parameters():
            if weight.ndim < 2 or MODULATION.search(name) or OTHERS.search(name):
                continue
            product = 2 * weight.numel() * (one.text if TEXT.search(name) else one.image)
            forward += product
            backward += product * (1 + weight.requires_grad)
    return forward, backward


class Work:
    """`done`: model FLOPs so far; threads may add."""

    def __init__(self) -> None:
        self.done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count these."""
        with self._lock:
            self.done += count
