"""One HTML page for the reports of `dataset.clean` and `dataset.preview`.

A page is one file that opens anywhere: pictures are inside it, it has no script and no link.
"""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import write_text

BINS = 24  # of a histogram
# Pixels of a picture's longer side, twice as many as a page has for it.
SHOWN_SIDE = 320
STYLE = """
body { max-width: 1080px; margin: 2.5em auto 4em; padding: 0 1.5em; color: #1f2937;
  background: #fff; font: 16px/1.55 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif }
h1 { font-size: 1.6em; margin: 0 0 .2em; overflow-wrap: anywhere }
h2 { font-size: 1.2em; margin: 2.2em 0 .6em }
h3 { font-size: 1em; margin: 1.6em 0 .4em }
p { margin: .3em 0 }
code { font-size: .92em }
.quiet { color: #6b7280; font-size: .9em }
table { border-collapse: collapse; font-size: .95em }
td { padding: .15em 1.2em .15em 0 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { display: inline-block; height: .7em; background: #7aa5d2; border-radius: 2px }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 90px; max-width: 620px }
.bars div { flex: 1; min-height: 1px; background: #7aa5d2; border-radius: 2px 2px 0 0 }
.scale { display: flex; justify-content: space-between; max-width: 620px }
.row { display: flex; gap: 1.6em; padding: 1.2em 0; border-top: 1px solid #e5e7eb }
.pictures { flex: 0 0 200px; display: flex; flex-wrap: wrap; gap: 6px; align-content: flex-start }
.pictures img { border-radius: 5px; width: 200px }
.pictures img:not(:only-child) { width: 97px }
.text { flex: 1; min-width: 0; overflow-wrap: anywhere }
.small .pictures { flex-basis: 160px }
.small .pictures img { width: 110px }
.small .pictures img:not(:only-child) { width: 77px }
.small.row { padding: .7em 0 }
.tokens { white-space: pre-wrap; line-height: 1.75; margin-top: .5em }
.tokens span { padding: .12em 0; border-radius: 2px }
.legend { line-height: 2.1; margin-top: .8em }
.legend span { padding: .12em .4em; margin-right: .3em; border-radius: 4px }
.legend b { font-weight: normal; white-space: nowrap; margin-right: 1.6em }
.legend + .quiet { margin-bottom: 2em }
.seen { background: #f3f4f6 } .seen:nth-child(2n) { background: #e5e7eb }
.label { background: #c6f2d1 } .label:nth-child(2n) { background: #9fe3b2 }
.tokens .image { background: #cfe2ff; padding: .12em .5em; border-radius: 8px }
.legend .image { background: #cfe2ff }
.mark, .gap { color: #9ca3af }
.cut { background: #fdeaea; color: #b91c1c; text-decoration: line-through }
.cut:nth-child(2n) { background: #fad7d7 }
"""


def write_page(path: Path, title: str, body: str) -> None:
    """Write a page of that title (text) and body (HTML)."""
    title = escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    text = f'<!doctype html>\n<html lang="en">{head}\n<h1>{title}</h1>\n{body}\n</html>\n'
    write_text(path, text)


def show_row(images: list[Image.Image], text: str, is_small: bool = False) -> str:
    """Pictures on the left, `text` (HTML) on the right; the pictures are shrunk in place."""
    pictures = "".join(map(show_picture, images)) or '<span class="quiet">no picture</span>'
    kind = "row small" if is_small else "row"
    return (
        f'<div class="{kind}"><div class="pictures">{pictures}</div>'
        f'<div class="text">{text}</div></div>\n'
    )


def show_picture(image: Image.Image) -> str:
    """An <img> with a JPEG inside, of at most SHOWN_SIDE pixels a side."""
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{content}">'


def show_counts(counts: dict[str, int], total: int | None = None) -> str:
    """A table of counts with bars; with `total`, also their shares of it."""
    if not counts:
        return "<p>Nothing.</p>"
    most = max(counts.values()) or 1
    rows = ""
    for name, count in counts.items():
        share = f'<td class="number">{count / total:.2%}</td>' if total else ""
        bar = f'<span class="bar" style="width:{200 * count / most:.0f}px"></span>'
        rows += f'<tr><td>{escape(name)}</td><td class="number">{count:,}</td>{share}'
        rows += f"<td>{bar}</td></tr>\n"
    return f"<table>{rows}</table>"


def show_histogram(values: np.ndarray, caption: str) -> str:
    """Bars from 0 to the 99.5th percentile; larger values are counted in the last bar."""
    if not len(values):
        return "<p>None.</p>"
    top = max(float(np.percentile(values, 99.5)), 1.0)
    counts, edges = np.histogram(values.clip(max=top), BINS, (0, top))
    bars = "".join(
        f'<div style="height:{100 * count / counts.max():.1f}%" '
        f'title="{low:.0f} to {high:.0f}: {count:,}"></div>'
        for count, low, high in zip(counts, edges, edges[1:])
    )
    middle = f"{escape(caption)}, median {np.median(values):,.0f}"
    return (
        f'<div class="bars">{bars}</div>'
        f'<div class="scale quiet"><span>0</span><span>{middle}</span><span>{top:,.0f}</span></div>'
    )
