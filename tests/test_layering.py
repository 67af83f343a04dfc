"""Imports go one way, read from the source:

csrc, kernels -> ops -> models, rewards, data -> rollout -> algorithms -> drivers -> entry points.
Services are imported by drivers, entry points and each other. An entry point is a file that runs as
`python -m`; a driver is any other module outside the parts and services named here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qirl_fast"
KERNELS = PACKAGE.parent / "kernels"

# What each part may import of the project, besides itself.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "ops": {"_cpu", "_cuda", "kernels"},
    "compat": {"ops", "rollout"},
    "models": {"ops", "processor"},
    "rewards": {"ops", "section", "tiny.scenes", "processor"},
    "data": {"ops", "tensors"},
    "rollout": {"ops", "models", "data"},
    "algorithms": {"ops", "models", "rollout", "section"},
    "evaluation": {"ops", "models", "rewards", "data", "rollout"},
    "section": set(),
    "processor": set(),
    "tensors": set(),
    "tiny.scenes": set(),
}
SERVICES = ("config", "checkpoint", "clock", "distributed", "run_folder", "tracking")


def part_of(module: str) -> str:
    """'models.fused.qwen' -> 'models'; tiny.scenes stands for itself."""
    return "tiny.scenes" if module == "tiny.scenes" else module.split(".")[0]


def sources() -> dict[str, Path]:
    """Dotted names below qirl_fast -> file."""
    found = {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")
    }
    found.update({f"kernels.{p.stem}": p for p in KERNELS.glob("*.py")})
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imports(module: str, path: Path) -> set[str]:
    """Project modules that the file imports anywhere in it, relative to qirl_fast."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package[: len(package) - (node.level - 1)]
                base = ".".join(["qirl_fast", *kept, *([base] if base else [])])
            names = [f"{base}.{a.name}" for a in node.names]
        else:
            continue
        found |= {n.removeprefix("qirl_fast.") for n in names if n.startswith("qirl_fast.")}
    return found


MODULES = sources()


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part_of(m) in ALLOWED))
def test_a_part_imports_only_what_lies_below_it(module):
    allowed = ALLOWED[part_of(module)] | {part_of(module)}
    for name in imports(module, MODULES[module]):
        target = "tiny.scenes" if name.startswith("tiny.scenes") else name.split(".")[0]
        assert target in allowed, f"{module} imports {name}; it may import {sorted(allowed)}"


def is_entry_point(module: str) -> bool:
    tests = [n.test for n in ast.parse(MODULES[module].read_text()).body if isinstance(n, ast.If)]
    return module.endswith("__main__") or any("__main__" in ast.unparse(t) for t in tests)


ENTRY_POINTS = {m for m in MODULES if is_entry_point(m)}
DRIVERS = {
    m
    for m in MODULES
    if m not in ENTRY_POINTS and part_of(m) not in {*ALLOWED, *SERVICES, "__init__", "tiny"}
}


def reached(module: str, targets: set[str]) -> set[str]:
    names = imports(module, MODULES[module])
    return {t for t in targets for name in names if name == t or name.startswith(t + ".")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_an_entry_point(module):
    assert not reached(module, ENTRY_POINTS - {module})


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part_of(m) in SERVICES))
def test_services_do_not_know_the_drivers(module):
    assert not reached(module, DRIVERS)


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part_of(m) in ALLOWED))
def test_services_and_drivers_are_imported_from_above_alone(module):
    assert not reached(module, {*SERVICES, *DRIVERS})


def test_the_walk_sees_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import qirl_fast.models.a\nfrom . import b\nfrom ..ops import c\n"
        "def f():\n  from qirl_fast import train\n"
    )
    assert imports("rewards.x", file) == {"models.a", "rewards.b", "ops.c", "train"}


def test_importing_the_ops_loads_no_gpu_code_and_no_model_library() -> None:
    heavy = ("triton", "qirl_fast._cuda", "diffusers", "transformers", "peft")
    code = f"import sys, qirl_fast.ops; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
