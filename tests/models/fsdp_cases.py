"""Run by test_fused.py, one process a rank: fused blocks under FSDP2 against the unsharded model.

Every rank has the same inputs, so the mean over ranks is the gradient of one. Tolerance: that of
test_fused.py, for the stock forward; the adapter's own forward is compared with itself unsharded,
from which the mean of two equal gradients is no step away.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from diffusers import QwenImagePipeline
from small_transformers import draw, inputs, inputs21, qwen, qwen21, qwen_parts
from test_fused import CLOSE, assert_close, lora, run
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import qirl_fast
from qirl_fast.distributed import leave
from qirl_fast.models.qwenimage import QwenImage
from qirl_fast.tiny import packaged


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def stock_forward(make: Callable[..., Any], given: dict[str, Any], mesh: Any) -> None:
    """Blocks and model sharded, as diffusers users do: output, gradients, state dict."""
    stock = run(lora(make()), given)
    model = qirl_fast.patch(lora(make()))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(**given, return_dict=False)[0]
    (out * draw(*out.shape, seed=3)).sum().backward()
    found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    inputs = {"hidden_states", "encoder_hidden_states"}
    wanted = {n: t for n, t in stock.items() if n not in inputs}
    assert_close(found | {"out": out.detach()}, wanted, CLOSE)
    after = model.state_dict()
    assert list(after) == list(before), "state dict keys"
    assert all(torch.equal(whole(after[n]), t) for n, t in before.items())


def packed_forward(mesh: Any) -> None:
    """The adapter's of Qwen-Image 1.x: rows of several text lengths, rollout and replay."""
    found = []
    for sharded in (False, True):
        model = QwenImage(QwenImagePipeline(**qwen_parts(packaged("tiny"))))
        named = model.trainable("lora", 4, 8, None, 0)
        with torch.no_grad():
            for k, p in enumerate(named.values()):
                p.copy_(0.05 * draw(*p.shape, seed=k))
        for block in model.transformer.transformer_blocks if sharded else ():
            outside = {*block.img_mod.parameters(), *block.txt_mod.parameters()}  # read before it
            fully_shard(block, mesh=mesh, ignored_params=outside)
        text = [draw(length, 32, seed=length) for length in (5, 9, 5)]
        velocities = []
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                prefix = model.prefix(text, [2, 0, 1, 0], 64, 64)
                velocities.append(model.velocity(draw(4, 16, 16), [0.7, 0.3], prefix))
        rollout, v = velocities
        assert torch.equal(rollout, v)
        (v * draw(*v.shape, seed=3)).sum().backward()
        own = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
        assert list(own) == list(named)
        found.append({"v": v.detach()} | {n: p.grad for n, p in own.items()})
    plain, shared = found
    for name, t in plain.items():
        if t is None:  # the text's, in the last block
            assert shared[name] is None or not whole(shared[name]).any(), name
        else:
            assert torch.equal(whole(shared[name]), t), name


def main(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    try:
        stock_forward(qwen21, inputs21(condition=True), mesh)
        stock_forward(lambda: qwen(zero_cond_t=True), inputs(condition=True), mesh)
        packed_forward(mesh)
    finally:
        leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
