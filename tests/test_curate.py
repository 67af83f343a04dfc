"""`python -m qirl_fast.curate` as processes: what it keeps, killed, resumed, refused, failing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qirl_fast.config import ConfigError, load_config
from qirl_fast.curate import open_folder
from qirl_fast.data.prompts import load_prompts
from qirl_fast.evaluation.scores import ScoreFile
from qirl_fast.tiny import packaged

CURATE = "from qirl_fast.curate import main"
COUNT, SAMPLES = 20, 6

# A judge of known success rates, and one that fails where a file says so.
JUDGE = '''
import hashlib, os
from pathlib import Path
import numpy as np

def coin(images, rows):
    """Success with probability row["p"], by the image's own bits."""
    bits = [int.from_bytes(hashlib.sha256(i.tobytes()).digest()[:8], "big") for i in images]
    return np.array([float(b / 2**64 < row["p"]) for b, row in zip(bits, rows)], np.float32)

class Sour:
    """Fails on rows marked "sour", as long as the file beside it is there."""
    seen = 0
    def __call__(self, images, rows):
        self.seen += len(rows)
        if any(row.get("sour") for row in rows) and (Path(__file__).parent / "sour").exists():
            raise TimeoutError("no answer")
        return np.full(len(rows), self.seen, np.float32)
    def state_dict(self): return {"seen": self.seen}
    def load_state_dict(self, state): self.seen = state["seen"]

sour = Sour()
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the judge's module and prompts whose success rates are known."""
    folder = tmp_path_factory.mktemp("curate")
    (folder / "known.py").write_text(JUDGE)
    rates = [0.0, 1.0, 0.5, 0.3]
    with packaged("tiny:train").open() as file:
        rows = [json.loads(line) for line in file][:COUNT]
    lines = [
        json.dumps(row | {"p": rates[i % 4]} | ({"sour": True} if i == 7 else {}))
        for i, row in enumerate(rows)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def curate(start, small, place) -> Callable[..., tuple[int, str, Path]]:
    """`curate(name, *settings, hook="")`: exit code, output and folder of a run of this name."""

    def run(name: str, *settings: str, hook: str = "") -> tuple[int, str, Path]:
        argv = [
            *small,
            f"output={place}",
            f"run={name}",
            f"data.train={place / 'prompts.jsonl'}",
            "rewards={'known:coin': 1, alignment: 0, aesthetics: 0}",
            "rollout={max_rows: 18, steps: 3, window: {start: 0, size: 1}}",  # chunks of 3 prompts
            f"curation={{samples: {SAMPLES}, threshold: 0, quantile: null}}",
            "curation={drop_failed: 0.5, drop_passed: 0.5}",
            *settings,
        ]
        ran = start(argv, paths=[place], hook=f"{CURATE}\n{hook}")
        code = ran.wait()
        return code, ran.output(), place / f"{name}-curation"

    return run


@pytest.fixture(scope="module")
def whole(curate) -> Path:
    code, output, folder = curate("whole", "curation.images=2")
    assert code == 0, output
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_keeps_the_band_that_the_judge_makes(whole: Path, place: Path) -> None:
    scores = ScoreFile(
        whole / "scores.jsonl", [*rows(whole / "scores.jsonl")[0]["scores"]], SAMPLES
    )
    coin_Pn = scores.array()[:, :, list(scores.names).index("known:coin")]
    assert coin_Pn.shape == (COUNT, SAMPLES) and not np.isnan(scores.array()).any()
    wins = coin_Pn.sum(1)
    prompts = load_prompts(place / "prompts.jsonl")
    rate = np.array([p.metadata["p"] for p in prompts])
    assert (wins[rate == 0] == 0).all() and (wins[rate == 1] == SAMPLES).all()
    mixed = (wins > 0) & (wins < SAMPLES)
    expected = sum(1 - p**SAMPLES - (1 - p) ** SAMPLES for p in rate)
    assert abs(mixed.sum() - expected) <= 3 and mixed.sum() >= 5
    kept, dropped = (rows(whole / f"{name}.jsonl") for name in ("kept", "dropped"))
    assert [r["prompt"] for r in kept] == [prompts[i].prompt for i in np.flatnonzero(mixed)]
    assert {r["curation"]["reason"] for r in dropped} == {"all fail", "all pass"}
    assert len(kept) + len(dropped) == COUNT and not rows(whole / "failed.jsonl")


def test_rows_load_again_with_their_metadata(whole: Path, place: Path) -> None:
    wanted = {p.prompt: p.metadata for p in load_prompts(place / "prompts.jsonl")}
    for name in ("kept", "dropped"):
        for prompt in load_prompts(whole / f"{name}.jsonl"):
            own = dict(prompt.metadata)
            assert own.pop("curation")["n"] == SAMPLES
            assert own == wanted[prompt.prompt]


def test_samples_differ_and_their_images_are_kept_where_asked(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert sum(summary["verdicts"].values()) == COUNT == summary["prompts"]
    images = [np.asarray(Image.open(path)) for path in sorted((whole / "images").iterdir())]
    assert len(images) == 2 * SAMPLES and len({i.tobytes() for i in images}) == 2 * SAMPLES
    for name in ("histogram.png", "strips.png"):
        assert Image.open(whole / name).size[0] > 500


KILL = """
import os, signal
from qirl_fast.evaluation.scores import ScoreFile
real = ScoreFile.append
def append(self, record):
    if len(self.records) == {after}:
        with self.path.open("a") as file:
            file.write('{{"row": 1')
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, record)
ScoreFile.append = append
"""


def test_killed_at_any_moment_it_goes_on_with_the_same_bits(curate, whole: Path) -> None:
    for after in (0, 13):
        code, output, folder = curate("killed", "curation.images=2", hook=KILL.format(after=after))
        assert code == -9, output
        assert len((folder / "scores.jsonl").read_bytes().splitlines()) == after + 1
    code, output, folder = curate("killed", "curation.images=2", "threads=2")
    assert code == 0 and f"13 of {COUNT} prompts have their scores" in output
    for path in whole.rglob("*"):
        if path.suffix in (".jsonl", ".png") and path.name != "histogram.png":
            own = folder / path.relative_to(whole)
            assert own.read_bytes() == path.read_bytes(), path.name


def test_other_thresholds_draw_nothing(curate, whole: Path) -> None:
    before = (whole / "scores.jsonl").read_bytes()
    code, output, _ = curate("whole", "curation.images=2", "curation.threshold=99")
    assert code == 0 and f"{COUNT} of {COUNT} prompts have their scores" in output
    assert "nothing is kept" in output and not rows(whole / "kept.jsonl")
    assert (whole / "scores.jsonl").read_bytes() == before
    code, output, _ = curate("whole", "curation.images=2")
    assert code == 0 and rows(whole / "kept.jsonl")


def test_a_folder_of_other_sampling_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "p.txt"
    source.write_text("a\n")
    base = (f"output={tmp_path}", "run=a")
    folder = open_folder(load_config(base), source)
    for other in ("rollout.guidance=2.0", "seed=4", "curation.samples=5", "watch=[json:dumps]"):
        with pytest.raises(ConfigError, match="was made with other settings") as error:
            open_folder(load_config([*base, other]), source)
        assert other.partition("=")[0] in str(error.value)
    same = ("curation={threshold: 1, quantile: null}", "rewards.alignment=0.2", "train.lr=1")
    assert open_folder(load_config([*base, *same, "rollout.group_size=6"]), source) == folder
    source.write_text("b\n")
    with pytest.raises(ConfigError, match=r"sha256 of data\.train"):
        open_folder(load_config(base), source)


def test_a_failing_judge_fails_its_prompts_and_is_asked_again(curate, place: Path) -> None:
    (place / "sour").touch()
    settings = ("rewards={'known:sour': 1}", "failures={reask: 0, budget: 0.3}")
    code, output, folder = curate("sour", *settings)
    assert code == 0 and "prompts lack a score" in output, output
    (failed, *_) = rows(folder / "failed.jsonl")
    assert failed["curation"]["reason"] == "failed" and failed["curation"]["range"] is None
    assert "no answer" in failed["curation"]["failures"]["known:sour"]["0"]
    numbers = {name: len(rows(folder / f"{name}.jsonl")) for name in ("kept", "dropped", "failed")}
    assert sum(numbers.values()) == COUNT and numbers["failed"] == 3, "the chunk that raised"
    (place / "sour").unlink()
    code, output, folder = curate("sour", *settings)
    assert code == 0 and "3 on which a judge failed are asked again" in output
    assert not rows(folder / "failed.jsonl")
    assert {tuple(r["scores"]["known:sour"]) for r in rows(folder / "scores.jsonl")} >= {
        (3.0 * SAMPLES,) * SAMPLES
    }, "a judge's state is the first chunk's at every chunk"


def test_a_judge_beyond_its_budget_stops_with_the_scores_kept(curate, place: Path) -> None:
    (place / "sour").touch()
    settings = ("rewards={'known:sour': 1}", "failures={reask: 0, budget: 0.1}")
    code, output, folder = curate("budget", *settings)
    (place / "sour").unlink()
    assert code == 1 and "known:sour" in output and "failures.budget allows 10%" in output
    assert len(rows(folder / "scores.jsonl")) >= 9 and not (folder / "kept.jsonl").exists()
    code, output, _ = curate("budget", *settings)
    assert code == 0, output


def test_a_folder_that_is_no_curation_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "strange-curation"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds files and no settings\.json"):
        open_folder(load_config([f"output={tmp_path}", "run=strange"]), folder / "notes.txt")
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_scores_that_are_none_are_named(curate, whole: Path, place: Path) -> None:
    code, _, folder = curate("torn", hook=KILL.format(after=3))
    text = (folder / "scores.jsonl").read_text().splitlines()
    (folder / "scores.jsonl").write_text("\n".join([text[0], "{}", *text[1:]]))
    code, output, _ = curate("torn")
    assert code == 2 and "scores.jsonl:2: no record" in output


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["curation.threshold=0.5"], "got 0.5 and 0.25; set exactly one"),
        (["curation.quantile=null"], "got neither; set exactly one"),
        (["curation={drop_failed: 0.9, drop_passed: 0.1}"], "would count as failed and passed"),
        (["curation.samples=1"], "curation.samples"),
        (["curation.quantile=1.0"], "curation.quantile"),
        (["curation.threshhold=1"], "did you mean curation.threshold?"),
    ],
)
def test_settings_that_cannot_be(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(settings)
    assert words in str(error.value)
