"""`python -m bench.collect FOLDER`: what bench/gpu.sh left there, as one JSON, table and plot."""

import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

from bench import report


def _tests(path: Path) -> dict[str, Any]:
    """Counts, and the first lines of each failure."""
    if not path.exists():
        return {"ran": False}
    cases = list(xml.parse(path).getroot().iter("testcase"))
    failed = {
        case.get("name"): problem.get("message", "")[:400]
        for case in cases
        for problem in (*case.findall("failure"), *case.findall("error"))
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    return {"ran": True, "passed": passed, "skipped": skipped, "failed": failed}


def _parts(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {
        name: {"seconds": int(seconds), "exit_status": status}
        for name, seconds, status in (line.split() for line in lines)
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("op", "device", "dtype", "mode", "provider", "sweep")
    return (*(row[name] for name in names), tuple(row["shape"]))


def collect(folder: Path) -> dict[str, Any]:
    """One result: rows with torch.compile take the place of the same rows without it."""
    result: dict[str, Any] = {}
    for name in ("ops", "compile"):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        if not result:
            result = found
            continue
        rows = {_key(row): row for row in result["rows"]} | {_key(r): r for r in found["rows"]}
        result["rows"] = list(rows.values())
        for kind in ("wrong", "skipped"):
            result[kind] = list(dict.fromkeys([*result[kind], *found[kind]]))
    for name in ("block", "step", "opd", "fp8"):
        path = folder / f"{name}.json"
        if path.exists():
            result[name] = json.loads(path.read_text())
    result["tests"] = _tests(folder / "tests.xml")
    result["parts"] = _parts(folder / "parts.txt")
    return result


def main() -> None:
    folder = Path(sys.argv[1])
    result = collect(folder)
    (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    if "rows" in result:
        (folder / "gpu.md").write_text(report.markdown(result))
        report.plot(result, folder / "gpu.png")
    print(json.dumps({"tests": result["tests"], "parts": result["parts"]}, indent=1))


if __name__ == "__main__":
    main()
