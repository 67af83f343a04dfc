"""`python -m bench fp8`: what fp8 does to a velocity, a log-prob and a trajectory, and its speed.

Errors, against the same model in its own dtype, for every recipe and choice of layers:
    velocity   |v8 - v| / |v| (root mean square) at the recorded states of the model's own rollout
    log-prob   |logp8 - logp| of that rollout's recorded steps: a clip of the ratio is 1e-5 to 1e-3
    drift      |x8 - x| / |x| of the last latents, both rolled out from one noise
    replay     |logp8' - logp8| of fp8's own rollout, replayed in fp8: 0 is what `unified` promises
The tiny model is the packaged, trained one; the others have random weights at the true block shape,
61 and 65 million parameters, and modulation that opens the gates (a fresh model's blocks add next
to nothing, so nothing in them matters). Speed: linear layers at 512 px shapes, quantising included,
and on a GPU a whole step.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.machine import about
from bench.models import MODELS, build
from bench.step import Bench, Clock
from bench.step import Options as StepOptions
from bench.timing import copy_gbps, interleaved
from qirl_fast import ops
from qirl_fast.models.fp8 import Fp8Linear, plan_layers, use_fp8
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, Trajectory, sample
from qirl_fast.tiny import packaged

RECIPES = ("row", "block", "tensor")
PROMPTS = ("a red circle and a blue square", "three yellow triangles", "a green cross")
SHAPES = {"qkv": (3072, 3072), "mlp up": (12288, 3072), "mlp down": (3072, 12288)}
STEPS, GROUP, ETA = 10, 2, 0.7
GATE = 0.5  # spread of a random model's gates


@dataclass
class Options:
    """What `python -m bench fp8` was asked for."""

    device: str = "cpu"
    px: int = 128
    rounds: int = 5
    seconds: float = 20.0
    scale: str = "half"  # of the step on a GPU
    out: Path | None = None


def choices(model: Any) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """(layers, skip) by name, widest first."""
    every = [
        name for name, m in model.transformer.named_modules() if isinstance(m, torch.nn.Linear)
    ]
    mlps = [name for name in model.fp8_layers if "mlp" in name]
    return {
        "every linear layer": (every, ()),
        "the family's": (model.fp8_layers, ()),
        "attention alone": (model.fp8_layers, mlps),
    }


def models(options: Options) -> Iterator[tuple[str, Any, list[Tensor], Tensor, int]]:
    """Name, adapter, embeddings, the empty one, image size."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    tiny = QwenImage21.load(packaged("tiny"), dtype, options.device)
    with torch.no_grad():
        *texts, null = tiny.encode([*PROMPTS, ""])
    yield "tiny", tiny, texts, null, 64
    for name in MODELS:
        torch.manual_seed(0)
        model, encode = build(name, MODELS[name]["cpu"], options.device, dtype)
        with torch.no_grad():
            rows = model.modulations.rows([0.5])[0]
            for layer_name, layer in model.transformer.named_modules():
                if "mod" in layer_name and isinstance(layer, torch.nn.Linear):
                    layer.weight.mul_(GATE / rows.std())
        *texts, null = encode([*PROMPTS, ""])
        yield name, model, texts, null, options.px


class Errors:
    """One model's rollout in its own dtype, and how far fp8 is from it."""

    def __init__(self, model: Any, texts: list[Tensor], null: Tensor, px: int):
        self.model, self.texts, self.null = model, texts, null
        self.how = Sampling(
            height=px,
            width=px,
            steps=STEPS,
            guidance=Guidance(1.5, model.norm_rescaled_guidance, "frozen_offset"),
            dynamics="flow_sde",
            eta=ETA,
        )
        self.recorded = tuple(range(STEPS // 2))  # of high noise, which are trained
        self.own = self.rollout()
        self.velocities = self.replayed(self.own, "velocity")
        self.logp = self.replayed(self.own, "logp")

    def rollout(self) -> Trajectory:
        (chunk,) = sample(
            self.model,
            self.texts,
            self.null,
            self.how,
            dict(self.model.pipeline.scheduler.config),
            group_size=GROUP,
            seed=0,
            update=1,
            recorded=self.recorded,
        )
        return chunk

    @torch.no_grad()
    def replayed(self, chunk: Trajectory, what: str) -> Tensor:
        """[S, ...] of the recorded steps."""
        steps = replay(self.model, chunk, self.how)
        return torch.stack([getattr(step, what).double() for step in steps])

    def under(self, on: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
        with on():
            theirs = self.rollout()
            again = self.replayed(theirs, "logp")
            velocities = self.replayed(self.own, "velocity")
            logp = self.replayed(self.own, "logp")
        by_step = [relative(a, b) for a, b in zip(velocities, self.velocities, strict=True)]
        gap = (logp - self.logp).abs()
        states = zip((*theirs.x, theirs.latents), (*self.own.x, self.own.latents), strict=True)
        drift = [relative(a.double(), b.double()) for a, b in states]
        return {
            "velocity": relative(velocities, self.velocities),
            "velocity_by_step": by_step,
            "logp_mean": gap.mean().item(),
            "logp_max": gap.max().item(),
            "drift": drift[-1],
            "drift_by_step": drift,
            "replay": (again - torch.stack(theirs.logp).double()).abs().max().item(),
        }


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def error_rows(options: Options) -> Iterator[dict[str, Any]]:
    for name, model, texts, null, px in models(options):
        errors = Errors(model, texts, null, px)
        for chosen, (layers, skip) in choices(model).items():
            for recipe in RECIPES:
                row = {
                    "model": name,
                    "recipe": recipe,
                    "layers": chosen,
                    "sigmas": errors.own.sigmas,
                }
                try:
                    plan = plan_layers(model.transformer, layers, skip, recipe, "high")
                except ValueError:  # a block is wider than any layer of the tiny model
                    continue
                sizes = {layer: layer.shape[0] * layer.shape[1] for layer in plan}
                inside = sum(size for layer, size in sizes.items() if layer.fp8)
                fp8 = use_fp8(model.transformer, plan, recipe)
                yield row | {"share": inside / sum(sizes.values())} | errors.under(fp8.on)
                for module in list(model.transformer.modules()):
                    if isinstance(module, Fp8Linear):
                        module.restore()


def linear_rows(options: Options) -> Iterator[dict[str, Any]]:
    """A linear layer on 512 px, image and text: 1152 tokens a sample, four samples on a GPU."""
    cuda = options.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    tokens = 4608 if cuda else 1152
    for name, (out, width) in SHAPES.items():
        x = torch.randn(tokens, width, device=options.device, dtype=dtype)
        weight = torch.randn(out, width, device=options.device, dtype=dtype) / width**0.5
        variants: dict[str, Callable[[], object]] = {"high": lambda x=x, w=weight: F.linear(x, w)}
        for recipe in RECIPES:
            quantized = ops.fp8_quantize(weight, granularity=recipe)
            ready = ops.Quantized(x, *ops.fp8_quantize(x, granularity=recipe))
            for kind, given in (("", x), (", x given in fp8", ready)):
                variants[recipe + kind] = lambda g=given, w=quantized, r=recipe: ops.fp8_linear(
                    g, *w, granularity=r
                )
        times = interleaved(variants, options.rounds, options.device, options.seconds)
        for kind, t in times.items():
            yield {
                "layer": name,
                "shape": [tokens, width, out],
                "kind": kind,
                "ms_p20": t.p20,
                "ms_p50": t.p50,
                "ms_p80": t.p80,
                "speedup_vs_high": times["high"].p50 / t.p50,
            }


def step_rows(options: Options) -> Iterator[dict[str, Any]]:
    """A GRPO step of this package in the model's dtype and with fp8 in rollout and replay."""
    for name in MODELS:
        bench = Bench(StepOptions(model=name, scale=options.scale, px=512, device=options.device))
        model, first = bench.model, None
        for recipe in (None, "row"):
            on: Callable[[], AbstractContextManager[None]] = nullcontext
            if recipe is not None:
                plan = plan_layers(model.transformer, model.fp8_layers, (), recipe, "high")
                on = use_fp8(model.transformer, plan, recipe).on
            best = float("inf")
            for _ in range(3):
                clock = Clock(options.device)
                with on():
                    bench.engine_step(model, clock, "frozen_offset", bench.options.window)
                best = min(best, sum(clock.seconds.values()))
            first = first or best
            yield {"model": name, "fp8": recipe, "seconds": best, "speedup": first / best}


def run(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The result; options.out is rewritten after each row."""
    result: dict[str, Any] = about(options.device) | {"copy_gbps": copy_gbps(options.device)}
    result |= {"settings": {k: v for k, v in asdict(options).items() if k != "out"}}
    parts = {"errors": error_rows, "linear": linear_rows}
    if options.device == "cuda":
        parts = {"linear": linear_rows, "step": step_rows, "errors": error_rows}
    for part, rows in parts.items():
        result[part] = []
        for row in rows(options):
            result[part].append(row)
            say(
                ", ".join(
                    f"{k} {_short(v)}" for k, v in row.items() if not isinstance(v, list | tuple)
                )
            )
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    lines = [
        f"Commit {result['commit'][:12]}, {result['date']}; {machine}.",
        "",
        "| model | layers | share of weights | recipe | velocity | log-prob mean | max | drift | "
        "replay |",
        "|---" * 9 + "|",
    ]
    for r in result["errors"]:
        lines.append(
            f"| {r['model']} | {r['layers']} | {r['share']:.0%} | {r['recipe']} | "
            f"{r['velocity']:.2%} | {r['logp_mean']:.1e} | {r['logp_max']:.1e} | "
            f"{r['drift']:.2%} | {r['replay']:g} |"
        )
    lines += ["", "| linear layer | tokens x in x out | kind | ms | vs high |", "|---" * 5 + "|"]
    for r in result["linear"]:
        shape = " x ".join(map(str, r["shape"]))
        lines.append(
            f"| {r['layer']} | {shape} | {r['kind']} | {r['ms_p50']:.2f} ({r['ms_p20']:.2f} to "
            f"{r['ms_p80']:.2f}) | {r['speedup_vs_high']:.2f}x |"
        )
    if "step" in result:
        lines += ["", "| step | fp8 | seconds | speed-up |", "|---" * 4 + "|"]
        for r in result["step"]:
            lines.append(
                f"| {r['model']} | {r['fp8']} | {r['seconds']:.2f} | {r['speedup']:.2f}x |"
            )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Velocity error and drift over the steps of a rollout, a column a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(r["model"] for r in result["errors"]))
    figure, axes = pyplot.subplots(
        2, len(names), figsize=(4 * len(names), 5), layout="constrained", squeeze=False
    )
    styles = {"row": "-", "block": "--", "tensor": ":"}
    for column, name in enumerate(names):
        rows = [r for r in result["errors"] if r["model"] == name]
        colours = {
            chosen: f"C{i}" for i, chosen in enumerate(dict.fromkeys(r["layers"] for r in rows))
        }
        for r in rows:
            given = {"color": colours[r["layers"]], "linestyle": styles[r["recipe"]]}
            label = f"{r['layers']}, {r['recipe']}"
            for axis, key in zip(
                axes[:, column], ("velocity_by_step", "drift_by_step"), strict=True
            ):
                axis.plot([100 * value for value in r[key]], label=label, **given)
        axes[0, column].set_title(name)
        axes[0, column].set_ylabel("velocity error, %")
        axes[1, column].set_ylabel("drift of the latents, %")
        axes[1, column].set_xlabel("denoising step; last: the end")
    axes[0, -1].legend(fontsize="xx-small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
