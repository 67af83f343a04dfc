"""What docs/security.md says: nothing that is read is run; every line names a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "qirl_fast").rglob("*.py"))
# What runs, or unpickles, whatever it is given.
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.save", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "__import__",
}  # fmt: skip
COLLECTIVES = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?$")


def faults(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        named = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in CALLS or COLLECTIVES.search(name):
            found.append(name)
        if named.get("shell", "False") != "False" or "trust_remote_code" in named:
            found.append(f"{name}: {named}")
        if name in ("np.load", "numpy.load") and named.get("allow_pickle") != "False":
            found.append(f"{name} without allow_pickle=False")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_that_is_read_is_run(file: Path) -> None:
    assert faults(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text)",
        "dist.all_gather_object(found, mine)",
        "Model.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_walk_sees_what_is_forbidden(source: str) -> None:
    assert faults(source)


def test_every_line_names_a_test_that_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    for line in lines:
        names = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", line)
        assert names, line
        for file, function in names:
            content = (ROOT / file).read_text(encoding="utf-8")
            assert not function or f"def {function}(" in content, (file, function)
