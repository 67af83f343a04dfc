"""A Markdown table and a plot, both written from a result file."""

from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
MODES = ("forward", "backward", "both")


def _shape(row: dict[str, Any]) -> str:
    return " x ".join(map(str, row["shape"]))


def _best_ours(rows: Rows) -> Rows:
    """Per op, dtype, shape and mode the fastest provider of ours."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["provider"].startswith("ours"):
            key = (row["op"], row["dtype"], tuple(row["shape"]), row["mode"], row["sweep"])
            if key not in best or row["ms_p50"] < best[key]["ms_p50"]:
                best[key] = row
    return list(best.values())


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def markdown(result: dict[str, Any]) -> str:
    """Every row that is not of the size sweep, what was wrong or skipped, and the machine."""
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    lines = [
        f"Commit {result['commit'][:12]}, {result['date']}; {machine}; {versions}. Copy "
        f"{result['copy_gbps']:.1f} GB/s. Medians of interleaved runs (p20 to p80)"
        + (f" of {result['processes']} processes." if "processes" in result else "."),
        "",
        "| op | dtype | shape | mode | provider | ms | GB/s | % of copy | peak MB | vs eager "
        "| vs compile |" + (" vs base |" if "base" in result else ""),
        "|---|---|---|---|---|---|---|---|---|---|---|" + ("---|" if "base" in result else ""),
    ]
    for row in result["rows"]:
        if row["sweep"]:
            continue
        cells = [row["op"], row["dtype"], _shape(row), row["mode"], row["provider"]]
        cells += [f"{row['ms_p50']:.3f} ({row['ms_p20']:.3f} to {row['ms_p80']:.3f})"]
        cells += [f"{row['gbps']:.1f}", f"{row['pct_copy']:.0f}", f"{row['peak_mb']:.1f}"]
        cells += [_ratio(row["speedup_vs_eager"]), _ratio(row["speedup_vs_compile"])]
        if "base" in result:
            cells.append(_ratio(row.get("speedup_vs_base")))
        lines.append("| " + " | ".join(cells) + " |")
    for kind in ("wrong", "skipped"):
        if result[kind]:
            lines += ["", f"{kind.capitalize()}:", "", *(f"- {text}" for text in result[kind])]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars: speed-up over eager and torch.compile, share of the copy. Below: the size sweep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ours = _best_ours(result["rows"])
    bars = [r for r in ours if not r["sweep"] and r["dtype"] == "bfloat16"]
    sweep = [r for r in ours if r["sweep"]]
    figure, axes = plt.subplots(3, 1, figsize=(max(8.0, 0.42 * len(bars)), 13.0))
    names = [f"{r['op']}\n{r['mode']}" for r in bars]
    at = range(len(bars))
    for shift, key, label in (
        (-0.2, "speedup_vs_eager", "over eager"),
        (0.2, "speedup_vs_compile", "over torch.compile"),
    ):
        heights = [r[key] or float("nan") for r in bars]
        axes[0].bar([i + shift for i in at], heights, 0.4, label=label)
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set(yscale="log", ylabel="speed-up, bfloat16")
    axes[0].legend()
    axes[1].bar(at, [r["pct_copy"] for r in bars], 0.6, color="tab:green")
    axes[1].set(ylabel="% of a copy of the same bytes", ylim=(0, 150))
    for axis in axes[:2]:
        axis.set_xticks(list(at), names, rotation=90, fontsize=7)
    for op in dict.fromkeys(r["op"] for r in sweep):
        rows = [r for r in sweep if r["op"] == op and _elements(r)]
        rows.sort(key=_elements)
        axes[2].plot([_elements(r) for r in rows], [r["gbps"] for r in rows], marker="o", label=op)
    axes[2].axhline(result["copy_gbps"], color="black", linewidth=0.8, linestyle=":")
    axes[2].set(xscale="log", yscale="log", xlabel="elements", ylabel="GB/s, forward, bfloat16")
    if sweep:
        axes[2].legend(fontsize=7, ncols=2)
    device = result["machine"].get("gpu") or result["machine"]["cpu"]
    axes[0].set_title(f"{device}, commit {result['commit'][:12]}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _elements(row: dict[str, Any]) -> int:
    product = 1
    for size in row["shape"]:
        product *= size
    return product
