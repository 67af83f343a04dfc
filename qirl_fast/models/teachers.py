"""Teachers: frozen policies of the student's architecture, that answer where the student stands.

A LoRA teacher is one more adapter on the student's own base and costs its adapter; switching is a
matter of names. A teacher of its own weights has a transformer beside the student's, which shares
text encoder and autoencoder; on a GPU its weights wait in pinned host memory and are copied over on
a stream of their own, ahead of their use where `fetch` is called early.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from qirl_fast.models.adapter import Adapter
from qirl_fast.models.loading import SHOWN, load_component, load_part

STUDENT = "default"  # PEFT's name of the adapter that is trained
PREFIX = "base_model.model."  # of PEFT's files


class Teacher(Protocol):
    """Answers inside `active`, with the adapter that it yields."""

    def fetch(self) -> None:
        """Begin to bring the weights to the device, where they are not there."""

    def active(self) -> Any:
        """Context that yields the model whose velocities are the teacher's."""


def is_lora(folder: Path) -> bool:
    """True for a folder of a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


def load_teacher(model: Adapter, name: str, folder: Path) -> Teacher:
    """The teacher in `folder`: a PEFT LoRA of the student's base, or a model folder.

    ValueError, naming both sides, for one that does not fit the student `model`.
    """
    if is_lora(folder):
        return LoraTeacher(model, name, folder)
    return FolderTeacher(model, name, folder)


def add_lora(transformer: Any, folder: Path, adapter: str, who: str) -> None:
    """Put the PEFT LoRA in `folder` on a transformer, as its adapter `adapter`.

    ValueError, naming both sides, for one that does not fit; who: what it is called there.
    """
    config = load_part(LoraConfig.from_pretrained, folder)
    weights = load_part(load_file, folder / "adapter_model.safetensors")
    weights = {key.removeprefix(PREFIX): value for key, value in weights.items()}
    _check_fit(transformer, f"{who} ({folder})", weights)
    with warnings.catch_warnings():  # that there are several adapters may be the point
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        transformer.add_adapter(config, adapter_name=adapter)
    found = set_peft_model_state_dict(transformer, weights, adapter_name=adapter)
    lacking = [key for key in found.missing_keys if f".{adapter}." in key]
    if lacking:
        raise ValueError(
            f"{who} ({folder}): its file lacks {len(lacking)} weights of the layers that its "
            f"adapter_config.json names ({_some(lacking)}); fetch it again"
        )


class LoraTeacher:
    """An adapter on the student's transformer, beside the student's own."""

    def __init__(self, model: Adapter, name: str, folder: Path):
        self.model, self.name = model, f"teacher_{name}"
        add_lora(model.transformer, folder, self.name, f"teacher {name!r}")
        self._switch(STUDENT)

    def _switch(self, name: str) -> None:
        for module in self.model.transformer.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter([name], inference_mode=name != STUDENT)

    def fetch(self) -> None:
        """Nothing: the adapter lies where the student does."""

    @contextmanager
    def active(self) -> Iterator[Adapter]:
        """Inside, the student's model answers as the teacher."""
        self._switch(self.name)
        try:
            yield self.model
        finally:
            self._switch(STUDENT)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B scaled) of each adapted module: its weights are changed by B A."""
        return {
            path: (layer.lora_A[self.name].weight, layer.lora_B[self.name].weight * scale)
            for path, layer in _lora_layers(self.model.transformer)
            if (scale := layer.scaling.get(self.name)) is not None
        }


class FolderTeacher:
    """A transformer of its own, the student's text encoder and autoencoder."""

    def __init__(self, model: Adapter, name: str, folder: Path):
        kind = model.parts["transformer"]
        own, theirs = dict(model.transformer.config), kind.load_config(folder / "transformer")
        differ = [k for k in own if not k.startswith("_") and own[k] != theirs.get(k, own[k])]
        if differ:
            k = differ[0]
            raise ValueError(
                f"teacher {name!r} ({folder}) is of another architecture: {k} is {theirs[k]!r}, "
                f"the student's {own[k]!r}; wanted a transformer of the student's shape"
            )
        transformer = load_component(kind, folder / "transformer", model.dtype)
        parts = dict(model.pipeline.components) | {"transformer": transformer}
        self.model = type(model)(type(model.pipeline)(**parts))
        self.model.device, self.model.work = model.device, model.work
        self._host: list[Tensor] | None = None
        self._coming: list[Tensor] | None = None
        if model.device.type == "cuda":
            self._host = [p.data.pin_memory() for p in transformer.parameters()]
            self._stream = torch.cuda.Stream(model.device)
            transformer.to(model.device)  # buffers; weights go back at once
            self._place(self._host)

    def _place(self, weights: Sequence[Tensor]) -> None:
        for p, w in zip(self.model.transformer.parameters(), weights, strict=True):
            p.data = w

    def fetch(self) -> None:
        """Begin to copy the weights to the GPU; on a CPU they are where they are used."""
        if self._host is None or self._coming is not None:
            return
        with torch.cuda.stream(self._stream):
            self._coming = [w.to(self.model.device, non_blocking=True) for w in self._host]

    @contextmanager
    def active(self) -> Iterator[Adapter]:
        """Inside, the teacher's weights are on the device."""
        if self._host is None:
            yield self.model
            return
        self.fetch()
        assert self._coming is not None
        current = torch.cuda.current_stream(self.model.device)
        current.wait_stream(self._stream)
        for w in self._coming:
            w.record_stream(current)
        self._place(self._coming)
        try:
            yield self.model
        finally:
            self._place(self._host)
            self._coming = None


def _lora_layers(transformer: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)]


def _check_fit(transformer: nn.Module, teacher: str, weights: dict[str, Tensor]) -> None:
    """ValueError unless every weight of the adapter fits a linear layer of the student."""
    for key, value in weights.items():
        path, _, rest = key.rpartition(".lora_")
        layer = transformer
        try:
            layer = transformer.get_submodule(path)
        except AttributeError:
            layer = nn.Identity()
        base = getattr(layer, "base_layer", layer)
        if not isinstance(base, nn.Linear) or not path:
            raise ValueError(
                f"{teacher} adapts {path or key}, and the student's {type(transformer).__name__} "
                "has no linear layer there; wanted an adapter of the student's base"
            )
        side, own = (1, base.in_features) if rest.startswith("A") else (0, base.out_features)
        if value.ndim != 2 or value.shape[side] != own:
            raise ValueError(
                f"{teacher} does not fit: {key} is {list(value.shape)}, the student's {path} maps "
                f"{base.in_features} to {base.out_features}; wanted an adapter of its base"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


@torch.no_grad()
def start_from(model: Adapter, teachers: Sequence[Teacher]) -> None:
    """Set the student's LoRA to the mean of the teachers' changes, as near as its rank comes.

    The mean of B_i A_i has rank sum r_i at most; of that the largest singular values are kept, all
    of them where the student's rank is as large. Where it is larger, the rest of B stays 0.
    ValueError where a teacher adapts a module that the student does not, or has whole weights.
    """
    own = dict(_lora_layers(model.transformer))
    changes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for teacher in teachers:
        if not isinstance(teacher, LoraTeacher):
            raise ValueError(
                "algorithm.init: a student begins from LoRA teachers, and one of these has whole "
                "weights; begin from 'base'"
            )
        for path, pair in teacher.factors().items():
            changes.setdefault(path, []).append(pair)
    lacking = [path for path in changes if STUDENT not in own[path].lora_A]
    if lacking:
        raise ValueError(
            f"the teachers adapt {len(lacking)} layers that the student does not "
            f"({_some(lacking)}); name them in model.lora.targets, or begin from the base"
        )
    for path, factors in changes.items():
        layer = own[path]
        a, b = layer.lora_A[STUDENT].weight, layer.lora_B[STUDENT].weight
        scale = layer.scaling[STUDENT] * len(teachers)
        left, right = low_rank([(a_i, b_i / scale) for a_i, b_i in factors], a.shape[0])
        rank = right.shape[0]
        a[:rank].copy_(right)
        b.zero_()
        b[:, :rank].copy_(left)


def low_rank(factors: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """(B, A), [out, r] and [r, in], whose product is nearest to sum_i B_i A_i; r <= rank.

    factors: (A_i [r_i, in], B_i [out, r_i]). Both get the roots of the singular values.
    """
    right, left = (torch.cat([f[k].double() for f in factors], dim=k) for k in (0, 1))
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    return q_left @ u[:, :kept] * root, (q_right @ vh[:kept].T * root).T
