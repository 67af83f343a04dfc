"""Folders of pictures: what is read, what is left out and said, what is refused."""

import json
from pathlib import Path
from shutil import copy

import pytest
from small_studies import write_model, write_rows

from qirl_fast.arena.__main__ import main
from qirl_fast.arena.study import load_study
from qirl_fast.config import ConfigError


def test_a_study_is_read(study):
    assert study.models == ("base", "rl") and len(study.prompts) == len(study.items) == 6
    assert study.notes == ()
    assert [p.source is not None for p in study.prompts.values()] == [True] * 2 + [False] * 4
    assert study.prompts["p3"].category == "odd" and study.prompts["p3"].size == (8, 8)


@pytest.mark.parametrize(
    ("models", "text"),
    [
        ("{}", "models: got 0 (none); wanted two or more"),
        ("{base: a}", "models: got 1 (base); wanted two or more"),
        ("{base: a, rl: a}", "two of them have the same folder"),
        ("{base: nowhere, rl: neither}", "nowhere/prompts.jsonl: cannot be read"),
    ],
)
def test_too_few_models_are_refused(tmp_path, capsys, models, text):
    file = tmp_path / "arena.yaml"
    file.write_text(f"models: {models}\ndatabase: {tmp_path}/v.db\n")
    assert main([str(file)]) == 2
    assert text in capsys.readouterr().err


def test_only_common_prompts_are_shown_and_it_says_how_many(folders):
    write_model(Path(folders["rl"]).with_name("other"), 50, n=4, edits=2)
    study = load_study(folders | {"other": str(Path(folders["rl"]).with_name("other"))})
    assert list(study.prompts) == ["p0", "p1", "p2", "p3"] and len(study.items) == 12
    assert study.notes == (
        "only the 4 prompts that all models have are shown: base 6, rl 6, other 4",
    )


def test_no_common_prompt_is_an_error(folders):
    rows = [{"id": "x", "prompt": "x", "image": "images/0.png"}]
    write_rows(Path(folders["rl"]), rows)
    with pytest.raises(ConfigError, match="no prompt is in every folder"):
        load_study(folders)


def test_a_missing_or_broken_picture_leaves_its_prompt_out_and_is_said(folders):
    (Path(folders["rl"]) / "images" / "3.png").unlink()
    (Path(folders["base"]) / "images" / "4.png").write_bytes(b"GIF, or so")
    study = load_study(folders)
    assert list(study.prompts) == ["p0", "p1", "p2", "p5"]
    assert "2 prompts are left out" in study.notes[0] and "images/3.png" in study.notes[0]
    for i in range(6):
        (Path(folders["base"]) / "images" / f"{i}.png").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="nothing is left to show"):
        load_study(folders)


def test_other_sizes_are_refused_or_shown_at_the_smallest(folders):
    large = Path(folders["rl"]).with_name("large")
    write_model(large, 50, size=(16, 16), edits=2)
    models = folders | {"large": str(large)}
    with pytest.raises(ConfigError, match=r"base 8x8, rl 8x8, large 16x16.*sizes=scale.*6 prompts"):
        load_study(models)
    assert {p.size for p in load_study(models, "scale").prompts.values()} == {(8, 8)}


def test_other_shapes_are_refused_however(folders):
    wide = Path(folders["rl"]).with_name("wide")
    write_model(wide, 50, size=(8, 16), edits=2)
    with pytest.raises(ConfigError, match="different shapes: base 8x8, rl 8x8, wide 16x8"):
        load_study(folders | {"wide": str(wide)}, "scale")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": "another text"}, "its prompt is .* in base and 'another text' in rl"),
        ({"category": "x"}, "its category is"),
        ({"source": None}, "has a source in one of base and rl alone"),
        ({"id": ""}, "id is ''; wanted a text"),
        ({"id": 3}, "id is '3'; wanted a text"),
        ({"image": None}, "image is 'None'; wanted a text"),
        ({"id": "x" * 201}, "201 characters"),
        ({"prompt": "\ud800"}, "prompt is"),
        ({"id": "p1"}, "id 'p1' is there twice"),
        ({"metadata": []}, "wanted an object, as is its metadata"),
    ],
)
def test_rows_that_do_not_fit_are_refused(folders, change, text):
    folder = Path(folders["rl"])
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    rows[0] |= change
    write_rows(folder, rows)
    with pytest.raises(ConfigError, match=text):
        load_study(folders)


@pytest.mark.parametrize("text", ["", "{", "[]\n", "\n", '{"id": "a"}\n\n', "\xff"])
def test_files_that_are_no_rows_are_refused(folders, text):
    (Path(folders["rl"]) / "prompts.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load_study(folders)


@pytest.mark.parametrize("image", ["../base/images/0.png", "/etc/hostname"])
def test_a_path_out_of_the_folder_is_never_opened(folders, image):
    """The prompt is left out, with the reason."""
    rows = write_model(Path(folders["rl"]).with_name("evil"), 9, edits=2)
    rows[0]["image"] = image
    write_rows(Path(folders["rl"]).with_name("evil"), rows)
    study = load_study(folders | {"evil": str(Path(folders["rl"]).with_name("evil"))})
    assert "p0" not in study.prompts and "1 prompts are left out" in study.notes[0]


def test_another_source_is_refused(folders):
    copy(Path(folders["rl"]) / "images" / "3.png", Path(folders["rl"]) / "images" / "0-source.png")
    with pytest.raises(ConfigError, match="have edited different pictures"):
        load_study(folders)
