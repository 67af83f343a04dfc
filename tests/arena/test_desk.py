"""What the page shows and keeps, without a browser."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_studies import write_rows

from qirl_fast.arena import store as module
from qirl_fast.arena.desk import Desk, label, side_of
from qirl_fast.arena.study import load_study
from qirl_fast.config.arena import ArenaConfig


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(module, "TOO_FAST_S", 0.0)


@pytest.fixture
def cfg(folders, tmp_path):
    return ArenaConfig(models=folders, database=str(tmp_path / "votes.db"), resamples=100)


@pytest.fixture
def desk(cfg, study, store):
    return Desk(cfg, study, store)


def send(rater="anna", **what):
    return json.dumps({"rater": rater, **what})


def data(page, name):
    return re.search(f"data-{name}='([^']*)'", page)[1]


def pictures(page):
    return re.findall(r"src='picture/([0-9a-f]{32})' alt='(\w+) picture'", page)


def test_a_vote_for_a_side_is_a_vote_for_the_model_that_stood_there(desk, store, study):
    page = desk.show(send())
    while "data-item" in page:
        left = {side: name for name, side in pictures(page)}["left"]
        shade = int(np.asarray(Image.open(io.BytesIO(desk.pictures.png(left)))).flat[0])
        before = len(store.votes())
        page = desk.vote(send(item=data(page, "item"), choice="left"))
        vote = store.votes()[before]
        chosen = vote.item.a if vote.choice == "a" else vote.item.b
        assert chosen == ("base" if shade < 100 else "rl")
    assert len(store.votes()) == 6 and "all 6 questions are answered" in page
    assert {v.choice for v in store.votes()} == {"a", "b"}  # sides were mixed


@pytest.mark.parametrize("left", ["a", "b"])
@pytest.mark.parametrize("side", ["left", "right", "tie", "bad"])
def test_labels_and_sides_are_inverse(left, side):
    assert side_of(label(side, left), left) == side


def test_nothing_on_the_page_tells_whose_picture_it_is(desk):
    page = desk.show(send())
    seen = [page]
    for _ in range(6):
        page = desk.vote(send(item=data(page, "item"), choice="tie"))
        seen.append(page)
        if "data-item" not in page:
            break
    text = "".join(seen)
    assert not re.search(r"\b(base|rl|images|png)\b", text)
    names = [name for name, _ in pictures(text)]
    assert len(set(names)) == 12


def test_names_of_pictures_differ_between_databases(desk, cfg, study, tmp_path):
    other = Desk(cfg, study, module.Store(tmp_path / "other.db"))
    assert other.pictures.name("p0", "rl") != desk.pictures.name("p0", "rl")


def test_pixels_alone_are_served(folders, cfg, store):
    """What a model's files say besides is left out: text, format, size of the file's metadata."""
    file = Path(folders["rl"]) / "images" / "0.png"
    info = PngInfo()
    info.add_text("model", "rl, the best")
    pixels = np.asarray(Image.open(file)).copy()
    Image.fromarray(pixels).save(file, pnginfo=info)
    desk = Desk(cfg, load_study(folders), store)
    served = desk.pictures.png(desk.pictures.name("p0", "rl"))
    image = Image.open(io.BytesIO(served))
    assert b"the best" not in served and image.info == {} and image.format == "PNG"
    assert np.array_equal(np.asarray(image), pixels)
    assert desk.pictures.png("no such") is None


def test_a_prompt_with_html_is_shown_as_text(folders, cfg, store):
    for folder in folders.values():
        path = Path(folder) / "prompts.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"prompt": "<img src=x onerror=alert(1)> '\"&"} for row in rows]
        write_rows(Path(folder), rows)
    page = Desk(cfg, load_study(folders), store).show(send("<b>'anna"))
    assert (
        "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt; &#x27;&quot;&amp;" in page
    )
    assert "<b>" not in page and data(page, "rater") == "&lt;b&gt;&#x27;anna"


def test_a_vote_that_comes_twice_is_not_a_vote_on_the_next_question(desk, store):
    page = desk.show(send())
    vote = send(item=data(page, "item"), choice="left")
    second, again = desk.vote(vote), desk.vote(vote)
    assert data(second, "place") == data(again, "place") == "2" and len(store.votes()) == 1


def test_going_back_changes_the_vote(desk, store):
    first = desk.show(send())
    desk.vote(send(item=data(first, "item"), choice="left"))
    back = desk.show(send(place=1))
    assert data(back, "item") == data(first, "item") and "You voted: left is better" in back
    page = desk.vote(send(item=data(back, "item"), choice="tie"))
    assert "Your vote was changed." in page and data(page, "place") == "2"
    assert [v.choice for v in store.votes()] == ["tie"] and store.changes() == 1


def test_a_vote_before_the_pictures_are_there_is_not_kept(desk, store):
    page = desk.show(send())
    page = desk.vote(send(item=data(page, "item"), choice="waiting"))
    assert "had not loaded" in page and data(page, "place") == "1" and not store.votes()


def test_a_picture_that_goes_away_while_serving_is_not_voted_on(desk, store, folders):
    page = desk.show(send())
    item = desk.items[data(page, "item")]
    file = Path(folders["rl"]) / "images" / f"{item.prompt[1:]}.png"
    kept = file.read_bytes()
    file.unlink()
    page = desk.vote(send(item=data(page, "item"), choice="left"))
    assert "A picture is gone" in page and not store.votes()
    assert desk.items[data(page, "item")] != item
    file.write_bytes(kept[:-20] + bytes(20))  # and comes back as something else
    assert desk.items[data(desk.show(send(place=1)), "item")] != item


@pytest.mark.parametrize(
    "wire", ["", "{", "[]", "null", "3", '{"rater": 3}', '{"rater": "a", "place": 1e9}',
             '{"rater": "a", "place": 99999999999999999999}', '{"rater": "\\u0000"}',
             '{"rater": "a", "what": 1}', '{"rater": "' + "x" * 99 + '"}', "[" * 100_000]
)  # fmt: skip
def test_what_the_page_would_never_send(desk, store, wire):
    for answer in (desk.show(wire), desk.vote(wire)):
        assert "data-item" not in answer and "arena-hello" in answer
    assert not store.votes()


def test_a_vote_on_an_unknown_question_or_choice_is_none(desk, store):
    page = desk.show(send())
    assert data(desk.vote(send(item="0" * 32, choice="left")), "place") == "1"
    assert "wanted one of left" in desk.vote(send(item=data(page, "item"), choice="up"))
    assert not store.votes()


def test_a_second_rater_gets_what_has_no_votes_yet(desk, store):
    page = desk.show(send())
    for _ in range(3):
        page = desk.vote(send(item=data(page, "item"), choice="left"))
    voted = {v.item for v in store.votes()}
    page = desk.show(send("ben"))
    for _ in range(3):
        assert desk.items[data(page, "item")] not in voted
        page = desk.vote(send("ben", item=data(page, "item"), choice="left"))


def test_results_are_noted_and_follow_the_votes(desk, store):
    first = desk.results(send(), "rl", "base")
    assert "No prompt of rl against base is decided yet" in first
    page = desk.show(send())
    desk.vote(send(item=data(page, "item"), choice="tie"))
    second = desk.results("", "rl", "base")
    assert "50.0 % of 1 prompts" in second
    assert "1 of these votes are of people who had seen results" in second
    assert "Choose two different" in desk.results("", "rl", "rl")
    assert "Choose two different" in desk.results("", "rl", "<b>")
