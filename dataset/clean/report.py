"""The account of a cleaning: report.json, and a page to read with examples and pictures."""

import base64
import io
import json
from collections import Counter, defaultdict
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import BadSampleError
from dataset.clean.decide import Decision, count_repairs
from dataset.clean.stages import Settings, open_source
from model.image import load_image

EXAMPLES = 6  # of each reason, and of what stays
THUMBNAIL = 96  # pixels
BINS = 24  # of a histogram
STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 1000px; margin: 2em auto;
  padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { margin-top: 2em; border-bottom: 1px solid #ddd } h3 { margin-bottom: .3em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { display: inline-block; height: .8em; background: #4878a8; border-radius: 2px }
.example { display: flex; gap: .8em; margin: .5em 0; padding: .5em; background: #f6f6f4; border-radius: 6px }
.example img { border-radius: 4px; height: 96px } .example p { margin: 0 } .quiet { color: #777; font-size: .9em }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 90px } .bars div { flex: 1; background: #4878a8; min-height: 1px }
.scale { display: flex; justify-content: space-between; color: #777; font-size: .85em }
.bars, .scale { max-width: 600px }
"""


class Report:
    """Watches rows go by while they are written; keeps counts and a few examples."""

    def __init__(self, settings: Settings, decision: Decision):
        self.settings, self.decision = settings, decision
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[dict]] = defaultdict(list)

    def watch(
        self, number: int, part: str, line: dict, reason: str, detail: str, pictures: list[int]
    ) -> None:
        """See dataset.clean_write.write_set."""
        if part == "rejected":
            self.reasons[reason] += 1
        heading = reason or ("goes to validation" if part == "val" else "stays")
        if len(self.examples[heading]) < EXAMPLES:
            repeats = [
                int(self.decision.repeats[p]) for p in pictures if self.decision.repeats[p] >= 0
            ]
            places = [
                tuple(map(int, self.decision.pictures.places[picture]))
                for picture in pictures + repeats
            ]
            example = {"row": number + 1, "detail": detail, "places": places}
            self.examples[heading].append(
                example | {"turns": line["row"]["conversations"] if "row" in line else []}
            )

    def summarise(self, counts: dict[str, int]) -> dict:
        """What report.json holds. ValueError unless every row went to just one place."""
        decision, settings = self.decision, self.settings
        n_read = len(decision.part)
        if sum(counts.values()) != n_read or counts["rejected"] != sum(self.reasons.values()):
            raise ValueError(f"{n_read} rows were read but {counts} written: please report this")
        good = decision.images["reason"] == "" if len(decision.pictures.ids) else np.zeros(0, bool)
        return {
            "settings": settings.describe(),
            "rows": {"read": n_read, **counts},
            "reasons": dict(self.reasons.most_common()),
            "repairs": dict(count_repairs(settings.work).most_common()),
            "pictures": {
                "different": len(decision.pictures.ids),
                "unusable": int((~good).sum()),
                "copies_of_another": int((decision.repeats >= 0).sum()),
            },
        }

    def write(self, summary: dict) -> None:
        """report.json and report.html in the output folder."""
        out = Path(self.settings.out)
        (out / "report.json").write_text(
            json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8"
        )
        (out / "report.html").write_text(
            self._page(summary), encoding="utf-8", errors="backslashreplace"
        )

    def _page(self, summary: dict) -> str:
        rows = summary["rows"]
        decision = self.decision
        lengths = decision.rows["length"]
        parts = [
            f"<h1>Cleaning of {escape(self.settings.data)}</h1>",
            f"<p>{rows['read']:,} rows were read: <b>{rows['train']:,} stay</b> for training, {rows['val']:,} for validation, "
            f"{rows['rejected']:,} were rejected and are kept in <code>rejects</code> with the reason.</p>",
            "<h2>Why rows were rejected</h2>", table(summary["reasons"], rows["read"]),
            "<h2>What was repaired</h2>", table(summary["repairs"], rows["read"]),
            "<h2>Pictures</h2>", table({name.replace("_", " "): n for name, n in summary["pictures"].items()}, None),
            "<h2>Length of answers</h2>",
            histogram(lengths[decision.part < 2], "characters of a row's answers, rows that stay"),
        ]  # fmt: skip
        if len(decision.pictures.ids):
            size = decision.images["size"][decision.images["reason"] == ""]
            parts += [
                "<h2>Size of the pictures as they came</h2>",
                histogram(size.min(axis=1, initial=2**31 - 1), "pixels of the shorter side"),
            ]
        parts.append("<h2>Examples</h2>")
        for heading in [*summary["reasons"], "stays", "goes to validation"]:
            if self.examples[heading]:
                parts += [
                    f"<h3>{escape(heading)}</h3>",
                    *map(self._example, self.examples[heading]),
                ]
        title = f"<title>Cleaning of {escape(Path(self.settings.data).name)}</title>"
        head = f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{STYLE}</style>'
        return f"{head}{''.join(parts)}</html>\n"

    def _example(self, example: dict) -> str:
        pictures = "".join(map(self._picture, example["places"][:6]))
        text = "<br>".join(
            f"<b>{escape(turn['role'])}</b> {escape(turn['content'][:300])}"
            for turn in example["turns"][:6]
        )
        where = f"row {example['row']}" + (
            f": {escape(example['detail'][:300])}" if example["detail"] else ""
        )
        return f'<div class="example">{pictures}<p>{text}<br><span class="quiet">{where}</span></p></div>'

    def _picture(self, place: tuple[int, int]) -> str:
        """A thumbnail of a picture as it came; nothing where it cannot be read."""
        source = open_source(self.settings.data, self.settings.images)
        keys = np.load(self.settings.work / "keys.npy", mmap_mode="r")
        try:
            image = load_image(source.images(source.read(int(keys[place[0]])))[place[1]])
        except BadSampleError:
            return ""
        image.thumbnail((2 * THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def table(counts: dict[str, int], total: int | None) -> str:
    """Counts with bars; with `total`, shares of it too."""
    if not counts:
        return "<p>Nothing.</p>"
    most = max(counts.values()) or 1
    rows = (
        f'<tr><td>{escape(name)}</td><td class="number">{count:,}</td>'
        + (f'<td class="number">{100 * count / total:.2f} %</td>' if total else "")
        + f'<td><span class="bar" style="width:{200 * count / most:.0f}px"></span></td></tr>'
        for name, count in counts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def histogram(values: np.ndarray, caption: str) -> str:
    if not len(values):
        return "<p>None.</p>"
    top = max(float(np.percentile(values, 99.5)), 1.0)
    counts, edges = np.histogram(values.clip(max=top), BINS, (0, top))
    bars = "".join(
        f'<div style="height:{100 * count / counts.max():.1f}%" title="{low:.0f} to {high:.0f}: {count:,}"></div>'
        for count, low, high in zip(counts, edges, edges[1:])
    )
    middle = f"{escape(caption)}, median {np.median(values):,.0f}"
    scale = f'<div class="scale"><span>0</span><span>{middle}</span><span>{top:,.0f}</span></div>'
    return f'<div class="bars">{bars}</div>{scale}'
