"""Fixtures of the budget tests: what the machine code of a kernel says about it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest


@dataclass
class Measured:
    """Of one kernel for one target; accesses count instructions by bits."""

    registers: int
    local_bytes: int
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    scalar_loads: int = 0  # accesses of a single value in the source
    scalar_stores: int = 0
    tensor_loads: int = 0
    tensor_stores: int = 0
    row_layouts: set[str] = field(default_factory=set)  # of the rows that are added up


_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)\.E((?:\.\w+)*)")
_BITS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def _tool(name: str) -> str:
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "backends/nvidia/bin" / name)


def _run(*command: object) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout


def read_cubin(path: Path) -> Measured:
    usage = _run(_tool("cuobjdump"), "--dump-resource-usage", path)
    numbers = dict(re.findall(r"(\w+):(\d+)", usage[usage.index("REG:") :]))
    measured = Measured(int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]))
    for kind, modifiers in _ACCESS.findall(_run(_tool("nvdisasm"), "-c", path)):
        bits = next((_BITS[m] for m in modifiers.split(".") if m in _BITS), 32)
        (measured.stores if kind == "STG" else measured.loads)[bits] += 1
    return measured


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., Measured]:
    """measure(case, capability) compiles ahead of time; no GPU or driver is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compiled(case, capability: int) -> Measured:
        arguments = case.kernel.arg_names
        assert set(arguments) == set(case.signature) | set(case.constexprs), "arguments of the case"
        source = ASTSource(
            case.kernel,
            {name: case.signature.get(name, "constexpr") for name in arguments},
            constexprs={(arguments.index(n),): v for n, v in case.constexprs.items()},
            attrs={(arguments.index(n),): [["tt.divisibility", 16]] for n in case.divisible},
        )
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": case.num_warps, "enable_fp_fusion": False},
        )
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        measured = read_cubin(cubin)
        layouts = dict(re.findall(r"^(#\w+) = (.*)$", kernel.asm["ttgir"], re.M))
        sums = re.findall(r"\}\) : \(tensor<\d+xf32, (#\w+)>\)", kernel.asm["ttgir"])
        measured.row_layouts = {layouts[name] for name in sums}
        # A software pipeline turns loads into asynchronous copies.
        measured.tensor_loads += kernel.asm["ttgir"].count("async_copy_global_to_local")
        for op, operand in re.findall(r"\btt\.(load|store) .* : (.)", kernel.asm["ttgir"]):
            kind = f"{'scalar' if operand == '!' else 'tensor'}_{op}s"
            setattr(measured, kind, getattr(measured, kind) + 1)
        return measured

    return compiled


@pytest.fixture
def faults() -> Callable[..., list[str]]:
    """faults(case, measured): what of a case's budget is not kept, [] when all is."""

    def check(case, measured: Measured) -> list[str]:
        found = []
        if measured.registers > case.registers:
            found.append(f"{measured.registers} registers, budget {case.registers}")
        if measured.local_bytes:
            found.append(f"{measured.local_bytes} bytes of local memory (spills)")
        narrow = 0
        for name in ("load", "store"):
            counts: Counter[int] = getattr(measured, f"{name}s")
            if getattr(measured, f"tensor_{name}s") and max(counts, default=0) < case.width:
                found.append(f"widest {name} {max(counts, default=0)} bits, wanted {case.width}")
            below = sum(n for bits, n in counts.items() if bits < case.width)
            narrow += max(0, below - getattr(measured, f"scalar_{name}s"))
        if narrow > case.narrow:
            found.append(
                f"{narrow} accesses of tensors narrower than {case.width} bits, budget "
                f"{case.narrow}"
            )
        return found

    return check
