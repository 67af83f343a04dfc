"""What the adapters of all families share: loading, what is trained, the reference policy."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qirl_fast.models.compiled import CompiledForward, maybe_compiled
from qirl_fast.models.ema import exchanged
from qirl_fast.models.flops import Pass, Work, flops
from qirl_fast.models.fused import patch
from qirl_fast.models.graphs import ForwardGraphs
from qirl_fast.models.loading import check_class, load_component, load_part
from qirl_fast.models.modulation import ModulationCache
from qirl_fast.models.prefix import Conditioned
from qirl_fast.models.sequence import Ulysses
from qirl_fast.models.sharding import Sharding, Units

R = TypeVar("R")

ROPES = 64  # layouts whose rotations are kept
_NO_IMAGES = (
    "{} draws from text alone and takes no condition images; use Qwen-Image-Edit, "
    "Qwen-Image-Edit-Plus or Qwen-Image-2.1, or prompts without images"
)


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a model folder; ValueError for one of another class."""
    name = FlowMatchEulerDiscreteScheduler.__name__
    check_class(folder, "scheduler_config.json", "_class_name", name)
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder)


class NotFinite(ValueError):
    """Latents that hold NaN or infinity: an image of them would look like one.

    row: the first of them.
    """

    def __init__(self, bad: Sequence[int], rows: int):
        super().__init__(f"latents are not finite in {len(bad)} of {rows} rows")
        self.row = bad[0]


def require_finite(latents: Tensor) -> None:
    """NotFinite where a row of latents [B, N, Z] is not finite."""
    bad = (~latents.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NotFinite(bad, len(latents))


def heads_and_width(config: Any) -> tuple[int, int]:
    """Attention heads and channels of a transformer's blocks, from its config."""
    heads = config.get("num_attention_heads") or config.n_heads
    return heads, config.get("dim") or heads * config.attention_head_dim


class Adapter:
    """A stock pipeline as the trainer sees it; a family adds encode, latent_shape, prefix, join,
    modulation, forward and decode.
    """

    family: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    fp8_layers: ClassVar[
        tuple[str, ...]
    ]  # name endings of what runs in fp8 where that is asked for
    norm_rescaled_guidance: ClassVar[bool]
    needs_images: ClassVar[bool] = False  # a prompt without condition images cannot be encoded
    text_stream: ClassVar[bool] = False  # a block takes and gives text beside the image
    shards: ClassVar[bool] = False  # weights are read in `whole` and in units' forwards alone
    splits: ClassVar[bool] = False  # `forward` serves `sequence`
    pipeline_class: ClassVar[Any]
    parts: ClassVar[dict[str, Any]]  # folder of a model folder -> class, where it has weights
    reads: ClassVar[dict[str, Any]]  # folder -> what reads it, where it has none

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.vae = pipeline.vae
        self.device = pipeline.transformer.device
        self.dtype = pipeline.transformer.dtype
        self.ropes: dict[Any, Any] = {}  # rotations by layout
        self.units: Units | None = None  # set: the transformer's weights are spread over processes
        self.sequence: Ulysses | None = None  # set: processes share the tokens of each row
        self.recompute_blocks = 0  # from the first: activations computed again in backward
        self.work = Work()
        self._costs: dict[tuple[int, int], tuple[int, int]] = {}  # of a row, by its tokens
        self._frozen: list[Tensor] | None = None
        self._decoding = threading.Lock()
        self.modulations = ModulationCache(
            self.modulating(),
            lambda level: self.modulation(torch.full((1,), level, device=self.device)),
        )
        self.denoiser: ForwardGraphs | CompiledForward | None = None  # runs what has no gradient
        patch(self.transformer)
        for name in self.parts:
            if hasattr(pipeline, name):
                getattr(pipeline, name).requires_grad_(False).eval()

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype, device: str = "cpu", spread: bool = False
    ) -> Self:
        """Load a model folder in the stock pipeline's format; nothing is downloaded.

        spread: the transformer waits in CPU memory for `trainable` to spread it.

        Raises FileNotFoundError naming every missing component, ValueError for one that is there
        in part.
        """
        folder = Path(folder)
        folders = sorted({**cls.parts, **cls.reads})
        missing = [
            c for c in folders if not (folder / c).is_dir() or not any((folder / c).iterdir())
        ]
        if missing:
            raise FileNotFoundError(
                f"model folder {folder} lacks {', '.join(missing)}: a folder of "
                f"{cls.pipeline_class.__name__} holds {', '.join(folders)} (a folder each) and "
                "model_index.json"
            )
        components = {name: load_part(read, folder / name) for name, read in cls.reads.items()}
        for name, kind in cls.parts.items():
            components[name] = load_component(kind, folder / name, dtype)
        pipeline = cls.pipeline_class(**components)
        for p in pipeline.transformer.parameters():
            # The bits of a GEMM on a CPU may depend on where its weights lie: a file that is mapped
            # into memory puts them anywhere, a copy (the reference policy's, a resumed run's) not.
            if p.data_ptr() % 64:
                p.data = p.data.clone()
        if not spread:
            return cls(pipeline.to(device))
        for name in cls.parts:
            if name != "transformer":
                getattr(pipeline, name).to(device)
        adapter = cls(pipeline)
        adapter.device = torch.device(device)
        return adapter

    @classmethod
    def takes_images(cls) -> bool:
        """Whether `condition` serves this family: prompts may come with condition images."""
        return False

    @classmethod
    def condition_sizes(cls, image: tuple[int, int], pixels: int) -> tuple[tuple[int, int], ...]:
        """(height, width) of each version wanted of a condition image (height, width).

        pixels: the area of the version for the autoencoder, about.
        ValueError for a family that takes no images, or an image that cannot be served.
        """
        raise ValueError(_NO_IMAGES.format(cls.pipeline_class.__name__))

    def condition(self, prompt: str, images: Sequence[Sequence[np.ndarray]]) -> Conditioned:
        """The prompt with its condition images, as the stock pipeline encodes both.

        Args:
            prompt: "" for the unconditional branch, which sees the images too.
            images: for each image its versions, in the order of `condition_sizes`: uint8
                [height, width, 3], or 4 with alpha.
        ValueError for a family that takes no images, and for images that do not fit.
        """
        raise ValueError(_NO_IMAGES.format(type(self).pipeline_class.__name__))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that `runner` counts, in order."""
        blocks: Sequence[nn.Module] = self.transformer.transformer_blocks
        return blocks

    @property
    def sharded_parts(self) -> Sequence[nn.Module]:
        """The units of sharding, those inside another before it."""
        return self.blocks

    @classmethod
    def latent_channels(cls, config: Any) -> int:
        """Z, the channels of a latent token, of the transformer's config."""
        return int(config.in_channels)

    def use_rope(self, prompt: int | Conditioned, grid: tuple[int, int], rope: Tensor) -> None:
        """Take these rotations; of use where tensors have no values, for families that look
        values up to make their own. The others make them.
        """

    def modulating(self) -> list[nn.Module]:
        """The modules that hold all weights `modulation` reads.

        Containers, not linear layers: an adapter may take a layer's place in its container.
        """
        raise NotImplementedError

    def modulation(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """What the transformer computes from noise levels [R] alone, as rows [R, D_i]."""
        raise NotImplementedError

    def forward(self, x: Tensor, rows: Sequence[Tensor], prefix: Any) -> Tensor:
        """`velocity` of the rows of `modulation`: nothing in it looks at a value on the host."""
        raise NotImplementedError

    def velocity(
        self, x: Tensor, sigma: Tensor | Sequence[float], prefix: Any, exact: bool = True
    ) -> Tensor:
        """Velocity v = eps - x0, [B, N, Z] in the model's dtype.

        Args:
            x: latents [B, N, Z]; prefix: of the same B rows.
            sigma: R noise levels in [0, 1], each of a run of B / R rows. What depends on it alone
                is kept for levels that are host values, see models/modulation.py.
            exact: False where the bits need not be those of a call with gradient.
        ValueError where the three are not of the same rows.
        """
        if len(x) != prefix.batch:
            raise ValueError(f"{len(x)} latent rows but a prefix of {prefix.batch} rows")
        if not len(sigma) or len(x) % len(sigma):
            raise ValueError(f"{len(sigma)} noise levels for {len(x)} rows; wanted a divisor of it")
        out = self.whole(partial(self._velocity, x, sigma, prefix, exact))
        sharing = 1 if self.sequence is None else self.sequence.size
        for rows, image, text in prefix.lengths:
            self.count(rows, x.shape[1] + image, text, sharing)
        return out

    def passes(self, image: int, text: int) -> list[Pass]:
        """What a velocity is computed by, of a row of so many tokens: see models/flops.py."""
        both, single = image + text, getattr(self.transformer, "single_transformer_blocks", ())
        passes = [Pass(block, image, text, both) for block in self.transformer.transformer_blocks]
        return passes + [Pass(block, both, 0, both) for block in single]

    def count(self, rows: int, image: int, text: int, sharing: int = 1) -> None:
        """Count the model FLOPs of these rows; image 0: of a prefix alone. sharing: processes."""
        if (image, text) not in self._costs:
            self._costs[image, text] = flops(self.passes(image, text))
        forward, backward = self._costs[image, text]
        self.work.add(rows * (forward + backward * torch.is_grad_enabled()) // sharing)

    def _velocity(
        self, x: Tensor, sigma: Tensor | Sequence[float], prefix: Any, exact: bool
    ) -> Tensor:
        modulate: Any = self.modulation if isinstance(sigma, Tensor) else self.modulations.rows
        rows: tuple[Tensor, ...] = modulate(sigma)
        denoiser = self.denoiser
        if denoiser is None or torch.is_grad_enabled() or (exact and not denoiser.exact):
            return self.forward(x, rows, prefix)
        return denoiser(x, rows, prefix)

    def whole(self, run: Callable[[], R]) -> R:
        """`run()` with the weights that lie outside the blocks whole; they stay so until backward.

        FSDP sees neither input nor output: what goes in and out would end the unit's backward while
        another forward of the same loss needs it.
        """
        if self.units is None:
            return run()
        found: list[R] = []
        self.transformer.inside(lambda: found.append(run()))
        return found[0]

    def inside(self, block: Any, run: Callable[..., Any], *args: Any) -> Any:
        """`run(*args)`, a forward of a block under another name than its own.

        args, and what comes back: all tensors that a gradient goes through.
        """
        return run(*args) if self.units is None else block.inside(run, *args)

    def gathered(self) -> AbstractContextManager[None]:
        """All: inside, each process may run as many forwards as it likes, without gradient."""
        return nullcontext() if self.units is None else self.units.gathered()

    def keep_rope(self, layout: Any, rope: Any) -> Any:
        """The rotations `rope`, kept for this layout; of many layouts the first go."""
        self.ropes[layout] = rope
        while len(self.ropes) > ROPES:
            del self.ropes[next(iter(self.ropes))]
        return rope

    def runner(self, number: int, block: nn.Module) -> Callable[..., Any]:
        """What `forward` calls for its block of this number: with gradient, one of the first
        `recompute_blocks` computes its activations again in backward.
        """
        if not torch.is_grad_enabled():
            return maybe_compiled(block)
        if number >= self.recompute_blocks:
            return block
        return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)

    def trainable(
        self,
        mode: str,
        rank: int,
        alpha: float,
        targets: Sequence[str] | None,
        seed: int,
        sharding: Sharding | None = None,
    ) -> dict[str, Tensor]:
        """Add a LoRA adapter "default" (mode "lora") or open all weights (mode "full").

        The LoRA starts as the identity (B = 0) and A is drawn from `seed` alone. Returns the
        trainable parameters by name, in a fixed order, in float32. sharding: spread the weights,
        but not a LoRA's; the forward of "full" may then be in another dtype.
        ValueError for an unknown mode, LoRA targets that match nothing, or "full" in another dtype
        than float32 without sharding: the weights would be float32, the activations not.
        """
        self._costs.clear()
        if mode == "full":
            if self.dtype != torch.float32 and sharding is None:
                raise ValueError(
                    f"model.adapter full trains float32 weights and model.dtype is {self.dtype}; "
                    "set model.dtype=float32, model.adapter=lora, or processes.shard"
                )
            self.transformer.requires_grad_(True)
            self._frozen = [p.detach().clone() for p in self.transformer.parameters()]
        elif mode == "lora":
            self._add_lora(rank, alpha, list(targets or self.lora_targets), seed)
        else:
            raise ValueError(f"adapter mode {mode!r}: use 'lora' or 'full'")
        named = {n: p for n, p in self.transformer.named_parameters() if p.requires_grad}
        for p in named.values():
            p.data = p.data.float()
        if sharding is None:
            return named
        kept = set() if mode == "full" else set(named.values())
        for p in kept:
            p.data = p.data.to(self.device)
        units = Units(self.transformer, self.sharded_parts, sharding, kept, self.dtype)
        self.units, self.modulations.keeps = units, False
        if mode == "full":
            self._frozen = [p.detach().clone() for p in self.transformer.parameters()]
        return {n: p for n, p in self.transformer.named_parameters() if p.requires_grad}

    def _add_lora(self, rank: int, alpha: float, targets: list[str], seed: int) -> None:
        modules = [name for name, _ in self.transformer.named_modules()]
        unknown = [t for t in targets if not any(name.endswith(t) for name in modules)]
        if unknown:
            raise ValueError(
                f"LoRA targets {unknown} match no module of the transformer; "
                f"the family's own are {', '.join(self.lora_targets)}"
            )
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer.add_adapter(config)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The untrained policy: LoRA off, or the weights as they were when training began."""
        if self._frozen is None:
            self.transformer.disable_adapters()
            try:
                yield
            finally:
                self.transformer.enable_adapters()
            return
        if self.units is not None:
            with exchanged(list(self.transformer.parameters()), self._frozen):
                yield
            return
        trained = [p.data for p in self.transformer.parameters()]
        for p, frozen in zip(self.transformer.parameters(), self._frozen, strict=True):
            p.data = frozen
        try:
            yield
        finally:
            for p, own in zip(self.transformer.parameters(), trained, strict=True):
                p.data = own
