"""The shell of a page and the few pieces of HTML it is made of: one file, no script, no link.

Text that came from anywhere else goes through `esc`. The style is one column on a phone and several
on a wide screen, light or dark as the reader's system is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

# What a page ends with; \1 stands for what is known when all else is written.
FOOT = "<footer>Written by qirl_fast from the run's own files; nothing is loaded.\1</footer>"
LONGEST = 300  # characters of a prompt that are shown
# Not characters of HTML; NUL marks pictures, see album.py. Lone surrogates are not UTF-8.
STRANGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def esc(text: object) -> str:
    """Any text as text of HTML, quotes too."""
    return escape(STRANGE.sub("\ufffd", str(text)))


def short(text: str | None, limit: int = LONGEST) -> str:
    """A prompt as HTML; of a long one the beginning, saying how long it is."""
    if text is None:
        return '<span class="pale">(the text of this prompt was not kept)</span>'
    if len(text) <= limit:
        return esc(text)
    return f"{esc(text[:limit])} ... <small>({len(text):,} characters in all)</small>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML; it scrolls where it is too wide. kind: its class."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def section(title: str, body: str) -> str:
    """A heading and what stands under it; nothing where that is empty."""
    return f"<section><h2>{esc(title)}</h2>\n{body}</section>\n" if body else ""


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Names and short values, side by side; values are HTML."""
    each = "".join(
        f'<div class="tile"><small>{esc(name)}</small><b>{value}</b></div>'
        for name, value in values
    )
    return f'<div class="tiles">{each}</div>\n'


def notes(texts: Iterable[str]) -> str:
    """Sentences that a reader should see first."""
    return "".join(f'<p class="note">{esc(text)}</p>\n' for text in texts)


def picture(mark: str, width: int, caption: str) -> str:
    """An image of the album, of this many pixels across, over a caption that is HTML."""
    kind = ' class="small"' if width < 128 else ""
    return f'<figure><img{kind} src="{mark}" alt="">{caption}</figure>'


def document(title: str, body: str) -> str:
    """The whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )
