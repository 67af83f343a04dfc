"""Transformer Engine under a transformer's linear layers.

Every contract is tested on a stand-in for the package, which has TE's signatures, its refusals and
its weight cache, and rounds to FP8 on the CPU; and, marked gpu, on the real one where it is
installed. The stand-in follows transformer_engine 2.20; a test compares the signatures.

Tolerance. e4m3 keeps three bits of a mantissa: a rounding errs by 2.6 % in the root of the mean
square, a product of two rounded matrices by 3.7 %, so between 2 and 6 % show that FP8 ran and ran
right; bfloat16 errs by 0.2 %. A transformer of two layers adds up to twice that.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qirl_fast
from qirl_fast import ops
from qirl_fast.models.fp8 import plan_layers, te, use_fp8
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, sample

WIDTH = 128
PERMITTED = (0.02, 0.06)


# ---- the stand-in -------------------------------------------------------------------------------
@dataclass
class Recipe:
    """Base of the recipes; the real ones have more settings, all with defaults."""


class DelayedScaling(Recipe):
    pass


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class State:
    """FP8GlobalStateManager: what is on, and the tensors whose scales a region's end moves."""

    on, recipe, depth = False, None, 0
    histories: list[dict[str, Any]] = []  # noqa: RUF012 - reset by the fixture
    block = (True, "")


class autocast:
    def __init__(
        self, enabled: bool = True, calibrating: bool = False, recipe: Recipe | None = None
    ) -> None:
        self.enabled, self.recipe = enabled, recipe

    def __enter__(self) -> autocast:
        self.before = State.on, State.recipe
        State.on, State.recipe = self.enabled, self.recipe
        State.depth += 1
        return self

    def __exit__(self, *_: Any) -> None:
        State.on, State.recipe = self.before
        State.depth -= 1
        if self.enabled and State.depth == 0 and torch.is_grad_enabled():
            for history in State.histories:
                for name, now in history["now"].items():
                    history["seen"][name] = max(history["seen"].get(name, 0.0), now)
                    if history["seen"][name] > 0:
                        history["scale"][name] = history["seen"][name] / 448
                history["now"] = {}


def is_fp8_available(return_reason: bool = False) -> Any:
    return (True, "") if return_reason else True


def is_fp8_block_scaling_available(return_reason: bool = False) -> Any:
    return State.block if return_reason else State.block[0]


def rounded(x: Tensor, granularity: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    q, scale = ops.fp8_quantize(x.detach(), granularity=granularity, dtype=dtype)
    if granularity == "block":
        scale = scale.repeat_interleave(128, dim=-1)[..., : x.shape[-1]]
    return (q.float() * scale).to(x.dtype)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, q_x, held, recipe):
        ctx.save_for_backward(q_x, held["data"])
        ctx.held, ctx.recipe, ctx.with_bias = held, recipe, bias is not None
        return F.linear(q_x, held["data"], bias)

    @staticmethod
    def backward(ctx, g):
        if not ctx.held["columns"]:
            raise RuntimeError("Cannot generate FP8 data, even from FP8 data transpose")
        q_x, q_weight = ctx.saved_tensors
        block = isinstance(ctx.recipe, Float8BlockScaling)
        kind = torch.float8_e4m3fn if block else torch.float8_e5m2
        g = rounded(g, "block" if block else "tensor", kind)
        return g @ q_weight, g.T @ q_x, g.sum(0) if ctx.with_bias else None, None, None, None


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        given = {"dtype": params_dtype or torch.get_default_dtype(), "device": device}
        self.use_bias = bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **given))
        self.bias = nn.Parameter(torch.empty(out_features, **given)) if bias else Tensor()
        self.cached: dict[str, Any] | None = None
        self.counted = 0  # quantisations of the weight
        self.history: dict[str, Any] = {"now": {}, "seen": {}, "scale": {}}

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        for name, p in self.named_parameters():
            if p.dtype != inp.dtype:
                raise TypeError(f"Found input dtype: {inp.dtype} and {name!r} dtype: {p.dtype}")
        bias = self.bias if self.use_bias else None
        if not State.on:
            return F.linear(inp, self.weight, bias)
        for t in (inp, self.weight):
            if t.shape[:-1].numel() % 8 or t.shape[-1] % 16:
                raise ValueError(
                    "FP8 execution requires the product of all dimensions except the last to be"
                    f" divisible by 8 and the last by 16, but got tensor with dims={list(t.size())}"
                )
        columns = torch.is_grad_enabled() and inp.requires_grad
        held = None if is_first_microbatch is None else self.cached
        # Only the per-tensor recipes look whether a cached weight has what this call needs.
        block = isinstance(State.recipe, Float8BlockScaling)
        if held and columns and not (held["columns"] or block):
            held = None
        if held is None or is_first_microbatch:
            held = {"data": self._round("weight", self.weight), "columns": columns}
            self.counted += 1
            if is_first_microbatch is not None:
                self.cached = held
        q_x = self._round("input", inp)
        return Product.apply(inp, self.weight, bias, q_x, held, State.recipe)

    def _round(self, name: str, x: Tensor) -> Tensor:
        if isinstance(State.recipe, DelayedScaling):
            if self.history not in State.histories:
                State.histories.append(self.history)
            now, scale = self.history["now"], self.history["scale"].get(name, 1.0)
            now[name] = max(now.get(name, 0.0), x.detach().abs().max().item())
            fp8 = (x.detach() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            return (fp8.float() * scale).to(x.dtype)
        return rounded(x, "block" if isinstance(State.recipe, Float8BlockScaling) else "tensor")


STAND_IN = (Linear, autocast, is_fp8_available, is_fp8_block_scaling_available)
RECIPE_CLASSES = (DelayedScaling, Float8CurrentScaling, Float8BlockScaling)


def module(name: str, members: tuple[Any, ...] = ()) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, is_package=True)
    made.__path__ = []
    vars(made).update({member.__name__: member for member in members})
    return made


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    State.on, State.recipe, State.depth, State.histories = False, None, 0, []
    for name, members in {
        "transformer_engine": (),
        "transformer_engine.pytorch": STAND_IN,
        "transformer_engine.common": (),
        "transformer_engine.common.recipe": RECIPE_CLASSES,
    }.items():
        monkeypatch.setitem(sys.modules, name, module(name, members))


def real() -> Any:
    try:
        return te.require()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the tests run, and with which package."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
        yield "cpu"
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    real()
    yield "cuda"


@pytest.fixture(params=list(te.RECIPES))
def recipe(request: pytest.FixtureRequest, device: str) -> str:
    if device == "cuda" and request.param == "block":
        runs, why = te.require().is_fp8_block_scaling_available(return_reason=True)
        if not runs:
            pytest.skip(why)
    return request.param


# ---- models -------------------------------------------------------------------------------------
def draw(*size: int, seed: int = 1, device: str = "cpu") -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return values.to(device, torch.bfloat16)


COMMON = {
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": WIDTH // 32,
    "axes_dims_rope": (8, 12, 12),
}


def qwen21(device: str) -> Any:
    return randomised(
        QwenImage21Transformer2DModel(in_channels=16, out_channels=16, context_in_dim=32, **COMMON),
        device,
    )


def qwen(device: str) -> Any:
    return randomised(
        QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, joint_attention_dim=32, **COMMON
        ),
        device,
    )


def randomised(model: Any, device: str) -> Any:
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        with torch.no_grad():
            p.copy_(("norm" in name) + 0.2 * noise if p.ndim == 1 else noise / p.shape[1] ** 0.5)
    return qirl_fast.patch(model.requires_grad_(False).eval().to(device, torch.bfloat16))


MODELS = {"qwenimage": qwen, "qwenimage21": qwen21}


def inputs(kind: str, device: str) -> dict[str, Any]:
    given: dict[str, Any] = {
        "hidden_states": draw(3, 16, 16, device=device),
        "encoder_hidden_states": draw(3, 7, 32, seed=2, device=device),
        "timestep": torch.tensor([0.9, 0.4, 0.05], device=device, dtype=torch.bfloat16),
        "img_shapes": [[(1, 4, 4)]] * 3,
    }
    if kind == "qwenimage21":
        given["img_mask"] = torch.tensor([[False] * 7 + [True] * 4] * 3, device=device)
    return given


def layers_of(model: nn.Module) -> list[str]:
    """The plan's choice, more or less: the blocks' layers but for modulation."""
    return [
        name
        for name, layer in model.named_modules()
        if "transformer_blocks" in name
        and type(layer) is nn.Linear
        and not any(part in name for part in ("_mod", "lora_"))
    ]


def velocity(model: Any, given: dict[str, Any]) -> Tensor:
    return model(**given, return_dict=False)[0]


def error(found: Tensor, wanted: Tensor) -> float:
    """Root of the mean square, relative."""
    found, wanted = found.float(), wanted.float()
    return ((found - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def one_layer(device: str = "cpu") -> nn.Sequential:
    """A frozen layer by the name "0"."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 256)).to(device, torch.bfloat16).requires_grad_(False)


@pytest.fixture
def layer(device: str) -> nn.Sequential:
    return one_layer(device)


# ---- contracts ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(MODELS))
def test_state_dicts_are_the_stock_ones_both_ways(device: str, kind: str) -> None:
    stock, model = MODELS[kind](device), MODELS[kind](device)
    te.convert(model, layers_of(model), "current")
    with te.autocast(model, True), torch.no_grad():
        velocity(model, inputs(kind, device))
    assert list(model.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    stock.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(stock.state_dict(), strict=True)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_transformer_runs_in_fp8_inside_the_region_alone(
    device: str, recipe: str, kind: str
) -> None:
    model, given = MODELS[kind](device), inputs(kind, device)
    with torch.no_grad():
        stock = velocity(model, given)
        te.convert(model, layers_of(model), recipe)
        outside = velocity(model, given)
        with te.autocast(model, True):
            inside = velocity(model, given)
            with te.autocast(model, False):
                switched_off = velocity(model, given)
        after = velocity(model, given)
    assert torch.equal(outside, stock)
    assert torch.equal(switched_off, stock) and torch.equal(after, stock)
    assert PERMITTED[0] / 2 < error(inside, stock) < 2 * PERMITTED[1]
    te.restore(model)
    assert not [m for m in model.modules() if isinstance(m, te.TeLinear)]
    with torch.no_grad():
        assert torch.equal(velocity(model, given), stock)


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_rollout_has_the_bits_of_its_replay(device: str, kind: str) -> None:
    """Evaluation without gradients, in inference mode, training with gradients: one function."""
    model, given = MODELS[kind](device), inputs(kind, device)
    te.convert(model, layers_of(model), "current")
    outputs = []
    with te.autocast(model, True):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                outputs.append(velocity(model.eval(), given).clone())
    with te.autocast(model, True):
        x = given["hidden_states"].requires_grad_()
        outputs.append(velocity(model.train(), given).detach())
    assert x.requires_grad
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("size", [(1,), (7,), (8,), (16,), (17,), (2, 3), (2, 2, 8), ()])
def test_any_number_of_rows(device: str, recipe: str, layer: Any, size: tuple[int, ...]) -> None:
    """Zeros beside the rows change nothing: the same values as for the rows among 32."""
    layer.requires_grad_(True)
    te.convert(layer, ["0"], recipe)
    x = draw(*size, WIDTH, device=device).requires_grad_()
    stock = F.linear(x, layer[0].weight, layer[0].bias)
    with te.autocast(layer, True):
        out = layer(x)
    assert out.shape == stock.shape and out.dtype == stock.dtype
    assert PERMITTED[0] < error(out.detach(), stock.detach()) < PERMITTED[1]
    weight = draw(*out.shape, seed=3, device=device)
    wanted = [x, layer[0].weight, layer[0].bias]
    gradients = torch.autograd.grad((out * weight).sum(), wanted)
    truth = torch.autograd.grad((stock * weight).sum(), wanted)
    # e5m2 keeps two bits: gradients are rounded to twice the error; a bias sums what is rounded.
    for found, right in zip(gradients, truth, strict=True):
        assert error(found, right) < 2 * PERMITTED[1]
    assert error(gradients[1], truth[1]) > PERMITTED[0]


def test_no_rows_at_all(device: str, layer: Any) -> None:
    te.convert(layer, ["0"], "current")
    with te.autocast(layer, True):
        assert layer(draw(2, 0, WIDTH, device=device)).shape == (2, 0, 256)


def test_a_weight_cached_without_gradients_serves_training(
    device: str, recipe: str, layer: Any
) -> None:
    """TE's own cache holds what the first call needed, and its block recipe does not look again."""
    te.convert(layer, ["0"], recipe)
    x = draw(16, WIDTH, device=device)
    with te.autocast(layer, True), torch.no_grad():
        layer(x)
    with te.autocast(layer, True):
        layer(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_run_rolls_out_and_replays_through_it(
    stand_in: None, make_model: Any, lora_first: bool
) -> None:
    model = make_model()
    if lora_first:
        model.trainable("lora", 4, 8, None, 0)
    plan = plan_layers(model.transformer, model.fp8_layers, (), "tensor", "high")
    switch = use_fp8(model.transformer, plan, "tensor", library="te")
    if not lora_first:
        model.trainable("lora", 4, 8, None, 0)
    how = Sampling(64, 64, 3, Guidance(1.5, False, "frozen_offset"), "flow_sde", max_rows=2)
    *texts, null = model.encode(["a red circle", ""])

    def rollout() -> Any:
        config = dict(model.pipeline.scheduler.config)
        options: dict[str, Any] = {"group_size": 2, "seed": 0, "update": 1, "recorded": (0, 1)}
        return next(iter(sample(model, texts, null, how, config, **options)))

    plain = rollout()
    with switch.on():
        chunk = rollout()
        for step in replay(model, chunk, how):
            assert torch.equal(step.logp, step.logp_old)
    assert 0.001 < error(chunk.latents, plain.latents) < 0.2
    assert torch.equal(rollout().latents, plain.latents)


def changed_in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.mul_(-0.5)  # larger ones would be cut at a delayed scale


def exchanged(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data * -0.5


def loaded(layer: nn.Module) -> None:
    layer.load_state_dict({n: -0.5 * t for n, t in layer.state_dict().items()})


def replaced(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight * -0.5, requires_grad=False)


@pytest.mark.parametrize("change", [changed_in_place, exchanged, loaded, replaced])
def test_a_changed_weight_is_quantised_again(
    device: str, recipe: str, layer: Any, change: Callable[[Any], None]
) -> None:
    te.convert(layer, ["0"], recipe)
    x = draw(16, WIDTH, device=device)
    with te.autocast(layer, True), torch.no_grad():
        before = layer(x)
        change(layer[0])
        after = layer(x)
        stock = F.linear(x, layer[0].weight, layer[0].bias)
    assert error(after, stock) < PERMITTED[1] < error(before, stock)


@pytest.mark.parametrize(("trained", "quantised"), [(False, 1), (True, 4)])
def test_frozen_weights_are_quantised_once(stand_in: None, trained: bool, quantised: int) -> None:
    layer, x = one_layer().requires_grad_(trained), draw(16, WIDTH)
    te.convert(layer, ["0"], "block")
    for grad in (False, True, False, True):
        with te.autocast(layer, True), torch.set_grad_enabled(grad):
            layer(x)
    assert layer[0].engine.counted == quantised


def test_delayed_scales_move_with_regions_in_grad_mode(stand_in: None) -> None:
    """Weights are scaled from the first; inputs, whose scale is 1 then, by what was trained."""
    layer, small = one_layer(), draw(16, WIDTH) * 2**-9
    te.convert(layer, ["0"], "delayed")
    stock = F.linear(small, layer[0].weight)
    layer[0].bias.zero_()
    errors = []
    for grad in (False, False, True, False):
        with torch.set_grad_enabled(grad), te.autocast(layer, True):
            errors.append(error(layer(small), stock))
    assert errors[0] == errors[1] == errors[2] > 3 * PERMITTED[1]
    assert PERMITTED[0] < errors[3] < PERMITTED[1]


def test_delayed_weights_are_scaled_before_the_first_region(stand_in: None) -> None:
    layer, x = one_layer(), draw(16, WIDTH)
    layer[0].weight.mul_(2**-6)
    layer[0].bias.zero_()
    te.convert(layer, ["0"], "delayed")
    with torch.no_grad(), te.autocast(layer, True):
        assert PERMITTED[0] < error(layer(x), F.linear(x, layer[0].weight)) < PERMITTED[1]


def test_a_region_is_left_as_it_was_found(stand_in: None) -> None:
    layer, x = one_layer(), draw(16, WIDTH)
    te.convert(layer, ["0"], "current")
    stock = layer(x)
    with pytest.raises(KeyError), te.autocast(layer, True):
        raise KeyError
    assert torch.equal(layer(x), stock) and not State.on
    with te.autocast(layer, True):
        with te.autocast(layer, False):
            pass
        assert not torch.equal(layer(x), stock)


def test_a_copy_has_weights_of_its_own(device: str, layer: Any) -> None:
    te.convert(layer, ["0"], "current")
    x = draw(16, WIDTH, device=device)
    with te.autocast(layer, True):
        ours = layer(x)
    other = copy.deepcopy(layer)
    assert "engine" not in vars(other[0])
    changed_in_place(other[0])
    other[0].bias.mul_(-0.5)
    with te.autocast(other, True):
        theirs = other(x)
    with te.autocast(layer, True):
        assert torch.equal(layer(x), ours)
    assert torch.equal(theirs, -0.5 * ours)


@pytest.mark.parametrize("inside", [True, False])
def test_activations_computed_again_belong_inside(device: str, layer: Any, inside: bool) -> None:
    te.convert(layer, ["0"], "current")
    x = draw(16, WIDTH, device=device).requires_grad_()
    with te.autocast(layer, True):
        (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
        loss = checkpoint(lambda x: layer(x).square(), x, use_reentrant=False).sum()
        if inside:
            assert torch.equal(torch.autograd.grad(loss, x)[0], wanted)
    if not inside:
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            loss.backward()


@pytest.mark.parametrize("convert_first", [True, False])
@pytest.mark.parametrize("kind", list(MODELS))
def test_adapters_train_over_fp8_layers(device: str, kind: str, convert_first: bool) -> None:
    """The loss of a few steps falls, the base stays as it was, names are those of a stock model."""
    stock, model, given = MODELS[kind](device), MODELS[kind](device), inputs(kind, device)
    base = copy.deepcopy(model.state_dict())
    targets = ["attn.to_q", "attn.to_v", "attn.to_out.0"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    stock.add_adapter(config)
    if convert_first:
        te.convert(model, layers_of(model), "current")
    model.add_adapter(config)
    if not convert_first:
        te.convert(model, layers_of(model), "current")
    assert list(model.state_dict()) == list(stock.state_dict())
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(adapters, lr=0.01)
    target = draw(3, 16, 16, seed=5, device=device)
    losses = []
    for _ in range(6):
        with te.autocast(model, True):
            out = velocity(model, given)[:, -16:]
            loss = (out - target[..., : out.shape[-1]]).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    kept = {n.replace(".base_layer", ""): p for n, p in model.state_dict().items()}
    assert all(torch.equal(kept[n], t) for n, t in base.items())
    with torch.no_grad():
        plain = velocity(model, given)
        with te.autocast(model, True):
            assert PERMITTED[0] / 2 < error(velocity(model, given), plain) < 2 * PERMITTED[1]


# ---- refusals -----------------------------------------------------------------------------------
REFUSED = {
    "missing": (["0", "1"], "current", "1 is missing"),
    "another": (["0", "2.norm"], "current", r"2\.norm is LayerNorm and no nn\.Linear"),
    "narrow": (["0", "2.odd"], "current", r"2\.odd maps 24 -> 32 channels and FP8 takes multiples"),
    "none": ([], "current", "no layers are named"),
    "recipe": (["0"], "rowwise", "recipe 'rowwise': use current, block, delayed"),
    "device": (["0"], "block", "recipe 'block' does not run here: CUDA >= 12.9"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_converted_is_refused_whole(stand_in: None, what: str, monkeypatch) -> None:
    layers, recipe, words = REFUSED[what]
    monkeypatch.setattr(State, "block", (False, "CUDA >= 12.9"))
    model = one_layer()
    parts = nn.ModuleDict({"norm": nn.LayerNorm(16), "odd": nn.Linear(24, 32)})
    model.add_module("2", parts)
    with pytest.raises(ValueError, match=words):
        te.convert(model, layers, recipe)
    assert type(model[0]) is nn.Linear and not te.is_converted(model)


def test_a_region_and_a_second_conversion_say_what_is_wanted(stand_in: None) -> None:
    layer = one_layer()
    with pytest.raises(ValueError, match=r"Sequential has no layers .*: convert first"):
        te.autocast(layer, True).__enter__()
    te.convert(layer, ["0"], "current")
    with pytest.raises(ValueError, match=r"0 is TeLinear .*; it is converted already"):
        te.convert(layer, ["0"], "current")


def test_a_missing_package_is_named_with_its_installation(monkeypatch) -> None:
    class Nowhere:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "transformer_engine":
                raise ModuleNotFoundError(name=name)

    for name in [n for n in sys.modules if n.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    with pytest.raises(ImportError, match=r"needs that package: pip install .*bench/te\.sh"):
        te.convert(one_layer(), ["0"], "current")


def test_a_package_without_the_present_names_is_too_old(stand_in: None, monkeypatch) -> None:
    monkeypatch.delattr(sys.modules["transformer_engine.pytorch"], "autocast")
    with pytest.raises(ImportError, match="too old"):
        te.require()


BROKEN = """
import importlib.util, sys
sys.path.insert(0, {folder!r})
import qirl_fast
spec = importlib.util.spec_from_file_location("te", {source!r})
te = importlib.util.module_from_spec(spec)
sys.modules["te"] = te
spec.loader.exec_module(te)
try:
    te.require()
except ImportError as error:
    print(error)
"""


def test_a_broken_package_is_not_touched_before_it_is_asked_for(tmp_path: Path) -> None:
    """Then the cause is named, whatever it is. The file alone: PEFT imports what it finds."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    cause = "Could not find shared object file for Transformer Engine torch lib."
    (package / "__init__.py").write_text(f"raise FileNotFoundError({cause!r})")
    code = BROKEN.format(folder=str(tmp_path), source=te.__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"broken: FileNotFoundError: {cause}" in done.stdout


# ---- the real package ---------------------------------------------------------------------------
def test_the_stand_in_has_the_signatures_of_the_package() -> None:
    """No device is needed; each parameter by name, kind and default, in their order."""
    package = real()
    recipes = importlib.import_module("transformer_engine.common.recipe")
    for ours in (*STAND_IN, Linear.forward, Linear.get_extra_state, *RECIPE_CLASSES):
        names = ours.__qualname__.split(".")
        theirs = getattr(recipes if ours in RECIPE_CLASSES else package, names[0])
        for name in names[1:]:
            theirs = getattr(theirs, name)
        expected = inspect.signature(theirs).parameters
        for name, parameter in inspect.signature(ours).parameters.items():
            assert name in expected, f"{ours.__qualname__}({name})"
            assert expected[name].kind == parameter.kind
            assert expected[name].default == parameter.default
    for theirs in (getattr(recipes, name) for name in te.RECIPES.values()):
        theirs()
