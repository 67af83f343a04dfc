"""`patch` on the stock transformers of SD 3.5, FLUX.1, FLUX.2 and Z-Image.

Tolerances. float32: the stock model in float64 is the truth, and the worst of output and all
gradients may be twice as far off as the worst of stock in float32 (5e-7 to 8e-6 of the largest
value, by how sharp the attention of a case is). bfloat16: the truth is float32, and output and
gradients together may be twice as far off as stock's: the error of one gradient is a few rounded
sums, whose ratio to stock's scatters from 0.5 to 4 over seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from small_families import flux, flux2, sd3, zimage
from small_transformers import draw
from test_fused import CLOSE, assert_close, lora
from torch import Tensor

import qirl_fast
from qirl_fast.models.fused import blocks_of, is_patched

FLOATS = {"hidden_states", "encoder_hidden_states", "pooled_projections"}
GUIDED = torch.full((3,), 4.0)
IDS = {"txt_ids": torch.zeros(7, 3), "img_ids": torch.arange(48).view(16, 3)}
IDS4 = {"txt_ids": torch.arange(28).view(7, 4), "img_ids": torch.arange(64).view(16, 4)}


def inputs(
    latents: tuple[int, ...] = (3, 16, 16), text: int = 7, width: int = 32, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_states": draw(*latents),
        "encoder_hidden_states": draw(3, text, width, seed=2),
        "timestep": torch.tensor([0.5, 0.25, 0.125]),  # in bfloat16 too, and 1000 times as much
        **more,
    }


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "sd3": (sd3, lambda: inputs((3, 4, 8, 8), pooled_projections=draw(3, 40))),
    "flux": (flux, lambda: inputs(**IDS, guidance=GUIDED, pooled_projections=draw(3, 24))),
    "flux-schnell": (
        lambda: flux(guidance_embeds=False),
        lambda: inputs(**IDS, pooled_projections=draw(3, 24)),
    ),
    "flux2": (flux2, lambda: inputs(width=48, **IDS4, guidance=GUIDED)),
    "zimage": (zimage, lambda: inputs((3, 4, 1, 8, 8), text=40)),
}


def output(model: Any, given: dict[str, Any]) -> Tensor:
    """What the model gives; Z-Image takes and gives lists, here of texts of several lengths."""
    if not isinstance(model, ZImageTransformer2DModel):
        out: Tensor = model(**given, return_dict=False)[0]
        return out
    texts = [t[:n] for t, n in zip(given["encoder_hidden_states"], (7, 40, 9), strict=True)]
    images = list(given["hidden_states"].unbind())
    return torch.stack(model(images, given["timestep"], texts, return_dict=False)[0])


def run(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Output and the gradient of everything that requires one, inputs included."""
    leaves = {n: given[n].to(model.dtype).requires_grad_() for n in FLOATS & given.keys()}
    out = output(model, given | leaves)
    weight = draw(*out.shape, seed=3).to(model.dtype)
    wanted = leaves | {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((out * weight).sum(), list(wanted.values()), allow_unused=True)
    found = zip(wanted, gradients, strict=True)
    return {"out": out.detach()} | {n: g for n, g in found if g is not None}


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest error of any tensor, relative to its largest value."""
    pairs = [(found[n], t) for n, t in truth.items() if t.any()]
    return max(((a - t).abs().max() / t.abs().max()).item() for a, t in pairs)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", list(CASES))
def test_float32_is_the_stock_model(case: str, adapted: bool) -> None:
    make, given = CASES[case][0], CASES[case][1]()
    model = lora(make()) if adapted else make()
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    truth, stock = run(copy.deepcopy(model).double(), wide), run(model, given)
    assert qirl_fast.patch(model) is model and is_patched(model)
    fused = run(model, given)
    assert not torch.equal(fused["out"], stock["out"]), "the fused blocks did not run"
    assert set(fused) == set(stock) == set(truth)
    assert worst(fused, truth) <= 2 * worst(stock, truth) < 2 * CLOSE
    qirl_fast.unpatch(model)
    assert not is_patched(model)
    assert torch.equal(run(model, given)["out"], stock["out"])


@pytest.mark.parametrize("case", list(CASES))
def test_bfloat16_errs_no_more_than_twice_stock(case: str) -> None:
    model, given = CASES[case][0]().to(torch.bfloat16), CASES[case][1]()
    given = {n: v.bfloat16().float() if n in FLOATS else v for n, v in given.items()}
    truth = run(copy.deepcopy(model).float(), given)
    stock = run(model, given)
    fused = run(qirl_fast.patch(model), given)
    assert fused["out"].dtype == torch.bfloat16 and set(fused) == set(truth)

    def errors(found: dict[str, Tensor]) -> Tensor:
        """Of each tensor, relative to its root mean square."""
        pairs = [(found[n].double(), t.double()) for n, t in truth.items() if t.any()]
        return torch.stack([(a - t).norm() / t.norm() for a, t in pairs])

    ours, theirs = errors(fused), errors(stock)
    assert ours[0] <= 2 * theirs[0] and ours.norm() <= 2 * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_compiled_blocks_have_no_graph_break(case: str) -> None:
    model, given = qirl_fast.patch(lora(CASES[case][0]())), CASES[case][1]()
    plain = run(model, given)
    for block in (blocks_of(model)[0], blocks_of(model)[-1]):
        block.compile(fullgraph=True, backend="aot_eager")
    assert_close(run(model, given), plain, CLOSE)


def with_dropout() -> Any:
    model = flux()
    model.transformer_blocks[1].attn.to_out[1].p = 0.1
    return model


def with_chunks() -> Any:
    model = sd3()
    model.enable_forward_chunking(2)
    return model


def fused_projections() -> Any:
    model = flux2()
    model.fuse_qkv_projections()
    return model


REFUSED = {
    "Stable Diffusion 3.0": (lambda: sd3(qk_norm=None), "block 0 has no RMSNorm on its queries"),
    "chunks": (with_chunks, r"chunked MLP; call disable_forward_chunking\(\)"),
    "dropout": (with_dropout, r"block 1 has dropout 0\.1"),
    "projections": (fused_projections, r"fused projections; call unfuse_qkv_projections\(\)"),
    "no norm": (lambda: zimage(qk_norm=False), "noise_refiner 0 has no RMSNorm"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_fused_is_refused_whole(what: str) -> None:
    make, words = REFUSED[what]
    model = make()
    with pytest.raises(ValueError, match=f"cannot be fused: .*{words}"):
        qirl_fast.patch(model)
    assert not any("forward" in vars(block) for block in blocks_of(model))


def test_what_the_fused_blocks_have_no_place_for_is_refused() -> None:
    model = qirl_fast.patch(flux())
    given = CASES["flux"][1]() | {"joint_attention_kwargs": {"ip_hidden_states": [draw(1, 2, 3)]}}
    with pytest.raises(ValueError, match=r"no joint_attention_kwargs; got \['ip_hidden_states'\]"):
        model(**given)
    omni = qirl_fast.patch(zimage())
    with pytest.raises(ValueError, match="serves no omni mode"):
        omni.layers[0](draw(1, 4, 48), None, draw(4, 8), noise_mask=torch.ones(1, 4))
