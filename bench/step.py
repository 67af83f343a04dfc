"""`python -m bench step`: one GRPO step by phase, from the loop the field runs to this package's.

The weights are random, at the block shapes of the true model; at `--scale cpu` with fewer layers
and heads, 61 to 65 million parameters. Rows, in order: `stock` is bench/baselines/stock.py; each
`+` row adds one thing to the row above; `all` is this package's own rollout and replay, with
guidance out of the objective; the row above it, with both branches in the objective, still computes
what `stock` computes. `peak_bytes`: the most that training held in tensors beyond what was there
before it.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qirl_fast
from bench.baselines import stock
from bench.machine import about
from bench.models import HEAD_DIM, MODELS, TEXT_WIDTH, build
from bench.timing import copy_gbps, peak_bytes
from qirl_fast import ops
from qirl_fast.algorithms import Policy, grpo
from qirl_fast.models.prefix import Conditioned
from qirl_fast.rewards import aesthetics
from qirl_fast.rollout.dynamics import step_coefficients
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, coefficient_tensors, sample
from qirl_fast.rollout.schedule import make_sigmas
from qirl_fast.rollout.workers import Workers

PHASES = (
    *("encode", "rollout", "decode", "reward"),
    *("advantage", "replay_forward", "backward", "optimizer"),
)


@dataclass
class Options:
    """What `python -m bench step` was asked for."""

    model: str = "qwen-image-2.1"
    scale: str = "cpu"
    px: int = 128
    device: str = "cpu"
    steps: int = 10
    window: int = 2
    group: int = 8
    text_tokens: int = 128
    condition_px: int = 0
    guidance: float = 4.0
    eta: float = 0.7
    rank: int = 32
    repeats: int = 1
    out: Path | None = None


@dataclass
class Clock:
    """Seconds of each phase of one step."""

    device: str
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class FusedStep(stock.Loop):
    """The stock loop with noise, log-probability and loss from `qirl_fast.ops`."""

    def coefficients(self, sigma: float, sigma_next: float) -> list[Tensor]:
        k = step_coefficients("flow_sde", sigma, sigma_next, eta=self.eta, sigma_max=self.sigmas[1])
        return coefficient_tensors(k, self.group, self.text.device)

    def step(
        self, x: Tensor, v: Tensor, sigma: float, sigma_next: float, x_next: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        a, c, s, w, b = self.coefficients(sigma, sigma_next)
        if x_next is None:
            seeds = torch.randint(2**62, (self.group,), device=x.device)
            return ops.flow_step(x, v, a, c, s, w, b, seed=seeds, offset=0)
        return x_next, ops.flow_logp(x, x_next, v, a, c, w, b)

    def loss(self, step: stock.Recorded, advantage: Tensor) -> Tensor:
        v = self.velocity(step.x, step.sigma)
        _, logp = self.step(step.x, v, step.sigma, step.sigma_next, step.x_next)
        loss = ops.policy_loss(
            logp, step.logp, advantage, clip_low=self.clip, clip_high=self.clip
        ).loss
        return loss / len(self.recorded)


class Plain:
    """The adapter without its newer gains: branches and steps one by one, modulation for every row.

    dual: branches and steps of a forward together.
    """

    def __init__(self, model: Any, dual: bool):
        self._model, self._dual = model, dual

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def join(self, *prefixes: Any) -> Any:
        return self._model.join(*prefixes) if self._dual else prefixes

    def velocity(
        self, x: Tensor, sigma: Sequence[float], prefix: Any, exact: bool = True
    ) -> Tensor:
        if isinstance(prefix, tuple):
            levels = [sigma] * 2 if len(sigma) == 1 else [sigma[:1], sigma[1:]]
            parts = zip(x.chunk(2), levels, prefix, strict=True)
            return torch.cat([self.velocity(*part) for part in parts])
        by_row = torch.tensor(sigma, device=x.device).repeat_interleave(len(x) // len(sigma))
        return self._model.velocity(x, by_row, prefix)


class Bench:
    """The model, its adapter's weights and optimizer, and a step of every row."""

    def __init__(self, options: Options):
        self.options = o = options
        torch.manual_seed(0)
        dtype = torch.float32 if o.device == "cpu" else torch.bfloat16
        self.model, self._encode = build(o.model, MODELS[o.model][o.scale], o.device, dtype)
        self.two_stream = o.model == "qwen-image"
        if self.two_stream and o.condition_px:
            raise ValueError("--condition-px serves qwen-image-2.1, whose prefix holds the image")
        self.named = self.model.trainable("lora", o.rank, o.rank, None, 0)
        self.trainable = list(self.named.values())
        with torch.no_grad():
            for p in self.trainable:
                p.normal_(std=0.02)
        self.optimizer = torch.optim.AdamW(self.trainable, lr=0.0)
        side = o.condition_px // 16
        self.condition, self.slots = None, torch.empty(0, TEXT_WIDTH, device=o.device, dtype=dtype)
        if side:
            channels = self.model.transformer.config.in_channels
            self.condition = torch.randn(side**2, channels, device=o.device, dtype=dtype)
            self.slots = torch.randn(side**2 // 4, TEXT_WIDTH, device=o.device, dtype=dtype)
        self.prompt = "a photo of a red circle and a blue square"
        while len(self._encode([self.prompt])[0]) < o.text_tokens:
            self.prompt += ", a photo of a green triangle and a yellow circle"
        self.encode()
        tokens, _ = self.model.latent_shape(o.px, o.px)
        self.grid = (o.px // 16, o.px // 16)
        self.tokens = tokens
        self.scheduler = dict(self.model.pipeline.scheduler.config)
        self.train: Callable[[Clock], None] = lambda clock: None  # the last step's training
        self.sigmas = [float(s) for s in make_sigmas(o.steps, tokens, self.scheduler)]

    def encode(self) -> None:
        """The prompt, of `text_tokens`, and the empty one; slots of the condition image first."""
        text, null = self._encode([self.prompt, ""])
        text = text[: self.options.text_tokens]
        self.text, self.null = (torch.cat([self.slots, each]) for each in (text, null))

    def rows(self) -> dict[str, tuple[bool, Callable[[Clock], None]]]:
        """Name -> (whether the blocks are fused, the step)."""
        model, steps = self.model, self.options.window
        shared = "+ no padding" if self.two_stream else "+ shared prefix"
        return {
            "stock": (False, lambda clock: self.loop_step(stock.Loop, clock)),
            "+ fused step": (False, lambda clock: self.loop_step(FusedStep, clock)),
            "+ fused blocks": (True, lambda clock: self.loop_step(FusedStep, clock)),
            shared: (True, lambda clock: self.engine_step(Plain(model, False), clock)),
            "+ dual forward": (True, lambda clock: self.engine_step(Plain(model, True), clock)),
            "+ kept modulation": (True, lambda clock: self.engine_step(model, clock)),
            "+ batched replay": (True, lambda clock: self.engine_step(model, clock, "full", steps)),
            "all": (True, lambda clock: self.engine_step(model, clock, "frozen_offset", steps)),
        }

    def loop_step(self, kind: type[stock.Loop], clock: Clock) -> None:
        o = self.options
        with clock.phase("encode"):
            self.encode()
        loop = kind(
            transformer=self.model.transformer,
            text=self.text,
            null=self.null,
            grid=self.grid,
            group=o.group,
            sigmas=self.sigmas,
            window=range(o.window),
            scale=o.guidance,
            eta=o.eta,
            condition=self.condition,
        )
        with clock.phase("rollout"):
            latents = loop.rollout()
        rewards = self.rewards(latents, clock)
        with clock.phase("advantage"):
            advantage = loop.advantages(rewards)

        def train(clock: Clock) -> None:
            for step in loop.recorded:
                with clock.phase("replay_forward"):
                    loss = loop.loss(step, advantage)
                with clock.phase("backward"):
                    loss.backward()
            self.optimize(clock)

        train(clock)
        self.train = train

    def engine_step(
        self, model: Any, clock: Clock, mode: str = "full", replay_steps: int = 1
    ) -> None:
        o = self.options
        with clock.phase("encode"):
            self.encode()
        how = Sampling(
            height=o.px,
            width=o.px,
            steps=o.steps,
            guidance=Guidance(o.guidance, self.model.norm_rescaled_guidance, mode),
            dynamics="flow_sde",
            eta=o.eta,
            max_rows=o.group,
            replay_steps=replay_steps,
        )
        with clock.phase("rollout"):
            (chunk,) = sample(
                model,
                [self.conditioned(self.text)],
                self.conditioned(self.null),
                how,
                self.scheduler,
                group_size=o.group,
                seed=0,
                update=1,
                recorded=tuple(range(o.window)),
            )
        rewards = self.rewards(chunk.latents, clock)
        with clock.phase("advantage"):
            group = torch.zeros(o.group, dtype=torch.int64, device=rewards.device)
            one = torch.ones(1, device=rewards.device)
            advantage = ops.group_advantage(rewards[:, None], group, one).advantage
        settings = grpo.Settings(name="grpo", clip_low=1e-3, clip_high=1e-3)
        algorithm = grpo.Grpo(settings, Policy(model, self.named, how, Workers(1)))
        (prepared,) = algorithm.prepare([chunk], ["t2i"] * o.group)

        def train(clock: Clock) -> None:
            with clock.phase("replay_forward"):
                steps = list(algorithm.loss(chunk, advantage, prepared))
            with clock.phase("backward"):
                torch.stack([step.loss for step in steps]).mean().backward()
            self.optimize(clock)

        train(clock)
        self.train = train

    def conditioned(self, text: Tensor) -> Tensor | Conditioned:
        """The prompt as the adapter takes it."""
        if self.condition is None:
            return text
        tokens, side = len(self.condition), self.options.condition_px // 16
        slots = torch.arange(len(text)) < tokens // 4
        return Conditioned(text, slots, self.condition, ((side, side),))

    def rewards(self, latents: Tensor, clock: Clock) -> Tensor:
        with clock.phase("decode"):
            images = self.model.decode(latents, self.options.px, self.options.px)
        with clock.phase("reward"):
            scores = aesthetics.score(images, [{}] * len(images))
        return torch.as_tensor(scores, dtype=torch.float32, device=latents.device)

    def optimize(self, clock: Clock) -> None:
        with clock.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def flops(self) -> float:
        """Multiplications and additions that a step needs, with guidance in rollout alone.

        Each branch's prefix once, image tokens at every step; backward costs a forward, the weights
        being frozen.
        """
        o, config = self.options, self.model.transformer.config
        if self.two_stream:
            return self.two_stream_flops()
        width = config.num_attention_heads * HEAD_DIM
        linear = 2 * config.num_layers * (4 + 3 * config.mlp_ratio) * width**2
        extra = 0 if self.condition is None else 3 * len(self.condition) // 4
        texts = (len(self.text) + extra, len(self.null) + extra)
        image = sum(
            self.tokens * (linear + 4 * config.num_layers * width * (self.tokens + text))
            for text in texts
        )
        trained = self.tokens * (linear + 4 * config.num_layers * width * (self.tokens + texts[0]))
        return float(
            sum(texts) * linear + o.steps * o.group * image + o.window * o.group * 2 * trained
        )

    def two_stream_flops(self) -> float:
        """The same for Qwen-Image, whose text runs at every step."""
        o, config = self.options, self.model.transformer.config
        width = config.num_attention_heads * HEAD_DIM

        def forward(text: int) -> int:
            tokens = self.tokens + text
            return tokens * config.num_layers * width * (24 * width + 4 * tokens)

        branches = forward(len(self.text)) + forward(len(self.null))
        return float(
            o.steps * o.group * branches + o.window * o.group * 2 * forward(len(self.text))
        )


def gemm_flops(device: str) -> float:
    """Operations a second of a large matrix product in the dtype that is benchmarked."""
    size = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        clock = Clock(device)
        with clock.phase("gemm"):
            a @ b
        best = min(best, clock.seconds["gemm"])
    return 2 * size**3 / best


def run(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The result; options.out is rewritten after each row."""
    bench = Bench(options)
    peak = gemm_flops(options.device)
    needed = bench.flops()
    model = bench.model.transformer
    settings = {k: v for k, v in asdict(options).items() if k != "out"}
    result = about(options.device) | {
        "copy_gbps": copy_gbps(options.device),
        "gemm_gflops": peak / 1e9,
        "settings": settings | {"parameters": sum(p.numel() for p in model.parameters())},
        "rows": [],
    }
    warm_up = options.device == "cuda"
    for name, (fused, step) in bench.rows().items():
        (qirl_fast.patch if fused else qirl_fast.unpatch)(model)
        if warm_up or name == "stock":  # the first step of a process meets untouched memory
            step(Clock(options.device))
        clocks = []
        for _ in range(options.repeats):
            clock = Clock(options.device)
            step(clock)
            clocks.append(clock)
        peak = max(peak, gemm_flops(options.device))  # a shared machine is slow at times
        peak_training = peak_bytes(lambda: bench.train(Clock(options.device)), options.device)
        best = min(clocks, key=lambda clock: sum(clock.seconds.values()))
        seconds = sum(best.seconds.values())
        stock_rate = (
            result["rows"][0]["images_per_s"] if result["rows"] else options.group / seconds
        )
        row = {
            "name": name,
            "images_per_s": options.group / seconds,
            "speedup_vs_stock": options.group / seconds / stock_rate,
            "phases_s": {phase: best.seconds.get(phase, 0.0) for phase in PHASES},
            "mfu": needed / seconds / peak,
            "peak_bytes": peak_training,
        }
        result["rows"].append(row)
        result["gemm_gflops"] = peak / 1e9
        for each in result["rows"]:
            each["mfu"] = needed / sum(each["phases_s"].values()) / peak
        say(line(row))
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    phases = ", ".join(f"{name} {s:.2f}" for name, s in row["phases_s"].items())
    return (
        f"{row['name']:16} {row['images_per_s']:7.3f} images/s  {row['speedup_vs_stock']:5.2f}x  "
        f"mfu {row['mfu']:.2f}  peak {row['peak_bytes'] / 2**20:.0f} MiB  seconds: {phases}"
    )


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    settings = ", ".join(f"{k} {v}" for k, v in result["settings"].items())
    lines = [
        f"Commit {result['commit'][:12]}, {result['date']}; {machine}. {settings}. GEMM "
        f"{result['gemm_gflops']:.0f} GFLOP/s.",
        "",
        "| row | images/s | vs stock | MFU | peak MiB | " + " | ".join(PHASES) + " |",
        "|---" * (5 + len(PHASES)) + "|",
    ]
    for row in result["rows"]:
        cells = [row["name"], f"{row['images_per_s']:.3f}", f"{row['speedup_vs_stock']:.2f}x"]
        cells += [f"{row['mfu']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"]
        cells += [f"{s:.2f}" for s in row["phases_s"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds of each row, stacked by phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    names = [f"{row['name']}  ({row['speedup_vs_stock']:.1f}x)" for row in result["rows"]]
    left = [0.0] * len(names)
    for phase in PHASES:
        seconds = [row["phases_s"][phase] for row in result["rows"]]
        axes.barh(names, seconds, left=left, label=phase)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds a step of {result['settings']['group']} images")
    axes.legend(ncols=4, fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
