"""Split a nested state, such as `optimizer.state_dict()`, into tensors and plain JSON, and back.

The round trip is exact: types (dict, list, tuple, str, bool, int, float, None, Tensor), order and
type of dict keys, dtype, shape and every bit of a tensor, every bit of a float (NaN comes back as a
NaN). Lost: strides, device (tensors come back contiguous on the CPU), and that two entries were one
object.

JSON form: None, bool, int, str, finite floats and lists stand for themselves; everything else is an
object with one key: {"dict": [[key, value], ...]}, {"tuple": [...]}, {"float": "nan"},
{"tensor": name}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SCALARS = (type(None), bool, int, str)


def pack(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Return (tensors by name, JSON). Tensors are copies on the CPU, but for those that processes
    share out (DTensor), which are themselves.

    prefix: start of every tensor name; names follow the path: "optimizer/state/0/exp_avg".
    Raises TypeError naming the path of a value that has no exact JSON form (numpy scalars and
    arrays, objects, subclasses).
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            name = path or "tensor"
            while name in tensors:
                name += "'"
            tensors[name] = value.detach()
            if not isinstance(value, DTensor):
                tensors[name] = tensors[name].to("cpu", copy=True).contiguous()
            return {"tensor": name}
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind in (list, tuple):
            items = [walk(item, _join(path, index)) for index, item in enumerate(value)]
            return items if kind is list else {"tuple": items}
        if isinstance(value, dict):
            pairs = [[walk(key, path), walk(item, _join(path, key))] for key, item in value.items()]
            return {"dict": pairs}
        raise TypeError(
            f"cannot save {path or 'the state'}: got {kind.__module__}.{kind.__qualname__}; wanted "
            "dict, list, tuple, str, bool, int, float, None or a tensor"
        )

    return tensors, walk(tree, prefix)


def _join(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def unpack(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """Return what `pack` was given. tensors may hold more names than the tree needs."""
    if isinstance(tree, list):
        return [unpack(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "dict":
        return {_key(unpack(tensors, key)): unpack(tensors, item) for key, item in value}
    if kind == "tuple":
        return tuple(unpack(tensors, item) for item in value)
    if kind == "float":
        return float(value)
    assert kind == "tensor", f"unknown entry {kind!r} in a packed tree"
    return tensors[value]


def _key(key: Any) -> Any:
    assert not isinstance(key, (dict, list, torch.Tensor)), f"{key!r} cannot be a key"
    return key
