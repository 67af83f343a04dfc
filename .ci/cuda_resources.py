"""Registers, shared memory and spills of every CUDA kernel, from what ptxas said when compiling.

python3 .ci/cuda_resources.py BUILD_DIR reads BUILD_DIR/**/<op>.cu.o.ptxas, writes
BUILD_DIR/resources.json, prints a table and exits 1 if a kernel spills or uses a local stack.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def demangled(names: list[str]) -> list[str]:
    """Readable names without arguments, as far as c++filt is there."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    run = subprocess.run([tool, "-p", *names], capture_output=True, text=True, check=True)
    return [
        name.replace("qirl::cuda::", "").replace("(anonymous namespace)::", "")
        for name in run.stdout.splitlines()
    ]


def kernels_of(log: Path) -> list[dict]:
    """One record for each kernel and target of one .cu file."""
    records: list[dict] = []
    for line in log.read_text().splitlines():
        if entry := _ENTRY.search(line):
            records.append({"file": log.name.split(".")[0], "kernel": entry[1], "target": entry[2]})
            records[-1] |= {"registers": 0, "shared": 0, "stack": 0, "spills": 0}
        elif records and (stack := _STACK.search(line)):  # of the kernel or of a function it calls
            records[-1]["stack"] += int(stack[1])
            records[-1]["spills"] += int(stack[2]) + int(stack[3])
        elif records and (used := _USED.search(line)):
            shared = _SHARED.search(line)
            records[-1] |= {"registers": int(used[1]), "shared": int(shared[1]) if shared else 0}
    for record, name in zip(records, demangled([r["kernel"] for r in records]), strict=True):
        record["kernel"] = name
    return records


def main(build: Path) -> int:
    sources = {p.name for p in Path(__file__).parents[1].glob("csrc/cuda/*.cu")}
    logs = [p for p in sorted(build.rglob("*.ptxas")) if p.name.split(".o")[0] in sources]
    records = [record for log in logs for record in kernels_of(log)]
    (build / "resources.json").write_text(json.dumps({"kernels": records}, indent=1) + "\n")
    print(f"{'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}  target   kernel")
    for r in records:
        print(
            f"{r['registers']:9} {r['shared']:7} {r['stack']:6} {r['spills']:6}  "
            f"{r['target']:8} {r['file']}: {r['kernel']}"
        )
    bad = [r for r in records if r["stack"] or r["spills"]]
    for r in bad:
        print(f"cuda-check: {r['kernel']} ({r['target']}) spills or has a stack", file=sys.stderr)
    return 1 if bad or not records else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
