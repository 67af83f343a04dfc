"""What a run will hold in memory, planned from the config files alone: no weight is read.

The transformer is built of fake tensors, which have shapes and no storage, and one replayed step is
run on them: what autograd saves is counted, not estimated. Left out: the allocator's own losses,
libraries' workspaces, and what lives inside a single operation.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qirl_fast.conditioning import condition_versions
from qirl_fast.config import Config, ConfigError, derived, trained_group
from qirl_fast.data.images import Size
from qirl_fast.data.prompts import Prompt, load_prompts
from qirl_fast.data.sources import ImageError
from qirl_fast.distributed import World, process_threads
from qirl_fast.models import Model, adapter_of
from qirl_fast.models.adapter import heads_and_width
from qirl_fast.models.fp8 import Layer, plan_layers, use_fp8
from qirl_fast.models.loading import described_model
from qirl_fast.models.prefix import Conditioned
from qirl_fast.models.qwenimage21 import PIXELS_PER_TOKEN
from qirl_fast.models.sequence import Ulysses
from qirl_fast.preflight import require_sharing
from qirl_fast.tiny import packaged

BYTES = {"float32": 4, "bfloat16": 2}

# What the processes of a run share out; the rest each of them holds whole.
SHARED_OUT = ("recorded states", "answers of teachers", "images")
# Held one after the other: replay's, then what processes send each other.
IN_TURN = (
    ("keys and values of the prompts", "activations of replay"),
    ("exchange of gradients",),
)


def plan(cfg: Config, processes: int = 1) -> dict[str, int]:
    """Bytes by purpose, on the device of that process which has most to do.

    processes: of the run, each with a device of its own; of them processes.shard, or all, share out
    the transformer. On a CPU every thread replays a chunk of its own where it is not shared out.
    ConfigError where the model cannot be shared out as the recipe asks.
    """
    folder, item = packaged(cfg.model.path), BYTES[cfg.model.dtype]
    adapter = adapter_of(folder, cfg.model.family)
    models = {name: described_model(kind, folder / name) for name, kind in adapter.parts.items()}
    require_sharing(cfg.processes.sequence, adapter, models["transformer"].config)
    plan = {
        f"weights of {name}": item * sum(p.numel() for p in model.parameters())
        for name, model in models.items()
    }
    fp8 = cfg.model.fp8
    if fp8 is not None:
        layers = [math.prod(layer.shape) for layer in fp8_plan(cfg) if layer.fp8]
        both_ways = fp8.backward == "fp8" or fp8.library == "te"
        plan["weights in fp8"] = sum(layers) * (2 if both_ways else 1)
    prompts = load_prompts(packaged(cfg.data.train), cfg.data.images)
    images = _most_images(cfg, adapter, prompts)
    length = adapter.prompt_tokens(folder, max((p.prompt for p in prompts), key=len), images)
    size, rollout = derived(cfg), cfg.rollout
    target = max(cfg.data.buckets or [(rollout.height, rollout.width)], key=lambda s: _tokens(*s))
    tokens = _tokens(*target)
    grids = tuple(_grid(*versions[0]) for versions in images)
    shard = cfg.processes.shard or processes
    trained, saved, prefix = _replay(cfg, adapter, folder, length, grids, target)
    on_cpu = cfg.device == "cpu" or not torch.cuda.is_available()
    threads = 1  # on a GPU, or in step with other processes
    if on_cpu and shard == cfg.processes.sequence == 1:
        threads = process_threads(cfg.threads) or torch.get_num_threads()
    chunks = size.minibatch_samples // size.chunk_rows
    worlds = [World(rank, processes, cfg.processes.sequence) for rank in range(processes)]
    shares = [world.own(chunks) for world in worlds]
    own = max(map(len, shares))
    updates = cfg.train.updates_per_rollout
    shown = max(len(world.shown(world.own(chunks * updates, updates))) for world in worlds)
    at_once = min(threads, own)
    lora = cfg.model.adapter == "lora"
    spread = shard > 1 and not lora
    if shard > 1:  # whole while it draws
        part = 4 * trained if spread else plan["weights of transformer"]
        plan["own part of the transformer"] = part // shard
    if spread:  # float32, and so is what follows of it
        trained = -(-trained // shard)
    plan["adapter" if lora else "weights of the reference"] = 4 * trained
    held = [_sums(share) for share in shares]
    before = max(max(sums[:-1]) for sums in held)  # beside the gradients that are to be added
    plan["gradients"] = 4 * trained * (1 if spread else before + at_once)
    if processes > 1 and not spread:
        # `World.total`: what is sent and received of every sum, then the whole.
        most = max(sums[-1] for sums in held)
        plan["exchange of gradients"] = 4 * trained * (2 * most + 3)
    plan["AdamW's two moments"] = 8 * trained
    plan["average of the weights"] = 4 * trained if cfg.train.ema else 0
    state = tokens * adapter.latent_channels(models["transformer"].config)
    stored = {"transitions": 2, "states": 1, "levels": 0}[cfg.algorithm.keeps]
    if stored == 2 and rollout.guidance != 1 and rollout.ratio_mode == "frozen_offset":
        stored += 1  # the offset
    samples = own * size.chunk_rows * updates
    replays = samples * size.recorded_steps
    plan["recorded states"] = replays * state * stored * BYTES[rollout.storage_dtype]
    if cfg.algorithm.keeps == "states":
        plan["answers of teachers"] = replays * state * item
    kind = adapter.parts["transformer"]
    for who, other in cfg.algorithm.models.items():
        teacher = described_model(kind, other / "transformer")
        plan[f"weights of {who}"] = item * sum(p.numel() for p in teacher.parameters())
    plan["images"] = shown * size.chunk_rows * target[0] * target[1] * 3
    plan["keys and values of the prompts"] = prefix * at_once
    plan["activations of replay"] = saved * at_once
    return plan


def fp8_plan(cfg: Config) -> list[Layer]:
    """The precision of every linear layer, from the config files; ConfigError as `plan_layers`."""
    fp8, folder = cfg.model.fp8, packaged(cfg.model.path)
    assert fp8 is not None
    adapter = adapter_of(folder, cfg.model.family)
    transformer = described_model(adapter.parts["transformer"], folder / "transformer")
    layers = fp8.layers or adapter.fp8_layers
    try:
        return plan_layers(transformer, layers, fp8.skip, fp8.recipe, fp8.backward)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def planned_peak(plan: dict[str, int]) -> int:
    """Bytes held at the worst moment: of what is held in turn, the larger."""
    turns = [sum(plan.get(name, 0) for name in names) for names in IN_TURN]
    return sum(plan.values()) - min(turns)


def describe_plan(plan: dict[str, int], processes: int = 1) -> str:
    """The plan as comment lines, largest first, with what is held at the worst moment."""
    rows = sorted(plan.items(), key=lambda item: -item[1])
    lines = [f"# {name:32} {amount / 2**20:12,.1f} MiB" for name, amount in rows if amount]
    several = f", each of {processes} processes" if processes > 1 else ""
    if several:
        lines = [
            f"{line}  its share" if line[2:].startswith(SHARED_OUT) else line for line in lines
        ]
    total = f"# {'at most at a time':32} {planned_peak(plan) / 2**20:12,.1f} MiB"
    return "\n".join([f"# planned memory{several}", *lines, total]) + "\n"


def _sums(leaves: Sequence[int]) -> list[int]:
    """Lists of gradients that `TreeSum` holds before each of these leaves, and at the end."""
    nodes: list[tuple[int, int]] = []
    counts = [0]
    for leaf in leaves:
        level, number = 0, leaf
        while number % 2 and nodes and nodes[-1] == (level, number - 1):
            nodes.pop()
            level, number = level + 1, number // 2
        nodes.append((level, number))
        counts.append(len(nodes))
    return counts


def _grid(height: int, width: int) -> tuple[int, int]:
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def _tokens(height: int, width: int) -> int:
    return math.prod(_grid(height, width))


def _most_images(
    cfg: Config, adapter: type[Model], prompts: Sequence[Prompt]
) -> list[tuple[Size, ...]]:
    """Versions of each condition image of the prompt that has most tokens of them.

    Images that are refused are left to the run's own checks.
    """
    most: list[tuple[Size, ...]] = []
    for prompt in prompts:
        with suppress(ImageError):
            found = condition_versions(cfg, adapter, prompt)
            most = max(most, found, key=lambda images: sum(_tokens(*v[0]) for v in images))
    return most


def _replay(
    cfg: Config,
    adapter: type[Model],
    folder: Path,
    length: int,
    grids: tuple[Size, ...],
    size: Size,
) -> tuple[int, int, int]:
    """(trained weights, bytes saved for backward, bytes of the prefixes) of one chunk's replay.

    length: embeddings of a prompt; grids: tokens (height, width) of its condition images; size: of
    the target, pixels.
    """
    rows = derived(cfg).chunk_rows
    dtype = getattr(torch, cfg.model.dtype)
    transformer = described_model(adapter.parts["transformer"], folder / "transformer")
    for p in transformer.parameters():
        p.data = p.data.to(dtype)
    none = torch.nn.Identity()
    none.config = SimpleNamespace(z_dim=transformer.config.in_channels)  # type: ignore[assignment]
    parts: Any = SimpleNamespace(transformer=transformer, vae=none, text_encoder=none)
    model: Any = adapter(parts)
    lora = cfg.model.lora
    mixed = cfg.model.adapter == "full" and cfg.processes.shard != 1
    model.dtype = torch.float32 if mixed else dtype  # spread weights are, whatever the forward is
    model.trainable(cfg.model.adapter, lora.rank, lora.alpha, lora.targets, 0)
    model.dtype = dtype
    if mixed:
        for p in transformer.parameters():
            p.data = p.data.to(dtype)
    model.recompute_blocks = again = cfg.train.recompute_blocks
    sequence = cfg.processes.sequence
    model.sequence = Ulysses(0, sequence, None) if sequence > 1 else None
    mode, model.device = FakeTensorMode(), torch.device("cpu")
    _without_storage(transformer, mode, model.device)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    tokens, latents = _tokens(*size), sum(h * w for h, w in grids)
    # Of a prompt with images the slots have values: each stands for four latent tokens, or, where
    # these run beside the target's, there is none.
    shown = 0 if adapter.text_stream else latents // 4
    slots = torch.arange(length) < shown
    with mode:
        config = transformer.config
        channels = adapter.latent_channels(config)
        heads, width = heads_and_width(config)
        names = ("context_in_dim", "joint_attention_dim", "cap_feat_dim")
        channels_of_text = next(config[name] for name in names if config.get(name))
        group = trained_group(cfg)
        groups = -(-rows // group)
        text = torch.empty(length, channels_of_text)
        shown_with = Conditioned(text, slots, torch.empty(latents, channels), grids)
        prompt: Tensor | Conditioned = shown_with if grids else text
        rotated = length - shown + latents + tokens
        rope = torch.empty(rotated, width // heads // 2, dtype=torch.complex64)
        model.use_rope(shown_with if grids else length, _grid(*size), rope)
        embeddings = [prompt] * groups
        owner = [r // group for r in range(rows)]
        weights = list(transformer.parameters())
        region = ExitStack()
        fp8 = cfg.model.fp8
        if fp8 is not None and fp8.mode == "unified" and fp8.library == "native":
            use = use_fp8(transformer, fp8_plan(cfg), fp8.recipe, fp8.backward)
            region.enter_context(use.on())
            weights += use.weights()
        count = SavedTensors(weights)
        with count, region:
            prefix = model.prefix(embeddings, owner, *size)
            guided = cfg.rollout.guidance != 1
            null = model.prefix(embeddings, owner, *size) if grids else None
            if guided and cfg.rollout.ratio_mode == "full":  # that branch has a gradient too
                null = null or model.prefix(embeddings[:1], [0] * rows, *size)
                prefix = model.join(prefix, null)
                rows *= 2
            for _ in range(derived(cfg).recorded_steps):
                x = torch.empty(rows, tokens, channels)
                model.velocity(x, torch.empty(1), prefix)
        # With images an unconditional prompt is as long as its prompt, and there is one for each.
        tensors = [*prefix.tensors, *(null.tensors if guided and null else ())]
        held = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}
    # What a recomputed block starts from is held by the call, not saved by autograd.
    beside = length + latents if adapter.text_stream else 0
    starts = min(again, len(model.blocks)) * rows * (tokens + beside) // sequence * width
    saved = count.bytes + starts * derived(cfg).recorded_steps * dtype.itemsize
    return trained, saved, sum(held.values())


def _without_storage(module: torch.nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Turns every weight on the meta device into one that says it is on `device`."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                fake = FakeTensor(mode, p.detach(), device)
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = FakeTensor(mode, buffer, device)


class SavedTensors:
    """Counts the storages that autograd saves inside, each once, the weights' own left out.

    `bytes` is the sum.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self._seen = {p.untyped_storage()._cdata for p in weights}
        self._kept: list[Tensor] = []  # an address is another tensor's once it is free
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
