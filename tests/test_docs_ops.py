"""docs/ops.md: every op has a row and an example, and the examples run."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from qirl_fast import ops

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "ops.md").read_text()
EXAMPLES = dict(re.findall(r"^## (\w+)\n\n```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.M))
ROWS = {
    cells[0].strip("`"): cells
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TEXT.splitlines()
        if line.startswith("| `")
    )
}
PUBLIC = {name for name in ops.__all__ if name.islower() and name != "use_backend"}


def test_every_op_has_a_row_and_an_example():
    assert set(EXAMPLES) >= PUBLIC
    assert set(ROWS) == set(EXAMPLES)


@pytest.mark.parametrize("op", EXAMPLES)
def test_the_example_runs(op):
    if op not in PUBLIC:
        pytest.skip(f"this build has no op {op}")
    assert f"ops.{op}(" in EXAMPLES[op]
    exec(compile(EXAMPLES[op], f"docs/ops.md, {op}", "exec"), {})


def test_the_example_of_outputs_in_fp8_runs():
    example = re.search(r"^## Outputs in fp8\n.*?^```python\n(.*?)^```", TEXT, re.DOTALL | re.M)
    assert example is not None
    exec(compile(example[1], "docs/ops.md, outputs in fp8", "exec"), {})


@pytest.mark.parametrize("op", ROWS)
def test_the_row_names_the_backends_it_has(op):
    if op not in PUBLIC:
        pytest.skip(f"this build has no op {op}")
    module = import_module(f"qirl_fast.ops.{op}")
    if not hasattr(module, "OP"):
        pytest.skip(f"{op} is composed of other ops")
    assert ROWS[op][2].split(", ") == list(module.OP.backends)
