"""What docs/security.md says: nothing that is read is run; every line names a test."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


LOCKS = {p.stem: p.read_text() for p in (ROOT / ".ci" / "locks").glob("*.txt")}
BLOCK = re.compile(
    r"[a-z][a-z0-9.-]*==[^\s;]+( ; [^\\\n]+)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+"
)


def pins(text: str) -> dict[str, Requirement]:
    """Packages of a lock as this Python takes them; AssertionError for a line without a hash."""
    body = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    assert BLOCK.sub("", body) == "", BLOCK.sub("", body)[:200]
    lines = [found[0].split("\\")[0] for found in BLOCK.finditer(body)]
    found = [Requirement(line) for line in lines]
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate()}


def version(pin: Requirement) -> str:
    (one,) = pin.specifier
    return one.version


def asked() -> list[Requirement]:
    """What pyproject.toml asks for, the extras that are locked among it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    words = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    todo = ["dev", "dali", "arena-test", "docs", "fuzz"]
    while todo:
        for text in extras[todo.pop()]:
            own = Requirement(text)
            if own.name == "qirl-fast":
                todo += own.extras
            else:
                words.append(text)
    return [Requirement(text) for text in words]


@pytest.mark.parametrize("group", LOCKS)
def test_every_package_of_a_lock_has_hashes(group: str) -> None:
    assert pins(LOCKS[group])


@pytest.mark.parametrize(
    "line", ["numpy\n", "numpy==2.4.6\n", "numpy>=2 \\\n    --hash=sha256:00\n"]
)
def test_a_lock_with_less_is_seen(line: str) -> None:
    with pytest.raises(AssertionError):
        pins(LOCKS["cpu"] + line)


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_the_locks_hold_what_is_asked_for_and_all_that_this_needs(torch: str) -> None:
    chosen = [g for g in LOCKS if g not in ("cpu", "cuda")] + [torch]
    held = {name: pin for group in chosen for name, pin in pins(LOCKS[group]).items()}
    needs = [("pyproject.toml", r) for r in asked()]
    for found in distributions():
        name = canonicalize_name(found.name)
        if name in held and found.version == version(held[name]):
            texts = found.requires or []
            needs += [(name, r) for r in map(Requirement, texts)]
    for who, need in needs:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            name = canonicalize_name(need.name)
            assert name in held, f"{who} needs {need}; run .ci/lock"
            assert need.specifier.contains(version(held[name]), prereleases=True), (who, need)


def test_what_is_installed_has_its_hash() -> None:
    """pip runs with --require-hashes, or installs this package alone, without anything it needs."""
    files = [ROOT / "Makefile", *(ROOT / ".ci" / n for n in ("run", "setup", "wheel", "install"))]
    calls = []
    for file in files:
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        calls += [line for line in lines if re.search(r"-m pip\b.* (install|wheel)\b", line)]
    assert len(calls) == 4, calls
    for line in calls:
        assert "--require-hashes" in line or "--no-deps" in line, line
    assert sum("--require-hashes" in line for line in calls) == 1  # .ci/install
