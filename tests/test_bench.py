"""python -m bench ops: what is wrong is not timed; table and plot come from the JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, collect, report
from bench import ops as bench
from bench.cases import Case, Make
from bench.check import fault, forced, results, tolerance
from bench.timing import interleaved, peak_bytes
from qirl_fast import ops

SMALL = {(4, 4096, 64): (2, 33, 16), (1, 4352, 3072): (1, 40, 256), (1152,): (72,)}
ROW = {
    *("op", "device", "dtype", "shape", "mode", "provider", "ms_p20", "ms_p50", "ms_p80"),
    *("gbps", "pct_copy", "speedup_vs_eager", "speedup_vs_compile"),
}
HEAD = {"machine", "versions", "commit", "date", "copy_gbps", "rows"}
QUICK = {"rounds": 1, "seconds": 0.01, "compiled": False, "sweep": False}


def in_this_build(name: str) -> bool:
    return hasattr(ops, name.split(",")[0])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every case at a small shape, and no gigabyte copy."""
    table = {name: (make, SMALL[shape]) for name, (make, shape) in cases.CASES.items()}
    monkeypatch.setattr(bench, "CASES", table)
    monkeypatch.setattr(bench, "copy_gbps", lambda device: 10.0)
    monkeypatch.setattr(bench, "SWEEP", {shape: [] for shape in SMALL.values()})


def test_every_op_has_a_case():
    public = {name for name in ops.__all__ if name.islower() and name != "use_backend"}
    assert public <= {name.split(",")[0] for name in cases.CASES}


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_eager_version_does_the_same_job(name, dtype):
    """Else a speed-up would compare different things. The reference, in float32, decides."""
    if not in_this_build(name):
        pytest.skip(f"this build has no op {name}")
    make, shape = bench.CASES[name]
    case = make(shape, Make(dtype, "cpu"))
    truth = results(case, forced("reference", case.ours))
    assert fault(results(case, case.ours), truth, tolerance(case, dtype)) == ""
    if case.same_job:
        assert fault(results(case, case.eager), truth, 8 * tolerance(case, dtype)) == ""


def test_result_table_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SWEEP", {SMALL[(4, 4096, 64)]: [(1, 8, 16), (1, 16, 16)]})
    out = tmp_path / "r.json"
    chosen = ["guide", "flow_step"]
    options = bench.Options(only=chosen, out=out, **(QUICK | {"sweep": True}))
    result = bench.measure(options, say=lambda text: None)
    assert result["wrong"] == []
    written = json.loads(out.read_text())
    assert set(written) >= HEAD and written["rows"]
    assert all(set(row) >= ROW for row in written["rows"])
    assert {r["mode"] for r in written["rows"]} == {"forward", "backward", "both"}
    assert {r["provider"] for r in written["rows"]} == {"ours", "eager"}
    for row in written["rows"]:
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    text = report.markdown(written)
    assert text.count("| guide |") == 12 and "| flow_step | bfloat16 |" in text
    report.plot(written, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_a_wrong_op_is_reported_and_not_timed(monkeypatch):
    def broken(shape, make):
        case = cases.CASES["gelu"][0](shape, make)

        def ours(x):
            y = case.eager(x)
            return y if ops.dispatch.forced_backend() == "reference" else y * 1.001

        return Case("gelu", shape, case.inputs, ours, case.eager, 1, 1, leaves=(0,))

    monkeypatch.setitem(bench.CASES, "gelu", (broken, (1, 8, 256)))
    options = bench.Options(only=["gelu"], dtypes=[torch.float32], **QUICK)
    result = bench.measure(options, say=lambda text: None)
    assert result["rows"] == []
    assert "WRONG" in result["wrong"][0] and "off by 1.0e-03" in result["wrong"][0]


def test_a_missing_op_is_skipped_with_a_reason(monkeypatch):
    monkeypatch.setitem(bench.CASES, "no_such", (None, (2, 33, 16)))
    result = bench.measure(bench.Options(only=["no_such"], **QUICK), say=lambda text: None)
    assert result["skipped"] == ["no_such: this build has no such op"]


def test_a_case_that_raises_does_not_lose_the_others(monkeypatch):
    monkeypatch.setitem(bench.CASES, "guide", (lambda *_: 1 / 0, (2, 33, 16)))
    result = bench.measure(
        bench.Options(only=["guide", "flow_step"], **QUICK), say=lambda text: None
    )
    assert "ZeroDivisionError" in result["wrong"][0]
    assert {row["op"] for row in result["rows"]} == {"guide, rescaled", "flow_step"}


def test_each_op_has_processes_of_its_own(tmp_path):
    out = tmp_path / "r.json"
    chosen = ["policy_loss", "group_advantage"]
    options = bench.Options(only=chosen, out=out, processes=2, **QUICK)
    result = bench.run(options)
    assert set(result) >= HEAD and result["wrong"] == []
    rows = [(row["op"], row["mode"], row["provider"]) for row in result["rows"]]
    assert len(rows) == len(set(rows)) and result["processes"] == 2
    assert {row["op"] for row in result["rows"]} == {"policy_loss", "group_advantage"}
    assert json.loads(out.read_text()) == result


def test_processes_count_alike_whatever_their_rounds():
    slow, fast = {"copy": [2.0, 2.0], "ours": [4.0, 4.0]}, {"copy": [1.0] * 9, "ours": [1.0] * 9}
    (one,) = bench._pooled([[bench.Timed({"op": "x"}, 8, {"ours": 0}, t)] for t in (slow, fast)])
    assert one.times_ms == {"copy": [2.0, 2.0, 1.0, 1.0], "ours": [4.0, 4.0, 1.0, 1.0]}
    (row,) = bench._rows(one)
    assert (row["ms_p20"], row["ms_p50"], row["ms_p80"]) == (1.0, 2.5, 4.0)
    assert row["pct_copy"] == 60.0 and row["speedup_vs_eager"] is None


def test_fault_sees_nan_shape_and_dtype():
    t = torch.ones(3)
    assert fault([t], [t], 0.1) == ""
    assert "off by nan" in fault([torch.tensor([1.0, 1.0, float("nan")])], [t], 0.1)
    assert "result 0" in fault([torch.ones(4)], [t], 0.1)
    assert "result 0" in fault([t.double()], [t], 0.1)


def test_interleaving_and_memory():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    pairs = ["".join(pair) for pair in zip(order[::2], order[1::2], strict=True)]
    assert set(pairs) == {"ab", "ba"} and set(times) == {"a", "b"}  # both orders, each once a round
    x = torch.ones(1000)
    # Two results are held at one time; the numbers 1 and 2 are tensors too.
    assert 8000 <= peak_bytes(lambda: (x + 1) * 2, "cpu") < 8100


def test_collect_merges_parts(tmp_path):
    head = {"machine": {"cpu": "c"}, "versions": {}, "commit": "0", "date": "d", "copy_gbps": 1.0}
    row = {"op": "gelu", "device": "cuda", "dtype": "bfloat16", "shape": [1], "mode": "forward"}
    row |= {"sweep": False, "provider": "eager", "ms_p50": 2.0}
    first = head | {"rows": [row], "wrong": ["x"], "skipped": []}
    second = head | {"rows": [row | {"ms_p50": 1.0}], "wrong": ["x", "y"], "skipped": []}
    (tmp_path / "ops.json").write_text(json.dumps(first))
    (tmp_path / "compile.json").write_text(json.dumps(second))
    (tmp_path / "step.json").write_text(json.dumps(head | {"rows": [{"name": "stock"}]}))
    (tmp_path / "parts.txt").write_text("build 60 0\ntests 9 124\n")
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="m"/>'
        '</testcase><testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    result = collect.collect(tmp_path)
    assert [r["ms_p50"] for r in result["rows"]] == [1.0]
    assert result["wrong"] == ["x", "y"]
    assert result["step"]["rows"] == [{"name": "stock"}] and "block" not in result
    assert result["tests"] == {"ran": True, "passed": 1, "skipped": 1, "failed": {"b": "m"}}
    assert result["parts"]["tests"] == {"seconds": 9, "exit_status": "124"}


def test_gpu_script_is_valid_and_within_nine_minutes():
    script = Path(__file__).resolve().parents[1] / "bench" / "gpu.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "limit=${LIMIT_S:-540}" in script.read_text()


def test_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench", "ops", "--help"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for option in ("--op", "--device", "--base", "--out"):
        assert option in done.stdout
