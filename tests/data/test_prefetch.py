"""The loader: the same arrays prefetched or not, waiting counted, memory bounded, errors kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qirl_fast.data import prefetch
from qirl_fast.data.images import Size
from qirl_fast.data.prefetch import ImageLoader, Result
from qirl_fast.data.sources import ImageError, Source


class Decoder:
    """A function of name and sizes; counts, and waits at the gate where it is closed."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self, sources: Sequence[Source], sizes: Sequence[Sequence[Size]]) -> list[Result]:
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.seen += [source.name for source in sources]
        return [
            ImageError(f"{source.name}: bad")
            if source.name.startswith("bad")
            else [np.full((*size, 3), ord(source.name[0]), np.uint8) for size in each]
            for source, each in zip(sources, sizes, strict=True)
        ]


def wanted(names: str | list[str], *sizes: Size) -> list[tuple[Source, list[Size]]]:
    return [(Source(name, Path(name)), list(sizes or ((2, 5), (1, 1)))) for name in names]


def same(first: list[Result], second: list[Result]) -> bool:
    def key(result: Result) -> object:
        return str(result) if isinstance(result, ImageError) else [a.tolist() for a in result]

    return [key(r) for r in first] == [key(r) for r in second]


def test_the_same_with_and_without_prefetching() -> None:
    names = [*"abcdefghijklmnopqrstuvw", "bad", "a"]
    plain = Decoder()(*zip(*wanted(names), strict=True))
    for ahead in ([], names[:1], names[::-1], [*names, "z"]):
        decoder = Decoder()
        with ImageLoader(decoder) as loader:
            loader.prefetch(wanted(ahead))
            got = loader.get(wanted(names))
            assert same(got, plain)
            assert same(loader.get(wanted(names[::-1])), plain[::-1])
        assert sorted(decoder.seen) == sorted({*names, *ahead}), "each is decoded once"
        assert got[0] is got[-1]


def test_training_goes_on_while_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    with ImageLoader(decoder) as loader:
        decoder.gate.clear()
        loader.prefetch(wanted("ab"))  # returns, though nothing can be decoded yet
        decoder.gate.set()
        ticks = iter([10.0, 13.0, 20.0, 20.5])
        monkeypatch.setattr(prefetch.time, "perf_counter", lambda: next(ticks))
        loader.get(wanted("ab"))
        assert loader.waited_s == 3.0
        loader.get(wanted("ab"))
        assert loader.waited_s == 3.5 and decoder.seen == ["a", "b"]


def test_sizes_are_part_of_what_is_asked() -> None:
    with ImageLoader(Decoder()) as loader:
        loader.prefetch(wanted("a", (4, 4)))
        (first,), (second,) = loader.get(wanted("a", (4, 4))), loader.get(wanted("a", (4, 5)))
        assert not isinstance(first, ImageError) and not isinstance(second, ImageError)
        assert [a.shape for a in first + second] == [(4, 4, 3), (4, 5, 3)]


def test_arrays_are_shared_and_so_read_only() -> None:
    with ImageLoader(Decoder()) as loader:
        (result,) = loader.get(wanted("a"))
        assert not isinstance(result, ImageError)
        with pytest.raises(ValueError, match="read-only"):
            result[0][:] = 0


def test_memory_is_bounded() -> None:
    decoder = Decoder()
    with ImageLoader(decoder, memory_bytes=2 * 300) as loader:  # two images of 10 x 10 x 3
        for name in "abc":
            loader.get(wanted(name, (10, 10)))
        loader.get(wanted("cb", (10, 10)))
        assert decoder.seen == list("abc"), "b and c were in memory"
        loader.get(wanted("a", (10, 10)))
        assert decoder.seen == list("abca"), "a was not, and c went for it"
        loader.get(wanted("b", (10, 10)))
        assert decoder.seen == list("abca")
        many = loader.get(wanted("defghijk", (10, 10)))
        assert len(many) == 8 and len(loader._kept) == 2 == len(loader._bytes)


def test_a_file_that_changes_is_decoded_again(tmp_path: Path) -> None:
    decoder = Decoder()
    source = Source("a.png", tmp_path / "a.png")
    with ImageLoader(decoder) as loader:
        for text, seen in (("one", 1), ("one", 1), ("longer", 2)):
            if not source.path.exists() or source.path.read_text() != text:
                source.path.write_text(text)
            loader.get([(source, [(10, 10)])])
            assert len(decoder.seen) == seen


def test_errors_are_kept() -> None:
    decoder = Decoder()
    with ImageLoader(decoder, memory_bytes=0) as loader:
        for _ in range(2):
            (error,) = loader.get(wanted(["bad"]))
            assert isinstance(error, ImageError) and str(error) == "bad: bad"
        assert decoder.seen == ["bad"]


def test_what_the_decoder_raises_reaches_who_asks_and_is_not_kept() -> None:
    decoder = Decoder()
    with ImageLoader(decoder) as loader:
        decoder.error = MemoryError("out of memory")
        loader.prefetch(wanted("a"))
        with pytest.raises(MemoryError, match="out of memory"):
            loader.get(wanted("b"))
        decoder.error = None
        assert len(loader.get(wanted("ab"))) == 2


def test_closing_gives_up_what_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    decoder.gate.clear()
    loader = ImageLoader(decoder)
    loader.prefetch(wanted("a"))
    loader.prefetch(wanted("b"))
    shutdown = loader._thread.shutdown

    def slow(cancel_futures: bool) -> None:
        shutdown(wait=False, cancel_futures=cancel_futures)
        decoder.gate.set()  # the first batch ends only now
        shutdown()

    monkeypatch.setattr(loader._thread, "shutdown", slow)
    loader.close()
    assert "b" not in decoder.seen
    for name in "bc":
        with pytest.raises(RuntimeError):
            loader.get(wanted(name))
