"""FP8 in the transformer: the layers, which of them, and what a run does with them.

Oracle of a layer: `ops.fp8_linear`, which has its own tests. Of a model there is none to the last
bits: a sum in another order may round to another fp8 number, so errors against the model's own
dtype are held between bounds instead. Each operand of a product is off by 2.6 % rms (e4m3fn has
three bits), so a layer by about 3.7 %.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from small_transformers import draw, inputs, inputs21, qwen, qwen21
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qirl_fast
from qirl_fast import ops
from qirl_fast.config import ConfigError, load_config
from qirl_fast.memory import SavedTensors, fp8_plan, plan
from qirl_fast.models import fp8 as fp8_module
from qirl_fast.models.adapter import NotFinite
from qirl_fast.models.compiled import CompiledForward
from qirl_fast.models.fp8 import Fp8Linear, describe, plan_layers, use_fp8
from qirl_fast.models.fused.qwenimage import packed_forward
from qirl_fast.models.graphs import ForwardGraphs
from qirl_fast.models.qwenimage import QwenImage
from qirl_fast.models.qwenimage21 import LORA_TARGETS, QwenImage21
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, sample
from qirl_fast.rollouts import best_and_worst
from qirl_fast.train import main

TARGETS = {"2.1": QwenImage21.fp8_layers, "1.x": QwenImage.fp8_layers}
RECIPES = ("row", "block", "tensor")
HEADS = 8  # of 16: width 128, a block


FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "2.1": (qwen21, inputs21),
    "1.x": (qwen, inputs),
}


def make(family: str, **changes: Any) -> Any:
    """A small patched transformer of a family."""
    given = {"num_attention_heads": HEADS} | changes
    return qirl_fast.patch(FAMILIES[family][0](**given)).requires_grad_(False)


def convert(model: Any, family: str, recipe: str = "row", backward: str = "high") -> Any:
    layers = plan_layers(model, TARGETS[family], (), recipe, backward)
    return use_fp8(model, layers, recipe, backward)


def forward(model: Any, family: str) -> Tensor:
    out: Tensor = model(**FAMILIES[family][1](), return_dict=False)[0]
    return out


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


class Calls(TorchDispatchMode):
    """Counts the calls of this package's ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name().removeprefix("qirl::")] += 1
        return func(*args, **(kwargs or {}))


# ---- a layer ------------------------------------------------------------------------------------
def layer(recipe: str = "row", backward: str = "high") -> tuple[Fp8Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(128, 256).requires_grad_(False)
    ours = Fp8Linear.convert(copy.deepcopy(plain), recipe, backward)
    ours.in_fp8 = True
    return ours, plain


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backward", ["high", "fp8"])
def test_a_layer_is_fp8_linear(recipe: str, backward: str) -> None:
    ours, plain = layer(recipe, backward)
    x, theirs = draw(2, 5, 128).requires_grad_(), draw(2, 5, 128).requires_grad_()
    expected = ops.fp8_linear(
        theirs,
        *ops.fp8_quantize(plain.weight, granularity=recipe),
        plain.bias,
        granularity=recipe,
        weight=plain.weight,
        weight_t=ops.fp8_quantize(plain.weight, granularity=recipe, transpose=True),
        grad="fp8" if backward == "fp8" else "bf16",
    )
    out = ours(x)
    assert torch.equal(out, expected)
    for y in (out, expected):
        y.square().sum().backward()
    assert torch.equal(x.grad, theirs.grad)
    assert 0.005 < relative(out, plain(x)) < 0.06


def test_off_a_layer_is_the_plain_one() -> None:
    ours, plain = layer()
    ours.in_fp8 = False
    x = draw(5, 128)
    assert torch.equal(ours(x), plain(x))
    quantized = ops.Quantized(x, *ops.fp8_quantize(x))
    assert torch.equal(ours(quantized), plain(x))
    restored = ours.restore()
    assert type(restored) is nn.Linear and vars(restored).keys() == vars(plain).keys()


def halve(ours: Fp8Linear) -> None:
    with torch.no_grad():
        ours.weight.mul_(0.5)


def exchange(ours: Fp8Linear) -> None:
    ours.weight.data = ours.weight.data * 0.5


def put(ours: Fp8Linear) -> None:
    ours.weight = nn.Parameter(ours.weight.detach() * 0.5, requires_grad=False)


def load(ours: Fp8Linear) -> None:
    ours.load_state_dict(
        {k: v * (0.5 if k == "weight" else 1) for k, v in ours.state_dict().items()}
    )


@pytest.mark.parametrize("change", [halve, exchange, put, load])
def test_a_changed_weight_is_quantised_again_and_no_other(change: Callable[..., None]) -> None:
    ours, plain = layer(backward="fp8")
    x = draw(5, 128)
    before = ours(x)
    held = [t for pair in ours.quantized() for t in pair]
    kept = [t.clone() for t in held]
    with Calls() as calls:
        assert torch.equal(ours(x), before)
    assert not calls.count["fp8_quantize"]
    change(ours)
    after = ours(x)
    now = [t for pair in ours.quantized() for t in pair]
    assert [t.data_ptr() for t in now] == [t.data_ptr() for t in held]
    assert torch.equal(now[1], kept[1] / 2) and torch.equal(now[3], kept[3] / 2)
    # Half a weight is the same fp8 number at half the scale.
    torch.testing.assert_close(after - plain.bias, (before - plain.bias) / 2)


def test_a_trained_weight_is_refused() -> None:
    ours, _ = layer()
    ours.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weight is frozen.*requires grad.*model\.adapter=lora"):
        ours(draw(5, 128))
    with torch.no_grad():
        ours(draw(5, 128))


def test_zero_rows_give_the_bias_and_infinite_ones_nothing_else() -> None:
    ours, plain = layer()
    with torch.no_grad():
        ours.weight[3] = 0
    x = draw(5, 128)
    x[1], x[2, 7] = 0, float("inf")
    out = ours(x)
    assert torch.equal(out[1], plain.bias)
    assert torch.equal(out[[0, 1, 3, 4], 3], plain.bias[3].expand(4))
    assert bool(out[2].isnan().all()) and bool(out[[0, 1, 3, 4]].isfinite().all())


# ---- a transformer ------------------------------------------------------------------------------
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_planned_layer_runs_in_fp8_and_norms_quantise_for_it(family, recipe) -> None:
    model = make(family)
    expected = forward(model, family)
    switch = convert(model, family, recipe)
    assert torch.equal(forward(model, family), expected)  # off
    with switch.on(), Calls() as calls:
        found = forward(model, family)
    assert 0.005 < relative(found, expected) < 0.15
    layers = sum(isinstance(m, Fp8Linear) for m in model.modules())
    assert calls.count["fp8_linear"] == layers
    with switch.on():
        forward(model, family)
        with Calls() as calls:
            assert torch.equal(forward(model, family), found)
    # The weights are ready now: what is quantised apart from the ops is what "tensor" cannot fuse.
    inputs_of_several = {"2.1": 3, "1.x": 5}[family] * 2
    assert calls.count["fp8_quantize"] == (inputs_of_several if recipe == "tensor" else 0)
    assert torch.equal(forward(model, family), expected)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_weights_are_quantised_once_for_all_regions(family: str) -> None:
    model = make(family)
    switch = convert(model, family)
    with switch.on():
        found = forward(model, family)
    with Calls() as calls, switch.on():
        assert torch.equal(forward(model, family), found)
    assert not calls.count["fp8_quantize"]
    # Through .data no version counts: the sum of the bits tells, and of this layer alone.
    changed = next(m for m in model.modules() if isinstance(m, Fp8Linear))
    version = changed.weight._version
    changed.weight.data[1, 2] *= 2
    assert changed.weight._version == version
    with Calls() as calls, switch.on():
        assert not torch.equal(forward(model, family), found)
    assert calls.count["fp8_quantize"] == 1


def test_a_merged_adapter_is_seen_at_the_next_region() -> None:
    model = make("2.1")
    switch = convert(model, "2.1")
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(LORA_TARGETS)))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = draw(*p.shape, seed=len(name)) * 0.05
    with switch.on(), torch.no_grad():
        apart = forward(model, "2.1")
    model.fuse_lora()
    with switch.on(), Calls() as calls, torch.no_grad():
        merged = forward(model, "2.1")
    assert calls.count["fp8_quantize"] == sum(isinstance(m, Fp8Linear) for m in model.modules())
    assert 0 < relative(merged, apart) < 0.15  # the update is in fp8 now, too


@pytest.mark.parametrize("family", list(FAMILIES))
def test_parameters_names_and_state_dicts_stay(family: str) -> None:
    model, plain = make(family), make(family)
    parameters = dict(model.named_parameters())
    switch = convert(model, family)
    assert dict(model.named_parameters()) == parameters
    with switch.on():
        forward(model, family)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("first", ["fp8", "lora"])
@pytest.mark.parametrize("backward", ["high", "fp8"])
def test_lora_trains_on_top_whichever_came_first(first: str, backward: str) -> None:
    def adapted(model: Any) -> None:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(LORA_TARGETS))
        torch.manual_seed(1)
        model.add_adapter(config)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = draw(*p.shape, seed=len(name)) * 0.05

    def gradients(model: Any) -> dict[str, Tensor]:
        (forward(model, "2.1") * draw(3, 23, 8, seed=3)).sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, model = make("2.1"), make("2.1")
    adapted(plain)
    if first == "lora":
        adapted(model)
    switch = convert(model, "2.1", backward=backward)
    if first == "fp8":
        adapted(model)
    expected = gradients(plain)
    with switch.on():
        found = gradients(model)
        plain_forward = forward(model, "2.1")
        with torch.no_grad():
            assert torch.equal(forward(model, "2.1"), plain_forward)  # rollout is replay
    assert found.keys() == expected.keys() and len(found) == 28
    whole = [torch.cat([g.flatten() for g in grads.values()]) for grads in (found, expected)]
    assert 0.001 < relative(*whole) < 0.2


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("unloaded", [True, False])
def test_merged_adapters_are_quantised_with_the_weight(patched: bool, unloaded: bool) -> None:
    model = make("2.1")
    if not patched:
        qirl_fast.unpatch(model)
    config = LoraConfig(r=4, lora_alpha=99, target_modules=["attn.to_v"], init_lora_weights=False)
    model.add_adapter(config)
    switch = convert(model, "2.1")
    with torch.no_grad():
        exact = forward(model, "2.1")
        with switch.on():
            apart = forward(model, "2.1")
        model.fuse_lora()
        if unloaded:
            model.unload_lora()
        with switch.on():
            merged = forward(model, "2.1")
        assert relative(apart, exact) < 0.1 and relative(merged, exact) < 0.1
        if not unloaded:
            model.disable_adapters()
            assert relative(forward(model, "2.1"), exact) > 0.15  # the adapter counts


def test_compiles_without_graph_break() -> None:
    model = make("2.1")
    switch = convert(model, "2.1")
    block = model.transformer_blocks[0]
    x, rows = draw(2, 16, 128), draw(2, 512, seed=2)
    compiled = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    with switch.on(), torch.no_grad():
        assert torch.equal(compiled(x, rows), block(x, rows))
        for p in block.parameters():
            p.mul_(0.9)
        assert torch.equal(compiled(x, rows), block(x, rows))


FSDP = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, {tests!r})
from test_fp8 import convert, forward, make
from qirl_fast.distributed import leave
dist.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
plain, model = make("2.1"), make("2.1")
switches = [convert(m, "2.1") for m in (plain, model)]
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
for block in model.transformer_blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
for _ in range(2):
    with switches[0].on(), switches[1].on():
        assert torch.equal(forward(model, "2.1"), forward(plain, "2.1"))
    for m in (plain, model):
        for p in m.parameters():
            with torch.no_grad():
                p.mul_(0.9)
leave()
"""


def test_fsdp2_quantises_what_it_gathers(tmp_path: Path) -> None:
    code = FSDP.format(tests=str(Path(__file__).parent), store=tmp_path / "s")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_multiplies_in_fp8(monkeypatch, recipe: str) -> None:
    seen: list[torch.dtype] = []
    for module, name in ((torch, "_scaled_mm"), (torch.nn.functional, "scaled_mm")):
        real = getattr(module, name)

        def multiply(a: Tensor, *args: Any, real: Any = real, **options: Any) -> Tensor:
            seen.append(a.dtype)
            return real(a, *args, **options)

        monkeypatch.setattr(module, name, multiply)
    model = make("2.1").to("cuda", torch.bfloat16)
    given = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs21().items()}
    given = {k: v.bfloat16() if k.endswith("hidden_states") else v for k, v in given.items()}
    expected = model(**given, return_dict=False)[0]
    switch = convert(model, "2.1", recipe)
    with switch.on():
        found = model(**given, return_dict=False)[0]
    assert seen == [torch.float8_e4m3fn] * 14
    assert 0.005 < relative(found, expected) < 0.15


# ---- which layers -------------------------------------------------------------------------------
def planned(family: str, **changes: Any) -> dict[str, str]:
    """Layer -> why it is not in fp8, '' where it is."""
    options = {"layers": TARGETS[family], "skip": (), "recipe": "row", "backward": "high"}
    found = plan_layers(make(family), **(options | changes))
    return {layer.name: layer.why for layer in found}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_default_leaves_what_is_sensitive_alone(family: str) -> None:
    found = planned(family)
    inside = {name for name, why in found.items() if not why}
    assert all(name.startswith("transformer_blocks.") for name in inside)
    assert not any("mod" in name or "norm" in name or "embed" in name for name in inside)
    outside = {"2.1": set(), "1.x": {"img_mlp.net.2", "img_mod.1", "txt_mod.1"}}[family]
    blocks = {n.partition(".")[2].partition(".")[2] for n in found if "blocks" in n} - {""}
    assert blocks - {n.split(".", 2)[2] for n in inside} == outside


def test_what_does_not_fit_is_said() -> None:
    found = planned("2.1", skip=("attn.to_q",))
    assert found["transformer_blocks.0.attn.to_q"] == "skipped by name"
    thin = qwen21(attention_head_dim=12, axes_dims_rope=(4, 4, 4), num_attention_heads=4)
    narrow = plan_layers(thin, ["attn.to_q", "proj_out"], (), "row", "high")
    whys = {layer.name.split(".", 2)[-1]: layer.why for layer in narrow}
    assert whys["attn.to_q"] == "" and whys["proj_out"] == "no multiples of 16"
    said = " ".join(describe(narrow, "row").split())
    assert "transformer_blocks.{0-1}.attn.to_q 48 x 48 fp8 row" in said
    assert "proj_out 8 x 48 the model's dtype: no multiples of 16" in said
    assert planned("2.1", layers=["attn.to_q", "img_in"], recipe="block")["img_in"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ["attn.to_qq"]}, r"layers \['attn\.to_qq'\] match no.*it has .*attn\.to_q, "),
        ({"skip": ["mlp.up"]}, r"skip \['mlp\.up'\] match no"),
        ({"layers": ["img_in"]}, r"no layer can run in it:\n.*img_in .*no multiples of 16"),
    ],
)
def test_a_plan_that_plans_nothing_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        planned("2.1", **options)


@pytest.mark.parametrize(
    ("name", "capability", "recipe", "words"),
    [
        ("NVIDIA A100", (8, 0), "row", r"A100 is sm_80.*sm_89 and above.*model\.fp8=null$"),
        ("NVIDIA L40S", (8, 9), "block", r"L40S is sm_89.*only sm_90.*or recipe=row"),
        ("NVIDIA B200", (10, 0), "block", r"B200 is sm_100.*only sm_90"),
    ],
)
def test_gpus_without_fp8_are_refused(monkeypatch, name, capability, recipe, words) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    with pytest.raises(ValueError, match=words):
        fp8_module.require_device(torch.device("cuda"), recipe)


def test_what_use_fp8_does_not_know_is_refused() -> None:
    model = make("2.1")
    layers = plan_layers(model, TARGETS["2.1"], (), "row", "high")
    with pytest.raises(ValueError, match="backward 'bf16': use high or fp8"):
        use_fp8(model, layers, backward="bf16")
    with pytest.raises(ValueError, match="'delayed': library 'native' has row, block, tensor"):
        use_fp8(model, layers, "delayed")
    with pytest.raises(ValueError, match="no layer of this plan is in fp8"):
        use_fp8(model, [layer for layer in layers if not layer.fp8])
    monkey = pytest.MonkeyPatch()
    monkey.setattr(torch.version, "cuda", "12.8")
    with monkey.context(), pytest.raises(ValueError, match=r"'block' needs CUDA 12\.9.*has 12\.8"):
        fp8_module.require_device(torch.device("cuda"), "block")
    monkey.undo()


def test_packed_texts_are_quantised_once(weights) -> None:
    """Qwen-Image's rows of different text lengths share the linear layers, and their input."""
    block = make("1.x").transformer_blocks[0]
    switch = convert(nn.ModuleDict({"b": block}), "1.x")
    rope = torch.ones(16, 8, dtype=torch.complex64)
    texts = (draw(1, 7, 128), draw(2, 5, 128))
    given = (draw(3, 16, 128), texts, draw(3, 768), draw(3, 768, seed=2), rope)
    ropes = tuple(torch.ones(t.shape[1], 8, dtype=torch.complex64) for t in texts)
    with torch.no_grad():
        plain, _ = packed_forward(block, *given, ropes)
        with switch.on():
            packed_forward(block, *given, ropes)
            with Calls() as calls:
                found, _ = packed_forward(block, *given, ropes)
    assert calls.count["fp8_quantize"] == 1  # of the texts' q, k and v
    assert calls.count["fp8_linear"] == 11
    assert 0.001 < relative(found, plain) < 0.1


def test_only_plain_layers_are_converted_and_all_or_none() -> None:
    class Other(nn.Linear):
        pass

    model = make("2.1")
    layers = plan_layers(model, TARGETS["2.1"], (), "row", "high")
    model.transformer_blocks[1].attn.to_q.__class__ = Other
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.to_q \(Other\)"):
        use_fp8(model, layers)
    assert not any(isinstance(m, Fp8Linear) for m in model.modules())


# ---- an adapter ---------------------------------------------------------------------------------
HOW = Sampling(
    height=64,
    width=64,
    steps=4,
    guidance=Guidance(1.5, False, "frozen_offset"),
    dynamics="flow_sde",
    max_rows=4,
)


def rolled_out(model: QwenImage21, prompts: Any, **changes: Any) -> list[Any]:
    with torch.no_grad():
        *texts, null = model.encode([*prompts[:2], ""])
    scheduler = dict(model.pipeline.scheduler.config)
    options: dict[str, Any] = {"group_size": 4, "seed": 0, "update": 1, "recorded": (0, 1)}
    return list(sample(model, texts, null, HOW, scheduler, **(options | changes)))


@pytest.mark.parametrize("recipe", ["row", "tensor"])
def test_a_rollout_in_fp8_is_its_replay_to_the_bit(make_model, prompts, recipe: str) -> None:
    model = make_model()
    model.trainable("lora", 4, 8, None, 0)
    for p in model.transformer.parameters():
        if p.requires_grad:
            p.data = draw(*p.shape) * 0.05
    own = rolled_out(model, prompts)
    layers = plan_layers(model.transformer, LORA_TARGETS, (), recipe, "high")
    with use_fp8(model.transformer, layers, recipe).on():
        for chunk, other in zip(rolled_out(model, prompts), own, strict=True):
            assert 0.001 < relative(chunk.latents, other.latents) < 0.2
            for step in replay(model, chunk, HOW):
                assert torch.equal(step.logp, step.logp_old)


def test_chosen_samples_are_those_of_the_whole_group(frozen_model, prompts) -> None:
    whole = torch.cat([chunk.latents for chunk in rolled_out(frozen_model, prompts)])
    chosen = [0, 3, 4, 6]
    (chunk,) = rolled_out(frozen_model, prompts, samples=chosen)
    assert chunk.prompts.owner == (0, 0, 1, 1)
    torch.testing.assert_close(chunk.latents, whole[chosen], rtol=1e-4, atol=1e-4)


def test_kept_modulation_knows_fp8(make_model) -> None:
    model = make_model()
    layers = plan_layers(model.transformer, ["modulation.1", "attn.to_q"], (), "row", "high")
    switch = use_fp8(model.transformer, layers)
    plain = model.modulations.rows([0.5])[0]
    with switch.on():
        assert not torch.equal(model.modulations.rows([0.5])[0], plain)
    assert torch.equal(model.modulations.rows([0.5])[0], plain)


def test_graphs_know_fp8_and_its_weights(make_model, prompts) -> None:
    model = make_model()
    switch = use_fp8(
        model.transformer, plan_layers(model.transformer, LORA_TARGETS, (), "row", "high")
    )
    recorded: list[Tensor] = []

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorded.append(run())
        return (lambda: None), recorded[-1]

    model.denoiser = ForwardGraphs(model.transformer, model.forward, capture)
    with torch.no_grad():
        prefix = model.prefix(model.encode(prompts[:1]), [0], 64, 64)
        x = draw(1, 16, 16)

        def call() -> Tensor:
            return model.velocity(x, [0.5], prefix)

        plain = call()
        with switch.on():
            in_fp8 = call()
            assert not torch.equal(in_fp8, plain) and torch.equal(call(), in_fp8)
            assert len(recorded) == 2
            for _ in range(8):  # numbers and scales stay where the recorded graph reads them
                model.transformer.transformer_blocks[0].attn.to_q.weight.mul_(1.1)
                call()
                assert len(recorded) == 2
            assert not torch.equal(model.forward(*recorded_call(model, x, prefix)), in_fp8)


def test_compiled_blocks_know_fp8(make_model, prompts) -> None:
    """On, off and on again: two compilations, each to rounding the eager numbers.

    In fp8 a sum in another order may round a value to its neighbour, 2^-4 of it away; of some
    hundred summed products few do.
    """
    model = make_model()
    switch = use_fp8(
        model.transformer, plan_layers(model.transformer, LORA_TARGETS, (), "row", "high")
    )
    model.denoiser = CompiledForward(model.transformer, model.forward, "aot_eager")
    found = []
    with torch.no_grad():
        prefix = model.prefix(model.encode(prompts[:1]), [0], 64, 64)
        for on in (False, True, False, True):
            with switch.on() if on else nullcontext():
                args = (draw(1, 16, 16), [0.5], prefix)
                quick, eager = (model.velocity(*args, exact) for exact in (False, True))
            assert (quick - eager).abs().max() <= (2e-3 if on else 3e-6) * eager.abs().max()
            found.append(eager)
    assert model.denoiser.compiled == 2 and not torch.equal(found[0], found[1])


def recorded_call(model: QwenImage21, x: Tensor, prefix: Any) -> tuple[Any, ...]:
    return x, model.modulations.rows([0.5]), prefix


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_become_no_image(frozen_model, bad: float) -> None:
    latents = torch.zeros(3, 16, 16)
    latents[1, 2, 3] = bad
    with pytest.raises(NotFinite, match="not finite in 1 of 3 rows") as found:
        frozen_model.decode(latents, 64, 64)
    assert found.value.row == 1


# ---- a run --------------------------------------------------------------------------------------
UNIFIED = "model.fp8={mode: unified}"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("high", ()),
        ("fp8", ("model.fp8.backward=fp8",)),
        ("bfloat16", ("model.dtype=bfloat16",)),
        ("tensor", ("model.fp8.recipe=tensor", "rollout.ratio_mode=full")),
    ],
)
def test_unified_has_a_ratio_of_one(finished, read_jsonl, name: str, settings: Any) -> None:
    folder = finished(f"unified-{name}", UNIFIED, "algorithm.kl_weight=0.1", *settings)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["pre_update_ratio_error"] for row in rows] == [0, 0]
    assert all(row["grad_norm"] > 0 for row in rows)
    plain = read_jsonl(finished("plain") / "metrics.jsonl")
    assert rows[0]["reward"] != plain[0]["reward"]  # of eight images: some differ to the eye
    assert "transformer_blocks.{0-3}.attn.to_q" in (folder / "log.txt").read_text()


def test_a_resumed_run_in_fp8_ends_alike(finished, start, small, tmp_path, read_jsonl) -> None:
    settings = [*small, UNIFIED, f"output={tmp_path}", "run=cut", "resume=auto"]
    for steps in (1, 2):
        run = start([*settings, f"train.steps={steps}"])
        assert run.wait() == 0, run.output()
    whole = finished("unified-whole", UNIFIED)
    assert read_jsonl(tmp_path / "cut" / "metrics.jsonl") == read_jsonl(whole / "metrics.jsonl")


def test_corrected_scores_the_rollout_again(finished, read_jsonl) -> None:
    folder = finished("corrected", "model.fp8={mode: corrected}")
    unified = read_jsonl(finished("unified-whole", UNIFIED) / "metrics.jsonl")
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["pre_update_ratio_error"] for row in rows] == [0, 0]
    assert all(1e-6 < row["fp8/logp_gap"] < 0.1 for row in rows)
    assert rows[0]["reward"] == unified[0]["reward"]  # the same images
    assert rows[0]["grad_norm"] != unified[0]["grad_norm"]


def test_explore_trains_on_the_best_and_worst_drawn_again(finished, read_jsonl) -> None:
    folder = finished("explore", "model.fp8={mode: explore, keep: 2}", "rollout.group_size=6")
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["pre_update_ratio_error"] for row in rows] == [0, 0]
    assert all({"explored/reward", "explored/alignment"} <= row.keys() for row in rows)
    assert all(0 < row["explored/score_gap"] < 0.1 for row in rows)
    dry = load_config(["model.fp8={mode: explore, keep: 10}"])
    assert fp8_plan(dry) and plan(dry)["images"] == 8 * 10 * 64 * 64 * 3


def test_best_and_worst() -> None:
    value = torch.tensor([3.0, 1, 2, 0, 5, 4, 7, 7, 7, 7, 7, 7])
    assert best_and_worst(value, 2, 2) == [3, 4, 6, 11]
    assert best_and_worst(torch.tensor([1.0, 1, 1, 0]), 1, 2) == [2, 3]
    assert best_and_worst(value, 2, 4) == [1, 3, 4, 5, 6, 7, 10, 11]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.fp8={recipe: row}"], r"fp8\.mode: required.*'unified', 'explore', 'corrected'"),
        (["model.fp8={mode: rollout}"], r"fp8\.mode: got 'rollout'"),
        ([UNIFIED, "model.adapter=full"], r"model\.fp8: fp8 weights are frozen.*'full'"),
        ([UNIFIED, "model.fp8.recipe=delayed"], r"recipe: got 'delayed'; with library 'native' "),
        ([UNIFIED, "model.fp8.library=te"], r"got 'row'; with library 'te' allowed: block, tensor"),
        (
            [UNIFIED, "model.fp8={library: te, recipe: delayed}"],
            r"'delayed' scales change from call to call.*no ratio of 1",
        ),
        (
            ["model.fp8={mode: corrected, library: te, recipe: delayed}"],
            r"'delayed' with rollout\.guidance=1\.5.*stateful_scales=true",
        ),
        ([UNIFIED, "model.fp8.recipe=tensor", "train.replay_steps=2"], r"'tensor' depends on the"),
        (["model.fp8={mode: explore}"], r"fp8\.keep: got None with mode 'explore'; wanted an even"),
        ([UNIFIED, "model.fp8.layers=[]"], r"fp8\.layers: got \[\]"),
        ([UNIFIED, "model.fp8.stateful_scales=true"], r"scales of 'row' have no state"),
        (
            ["model.fp8={mode: corrected, backward: fp8}"],
            r"backward: got 'fp8', and mode 'corrected' trains without fp8",
        ),
        (
            [UNIFIED, "model.fp8={library: te, recipe: tensor}"],
            r"backward: got 'high', and Transformer Engine's backward is always in fp8",
        ),
        ([UNIFIED, "model.fp8.keep=4"], r"fp8\.keep: got 4 with mode 'unified'; wanted null"),
        (["model.fp8={mode: explore, keep: 30}"], r"keep: got 30 of .*group_size 30.*2 to 28"),
        (["model.fp8={mode: explore, keep: 3}"], r"fp8\.keep: got 3"),
    ],
)
def test_settings_that_contradict_each_other(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(settings)


def test_dry_run_lists_every_layer(capsys, weights: Path) -> None:
    assert main(["--dry-run", UNIFIED, "model.fp8.skip=[img_mlp.out]"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "transformer_blocks.{0-3}.attn.to_k 96 x 96 fp8 row" in said
    assert "img_mlp.out 96 x 288 the model's dtype: skipped by name" in said
    assert "weights in fp8" in said
    assert main(["--dry-run", UNIFIED, "model.fp8.skip=[mlp]"]) == 2
    assert "error: fp8 skip ['mlp'] match no linear layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((UNIFIED, "model.fp8.layers=[attn.q]"), r"layers \['attn\.q'\] match no linear layer"),
        (
            (UNIFIED, "model.fp8={library: te, recipe: tensor, backward: fp8}"),
            "FP8 by Transformer Engine needs",
        ),
    ],
)
def test_a_run_that_cannot_be_leaves_nothing(start, small, tmp_path, settings, words) -> None:
    run = start([*small, *settings, f"output={tmp_path}", "run=none"])
    assert run.wait() == 2 and words.replace("\\", "") in run.output().replace("\n", " ")
    assert not (tmp_path / "none").exists()


POISON = """
import dataclasses
import qirl_fast.rollouts as module
inner = module.sample_then
def poisoned(then, *args, **options):
    def bad(chunk):
        chunk.latents[1 if chunk.rows.start else 0, 0, 0] = float("nan")
        return then(chunk)
    return inner(bad if options["update"] == 2 else then, *args, **options)
module.sample_then = poisoned
"""


def test_a_rollout_that_is_not_finite_stops_the_run(start, small, tmp_path: Path) -> None:
    run = start([*small, f"output={tmp_path}", "run=bad", UNIFIED], hook=POISON)
    assert run.wait() == 1
    assert re.search(
        r"step 2 is stopped.*rollout: row 0 \(.*latents are not finite in 1 of 8", run.output()
    )
    assert (tmp_path / "bad" / "failed" / "step-2" / "batch.npz").exists()


EVALUATION = """
import qirl_fast.evaluation.heldout as module
inner = module.sample_then
def poisoned(then, *args, **options):
    def bad(chunk):
        chunk.latents[1] = float("inf")
        return then(chunk)
    return inner(bad, *args, **options)
module.sample_then = poisoned
"""


def test_held_out_images_that_are_not_finite_stop_the_run(start, small, tmp_path: Path) -> None:
    run = start([*small, f"output={tmp_path}", "run=bad"], hook=EVALUATION)
    assert run.wait() == 1
    assert "stopped: held-out images: latents are not finite in 1 of 4 rows" in run.output()


def test_the_planner_counts_what_fp8_keeps(make_model) -> None:
    settings = ["model.lora={rank: 8, alpha: 16}", "rollout.max_rows=8"]
    plain = plan(load_config(settings))
    cfg = load_config([*settings, UNIFIED, "model.fp8.backward=fp8"])
    found = plan(cfg)
    sizes = [layer.shape[0] * layer.shape[1] for layer in fp8_plan(cfg) if layer.fp8]
    assert found["weights in fp8"] == 2 * sum(sizes)
    # Weights and inputs of the base are not saved where they are not needed.
    assert 0.9 < found["activations of replay"] / plain["activations of replay"] < 1.1


def test_saved_for_backward(make_model) -> None:
    """fp8 keeps no activation of its own: what LoRA needs of x is kept as before."""
    saved = []
    for wanted in (False, True):
        model = make_model()
        model.trainable("lora", 4, 8, None, 0)
        layers = plan_layers(model.transformer, LORA_TARGETS, (), "row", "fp8")
        switch = use_fp8(model.transformer, layers, backward="fp8")
        prefix = model.prefix([draw(9, 64)], [0], 64, 64)
        with switch.on():
            held = [*model.transformer.parameters(), *switch.weights()]
        with SavedTensors(held) as kept:
            if wanted:
                with switch.on():
                    alive = model.velocity(draw(1, 16, 16), [0.5], prefix)
            else:
                alive = model.velocity(draw(1, 16, 16), [0.5], prefix)
        saved.append(kept.bytes)
        del alive
    assert saved[1] <= 1.05 * saved[0]


def test_the_example_in_the_docs_runs(capsys) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "fp8.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    exec(compile(example, "docs/fp8.md", "exec"), {})
    assert "transformer_blocks.{0-3}.attn.to_q" in capsys.readouterr().out
