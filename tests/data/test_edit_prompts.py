"""Editing sets: every form gives the same rows; bad rows, names and links are named."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import pytest

from qirl_fast.data.grouped import expand
from qirl_fast.data.prompts import PromptError, load_prompts
from qirl_fast.data.sources import ImageError, Source

# Not images: reading rows opens none. Different lengths, so that a wrong offset shows.
FILES = {"a.jpg": b"first", "b.0.png": b"second one", "b.1.png": b"third", "b.10.png": b"tenth!"}
SIDES = {
    "a.txt": "make it red\n",
    "b.json": json.dumps({"prompt": "join both", "category": "join", "metadata": {"x": 1}}),
}


def rows(folder: Path, *rows: object, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def shard(path: Path, files: dict[str, bytes | str], mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(path: Path, **options: Path) -> list[tuple[str, str | None, list[bytes]]]:
    prompts = load_prompts(path, **options)
    return [(p.prompt, p.category, [image.read() for image in p.images]) for p in prompts]


BOTH = [
    ("make it red", None, [b"first"]),
    ("join both", "join", [b"second one", b"third", b"tenth!"]),
]


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", FILES | SIDES)
    assert contents(folder) == BOTH
    one = {"prompt": "make it red", "image": "a.jpg"}
    names = ["b.0.png", "b.1.png", "b.10.png"]
    two = {"prompt": "join both", "tag": "join", "images": names}
    assert contents(rows(folder, one, two)) == BOTH
    assert contents(rows(tmp_path, one, two), images=folder) == BOTH
    assert contents(shard(tmp_path / "s.tar", FILES | SIDES)) == BOTH
    rows(folder, {"prompt": "make it red", "file_name": "a.jpg"}, two, name="metadata.jsonl")
    assert contents(folder) == BOTH
    (folder / "metadata.jsonl").unlink()
    deep = fill(tmp_path / "deep", {f"x/y.z/{k}": v for k, v in (FILES | SIDES).items()})
    (deep / "p.jsonl").unlink(missing_ok=True)
    assert contents(deep) == BOTH


def test_shards_in_order_read_in_place(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        files = {"k.webp": f"image {number}", "k.txt": f"prompt {number}"}
        shard(tmp_path / f"s-{number:03}.tar", files)
    prompts = load_prompts(tmp_path / "s-{008..010}.tar")
    assert [p.prompt for p in prompts] == ["prompt 8", "prompt 9", "prompt 10"]
    assert [p.images[0].read() for p in prompts] == [b"image 8", b"image 9", b"image 10"]
    assert prompts[1].images[0].name == "s-009.tar:k.webp"
    assert len({p.id for p in prompts}) == 3
    with pytest.raises(PromptError, match=r"s-011\.tar: cannot be read"):
        load_prompts(tmp_path / "s-{010..011}.tar")
    with pytest.raises(PromptError, match="wanted the smaller number first"):
        load_prompts(tmp_path / "s-{2..1}.tar")
    assert [p.name for p in expand(Path("a{1..2}b{0..1}"))] == ["a1b0", "a1b1", "a2b0", "a2b1"]


def test_metadata_lies_below_the_row(tmp_path: Path) -> None:
    row = {"prompt": "p", "image": "a.jpg", "metadata": {"include": [], "prompt": "old", "k": 3}}
    (prompt,) = load_prompts(rows(tmp_path, row))
    assert prompt.metadata == {"include": [], "k": 3, **row}
    bare = {key: row[key] for key in ("prompt", "image")}
    assert load_prompts(rows(tmp_path, bare))[0].id != prompt.id


def test_files_that_are_no_part_of_a_row_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"a.cls": "3", "b.cls": "4", ".DS_Store": "x", "sub/.hidden.jpg": "x"}
    assert contents(fill(tmp_path, FILES | SIDES | extra)) == BOTH
    assert "{'.cls': 2}" in caplog.text and "DS_Store" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert contents(shard(tmp_path / "x.tar", FILES | SIDES)) == BOTH
    assert not caplog.records


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"image": 3}, "'image' is a number (3); wanted the path of an image"),
        ({"images": "a.jpg"}, "'images' is a text"),
        ({"images": []}, "'images' is a list ([]); wanted a list of one or more paths"),
        ({"images": ["a.jpg", None]}, "wanted a list of one or more paths"),
        ({"image": "a.jpg", "images": ["a.jpg"]}, "got 'image' and 'images'; wanted one of them"),
        ({"image": "a.jpg", "category": 1}, "'category' is a number"),
        ({"image": "a.jpg", "tag": "x", "category": "y"}, "tag 'x' and category 'y'; wanted one"),
        ({"image": "a.jpg", "metadata": "x"}, "'metadata' is a text"),
        ({"image": "a.jpg", "metadata": {"include": 3}}, "'include' is a number"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, row: dict[str, object], part: str) -> None:
    root = fill(tmp_path / "root", FILES)
    good = {"prompt": "p", "image": "a.jpg"}
    path = rows(root, good, {"prompt": "p", **row}, good)
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ") and part in str(caught.value)


@pytest.mark.parametrize(
    ("image", "part"),
    [
        ("../a.jpg", "wanted a path below"),
        ("x/../../a.jpg", "without '..' and not absolute"),
        ("/etc/passwd", "wanted a path below"),
        ("", "wanted a path below"),
        ("a\0.jpg", "wanted a path below"),
        ("out/secret.jpg", "is a link to"),
        ("out.jpg", "is a link to"),
        ("loop.jpg", "cannot be followed"),
    ],
)
def test_a_path_out_of_the_dataset_is_never_opened(tmp_path: Path, image: str, part: str) -> None:
    root = fill(tmp_path / "root", FILES)
    fill(tmp_path / "elsewhere", {"secret.jpg": "x", "a.jpg": "x"})
    fill(tmp_path, {"a.jpg": "x"})
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "out.jpg").symlink_to(tmp_path / "elsewhere" / "secret.jpg")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "in.jpg").symlink_to("a.jpg")
    good, bad = load_prompts(rows(root, *({"prompt": "p", "image": i} for i in ("in.jpg", image))))
    assert good.images[0].read() == b"first"
    for read in (Source.read, Source.sha256, Source.open):
        with pytest.raises(ImageError) as caught:
            read(bad.images[0])
        assert str(caught.value).startswith(f"{image}: ") and part in str(caught.value)


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "no images with prompts"),
        ({"a.png": "x"}, "a.png: the same row has a.jpg already"),
        ({"a.0.jpg": "x"}, "a: an image with and one without number"),
        ({"b.01.png": "x"}, "png: the same row has b."),
        ({"c.jpg": "x"}, "c: an image without a prompt; wanted c.txt or .json"),
        ({"README.txt": "x"}, "README: a prompt without an image"),
        ({"a.json": '{"prompt": "other"}'}, "its prompt and that of a.json differ"),
        ({"a.json": '{"image": "z.jpg"}'}, "a.json: names images"),
        ({"a.json": "[1]"}, "a.json: got a list"),
        ({"a.json": "{"}, "a.json: malformed JSON"),
        ({"c.jpg": "x", "c.json": "{}"}, "c.json: no 'prompt' among the keys"),
        ({"c.jpg": "x", "c.txt": ""}, "c.txt: the file is empty"),
        ({"c.jpg": "x", "c.txt": " \n"}, "c.txt: the prompt is blank"),
        ({"c.jpg": "x", "c.txt": b"caf\xe9"}, "c.txt: byte 3 is not UTF-8"),
    ],
)
@pytest.mark.parametrize("form", ["folder", "shard"])
def test_bad_groups(tmp_path: Path, form: str, files: dict[str, bytes | str], part: str) -> None:
    whole = (FILES | SIDES | files) if files else {}
    make = {"folder": fill, "shard": shard}[form]
    path = tmp_path / {"folder": "f", "shard": "s.tar"}[form]
    if form == "folder":
        path.mkdir()
    with pytest.raises(PromptError) as caught:
        load_prompts(make(path, whole))
    assert part in str(caught.value).replace("s.tar:", "")


def test_bad_shards(tmp_path: Path) -> None:
    good = shard(tmp_path / "s.tar", FILES | SIDES)
    (tmp_path / "cut.tar").write_bytes(good.read_bytes()[:2000])
    shard(tmp_path / "packed.tar", FILES | SIDES, "w:gz")
    for name, part in (
        ("cut", "not a whole uncompressed tar"),
        ("packed", "not a whole uncompressed tar"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(PromptError, match=part):
            load_prompts(tmp_path / f"{name}.tar")
    (tmp_path / "s.tar.gz").write_bytes(b"x")
    with pytest.raises(PromptError, match=r"got a \.gz file; wanted \.jsonl or \.txt, a folder"):
        load_prompts(tmp_path / "s.tar.gz")
    with pytest.raises(PromptError, match=r"only \.jsonl rows name them"):
        load_prompts(good, images=tmp_path)


def test_members_that_are_never_read(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {"a.txt": "p", "b.jpg": "x", "b.txt": "p", "c.txt": "p"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("b.jpg"))
        tar.addfile(tarfile.TarInfo("../c.jpg"))
        tar.addfile(tarfile.TarInfo("../c.txt"))
        tar.addfile(tarfile.TarInfo("c.jpg"))
    with pytest.raises(PromptError, match=r"\.\./c\.txt: the name leaves the shard"):
        load_prompts(path)  # a prompt is no image: nothing says what the row is
    path = shard(tmp_path / "t.tar", {"a.txt": "p", "b.jpg": "x", "b.txt": "p", "c.txt": "p"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("b.jpg"))
        tar.addfile(tarfile.TarInfo("c.jpg"))
    parts = ("a link or no plain file", "the name comes twice", r"empty \(0 bytes\)")
    prompts = sorted(load_prompts(path), key=lambda prompt: prompt.images[0].name)
    for prompt, part in zip(prompts, parts, strict=True):
        with pytest.raises(ImageError, match=rf"t\.tar:[abc]\.jpg: .*{part}"):
            prompt.images[0].read()


def test_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    for name, part in (("none.png", "No such file"), ("empty.png", r"empty \(0 bytes\)")):
        for read in (Source.read, Source.sha256):
            with pytest.raises(ImageError, match=f"photos/{name}: .*{part}"):
                read(Source(f"photos/{name}", tmp_path / name))
    with pytest.raises(ImageError, match=r"x: cannot be read \(Is a directory\)"):
        Source("x", tmp_path).read()
    (tmp_path / "s.tar").write_bytes(b"0123456789")
    assert Source("m", tmp_path / "s.tar", 3, 4).read() == b"3456"
    with pytest.raises(ImageError, match="ends after 2 of the 5 bytes"):
        Source("m", tmp_path / "s.tar", 8, 5).read()
    with pytest.raises(ImageError, match="empty"):
        Source("m", tmp_path / "s.tar", 8, 0).read()


def test_a_member_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"0123456789")
    with Source("m", tmp_path / "s.tar", 3, 4).open() as file:
        assert file.seek(0, io.SEEK_END) == 4 and file.read() == b""
        assert file.seek(-3, io.SEEK_CUR) == 1 and file.read(2) == b"45" and file.read() == b"6"


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    a = Source("a", fill(tmp_path, {"a": "x", "b": "x"}) / "a")
    assert a.sha256() == Source("b", tmp_path / "b").sha256()
    before = a.sha256()
    (tmp_path / "a").write_bytes(b"longer")
    assert a.sha256() != before
