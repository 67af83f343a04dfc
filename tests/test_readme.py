"""What the README and CONTRIBUTING tell people to do works: snippets, commands, targets, paths."""

import re
import sys
from pathlib import Path

import pytest
import torch
from yaml import safe_dump, safe_load

from qirl_fast.checkpoint import lora_state, save_checkpoint
from qirl_fast.config import Config, default_recipe, load_config
from qirl_fast.config.wording import schema_of
from qirl_fast.models import load_model
from qirl_fast.models.fused import is_patched
from qirl_fast.tiny import packaged

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text("utf-8")}


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language in the README, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def snippet(word: str, language: str = "python") -> str:
    """The one block that holds `word`."""
    found = [block for block in blocks(language) if word in block]
    assert len(found) == 1, f"{len(found)} {language} blocks of the README hold {word!r}"
    return found[0]


WORDS = (
    "ops.flow_step(",
    "sde_step_with_logprob(",
    "# my_judges.py",
    "load_lora_weights(",
    "qirl_fast.patch(",
)


def run(code: str) -> dict[str, object]:
    """Execute a snippet in a namespace of its own and return it."""
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_every_python_snippet_is_run_by_a_test_below():
    assert sorted(blocks("python")) == sorted(snippet(word) for word in WORDS)


def test_op_snippet_reaches_the_velocity():
    """Its own assert holds, and the gradient reaches exactly the rows with an advantage."""
    names = run(snippet(WORDS[0]))
    gradient = names["v"].grad
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().sum(1) > 0).tolist() == (names["advantage"] != 0).tolist() == [True] * 4


def test_flow_grpo_snippet():
    names = run(snippet(WORDS[1]))
    assert names["x_next"].shape == (2, 16, 8, 8) and names["logp"].shape == (2,)


def test_patch_snippet():
    names = run(snippet(WORDS[4]))
    assert is_patched(names["transformer"])


def test_recipe_and_judge_snippets_are_accepted(tmp_path, monkeypatch):
    """The recipe is valid as it stands, once its files exist; the judge is found and scores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_judges", raising=False)
    (tmp_path / "my_judges.py").write_text(snippet(WORDS[2]), encoding="utf-8")
    (tmp_path / "my_recipe.yaml").write_text(snippet("my_recipe.yaml", "yaml"), encoding="utf-8")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(packaged("tiny"))
    (tmp_path / "prompts").mkdir()
    for name in ("train", "heldout"):
        (tmp_path / "prompts" / f"{name}.jsonl").symlink_to(packaged(f"tiny:{name}"))
    cfg = load_config(["my_recipe.yaml"])
    assert cfg.rewards == {"my_judges:score": 1.0}
    (tmp_path / "edits").mkdir()
    for name in ("train", "heldout"):
        (tmp_path / "edits" / f"{name}.jsonl").symlink_to(packaged(f"tiny:edit-{name}"))
    recipe = safe_load(snippet("my_recipe.yaml", "yaml"))
    recipe |= safe_load(snippet("kind: preservation", "yaml"))
    (tmp_path / "edits.yaml").write_text(safe_dump(recipe), encoding="utf-8")
    edits = load_config(["edits.yaml"])
    assert set(edits.judges) == set(edits.rewards) and edits.data.bad_images == "skip"
    scores = run(snippet(WORDS[2]))["score"](torch.full((2, 4, 4, 3), 51).numpy(), [{}, {}])
    assert scores.tolist() == pytest.approx([0.2, 0.2])


def test_lora_snippet_draws_with_the_trained_weights(tmp_path, monkeypatch):
    """With the checkpoint of a run where the README says it is, the stock pipeline draws."""
    monkeypatch.chdir(tmp_path)
    cfg = load_config([])
    model = load_model(packaged(cfg.model.path), "auto", torch.float32, "cpu")
    model.trainable("lora", cfg.model.lora.rank, cfg.model.lora.alpha, None, seed=0)
    run_dir = tmp_path / cfg.output / str(cfg.run)
    save_checkpoint(run_dir, 1, {}, {}, lora_state(model.transformer), keep=1)
    names = run(snippet(WORDS[3]))
    assert names["image"].size == (64, 64)
    assert names["pipeline"].get_active_adapters()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for page, text in PAGES.items():
        named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE))
        assert named, page
        assert named <= targets, f"{page} names make targets that do not exist"
    first_screen = re.findall(r"^make (\S+)", blocks("bash")[0], re.MULTILINE)
    assert first_screen == ["train", "test"]


def test_settings_named_in_commands_are_keys():
    commands = re.findall(r'(?:ARGS="([^"]*)"|-m qirl_fast\.train ([^#`\n]*))', README)
    settings = re.findall(r"([A-Za-z_.]+)=", " ".join(a + " " + b for a, b in commands))
    assert len(settings) >= 4
    assert set(settings) <= set(schema_of(Config).dotted_keys())


def test_files_named_in_the_pages_exist():
    for page, text in PAGES.items():
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        paths = re.findall(r"`((?:\.ci|qirl_fast|csrc|configs|docs|tests)/[\w./-]+)`", text)
        missing = [path for path in links + paths if not (ROOT / path).exists()]
        assert not missing, f"{page} names files that do not exist: {missing}"
    assert default_recipe().stem in README
