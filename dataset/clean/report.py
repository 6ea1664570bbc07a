"""The account of a cleaning: report.json, and report.html with examples."""

import json
from html import escape
from pathlib import Path

from PIL import Image

from common.errors import BadSampleError
from common.files import write_text
from dataset.clean.decide import REJECTED, Decision
from dataset.clean.examine import open_source
from dataset.clean.settings import Settings
from dataset.clean.write import PARTS, Written
from dataset.page import show_counts, show_histogram, show_row, write_page
from model.image import load_image


def write_report(settings: Settings, folder: Path, decision: Decision, written: Written) -> dict:
    """Write report.json and report.html; returns what the first one holds.

    Args:
        settings: of the cleaning.
        folder: gets the reports.
        decision: what became of the rows, and why.
        written: what went where. ValueError unless every row went to just one place.
    """
    # report.json
    found, n_read = decision.found, len(decision.part)
    train, val, rejected = (written.counts[part] for part in PARTS)
    if not train + val + rejected == n_read or rejected != written.reasons.total():
        raise ValueError(f"{n_read} rows were read but {written.counts} written: please report it")
    is_staying = decision.part != REJECTED
    pictures = {
        "different": len(found.pictures),
        "unusable": int((found.pictures["reason"] > 0).sum()),
        "copies_of_another": int((decision.repeats >= 0).sum()),
        "rows_of_text_only": int((is_staying & (found.rows["n_images"] == 0)).sum()),
    }
    summary = {
        "settings": settings.describe(),
        "rows": {"read": n_read, "train": train, "val": val, "rejected": rejected},
        "reasons": dict(written.reasons.most_common()),
        "repairs": dict(found.repairs.most_common()),
        "pictures": pictures,
    }
    write_text(folder / "report.json", json.dumps(summary, ensure_ascii=False, indent=1))

    # report.html
    lengths = found.rows["length"][is_staying]
    sides = found.pictures["size"][found.pictures["reason"] == 0].min(axis=1, initial=2**31 - 1)
    parts = [
        f"<p>Of {n_read:,} rows <b>{train:,} stay</b> for training and {val:,} for validation. "
        f"{rejected:,} were rejected: the files <code>rejects</code> keep them, with the reason.",
        "<h2>Why rows were rejected</h2>" + show_counts(summary["reasons"], n_read),
        "<h2>What was repaired</h2>" + show_counts(summary["repairs"], n_read),
        "<h2>Pictures</h2>"
        + show_counts({key.replace("_", " "): pictures[key] for key in pictures}),
        "<h2>Length of answers</h2>" + show_histogram(lengths, "characters, of rows that stay"),
        "<h2>Size of the pictures as they came</h2>",
        show_histogram(sides, "pixels of the shorter side"),
        "<h2>Examples</h2>",
    ]
    for heading in [*summary["reasons"], "goes to train", "goes to val"]:
        examples = [show_example(settings, decision, one) for one in written.examples[heading]]
        parts += [f"<h3>{escape(heading)}</h3>" * bool(examples), *examples]
    title = f"Cleaning of {Path(settings.data).name}"
    write_page(folder / "report.html", title, "\n".join(parts))
    return summary


def show_example(settings: Settings, decision: Decision, example: dict) -> str:
    """A row with its pictures, and the earlier ones that they repeat."""
    earlier = [one for one in decision.repeats[example["shown"]].tolist() if one >= 0]
    images = [open_picture(settings, decision, one) for one in (example["shown"] + earlier)[:6]]
    text = "".join(
        f'<p><span class="quiet">{escape(turn["role"])}</span> {escape(turn["content"][:300])}'
        for turn in example["turns"][:6]
    )
    where = f"row {example['row'] + 1}: {example['detail'][:300]}".removesuffix(": ")
    text += f'<p class="quiet">{escape(where)}'
    return show_row([image for image in images if image], text, is_small=True)


def open_picture(settings: Settings, decision: Decision, number: int) -> Image.Image | None:
    """A picture as it came; None where it cannot be read."""
    source = open_source(settings.data, settings.images)
    row, which = decision.found.places[number].tolist()
    try:
        return load_image(source.images(source.read(int(decision.found.keys[row])))[which])
    except BadSampleError:
        return None
