"""`python -m bench decode`: condition images a second by DALI, PIL and torchvision; the loader.

The files are photographs of scikit-learn and scikit-image (extra "dev"), saved again at the sizes
that people upload. All providers run in one process, interleaved. `decode` asks for the pixels
alone, `versions` for the two sizes that an editing step takes of them; torchvision decodes on a
pool of as many threads. The loader: steps that do nothing but wait, as a step on a GPU does for the
CPU, each with images of its own; the share of a step that `ImageLoader.get` blocks, with the next
step's images prefetched and without.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from bench.machine import about, version
from bench.timing import interleaved
from qirl_fast.data.images import Decoder, header
from qirl_fast.data.prefetch import ImageLoader
from qirl_fast.data.sources import ImageError, Source

PHOTOS = {
    "sklearn.datasets": ("images/china.jpg", "images/flower.jpg"),
    "skimage": (
        *("data/rocket.jpg", "data/hubble_deep_field.jpg", "data/retina.jpg"),
        *("data/astronaut.png", "data/coffee.png", "data/chelsea.png"),
    ),
}
# Ending, PIL's name and options, the longer side in pixels.
KINDS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    (".jpg", "JPEG", {"quality": 90}, 1280),
    (".large.jpg", "JPEG", {"quality": 92}, 3000),
    (".png", "PNG", {}, 1024),
    (".webp", "WEBP", {"quality": 85}, 1280),
)
VERSIONS = [(1024, 1024), (384, 384)]
THREADS = (1, 2)


@dataclass
class Options:
    """What `python -m bench decode` was asked for."""

    rounds: int = 9
    seconds: float = 60.0
    step_s: float = 2.0
    steps: int = 6
    images_per_step: int = 4
    scale: float = 1.0  # of the sides in KINDS
    out: Path | None = None


def make_photos(folder: Path, scale: float) -> list[Source]:
    """One file for each photograph and kind."""
    import skimage
    import sklearn.datasets

    roots = {"sklearn.datasets": sklearn.datasets.__file__, "skimage": skimage.__file__}
    paths = [Path(roots[part]).parent / name for part, names in PHOTOS.items() for name in names]
    sources = []
    for path in paths:
        with Image.open(path) as file:
            photo = file.convert("RGB")
        for ending, kind, options, side in KINDS:
            factor = scale * side / max(photo.size)
            size = (round(photo.width * factor), round(photo.height * factor))
            target = folder / f"{path.stem}{ending}"
            photo.resize(size, Image.Resampling.LANCZOS).save(target, kind, **options)
            sources.append(Source(target.name, target))
    return sources


def decoders(say: Callable[[str], None]) -> dict[tuple[str, int], Callable[..., object]]:
    """(provider, threads) -> function of sources and sizes; what is missing is said."""
    found: dict[tuple[str, int], Callable[..., object]] = {}
    for threads in THREADS:
        found["pil", threads] = Decoder("pil", threads=threads)
        try:
            found["dali", threads] = Decoder("dali", threads=threads)
        except RuntimeError as error:
            say(f"dali left out: {error}")
        try:
            from torchvision.io import ImageReadMode, decode_image, read_file
        except (ImportError, OSError, RuntimeError) as error:  # a build for another torch
            say(f"torchvision left out: {error}")
            continue

        def by_torchvision(sources: Sequence[Source], sizes: object, pool: Any) -> object:
            def decode(source: Source) -> object:
                return decode_image(read_file(str(source.path)), ImageReadMode.RGB)

            return list(pool.map(decode, sources))

        pool = ThreadPoolExecutor(threads)
        found["torchvision", threads] = partial(by_torchvision, pool=pool)
    return found


def rates(
    sources: Sequence[Source],
    found: dict[tuple[str, int], Callable[..., object]],
    options: Options,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Images a second of each provider, by kind of file and for all together."""
    own = {source: [(head.height, head.width)] for source in sources for head in [header(source)]}
    groups = {
        ending: [s for s in sources if s.name.partition(".")[2] == ending[1:]]
        for ending, *_ in KINDS
    }
    groups["all"] = list(sources)
    rows = []
    for group, files in groups.items():
        for task in ("decode", "versions") if group == "all" else ("decode",):
            sizes = [own[s] if task == "decode" else VERSIONS for s in files]
            calls: dict[str, Callable[[], object]] = {
                f"{provider} {threads}": partial(call, files, sizes)
                for (provider, threads), call in found.items()
                if task == "decode" or provider != "torchvision"
            }
            times = interleaved(calls, options.rounds, seconds=options.seconds)
            for name, ms in times.items():
                provider, threads = name.split()
                row = {"files": group, "task": task, "provider": provider}
                row |= {"threads": int(threads), "images_per_s": 1e3 * len(files) / ms.p50}
                row |= {"vs_pil": times[f"pil {threads}"].p50 / ms.p50}
                row |= {"vs_pil_one_thread": times["pil 1"].p50 / ms.p50}
                rows.append(row)
                say(line(row))
    return rows


def waiting(
    sources: Sequence[Source], provider: str, ahead: bool, options: Options
) -> dict[str, Any]:
    """The share of simulated steps that is spent waiting for images; the first step is left out."""
    count = options.images_per_step
    batches = [
        [(sources[(step * count + i) % len(sources)], VERSIONS) for i in range(count)]
        for step in range(options.steps + 1)
    ]
    # Nothing stays in memory that a later step could find there.
    with ImageLoader(Decoder(provider), memory_bytes=2 * count * 4 * 2**20) as loader:
        loader.get(batches[0])
        before, start = loader.waited_s, time.perf_counter()
        for batch in batches[1:]:
            if ahead:
                loader.prefetch(batch)
            time.sleep(options.step_s)
            for result in loader.get(batch):
                if isinstance(result, ImageError):
                    raise result
        wall = time.perf_counter() - start
    waited = loader.waited_s - before
    row = {"provider": provider, "prefetch": ahead, "step_s": options.step_s}
    return row | {"waited_s": waited / options.steps, "share": waited / wall}


def run(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        sources = make_photos(Path(folder), options.scale)
        said: list[str] = []

        def note(text: str) -> None:
            if text not in said:
                said.append(text)
                say(text)

        result: dict[str, Any] = about("cpu")
        packages = ("pillow", "nvidia-dali-cuda130", "torchvision")
        result["versions"] |= {name: version(name) for name in packages}
        result["settings"] = {
            "files": len(sources),
            "megabytes": sum(s.path.stat().st_size for s in sources) / 1e6,
            "versions": VERSIONS,
            "steps": options.steps,
            "images_per_step": options.images_per_step,
        }
        result["rows"] = rates(sources, decoders(note), options, say)
        result["loader"] = []
        versions = [row for row in result["rows"] if row["task"] == "versions"]
        for provider in dict.fromkeys(row["provider"] for row in versions):
            for ahead in (True, False):
                result["loader"].append(waiting(sources, provider, ahead, options))
                say(loader_line(result["loader"][-1]))
        result["left_out"] = said
    return result


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['files']:10} {row['task']:8} {row['provider']:11} {row['threads']} threads "
        f"{row['images_per_s']:7.1f} images/s  {row['vs_pil']:.2f}x pil, "
        f"{row['vs_pil_one_thread']:.2f}x pil on one thread"
    )


def loader_line(row: dict[str, Any]) -> str:
    how = "prefetched" if row["prefetch"] else "on demand "
    return (
        f"loader {row['provider']:5} {how} step of {row['step_s']:.1f} s, waited "
        f"{row['waited_s']:.3f} s: {100 * row['share']:.2f} % of the step"
    )


def markdown(result: dict[str, Any]) -> str:
    """Both tables of a result."""
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    settings = ", ".join(f"{k} {v}" for k, v in result["settings"].items())
    lines = [
        f"Commit {result['commit'][:12]}, {result['date']}; {machine}; {versions}. {settings}. "
        "Medians of interleaved runs.",
        "",
        "| files | task | provider | threads | images/s | vs PIL | vs PIL, one thread |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["files"], row["task"], row["provider"], str(row["threads"])]
        cells += [f"{row['images_per_s']:.1f}", f"{row['vs_pil']:.2f}x"]
        lines.append("| " + " | ".join([*cells, f"{row['vs_pil_one_thread']:.2f}x"]) + " |")
    lines += ["", "| loader | prefetched | step s | waited s | share |", "|---|---|---|---|---|"]
    for row in result["loader"]:
        cells = [row["provider"], "yes" if row["prefetch"] else "no", f"{row['step_s']:.1f}"]
        cells += [f"{row['waited_s']:.3f}", f"{100 * row['share']:.2f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{text}" for text in result["left_out"]]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Images a second by kind of file, decoding alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["task"] == "decode"]
    files = list(dict.fromkeys(row["files"] for row in rows))
    providers = list(dict.fromkeys((row["provider"], row["threads"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    width = 0.8 / len(providers)
    for i, (provider, threads) in enumerate(providers):
        heights = [
            row["images_per_s"]
            for row in rows
            if (row["provider"], row["threads"]) == (provider, threads)
        ]
        at = [k + (i - (len(providers) - 1) / 2) * width for k in range(len(files))]
        axes.bar(at, heights, width, label=f"{provider}, {threads} threads")
    axes.set_xticks(range(len(files)), files)
    axes.set(ylabel="images/s, decoding alone", title=result["machine"]["cpu"])
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
