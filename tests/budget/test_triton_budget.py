"""Every Triton kernel, compiled ahead of time, keeps to the BUDGET of its file."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed (extra 'triton')", allow_module_level=True)

FILES = sorted(
    p.stem for p in (Path(__file__).parents[2] / "kernels").glob("*.py") if p.stem != "budget"
)


def cases():
    for file in FILES:
        for case in import_module(f"qirl_fast.kernels.{file}").BUDGET:
            for target in case.targets:
                yield pytest.param(case, target, id=f"{file}-{case.name}-sm_{target}")


@pytest.mark.parametrize(("case", "target"), cases())
def test_kernel_keeps_to_its_budget(case, target, measure, faults):
    measured = measure(case, target)
    print(measured)
    assert faults(case, measured) == [], str(measured)


@pytest.mark.parametrize("file", ["norm_modulate", "gate_residual_norm_modulate"])
@pytest.mark.parametrize("target", [80, 90, 100])
def test_a_norm_that_also_writes_fp8_adds_in_the_same_order(file, target, measure):
    """The layout of a row is the order of its sums, and so the bits of y."""
    found: dict[str, set[str]] = {}
    for case in import_module(f"qirl_fast.kernels.{file}").BUDGET:
        if "UNIT" in case.constexprs:
            instance = f"{case.signature['y_ptr']}, {case.constexprs['BLOCK']}"
            layouts = measure(case, target).row_layouts
            assert len(layouts) == 1
            found.setdefault(instance, set()).update(layouts)
    assert len(found) == 4 and all(len(layouts) == 1 for layouts in found.values())


@pytest.mark.parametrize("file", FILES)
def test_every_kernel_has_a_case(file):
    module = import_module(f"qirl_fast.kernels.{file}")
    named = {case.kernel.__name__ for case in module.BUDGET}
    assert {name for name in vars(module) if name.endswith("_kernel")} <= named


def test_a_budget_that_is_not_kept_is_reported(measure, faults):
    case = import_module("qirl_fast.kernels.flow_step").BUDGET[0]
    unaligned = faults(case, measure(replace(case, divisible=()), 90))
    assert any("widest load" in fault for fault in unaligned)
    assert any("narrower" in fault for fault in unaligned)
    assert faults(replace(case, registers=8), measure(case, 90)) != []
